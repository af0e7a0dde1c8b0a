"""A loaded backbone and a prompt, or many, put together: do they fit, and what runs them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.errors import InputError, near
from ptjax.interop import prompt_header
from ptjax.interop.prompt_file import NO_PROMPT, PromptFile, load_prompt, wrong_width
from ptjax.models.family import check_supported
from ptjax.models.prompt import NO_PROMPT_ID, Bank, stack_prompts
from ptjax.models.prompted import with_prompt
from ptjax.models.t5 import PromptStates
from ptjax.sharding.arrays import replicated
from ptjax.trees import Variables

_WARNED: set[bytes] = set()
"""Digests of what was said about which prompt on which backbone: each is said once."""


def open_prompt(prompt: Any) -> Any:
    """The loaded prompt where a path is given, else `prompt` itself.

    Raises:
        InputError: no prompt at that path, or one that `load_prompt` refuses.
    """
    return load_prompt(prompt) if isinstance(prompt, str | os.PathLike) else prompt


def check_prompt(
    backbone: Backbone, prompt: PromptFile, *, allow_mismatch: bool = False
) -> PromptFile:
    """Refuses a prompt that was tuned on another backbone or for another tokenizer.

    Args:
        allow_mismatch: say so instead of refusing; the width has to fit all the same.

    Returns:
        The prompt with this backbone's fingerprints, so that no later check says it all again.

    Raises:
        InputError: another width, or another fingerprint.
    """
    matrix = prompt.prompt
    checked = _check_origin(
        backbone, matrix.shape, lambda: matrix, prompt.metadata, "the prompt", allow_mismatch
    )
    if backbone.fingerprints.match_v1_alone(prompt.metadata):
        _say_partly_compared("the prompt", backbone)
    # Keys and values of another backbone mean nothing here; the prompt is run again instead.
    recorded, own = backbone.fingerprints.compare(prompt.metadata) or (None, "")
    return PromptFile(prompt.prompt, checked, prompt.states if recorded == own else None)


def _say_partly_compared(called: str, backbone: Backbone) -> None:
    logging.info(
        "%s: recorded before fingerprints covered every parameter; of %s the embeddings, norms and "
        "some rows were compared, and are the same",
        called,
        backbone.name,
    )


def _check_origin(
    backbone: Backbone,
    shape: Sequence[int],
    matrix: Callable[[], np.ndarray],
    metadata: Mapping[str, Any],
    called: str,
    allow_mismatch: bool,
) -> dict[str, Any]:
    """`check_prompt` of what a prompt says of itself.

    Args:
        shape, matrix: of the prompt; the matrix is fetched for a warning alone.
        called: what messages call it.
    """
    warn = functools.partial(_warn_once, backbone, matrix)
    width = backbone.config.emb_dim
    if shape[-1] != width:
        raise wrong_width(called, shape, backbone.name, width, metadata.get("backbone_name"))
    tokenizer = backbone.tokenizer
    own_name, own_id = backbone.name, backbone.name.partition("@")[0]
    name = metadata.get("backbone_name")
    checked = dict(metadata)
    recorded_tokenizer = metadata.get("tokenizer_fingerprint")
    own_tokenizer = tokenizer.fingerprint if tokenizer else None
    checked |= backbone.fingerprints.as_metadata()
    checked["tokenizer_fingerprint"] = own_tokenizer or recorded_tokenizer
    checked |= prompt_header.special_ids(backbone.config.special_ids)
    origin = f"{called} was tuned on {name or 'a backbone'}"

    def refuse(problem: str) -> None:
        if not allow_mismatch:
            raise InputError(
                f"{problem}; load its own, or override with --allow_mismatch (allow_mismatch=True)"
            )
        warn("%s; used all the same", problem)

    for what, wanted, own in (
        ("backbone", *(backbone.fingerprints.compare(metadata) or (None, None))),
        ("tokenizer", recorded_tokenizer, own_tokenizer),
    ):
        if what == "backbone" and wanted is None and name is None:
            warn("%s does not say which backbone it was tuned on; its width fits", called)
        # PEFT records a name, and of a model of the hub seldom the commit.
        elif what == "backbone" and wanted is None and name not in (own_name, own_id):
            warn(
                "%s was tuned on %s and does not tell its weights; that they are those of %s "
                "cannot be checked, its width fits",
                called,
                name,
                own_name,
            )
        former = tokenizer.former_fingerprints if what == "tokenizer" and tokenizer else ()
        if wanted is None or own is None or wanted in (own, *former):
            continue
        refuse(f"{origin} with the {what} {wanted[:19]}, not with that of {own_name}, {own[:19]}")
    if ids := prompt_header.other_ids(metadata, backbone.config.special_ids):
        refuse(f"{origin} with {ids[0]}; {own_name} has {ids[1]}")
    return checked


def _warn_once(
    backbone: Backbone, matrix: Callable[[], np.ndarray], message: str, *arguments: Any
) -> None:
    """A warning about a prompt; of the same prompt and backbone it is not repeated."""
    content = np.ascontiguousarray(matrix()).tobytes()
    text = repr((backbone.fingerprints, backbone.name, message, arguments)).encode()
    digest = hashlib.sha256(content + text).digest()
    if digest not in _WARNED:
        _WARNED.add(digest)
        logging.warning(message, *arguments)


@dataclasses.dataclass(frozen=True)
class PromptBank:
    """Prompts by name, of which every example of a batch takes its own.

    Attributes:
        names: of the N prompts.
        arrays: the prompts side by side.
        metadata: what each says of itself; None for a bare array.
    """

    names: tuple[str, ...]
    arrays: Bank
    metadata: tuple[dict[str, Any] | None, ...]

    def id_of(self, prompt: str | int | None) -> int:
        """The number of a prompt, given by name or number; -1 for None, "none" and -1.

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


