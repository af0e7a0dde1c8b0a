"""Sweeps: many prompts (the members), trained in one job on one frozen backbone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from ptjax.data.tasks import Task
from ptjax.errors import InputError, check_at_least, kind_of
from ptjax.methods.base import Method
from ptjax.methods.initializers import Initializer
from ptjax.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class MemberOverrides:
    """What one member of a sweep uses instead of the run's settings; None keeps the run's.

    Attributes:
        seed: determines the member's data order, initial prompt and dropout.
        learning_rate: replaces `Adafactor.learning_rate`. The run's `learning_rate_scale` applies
            to it too.
        initializer: replaces the initialiser of the run's method.
        task: replaces the task of the run.
    """

    seed: int | None = None
    learning_rate: float | None = None
    initializer: Initializer | None = None
    task: Task | None = None

    def __post_init__(self) -> None:
        check_at_least(0, "MemberOverrides", seed=self.seed, learning_rate=self.learning_rate)

    def apply(self, settings: RunSettings) -> RunSettings:
        """Returns the run's `settings` with these overrides.

        Ignores `task`, since `RunSettings` has no task.

        Raises:
            InputError: `initializer` is set, and the method has no initialiser.
        """
        method, optimizer, seed = settings.method, settings.optimizer, settings.seed
        if self.initializer is not None:
            method = _with_initializer(method, self.initializer)
        if self.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=self.learning_rate)
        if self.seed is not None:
            seed = self.seed
        return dataclasses.replace(settings, method=method, optimizer=optimizer, seed=seed)


def _with_initializer(method: Method, initializer: Initializer) -> Method:
    """The method with another initialiser; InputError if it has none."""
    if not (dataclasses.is_dataclass(method) and hasattr(method, "initializer")):
        raise InputError(
            f"MemberOverrides.initializer: {type(method).__name__} has no initialiser; leave it out"
        )
    changes: dict[str, object] = {"initializer": initializer}
    return dataclasses.replace(method, **changes)


def sweep(
    seeds: Sequence[int] = (),
    learning_rates: Sequence[float] = (),
    initializers: Mapping[str, Initializer] | None = None,
    tasks: Sequence[Task] = (),
) -> dict[str, MemberOverrides]:
    """Makes one member per combination of the arguments, for `ptjax.tune(members=...)`.

    A member is named after its combination, such as "sst2_seed1_rate0.3". If an argument is empty,
    all members keep the run's value.

    Args:
        initializers: the initialisers by name; the names become part of the members' names.

    Raises:
        InputError: every argument is empty, or one contains the same value twice.
    """
    choices = {
        "task": {task.name: task for task in tasks},
        "initializer": dict(initializers or {}),
        "seed": {f"seed{seed}": seed for seed in seeds},
        "learning_rate": {f"rate{rate:g}": rate for rate in learning_rates},
    }
    given = {field: values for field, values in choices.items() if values}
    if not given:
        raise InputError(
            "sweep has nothing to combine; set seeds, learning_rates, initializers or tasks"
        )
    values = {"task": tasks, "seed": seeds, "learning_rate": learning_rates}
    for field, several in values.items():
        if len(several) > len(choices[field]):
            names = [getattr(value, "name", value) for value in several]
            raise InputError(f"sweep.{field}s has a value twice ({names}); list each value once")
    return {
        "_".join(names): MemberOverrides(
            **{f: given[f][n] for f, n in zip(given, names, strict=True)}
        )
        for names in itertools.product(*given.values())
    }


def check_members(members: Mapping[str, MemberOverrides], settings: RunSettings) -> None:
    """Raises InputError if the method does not support sweeps, or a member cannot be used.

    Args:
        members: the overrides of each member by name; empty if the run is not a sweep.
    """
    if members and not settings.method.supports_sweep:
        raise InputError(
            f"{type(settings.method).__name__} does not support sweeps, whose members each train "
            "variables of their own; remove tune.members, or use PromptTuning"
        )
    for name, member in members.items():
        if not isinstance(member, MemberOverrides):
            raise InputError(f"member {name!r} is {kind_of(member)}; give ptjax.MemberOverrides")
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name)):
            raise InputError(f"invalid name of a member: {name!r}; use letters, digits, _ . + -")
