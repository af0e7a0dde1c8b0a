"""Changes a network's linear maps from outside, and finds those that a setting names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax

from ptjax.errors import InputError, listing, near
from ptjax.models.config import T5Config
from ptjax.models.family import ApplyFn, Config
from ptjax.models.interception import change_modules
from ptjax.models.layers import Dense
from ptjax.models.stacking import split_path
from ptjax.models.t5_family import T5_FAMILY
from ptjax.trees import Tree, flatten_paths

DenseFn = Callable[[jax.Array], jax.Array]
KeyFn = Callable[[], jax.Array]

_KERNEL = "/kernel"
_PEFT_NAMES = {"q": "query", "k": "key", "v": "value", "o": "out"}


@runtime_checkable
class DenseChange(Protocol):
    """A method that changes linear maps.

    Attributes:
        collection: the Flax collection of its arrays.
    """

    collection: ClassVar[str]

    def change(
        self,
        dense: DenseFn,
        x: jax.Array,
        arrays: Mapping[str, jax.Array],
        dropout_key: KeyFn | None,
    ) -> jax.Array:
        """Returns what a linear map returns instead of `dense(x)`.

        Args:
            arrays: the method's arrays for this map, by name.
            dropout_key: makes a random key in training; None otherwise.
        """
        ...


def change_dense(apply_fn: ApplyFn, method: DenseChange) -> ApplyFn:
    """Returns the network `apply_fn` with `method` around every `Dense` that has arrays for it."""

    def change(
        module: Dense, call: DenseFn, x: jax.Array, arrays: Mapping[str, jax.Array], train: bool
    ) -> jax.Array:
        key = functools.partial(module.make_rng, "dropout") if train else None
        return method.change(call, x, arrays, key)

    return change_modules(apply_fn, Dense, method.collection, change)


def dense_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape [in, out] of each linear map's kernel, by the path of its module.

    In stacked layers it is [layers, in, out].

    Raises:
        InputError: the network is not ptjax's own T5.
    """
    if not isinstance(config, T5Config):
        raise InputError(
            "LoRA and IA3 change the linear maps of ptjax's own T5, which this network is not; "
            "use ptjax.PromptTuning or ptjax.ModelTuning"
        )
    shapes = flatten_paths(T5_FAMILY.parameter_shapes(config))
    return {
        path.removesuffix(_KERNEL): leaf.shape
        for path, leaf in shapes.items()
        if path.endswith(_KERNEL)
    }


def chosen_dense(config: Config, **targets: Sequence[str]) -> dict[str, list[str]]:
    """Finds the linear maps that each setting chooses, as the paths of their modules.

    A target is the end of a path, or a regular expression for it, in stacked layers, because it
    holds for all layers alike: "query", "self_attention/value", "encoder/.*/wo".

    Args:
        targets: the targets of each setting, by its name for messages.

    Raises:
        InputError: a target matches no linear map.
    """
    # A name of stacked layers -> the modules of that name.
    modules: dict[str, list[str]] = {}
    for path in dense_shapes(config):
        modules.setdefault(split_path(path)[0], []).append(path)
    chosen: dict[str, list[str]] = {}
    for setting, patterns in targets.items():
        found: dict[str, None] = {}  # in the order of `patterns`, without repetitions
        for pattern in patterns:
            matched = [name for name in modules if re.fullmatch(f"(.*/)?({pattern})", name)]
            if not matched:
                raise InputError(
                    f"{setting}: {pattern!r} matches no linear map{_help(pattern, modules)}"
                )
            found |= dict.fromkeys(path for name in matched for path in modules[name])
        chosen[setting] = list(found)
    return chosen


def _help(pattern: str, modules: Mapping[str, Tree]) -> str:
    """What to write in place of a target that matches nothing."""
    if pattern in _PEFT_NAMES:
        return f"; ptjax has T5X's names, where it is {_PEFT_NAMES[pattern]!r}"
    if split_path(f"{pattern}/")[1] is not None:
        return "; a target is for all layers alike: write encoder/layers/... without a number"
    names = dict.fromkeys(name.rpartition("/")[2] for name in modules)
    return near(pattern, names) or f"; there are {listing(modules)}"


def check_targets(of: str, **targets: Sequence[str]) -> None:
    """Raises InputError unless each setting is a sequence of regular expressions, and one has any.

    Args:
        of: the class that the settings are fields of, for the message.
        targets: the value of each setting, by its name.
    """
    for setting, patterns in targets.items():
        if isinstance(patterns, str) or not (
            isinstance(patterns, Sequence) and all(isinstance(each, str) for each in patterns)
        ):
            raise InputError(
                f"{of}.{setting} must be a list of names, such as ['query'], got {patterns!r}"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"{of}.{setting}: {pattern!r} is not a regular expression ({error})"
                ) from error
    if not any(targets.values()):
        raise InputError(f"{of}.{' and '.join(targets)} name nothing to train; such as ['query']")
