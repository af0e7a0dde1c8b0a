"""Array sizes are rounded up to a few capacities, so that jit compiles each program once.

All sizes up to a capacity run the program that was compiled for it: one prompt more in a bank,
another set of labels, another number or length of texts, another number of new tokens. The added
rows and positions are padding, which no result depends on.
"""

from __future__ import annotations

SHORTEST_INPUT = 32
"""The smallest capacity for input tokens."""
FEWEST_LABELS = 4
"""The smallest capacity for the labels of a set."""


def round_up(size: int, steps: int = 2) -> int:
    """Rounds a size up to the next capacity; there are `steps` capacities in each doubling.

    >>> [round_up(n) for n in (1, 3, 5, 9, 20, 33, 501)]
    [1, 3, 6, 12, 24, 48, 512]
    >>> [round_up(n, 1) for n in (3, 5, 20)], [round_up(n, 8) for n in (20, 100, 150)]
    ([4, 8, 32], [20, 104, 160])
    """
    step = max(1, (1 << (size - 1).bit_length()) // (2 * steps))
    return -(-size // step) * step


def bank_capacity(prompts: int, longest: int) -> tuple[int, int]:
    """Returns the capacities of a bank's arrays: for the number of prompts and for their length.

    Lengths have finer steps, because every position of a prompt is computed for every row.
    """
    return round_up(prompts), round_up(longest, 8)


def label_capacity(labels: int, longest: int) -> tuple[int, int]:
    """Returns the capacities of a label set: for the number of labels and for their length."""
    return max(FEWEST_LABELS, round_up(labels, 1)), max(2, round_up(longest, 1))


def batch_rows(batch_size: int, examples: int, divisor: int) -> int:
    """Returns the number of rows of a batch, a multiple of `divisor`.

    It is a capacity for `batch_size` or, if there are fewer, for the number of examples.
    """
    rows = min(round_up(batch_size), round_up(examples, 1))
    return divisor * round_up(-(-rows // divisor))


def input_lengths(longest: int) -> list[int]:
    """Returns input lengths that double from `SHORTEST_INPUT` up to one that holds `longest`."""
    lengths = [SHORTEST_INPUT]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    lengths[-1] = min(lengths[-1], max(SHORTEST_INPUT, round_up(longest)))
    return lengths