def make_bank(prompts: Mapping[str, Any]) -> PromptBank:
    """A bank of prompts of any lengths, given by name as for `ptjax.forward`, or as paths.

    >>> bank = make_bank(load_prompts("runs/prompts"))  # doctest: +SKIP

    What was compiled of a prompt is not used: in a bank every row runs its own.

    Raises:
        InputError: no prompt, or one that is no matrix or not as wide as the first; it is named.
    """
    if not prompts:
        raise InputError("a bank needs a prompt at least")
    prompts = {name: open_prompt(prompt) for name, prompt in prompts.items()}
    matrices = {name: np.asarray(getattr(x, "prompt", x)) for name, x in prompts.items()}
    first, width = next(iter(matrices)), next(iter(matrices.values())).shape[-1:]
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[1:] != width:
            raise InputError(
                f"prompt {name!r} has the shape {list(matrix.shape)}, prompt {first!r} "
                f"{list(matrices[first].shape)}; those of a bank are matrices [P, D] of one width D"
            )
    return PromptBank(
        tuple(prompts),
        stack_prompts(
            [*matrices.values()], [attends_to_input(prompt) for prompt in prompts.values()]
        ),
        tuple(getattr(prompt, "metadata", None) for prompt in prompts.values()),
    )


def check_bank(backbone: Backbone, bank: PromptBank, *, allow_mismatch: bool = False) -> PromptBank:
    """`check_prompt` of every prompt of a bank; messages name the one.

    Returns:
        The bank with this backbone's fingerprints, its arrays on the backbone's mesh.

    Raises:
        InputError: another width, or another fingerprint.
    """
    (_, longest, width), checked, older = bank.arrays.prompt.shape, [], []
    lengths = np.asarray(bank.arrays.lengths).tolist()
    rows = zip(bank.names, lengths, bank.metadata, strict=True)
    for i, (name, length, metadata) in enumerate(rows):
        if backbone.fingerprints.match_v1_alone(metadata or {}):
            older.append(name)

        def matrix(i: int = i, start: int = longest - length) -> np.ndarray:
            return np.asarray(bank.arrays.prompt[i, start:])

        # A bare array is used without a word, as everywhere.
        said = {"backbone_name": backbone.name} if metadata is None else metadata
        own = _check_origin(
            backbone, (length, width), matrix, said, f"prompt {name!r}", allow_mismatch
        )
        checked.append(None if metadata is None else own)
    if older:
        more = f" and {len(older) - 5} more" if len(older) > 5 else ""
        _say_partly_compared(f"prompts {', '.join(older[:5])}{more}", backbone)
    arrays = jax.device_put(bank.arrays, replicated(backbone.mesh))
    return PromptBank(bank.names, arrays, tuple(checked))


def choose_prompts(
    prompt: Any, prompt_ids: Sequence[str | int | None] | np.ndarray | None, count: int
) -> Int[np.ndarray, " B"] | None:
    """`prompt_ids` as int32 [count] where `prompt` is a bank, else None.

    Raises:
        InputError: a bank without them or the other way round, another number of them, or one that
            names no prompt of the bank; with its place.
    """
    if not isinstance(prompt, PromptBank):
        if prompt_ids is not None:
            raise InputError("prompt_ids choose from a bank of prompts; make one with make_bank")
        return None
    if prompt_ids is None:
        raise InputError("a bank of prompts needs prompt_ids: a name, or None, for every example")
    if isinstance(prompt_ids, str) or len(prompt_ids) != count:
        raise InputError(f"prompt_ids has to be a list with one for each of {count} examples")
    ids = np.zeros(count, np.int32)
    for i, one in enumerate(prompt_ids):
        try:
            ids[i] = prompt.id_of(one)
        except InputError as error:
            raise InputError(f"prompt_ids[{i}]: {error}") from None
    return ids


