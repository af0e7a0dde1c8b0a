"""Opens prompts of every kind for inference, and checks them once for each backbone."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from absl import logging
from jaxtyping import Array

from ptjax.backbones.load import Backbone, check_backbone
from ptjax.data.batching import Batching
from ptjax.errors import InputError, check_path
from ptjax.files import JsonObject, Metadata
from ptjax.inference.bank import BarePrompt, PromptBank, SinglePrompt, place_bank, wrap_prompt
from ptjax.interop import prompt_header
from ptjax.interop.prompt_file import PromptFile, wrong_width
from ptjax.methods.adapter import Adapter, holds_adapter, load_adapter, place
from ptjax.models.t5 import PromptStates

Opened = PromptFile | PromptBank | Adapter
Prompt = Opened | None
"""What inference works with: a prompt, a bank from which each row chooses one, an adapter, or the
backbone alone (None)."""
PromptLike = SinglePrompt | PromptBank | Adapter | None
"""What callers may pass: a `Prompt`, an array [P, D], an object with a `.prompt`, or the path of a
prompt or an adapter."""

T = TypeVar("T", PromptFile, PromptBank, Adapter)

_OPENED: weakref.WeakKeyDictionary[Opened, dict[Hashable, Prompt]] = weakref.WeakKeyDictionary()
"""Prompt -> backbone -> the prompt as `open_prompt` returned it; None is the prompt itself."""
WARNED: set[bytes] = set()
"""Digests of the warnings about a prompt on a backbone: each is logged once, also when the same
prompt is loaded again."""


def open_prompt(backbone: Backbone, prompt: PromptLike, *, allow_mismatch: bool = False) -> Prompt:
    """Loads and checks a prompt in any form that callers may pass; returns it as `bind` needs it.

    For the same backbone, the same prompt object is checked only once, and a bank is copied to the
    mesh only once.

    Args:
        allow_mismatch: as for `check_prompt`.

    Raises:
        InputError: `backbone` is not one; the file at the path is missing or not a valid prompt; or
            the prompt is not a matrix [P, D] or does not fit the backbone.
    """
    check_backbone(backbone)
    wrapped = load_any(prompt)
    if wrapped is None:
        return None
    opened, key = _OPENED.setdefault(wrapped, {}), _key(backbone, allow_mismatch)
    if key not in opened:
        if isinstance(wrapped, PromptBank):
            checked = check_bank(backbone, wrapped, allow_mismatch=allow_mismatch)
        elif isinstance(wrapped, Adapter):
            checked = check_adapter(backbone, wrapped, allow_mismatch=allow_mismatch)
        else:
            checked = check_prompt(backbone, wrapped, allow_mismatch=allow_mismatch)
        opened[key] = None if checked is wrapped else checked  # a value must not keep its key alive
    return opened[key] or wrapped


def load_any(prompt: PromptLike) -> Prompt:
    """Loads a prompt or adapter in any form that callers may pass; checks it against no backbone.

    Raises:
        InputError: as for `wrap_prompt` and `load_adapter`.
    """
    if isinstance(prompt, str | os.PathLike):
        check_path("the path of the prompt", prompt)
        if holds_adapter(prompt):
            return load_adapter(prompt)
    return prompt if isinstance(prompt, PromptBank | Adapter | None) else wrap_prompt(prompt)


def open_single(backbone: Backbone, prompt: PromptLike) -> PromptFile | None:
    """Opens a prompt like `open_prompt`, but no bank or adapter; returns None for None.

    Raises:
        InputError: as for `open_prompt`, or `prompt` is a bank or an adapter.
    """
    opened = open_prompt(backbone, prompt)
    if isinstance(opened, PromptBank):
        raise InputError("one prompt is needed here, not a bank of them")
    if isinstance(opened, Adapter):
        raise InputError(f"a prompt is needed here, not an adapter ({opened.method.name})")
    return opened


def check_prompt(
    backbone: Backbone, prompt: PromptFile, *, allow_mismatch: bool = False
) -> PromptFile:
    """Checks that a prompt was tuned on this backbone, with this tokenizer.

    Compares the width, the fingerprints of backbone and tokenizer, and the special ids. What the
    prompt's metadata do not record is not compared. If they lack the backbone's fingerprint, logs a
    warning, unless they name this backbone.

    Args:
        allow_mismatch: only warn if fingerprints or special ids differ.

    Returns:
        The prompt with this backbone's fingerprints, so that later checks pass. Precomputed keys
        and values are dropped unless they were computed with this backbone.

    Raises:
        InputError: the prompt is not a matrix, or its width, fingerprints or special ids differ
            from the backbone's.
    """
    matrix, width = prompt.prompt, backbone.config.emb_dim
    if np.ndim(matrix) != 2:
        raise InputError(f"a prompt is a matrix [P, {width}], this is {list(np.shape(matrix))}")
    if isinstance(prompt, BarePrompt):
        if matrix.shape[1] != width:
            raise wrong_width("the prompt", matrix.shape, backbone.name, width)
        return _remember(backbone, prompt)
    checked = _check_origin(
        backbone, matrix.shape, lambda: matrix, prompt.metadata, "the prompt", allow_mismatch
    )
    if backbone.fingerprints.match_v1_alone(prompt.metadata):
        _log_partial_check("the prompt", backbone)
    # Keys and values of another backbone mean nothing here; the prompt is run again instead.
    recorded, own = backbone.fingerprints.compare(prompt.metadata) or (None, "")
    states = prompt.states if recorded == own else None
    if states is not None:
        _check_states(backbone, states)
    return _remember(backbone, PromptFile(prompt.prompt, checked, states))


def check_bank(backbone: Backbone, bank: PromptBank, *, allow_mismatch: bool = False) -> PromptBank:
    """Checks every prompt of a bank like `check_prompt`; messages name the prompt.

    Returns:
        The bank with this backbone's fingerprints; its arrays are on the backbone's mesh.

    Raises:
        InputError: the width, fingerprints or special ids of a prompt differ from the backbone's.
    """
    width, checked, older = bank.arrays.prompt.shape[-1], [], []
    lengths = np.asarray(bank.arrays.lengths)[: len(bank.names)].tolist()
    rows = zip(bank.names, lengths, bank.metadata, strict=True)
    for i, (name, length, metadata) in enumerate(rows):
        if backbone.fingerprints.match_v1_alone(metadata or {}):
            older.append(name)
        matrix = functools.partial(bank.matrix, i)
        # A bare array is used silently, as everywhere.
        described = {"backbone_name": backbone.name} if metadata is None else metadata
        new = _check_origin(
            backbone, (length, width), matrix, described, f"prompt {name!r}", allow_mismatch
        )
        checked.append(None if metadata is None else new)
    if older:
        more = f" and {len(older) - 5} more" if len(older) > 5 else ""
        _log_partial_check(f"prompts {', '.join(older[:5])}{more}", backbone)
    arrays = place_bank(bank.arrays, backbone.mesh)
    return _remember(backbone, PromptBank(bank.names, arrays, tuple(checked)))


def check_adapter(backbone: Backbone, adapter: Adapter, *, allow_mismatch: bool = False) -> Adapter:
    """Checks that a method's adapter was tuned on this backbone, like `check_prompt`.

    Returns:
        The adapter with this backbone's fingerprints; its arrays are on the backbone's mesh.

    Raises:
        InputError: the network cannot run the method, or shapes, fingerprints or special ids
            differ from the backbone's.
    """
    adapter.method.check(backbone, Batching())
    variables = place(adapter, backbone)
    checked = _check_origin(
        backbone,
        None,
        lambda: next(iter(adapter.arrays.values())),
        adapter.metadata,
        f"the adapter ({adapter.method.name})",
        allow_mismatch,
    )
    opened = dataclasses.replace(adapter, metadata=checked, variables=variables)
    return _remember(backbone, opened)


def _key(backbone: Backbone, allow_mismatch: bool) -> Hashable:
    """What the checks of a prompt depend on."""
    tokenizer = backbone.tokenizer
    return (
        backbone.fingerprints,
        backbone.name,
        tokenizer.fingerprint if tokenizer else None,
        backbone.config.special_ids,
        backbone.mesh,
        getattr(backbone.config, "scan_layers", None),  # an adapter's arrays are stacked like it
        allow_mismatch,
    )


def _remember(backbone: Backbone, prompt: T) -> T:
    """Records that a prompt passed its checks."""
    opened = _OPENED.setdefault(prompt, {})
    opened |= dict.fromkeys((_key(backbone, allowed) for allowed in (False, True)), None)
    return prompt


def _log_partial_check(called: str, backbone: Backbone) -> None:
    logging.info(
        "%s: recorded before fingerprints covered every parameter; of %s the embeddings, norms and "
        "some rows were compared, and are the same",
        called,
        backbone.name,
    )


def _check_origin(
    backbone: Backbone,
    shape: Sequence[int] | None,
    matrix: Callable[[], np.ndarray | Array],
    metadata: Metadata,
    called: str,
    allow_mismatch: bool,
) -> JsonObject:
    """`check_prompt` of a prompt's metadata.

    Args:
        shape, matrix: of the prompt; the matrix is fetched for a warning alone. None: the shape
            was checked before.
        called: the prompt's name in messages.

    Returns:
        The metadata with this backbone's fingerprints and special ids.
    """
    warn = functools.partial(_warn_once, backbone, matrix)
    width = backbone.config.emb_dim
    if shape is not None and shape[-1] != width:
        raise wrong_width(called, shape, backbone.name, width, metadata.get("backbone_name"))
    tokenizer = backbone.tokenizer
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

    fingerprints = backbone.fingerprints.compare(metadata)
    if fingerprints is None:
        _warn_unverified(backbone, name, called, warn)
    former = tokenizer.former_fingerprints if tokenizer else ()
    for part, recorded, own, accepted in (
        ("backbone", *(fingerprints or (None, None)), ()),
        ("tokenizer", recorded_tokenizer, own_tokenizer, former),
    ):
        if recorded is None or own is None or recorded in (own, *accepted):
            continue
        refuse(
            f"{origin} with the {part} {recorded[:19]}, not with that of {backbone.name}, "
            f"{own[:19]}"
        )
    if ids := prompt_header.other_ids(metadata, backbone.config.special_ids):
        refuse(f"{origin} with {ids[0]}; {backbone.name} has {ids[1]}")
    return checked


def _warn_unverified(
    backbone: Backbone, name: object, called: str, warn: Callable[..., None]
) -> None:
    """Warns about a prompt without a fingerprint, unless it names this very backbone."""
    if name is None:
        warn("%s does not say which backbone it was tuned on; only the width was checked", called)
    # PEFT records a name, and of a model of the hub seldom the commit.
    elif name not in (backbone.name, backbone.name.partition("@")[0]):
        warn(
            "%s was tuned on %s and records no fingerprint, so it cannot be verified against %s; "
            "only the width was checked",
            called,
            name,
            backbone.name,
        )


def _warn_once(
    backbone: Backbone, matrix: Callable[[], np.ndarray | Array], message: str, *arguments: object
) -> None:
    """A warning about a prompt, logged once for the same prompt and backbone."""
    content = np.ascontiguousarray(matrix()).tobytes()
    text = repr((backbone.fingerprints, backbone.name, message, arguments)).encode()
    digest = hashlib.sha256(content + text).digest()
    if digest not in WARNED:
        WARNED.add(digest)
        logging.warning(message, *arguments)


def _check_states(backbone: Backbone, states: PromptStates) -> None:
    """InputError unless precomputed keys and values have the backbone's layers and heads."""
    config = backbone.config
    heads = (config.num_heads, config.head_dim)
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for stack, layers in counts.items():
        shape = states.present()[stack][0].shape
        if shape[0] != layers or shape[2:] != heads:
            raise InputError(
                f"the prompt's keys and values were computed for another backbone: {shape[0]} "
                f"{stack} layers with heads {list(shape[2:])}, {backbone.name} has {layers} with "
                f"{list(heads)}"
            )
