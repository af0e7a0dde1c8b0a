"""`suggest_settings`: the settings of a run, chosen from the sizes of its backbone and data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from ptjax.backbones.load import Backbone, check_backbone
from ptjax.data.batching import Batching
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import Tokenizer
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, check_whole, kind_of, shortened
from ptjax.methods.base import Method
from ptjax.methods.initializers import ClassLabels, SampledVocabulary
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.settings import Evaluation, RunSettings, TrainSchedule
from ptjax.trainer.sweep import MemberOverrides

_SAMPLED = 10_000
"""Examples of a split whose tokens are counted."""
_SHORT, _USUAL, _LONG = 64, 512, 1024
"""Tokens: the least length; the largest, usually; and if most inputs are longer than that."""
_MULTIPLE = 16
"""Lengths are multiples of it, like the last bucket of `make_buckets`."""
_LONGEST_LABEL = 256
"""Tokens; every label is scored for every input, so longer ones would fill the memory."""
_ROWS = 20
_BATCH = 32
_PASSES = 30
_FEWEST_STEPS, _MOST_STEPS = 500, 30_000
_EVALUATIONS = 20
_LEAST_PERIOD = 20
_LEAST_PATIENCE = 5


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Settings, and in five lines what was chosen and why."""

    settings: RunSettings
    reasons: tuple[str, ...]


def suggest_settings(
    backbone: Backbone, task: Task, method: Method | None = None, *, steps: int | None = None
) -> RunSettings:
    """Suggests the settings of a run from its backbone, its data and its method.

    `tune` uses them, for a prompt, if it gets none. What was chosen is logged, and why. Equal data
    give equal settings, so a run resumes. The rules:

    - Learning rate: 0.03 of the embedding's RMS, which on T5 1.1 (RMS 10) is the paper's 0.3. It
      fits other backbones too; 0.3 would not (`Adafactor`). Other methods than prompts have the
      rates of their gin files (`Method.suggested_optimizer`).
    - Lengths: the 99th percentile of the inputs, rounded up to a multiple of 16, but at least 64
      and at most 512 (1,024 if most inputs are longer than 512: T5 was pre-trained on 512, mT5 and
      ByT5 on 1,024). A few long texts would make the largest batches slow and take memory; below 64
      it costs nothing, since a batch is as long as its own examples, and leaves room for texts that
      are yet to come. Targets: the longest label, exactly. Open text as the inputs, without room.
    - Prompt: 20 rows, since the paper finds that more gain little (section 3.2) and every row costs
      as much time as a token of the input; at least one row per label. Labels initialise their
      rows, sampled vocabulary the others: the best in the paper, except for the largest T5.
    - Batch: 32, the paper's; fewer for fewer than 64 examples, so that an epoch has two batches.
    - Steps: 30 passes over the examples, 500 at least, since a prompt needs some hundred steps
      however few examples there are (ptjax-nano, 800 sentences, mean of seeds 0-2: validation
      accuracy 0.69 after 50 and 100 steps, 0.715 after 150), and the paper's 30,000 at most.
    - Evaluation: 20 times in the run, but at most every 20 steps: the best of many noisy scores is
      often a lucky one. Less often if the validation split is so large that evaluating would take
      more than a quarter of the time. The run ends early after half of its
      evaluations without a better one; sooner would end runs that stay at chance for a while, as
      prompts do.

    Args:
        method: what is trained, such as `LoRA()`; it is used as it is. None chooses a prompt.
        steps: the number of steps, if it is already known. How often the run evaluates suits it,
            as it would not if `tune` replaced the number later.

    Raises:
        InputError: `steps` is not a positive whole number, the backbone has no tokenizer, the data
            cannot be used, or a label is so long that it must be open text.
    """
    check_whole("suggest_settings", steps=steps)
    check_backbone(backbone)
    if method is not None and (isinstance(method, type) or not isinstance(method, Method)):
        raise InputError(f"suggest_settings needs a ptjax.Method, got {kind_of(method)}")
    if not isinstance(task, Task):
        raise InputError(f"suggest_settings needs a ptjax.Task, got {kind_of(task)}")
    return _logged(suggest(backbone, [task], steps, method))


