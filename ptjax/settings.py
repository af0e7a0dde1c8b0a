"""`RunSettings`: every setting of a run except backbone, task and folder.

The defaults are those of the prompt tuning paper (Lester et al. 2021).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from ptjax.data.batching import Batching
from ptjax.data.hard_prompt import HardPrompt
from ptjax.errors import InputError, check_at_least, check_choice, check_whole, kind_of
from ptjax.methods.base import Method
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.training.compile import StepConfig
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

Predict = Literal["auto", "rank", "decode"]


@dataclasses.dataclass(frozen=True)
class TrainSchedule:
    """How long a run is, and when it evaluates, logs and saves.

    Attributes:
        train_steps: the number of steps of this run; the backbone's pre-training steps do not
            count.
        eval_period: the number of steps between evaluations. After each one the run also writes a
            checkpoint and an export, which is a file or folder with the prompt or model so far.
        log_period: the number of steps between rows of `metrics.jsonl`.
        patience: stop after this many evaluations without improvement; None never stops early.
        keep: the number of most recent exports to keep in addition to the best one.
    """

    train_steps: int = 30_000
    eval_period: int = 500
    log_period: int = 100
    patience: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        check_whole("TrainSchedule", **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a run evaluates: how it predicts, on how many examples, and with which baselines.

    Attributes:
        split: the split on which the best prompt is selected.
        examples: score at most this many examples per split, evenly spread over it; None: all.
        predict: "rank" compares the likelihoods of a closed set of labels, "decode" generates
            greedily; "auto" ranks if the task has a closed set.
        batch_size: the number of examples per batch.
        hard_prompts: baselines by name: texts that are added to the input instead of the tuned
            prompt. They are scored once, after training.
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


_PARTS = {
    "optimizer": Adafactor,
    "loss": Loss,
    "schedule": TrainSchedule,
    "batching": Batching,
    "evaluation": Evaluation,
}
"""The settings of `RunSettings` that are of one class, with that class."""


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Every setting of a run; `RunSettings()` is the paper's (Lester et al. 2021, appendix A).

    Attributes:
        method: what is trained: `PromptTuning`, another method such as `LoRA`, or a custom
            `Method`.
        optimizer: Adafactor with the learning rate. The default is for prompts;
            `suggest_settings` takes the one that suits the method.
        loss: the loss, with z-loss, label smoothing and class weights.
        schedule: how long the run is, and when it evaluates, logs and stops early.
        batching: batch size, and the lengths at which texts are cut.
        evaluation: how the best prompt is selected, and with what it is compared.
        seed: determines the data order, the initial prompt, dropout, and the shots of hard prompts.
    """

    method: PromptTuning | ModelTuning | Method = PromptTuning()
    optimizer: Adafactor = Adafactor()
    loss: Loss = Loss()
    schedule: TrainSchedule = TrainSchedule()
    batching: Batching = Batching()
    evaluation: Evaluation = Evaluation()
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, RANDOM_SEED=self.seed)
        for name, kind in _PARTS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise InputError(
                    f"RunSettings.{name} is {kind_of(value)}; give a ptjax.{kind.__name__}"
                )
        if isinstance(self.method, type) or not isinstance(self.method, Method):
            raise InputError(
                f"RunSettings.method = {self.method!r} is not a method; see ptjax.Method"
            )

    def step_config(self, *, sweep: bool) -> StepConfig:
        """Returns the part of these settings that determines the train step.

        Args:
            sweep: whether the step trains several members (prompts) together.
        """
        return StepConfig(self.optimizer, self.loss, self.batching.microbatches, sweep)
