"""Banks of named prompts, from which each example of a batch chooses one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ptjax.data.hard_prompt import HardPrompt
from ptjax.errors import InputError, listing, near
from ptjax.files import JsonObject, PathLike
from ptjax.inference.capacity import bank_capacity
from ptjax.interop.prompt_file import NO_PROMPT, PromptFile, load_prompt
from ptjax.methods.adapter import Adapter
from ptjax.models.prompt import NO_PROMPT_ID, Bank, stack_prompts
from ptjax.sharding.arrays import replicated

PromptIds = Sequence[str | int | None] | Int[np.ndarray, " B"] | None
"""Each example's prompt, by name or number; None, "none" and -1 mean the backbone alone."""


@runtime_checkable
class HasPrompt(Protocol):
    """An object that holds a prompt; it may also have `metadata`, like a `PromptFile`."""

    @property
    def prompt(self) -> np.ndarray | Array: ...


SinglePrompt = PromptFile | HasPrompt | PathLike | np.ndarray | Array
"""A prompt as callers may pass it."""


class BarePrompt(PromptFile):
    """A prompt that was passed as an array: without metadata, so only its width can be checked."""


def wrap_prompt(prompt: SinglePrompt) -> PromptFile:
    """Converts a prompt in any form to a `PromptFile`. A string or path goes to `load_prompt`.

    Raises:
        InputError: `load_prompt` refuses the path, or the prompt has another form.
    """
    if isinstance(prompt, PromptFile):
        return prompt
    if isinstance(prompt, str | os.PathLike):
        return load_prompt(prompt)
    if not isinstance(prompt, HasPrompt):
        if not hasattr(prompt, "ndim"):
            raise _not_a_prompt(prompt)
        return BarePrompt(prompt, {})
    if not hasattr(prompt.prompt, "ndim"):  # a `Run`, whose prompt is a `PromptFile`
        raise _not_a_prompt(prompt, "; pass its .prompt")
    metadata = getattr(prompt, "metadata", None)
    if metadata is None:
        return BarePrompt(prompt.prompt, {"sees_input": getattr(prompt, "attends_to_input", True)})
    return PromptFile(prompt.prompt, metadata, getattr(prompt, "states", None))


def _alone(adapter: Adapter) -> str:
    return f"{adapter.method.name} changes the network for all rows of a batch, so it runs alone"


