"""`RunSettings`: every setting of a run but what it works on. The defaults are the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

from ptjax.baselines import HardPrompt
from ptjax.data.pipeline import Bucket
from ptjax.errors import InputError, check_at_least, check_choice, gin_flag
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

Predict = Literal["auto", "rank", "decode"]
Method = PromptTuning | ModelTuning

FEATURE_LENGTHS: Mapping[str, int] = MappingProxyType({"inputs": 512, "targets": 16})
"""Tokens of the inputs and targets, EOS included, where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class TrainSchedule:
    """How long a run is, and when it evaluates, logs and saves.

    Attributes:
        train_steps: of this run; the backbone's own pre-training steps do not count.
        eval_period: steps between evaluations, each of which exports and checkpoints.
        log_period: steps between lines of `metrics.jsonl`.
        patience: stop after this many evaluations without a gain; None never stops early.
        keep: exported prompts that stay beside the best one, the last ones.
    """

    train_steps: int = 30_000
    eval_period: int = 500
    log_period: int = 100
    patience: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        check_at_least(1, "TrainSchedule", **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples become batches.

    Attributes:
        batch_size: examples a step.
        microbatches: parts of a batch that are computed one after the other.
        feature_lengths: T5X's {"inputs": T, "targets": L}, EOS included; longer ones are cut,
            counted and reported. What it leaves out is as in `FEATURE_LENGTHS`.
        buckets: batch shapes (T, L); None takes input lengths that double from 32.
        pack: short examples share rows instead; a batch holds as many examples as before.
        row_length: T of such rows, with the prompt's places where it attends to its input; None
            chooses.
    """

    batch_size: int = 32
    microbatches: int = 1
    feature_lengths: Mapping[str, int] | None = None
    buckets: Sequence[Bucket] | None = None
    pack: bool = False
    row_length: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, BATCH_SIZE=self.batch_size, MICROBATCHES=self.microbatches)
        check_at_least(1, "Batching", row_length=self.row_length)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"BATCH_SIZE = {self.batch_size} is no multiple of {self.microbatches} MICROBATCHES"
            )
        if unknown := sorted(set(self.feature_lengths or {}) - set(FEATURE_LENGTHS)):
            raise InputError(f"TASK_FEATURE_LENGTHS has {unknown[0]!r}, not 'inputs' or 'targets'")

    @property
    def lengths(self) -> dict[str, int]:
        """{"inputs": T, "targets": L}."""
        return {**FEATURE_LENGTHS, **(self.feature_lengths or {})}

    def identity(self) -> dict[str, Any]:
        """Lengths that are left out and lengths that are given alike are the same setting."""
        return {"feature_lengths": self.lengths}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How predictions are made, how many, and what they are compared with.

    Attributes:
        split: what selects the best prompt.
        examples: cap per split, evenly spread over it; None is all. Said in the output.
        predict: "rank" compares the likelihoods of a closed set of labels, "decode" generates
            greedily; "auto" ranks where the set is closed.
        batch_size: examples at once.
        hard_prompts: by name, texts that the backbone is given instead of the tuned prompt, scored
            once, when the run is over.
    """

    split: str = "validation"
    examples: int | None = None
    predict: Predict = "auto"
    batch_size: int = 64
    hard_prompts: Mapping[str, HardPrompt] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(get_args(Predict), "Evaluation", predict=self.predict)
        check_at_least(1, EVAL_EXAMPLES=self.examples)
        check_at_least(1, "Evaluation", batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Every setting of a run; `RunSettings()` is the paper's (Lester et al. 2021, appendix A).

    Attributes:
        method: what trains.
        seed: of the data order, the initial prompt, dropout, and the shots of hard prompts.
    """

    method: Method = PromptTuning()
    optimizer: Adafactor = Adafactor()
    loss: Loss = Loss()
    schedule: TrainSchedule = TrainSchedule()
    batching: Batching = Batching()
    evaluation: Evaluation = Evaluation()
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, RANDOM_SEED=self.seed)

    @property
    def attends_to_input(self) -> bool:
        """Whether prompt positions see the text; without a prompt both kinds are one."""
        return not isinstance(self.method, PromptTuning) or self.method.attends_to_input

    def check(self, quantize: str | None) -> None:
        """Refuses what does not fit the backbone's weights, before they are read.

        Args:
            quantize: of the backbone.

        Raises:
            InputError: the method would train int8 kernels.
        """
        if isinstance(self.method, ModelTuning) and quantize:
            needed = gin_flag("QUANTIZE", None)
            raise InputError(f"int8 kernels do not train: set {needed} for model tuning")
