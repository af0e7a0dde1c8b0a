"""Array sizes are rounded up to a few values, called capacities, to limit compilations.

Sizes that round up to the same capacity share one compiled program. So one more prompt in a bank,
other labels, more or longer texts, or more new tokens rarely need a compilation. The added rows and
positions are padding, which no result depends on.
"""

from __future__ import annotations

SHORTEST_INPUT = 16
"""The smallest capacity for input tokens."""
FEWEST_LABELS = 2
"""The smallest capacity for the labels of a set."""


def round_up(size: int, steps: int = 2) -> int:
    """Rounds a size up to the next capacity.

    From each power of 2 (included) to the next (excluded) there are `steps` equidistant capacities;
    small sizes have fewer, because capacities are integers.

    >>> [round_up(n) for n in (1, 3, 5, 9, 20, 33, 501)]
    [1, 3, 6, 12, 24, 48, 512]
    >>> [round_up(n, 1) for n in (3, 5, 20)], [round_up(n, 8) for n in (20, 100, 150)]
    ([4, 8, 32], [20, 104, 160])
    """
    step = max(1, (1 << (size - 1).bit_length()) // (2 * steps))
    return -(-size // step) * step


def bank_capacity(prompts: int, longest: int) -> tuple[int, int]:
    """Rounds up the size of a bank's arrays; returns (number of prompts, prompt length).

    Lengths are rounded in finer steps, because every position of a prompt is computed for every
    row.

    Args:
        prompts: the number of prompts.
        longest: the length of the longest prompt.
    """
    return round_up(prompts), round_up(longest, 8)


def label_capacity(labels: int, longest: int) -> tuple[int, int]:
    """Rounds up the size of a label set; returns (number of labels, tokens per label).

    Args:
        labels: the number of labels.
        longest: the number of tokens of the longest label.
    """
    return max(FEWEST_LABELS, round_up(labels, 1)), max(2, round_up(longest, 1))


def batch_rows(batch_size: int, examples: int, divisor: int) -> int:
    """Returns the number of rows of a batch, padding included.

    Takes the smaller of `batch_size` and `examples`, each rounded up to a capacity. Divides it over
    the devices, and rounds each device's share up to a capacity.

    Args:
        batch_size: the number of examples that a batch should hold.
        examples: the number of examples in total.
        divisor: the number of devices that share the rows; the result is a multiple of it.
    """
    rows = min(round_up(batch_size), round_up(examples, 1))
    return divisor * round_up(-(-rows // divisor))


def input_lengths(longest: int) -> list[int]:
    """Returns the input lengths to compile for, in tokens, ascending.

    They double from `SHORTEST_INPUT`. The last is `longest` rounded up by `round_up`, but not less
    than `SHORTEST_INPUT`.
    """
    lengths = [SHORTEST_INPUT]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    lengths[-1] = min(lengths[-1], max(SHORTEST_INPUT, round_up(longest)))
    return lengths