def attends_to_input(prompt: Any) -> bool:
    """Whether a prompt, of whatever kind, was tuned to see its input; a bare array was."""
    return getattr(prompt, "attends_to_input", True)


def compile_prompt(backbone: Backbone, prompt: PromptFile) -> PromptFile:
    """A prompt that sees no input together with its states, for `save_prompt`.

    With them it has no way through the encoder of its own any more: what is left of it is a key
    and a value [P, H, K] per layer, in the backbone's dtype.

    Raises:
        InputError: the prompt sees its input, so there is nothing that all inputs share.
    """
    if prompt.attends_to_input:
        raise InputError(
            "only a prompt that does not see its input can be compiled, and this one does; tune "
            "one with SEES_INPUT = False"
        )
    apply_fn, variables = prompted(backbone, dataclasses.replace(prompt, states=None))
    states = jax.device_get(_prompt_states(apply_fn, variables))
    check_scores(states, backbone, "a key or value that the backbone makes of the prompt")
    origin = {"backbone_name": backbone.name, **backbone.fingerprints.as_metadata()}
    return PromptFile(prompt.prompt, origin | prompt.metadata, states)


def prompted(backbone: Backbone, prompt: Any) -> tuple[Callable[..., Any], Variables]:
    """`(apply_fn, variables)` of the backbone with a prompt, given as for `forward` or as a path.

    One that was compiled for this backbone brings its states along, and its own way through the
    encoder is saved.
    """
    prompt = open_prompt(prompt)
    if isinstance(prompt, PromptBank):
        arrays = check_bank(backbone, prompt).arrays
        if not np.all(prompt.arrays.attends_to_input):
            check_supported(backbone.family, "blind prompts")
        return backbone.make_apply_fn(True), with_prompt(backbone.variables, arrays)
    array = prompt_array(backbone, prompt)
    states = getattr(prompt, "states", None)
    if states is not None:
        _check_states(backbone, states)
        cast = jax.tree.map(lambda x: jnp.asarray(x, backbone.config.dtype), states)
        array = jax.device_put(cast, replicated(backbone.mesh))
    variables = with_prompt(backbone.variables, array)
    return backbone.make_apply_fn(attends_to_input(prompt)), variables


def prompt_array(backbone: Backbone, prompt: Any) -> Float[Array, "P D"] | None:
    """A prompt, given as an array or as something that has one, as float32 [P, D].

    Raises:
        InputError: it is not a matrix as wide as the backbone, or a loaded prompt that was tuned
            on another one (pass its `.prompt` to use it all the same).
    """
    if prompt is None:
        return None
    if isinstance(prompt, PromptBank):
        raise InputError("one prompt is needed here, not a bank of them")
    array = getattr(prompt, "prompt", prompt)
    width = backbone.config.emb_dim
    if np.ndim(array) != 2:
        raise InputError(f"a prompt is a matrix [P, {width}], this is {list(np.shape(array))}")
    if np.shape(array)[1] != width:
        raise wrong_width("the prompt", np.shape(array), backbone.name, width)
    if getattr(prompt, "metadata", None) is not None:
        check_prompt(backbone, prompt)
    # It may come from another mesh, that of the run that tuned it.
    return jax.device_put(jnp.asarray(array, jnp.float32), replicated(backbone.mesh))


def _check_states(backbone: Backbone, states: PromptStates) -> None:
    config = backbone.config
    for stack, arrays, wanted in (
        ("encoder", states.encoder, config.num_encoder_layers),
        ("decoder", states.decoder, config.num_decoder_layers),
    ):
        layers, heads = len(arrays[0]), arrays[0].shape[2:]
        if layers != wanted or heads != (config.num_heads, config.head_dim):
            raise InputError(
                f"the prompt was compiled for another backbone: {layers} {stack} layers with "
                f"heads {list(heads)}, {backbone.name} has {wanted} with "
                f"{[config.num_heads, config.head_dim]}"
            )


@functools.partial(jax.jit, static_argnames="apply_fn")
def _prompt_states(apply_fn: Callable[..., Any], variables: Variables) -> PromptStates:
    return apply_fn(variables, method="prompt_states")