def resolve_settings(
    settings: RunSettings | None,
    backbone: Backbone,
    task: Task,
    members: Mapping[str, MemberOverrides],
    steps: int | None,
) -> RunSettings:
    """Returns `settings` or, if None, suggested ones, which are logged; both with `steps`.

    Args:
        members: of a sweep; the suggestion suits the tasks of all of them.
        steps: replaces `settings.schedule.train_steps`; None does not.
    """
    check_whole("tune", steps=steps)
    if settings is None:
        tasks = [member.task or task for member in members.values()] or [task]
        return _logged(suggest(backbone, tasks, steps))
    if steps is None:
        return settings
    schedule = dataclasses.replace(settings.schedule, train_steps=steps)
    return dataclasses.replace(settings, schedule=schedule)


def _logged(suggestion: Suggestion) -> RunSettings:
    """The settings, once their reasons are logged."""
    for reason in suggestion.reasons:
        logging.info("suggested: %s", reason)
    return suggestion.settings


def suggest(
    backbone: Backbone,
    tasks: Sequence[Task],
    steps: int | None = None,
    method: Method | None = None,
) -> Suggestion:
    """Suggests settings that suit all of `tasks`, by the rules of `suggest_settings`.

    Args:
        tasks: the task of the run; in a sweep the tasks of all members.
        steps: the number of steps, if it is already known. Only the schedule depends on it.
        method: what is trained; None chooses a prompt.
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise missing_tokenizer(backbone.name, backbone.config.vocab_size)
    counts: list[_Counts] = []
    for number, task in enumerate(tasks):
        if not any(task is earlier for earlier in tasks[:number]):
            counts.append(_Counts.of(task, tokenizer))
    labels = max(len(task.labels or ()) for task in tasks)
    asked = method is not None
    if method is None:
        of_one = ClassLabels() if labels else SampledVocabulary()
        # With several tasks, None: as each of them needs.
        initializer = of_one if len(counts) == 1 else None
        method = PromptTuning(length=max(_ROWS, labels), initializer=initializer)
    train = max(count.train for count in counts)
    batch = batch_size(train)
    validation = max(count.validation for count in counts)
    settings = RunSettings(
        method=method,
        optimizer=method.suggested_optimizer(),
        schedule=make_schedule(train, validation, batch, steps),
        batching=Batching(
            batch_size=batch,
            feature_lengths={
                "inputs": max(_length(count.inputs) for count in counts),
                "targets": max(
                    max([count.label, *map(_target_length, count.open_targets)]) for count in counts
                ),
            },
        ),
    )
    rate, what = _method_reasons(method, labels, asked)
    lengths, *rest = _reasons(settings, counts, labels, train, steps)
    return Suggestion(settings, (rate, lengths, what, *rest))


@dataclasses.dataclass(frozen=True)
class _Counts:
    """The sizes of a task's data.

    Attributes:
        train, validation: the numbers of examples.
        inputs: the number of tokens of inputs of either split, EOS included: int [n].
        open_targets: the same of targets, in a list of one array; [] if the labels are known.
        label: the number of tokens of the longest label; 0 if the task has none.
    """

    train: int
    validation: int
    inputs: np.ndarray
    open_targets: list[np.ndarray]
    label: int

    @classmethod
    def of(cls, task: Task, tokenizer: Tokenizer) -> _Counts:
        """Loads the data of a task and counts the tokens of at most `_SAMPLED` of each split."""
        train, validation = (task.load(split) for split in ("train", Evaluation().split))
        sampled = [*train.limited(_SAMPLED), *validation.limited(_SAMPLED)]

        def count(texts: Sequence[str]) -> np.ndarray:
            added = len(tokenizer.prefix) + 1  # EOS
            return np.array([len(ids) + added for ids in tokenizer.encode_batch(texts)])

        labels = [] if task.labels is None else count(task.labels)
        if max(labels, default=0) > _LONGEST_LABEL:
            label = (task.labels or ())[int(np.argmax(labels))]
            raise task.error(
                f"the label '{shortened(label)}' has {max(labels):,} tokens; give a verbalizer "
                "with short texts or, for open text, targets instead of a label"
            )
        open_targets = [count([e.targets for e in sampled])] if task.labels is None else []
        inputs = count([example.inputs for example in sampled])
        return cls(len(train), len(validation), inputs, open_targets, int(max(labels, default=0)))


def _length(tokens: np.ndarray) -> int:
    """The length for texts of these numbers of tokens."""
    most = _LONG if np.median(tokens) > _USUAL else _USUAL
    return min(max(_SHORT, _rounded(np.percentile(tokens, 99))), most)


def _target_length(tokens: np.ndarray) -> int:
    """As `_length`, but no longer than the longest: generation may run to the end of it."""
    return min(_length(tokens), _rounded(tokens.max()))


def _rounded(tokens: float) -> int:
    return math.ceil(tokens / _MULTIPLE) * _MULTIPLE


def batch_size(train: int) -> int:
    """The batch size for this number of training examples: a power of two, 8 to 32."""
    return min(_BATCH, max(8, 2 ** int(math.log2(max(train / 2, 1)))))


def make_schedule(train: int, validation: int, batch: int, steps: int | None) -> TrainSchedule:
    """The schedule for these numbers of examples and this batch size.

    Args:
        steps: the number of steps, if it is already known.
    """
    if steps is None:
        passes = _PASSES * train / batch
        steps = int(min(max(math.ceil(passes / 50) * 50, _FEWEST_STEPS), _MOST_STEPS))
    # A step goes forward and backward, an evaluation forward only: half of a step's time per batch.
    often = max(steps / _EVALUATIONS, _LEAST_PERIOD, 1.5 * validation / batch)
    period = min(_round_number(often), steps)
    half = math.ceil(steps / period / 2)
    return TrainSchedule(
        train_steps=steps,
        eval_period=period,
        log_period=min(max(1, period // 2), TrainSchedule().log_period),
        patience=max(_LEAST_PATIENCE, half),
    )


def _round_number(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    power = 1
    while True:
        for number in (power, 2 * power, 5 * power):
            if number >= least:
                return number
        power *= 10


def _method_reasons(method: Method, labels: int, asked: bool) -> tuple[str, str]:
    """The lines about the learning rate and about the method."""
    optimizer = method.suggested_optimizer()
    rate = f"learning rate {optimizer.learning_rate}"
    if optimizer.learning_rate_scale == "embedding_rms":
        rate += " of the embedding's RMS: on T5 1.1 it is the paper's 0.3"
    elif optimizer.multiply_by_parameter_scale:
        rate += " of each array's own RMS"
    if asked:
        return rate, f"method {shortened(repr(method))}: as asked"
    assert isinstance(method, PromptTuning)
    named = f"the first {labels} from the labels" if labels else "all from sampled vocabulary"
    return rate, f"a prompt of {method.length} rows, {named}: more rows gain little and cost time"


def _reasons(
    settings: RunSettings, counts: Sequence[_Counts], labels: int, train: int, steps: int | None
) -> tuple[str, ...]:
    schedule, batching = settings.schedule, settings.batching
    lengths = batching.lengths
    inputs = np.concatenate([count.inputs for count in counts])
    cut = (inputs > lengths["inputs"]).mean()
    targets = ", no label" if labels else ""
    share = f"{cut:.1%} are" if cut else "no input is"
    passes = schedule.train_steps * batching.batch_size / train
    asked = "as asked" if steps is not None else f"{passes:.0f} passes over {train:,}"
    return (
        f"lengths {lengths['inputs']} + {lengths['targets']} tokens: 99% of the inputs have at "
        f"most {math.ceil(np.percentile(inputs, 99))}; {share} cut{targets}",
        f"{schedule.train_steps:,} steps of {batching.batch_size} examples: {asked}",
        f"evaluation every {schedule.eval_period} steps, the best is kept; ends early after "
        f"{schedule.patience} without a better one",
    )