def _not_a_prompt(prompt: object, advice: str = "") -> InputError:
    name = type(prompt).__name__
    if isinstance(prompt, Adapter):
        advice = f"; {_alone(prompt)}"
    if isinstance(prompt, Mapping):
        advice = "; make a bank of several prompts with ptjax.make_bank"
    elif isinstance(prompt, HardPrompt):
        advice = "; ptjax.evaluate scores it"
    return InputError(
        f"a {name} is not a prompt: give an array [P, D], the result of load_prompt, a path or "
        f"name that load_prompt takes, or a bank{advice}"
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PromptBank:
    """Named prompts, from which each example of a batch chooses one; `make_bank` makes it.

    Attributes:
        names: the names of the N prompts; a prompt's number is its index.
        arrays: the stacked prompts. `place_bank` may add more as padding, with numbers from N on.
        metadata: the metadata of each prompt; None for a prompt that was passed as an array.
    """

    names: tuple[str, ...]
    arrays: Bank
    metadata: tuple[JsonObject | None, ...]

    def __repr__(self) -> str:
        return f"<PromptBank of {len(self.names)}: {listing(self.names)}>"

    def id_of(self, prompt: str | int | None) -> int:
        """Returns the number of a prompt given by name or number.

        None, "none" and -1 mean the backbone alone and return -1.

        Raises:
            InputError: the bank has no such prompt.
        """
        if prompt is None or prompt == NO_PROMPT:
            return NO_PROMPT_ID
        if prompt in self.names:
            return self.names.index(prompt)
        if not isinstance(prompt, bool | str) and prompt in range(NO_PROMPT_ID, len(self.names)):
            return int(prompt)
        if not isinstance(prompt, str):
            raise InputError(f"no prompt has the number {prompt}; there are {len(self.names)}")
        raise InputError(
            f"no prompt is called {prompt!r}{near(prompt, self.names)} ('{NO_PROMPT}' is the "
            "backbone alone)"
        )

    def matrix(self, number: int) -> np.ndarray:
        """Returns the prompt with this number, float32 [P, D], without padding."""
        rows = np.asarray(self.arrays.prompt[number])
        return rows[len(rows) - int(self.arrays.lengths[number]) :]


def make_bank(prompts: Mapping[str, SinglePrompt]) -> PromptBank:
    """Makes a bank of named prompts, each of any length and in any form that `ptjax.forward` takes.

    Keys and values that a prompt file has precomputed are ignored: with a bank, each row of a batch
    runs its prompt through the encoder.

    Examples:
        >>> bank = make_bank(load_prompts("runs/prompts"))  # doctest: +SKIP

    Raises:
        InputError: `prompts` is empty, or a prompt cannot be loaded, is not a matrix, or differs in
            width from the first (the message names it).
    """
    if not prompts:
        raise InputError("a bank needs a prompt at least")
    members = {name: wrap_prompt(prompt) for name, prompt in prompts.items()}
    matrices = {name: np.asarray(member.prompt) for name, member in members.items()}
    first, width = next(iter(matrices)), next(iter(matrices.values())).shape[-1:]
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[1:] != width:
            raise InputError(
                f"prompt {name!r} has shape {list(matrix.shape)}, prompt {first!r} "
                f"{list(matrices[first].shape)}; the prompts of a bank must be matrices [P, D] of "
                "the same width D"
            )
    attends = [member.attends_to_input for member in members.values()]
    return PromptBank(
        tuple(members),
        stack_prompts([*matrices.values()], attends),
        tuple(None if isinstance(x, BarePrompt) else x.metadata for x in members.values()),
    )


def place_bank(bank: Bank, mesh: Mesh) -> Bank:
    """Copies a bank's arrays to every device of the mesh, padded to rounded sizes.

    `bank_capacity` rounds up the number of prompts and their length, so that banks of similar size
    share a compiled program. The padding does not change results: no example chooses an added
    prompt, and added positions are masked.
    """
    count, longest = bank.prompt.shape[:2]
    capacity, length = bank_capacity(count, longest)
    if (capacity, length) != (count, longest):
        rows = (0, capacity - count)
        bank = Bank(
            np.pad(np.asarray(bank.prompt), (rows, (length - longest, 0), (0, 0))),
            np.pad(np.asarray(bank.lengths), rows),
            np.pad(np.asarray(bank.attends_to_input), rows, constant_values=True),
        )
    return jax.device_put(bank, replicated(mesh))


def choose_prompts(
    prompt: PromptFile | PromptBank | Adapter | None, prompt_ids: PromptIds, count: int
) -> Int[np.ndarray, " B"] | None:
    """Converts `prompt_ids` to the numbers of a bank's prompts, int32 [count].

    Returns None if `prompt` is not a bank.

    Args:
        prompt_ids: each example's prompt, by name or number.
        count: the number of examples.

    Raises:
        InputError: `prompt_ids` is missing for a bank or set without one, does not have `count`
            entries, or has an entry that is not in the bank (the message names its index).
    """
    if not isinstance(prompt, PromptBank):
        if prompt_ids is not None and isinstance(prompt, Adapter):
            raise InputError(f"prompt_ids choose prompts; {_alone(prompt)}")
        if prompt_ids is not None:
            raise InputError("prompt_ids choose from a bank of prompts; make one with make_bank")
        return None
    if prompt_ids is None:
        raise InputError("a bank of prompts needs prompt_ids: a name, or None, for every example")
    several = hasattr(prompt_ids, "__len__") and not isinstance(prompt_ids, str)
    if not several or len(prompt_ids) != count:
        got = len(prompt_ids) if several else repr(prompt_ids)
        raise InputError(f"prompt_ids must have one entry per example ({count}), got {got}")
    ids = np.zeros(count, np.int32)
    for i, prompt_id in enumerate(prompt_ids):
        try:
            ids[i] = prompt.id_of(prompt_id)
        except InputError as error:
            raise InputError(f"prompt_ids[{i}]: {error}") from None
    return ids
