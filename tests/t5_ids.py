"""T5's special ids, and decoding of rows whose zeros are padding: for tests of T5's vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ptjax.data.batch import SpecialIds
from ptjax.models import decoding

T5_IDS = SpecialIds(pad_id=0, eos_ids=(1,), decoder_start_id=0, forced_bos_id=None)

_STATIC = ("apply_fn", "ids", "max_length", "num_beams", "shards")
_jitted = {
    name: jax.jit(getattr(decoding, name), static_argnames=_STATIC)
    for name in ("decode", "beam_search")
}


def lengths_of(tokens: Any) -> jax.Array:
    """Lengths int32 [B] of rows [B, L] that end in zeros."""
    return jnp.max(jnp.where(tokens != 0, jnp.arange(tokens.shape[1]) + 1, 0), axis=1)


def with_lengths(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_fn` for unpacked rows that end in zeros."""

    @functools.wraps(apply_fn)
    def run(variables: Any, *args: Any, **kwargs: Any) -> Any:
        method = kwargs.get("method")
        packed = len(args) > (1 if method == "encode" else 2)
        if method in (None, "encode") and not packed and "encoder_segment_ids" not in kwargs:
            kwargs.setdefault("encoder_lengths", lengths_of(args[0]))
        return apply_fn(variables, *args, **kwargs)

    return run


def _run(name: str, apply_fn: Any, variables: Any, tokens: Any, **settings: Any) -> Any:
    ids = dataclasses.replace(T5_IDS, eos_ids=(settings.pop("eos_id", 1),))
    settings.setdefault("ids", ids)
    if "keys" in settings:
        how = {key: settings.pop(key) for key in decoding.Sampling._fields if key in settings}
        settings["sampling"] = decoding.Sampling(**how)
    return _jitted[name](apply_fn, variables, tokens, lengths_of(tokens), **settings)


decode = functools.partial(_run, "decode")
beam_search = functools.partial(_run, "beam_search")
