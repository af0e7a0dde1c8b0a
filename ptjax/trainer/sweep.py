"""Sweeps: many prompts trained in one job over one frozen backbone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptjax.data.tasks import Task
from ptjax.errors import InputError, check_at_least
from ptjax.methods.base import Method
from ptjax.methods.initializers import Initializer
from ptjax.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class MemberOverrides:
    """What one member of a sweep has of its own; None is what the run has.

    Attributes:
        seed: of its data order, its initialisation and its dropout.
        learning_rate: a number, in the run's scale.
    """

    seed: int | None = None
    learning_rate: float | None = None
    initializer: Initializer | None = None
    task: Task | None = None

    def __post_init__(self) -> None:
        check_at_least(0, "MemberOverrides", seed=self.seed, learning_rate=self.learning_rate)

    def apply(self, settings: RunSettings) -> RunSettings:
        """The member's settings, of those of the run."""
        method, optimizer, seed = settings.method, settings.optimizer, settings.seed
        if self.initializer is not None:
            method = _with_initializer(method, self.initializer)
        if self.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=self.learning_rate)
        if self.seed is not None:
            seed = self.seed
        return dataclasses.replace(settings, method=method, optimizer=optimizer, seed=seed)


def _with_initializer(method: Any, initializer: Initializer) -> Method:
    """InputError if the method takes no initialiser."""
    if not hasattr(method, "initializer"):
        raise InputError(
            f"MemberOverrides.initializer: {type(method).__name__} takes no initialiser; leave it "
            "out"
        )
    return dataclasses.replace(method, initializer=initializer)


def sweep(
    seeds: Sequence[int] = (),
    learning_rates: Sequence[float] = (),
    initializers: Mapping[str, Initializer] | None = None,
    tasks: Sequence[Task] = (),
) -> dict[str, MemberOverrides]:
    """Every combination of what is given, named by it: "sst2_seed1_rate0.3".

    Raises:
        InputError: nothing is given, or something twice.
    """
    choices = {
        "task": {task.name: task for task in tasks},
        "initializer": dict(initializers or {}),
        "seed": {f"seed{seed}": seed for seed in seeds},
        "learning_rate": {f"rate{rate:g}": rate for rate in learning_rates},
    }
    given = {field: found for field, found in choices.items() if found}
    if not given:
        raise InputError(
            "sweep has nothing to combine; set seeds, learning_rates, initializers or tasks"
        )
    values = {"task": tasks, "seed": seeds, "learning_rate": learning_rates}
    for field, several in values.items():
        if len(several) > len(choices[field]):
            names = [getattr(value, "name", value) for value in several]
            raise InputError(f"sweep.{field}s has a value twice ({names}); give each once")
    return {
        "_".join(names): MemberOverrides(
            **{f: given[f][n] for f, n in zip(given, names, strict=True)}
        )
        for names in itertools.product(*given.values())
    }


def check_members(members: Mapping[str, MemberOverrides], settings: RunSettings) -> None:
    """InputError unless the method can be swept, and every name can be a folder's."""
    if members and not settings.method.supports_sweep:
        raise InputError(
            "every member of a sweep has a prompt, or what else trains, of its own; "
            f"{type(settings.method).__name__} supports no sweep"
        )
    for name in members:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
            raise InputError(f"a member is called {name!r}; use letters, digits, _ . + -")
