"""`RunSettings`: every setting of a run but what it works on. The defaults are the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from ptjax.data.batching import Batching
from ptjax.data.hard_prompt import HardPrompt
from ptjax.errors import InputError, check_at_least, check_choice
from ptjax.methods.base import Method
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.training.compile import Recipe
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

Predict = Literal["auto", "rank", "decode"]


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
        method: what trains: ptjax's own methods, which messages name, or any other.
        seed: of the data order, the initial prompt, dropout, and the shots of hard prompts.
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
        if isinstance(self.method, type) or not isinstance(self.method, Method):
            raise InputError(
                f"RunSettings.method = {self.method!r}: no method; ptjax.Method says what one has"
            )

    def recipe(self, *, bank: bool) -> Recipe:
        """What these settings make of the train step, of a `bank` of prompts or of one."""
        return Recipe(self.optimizer, self.loss, self.batching.microbatches, bank)
