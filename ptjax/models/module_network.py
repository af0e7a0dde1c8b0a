"""Runs a Flax module of T5X's form with a prompt in front of its input, for `module_family`.

Nothing of the module is edited or copied. The prompt is put in front of what its embedder makes
of the input, by an interceptor that stands while `encode` runs. ptjax asks of the module:

    encode(encoder_input_tokens, enable_dropout=) -> [B, S, D]
    decode(encoded, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
           enable_dropout=, decode=, max_decode_length=) -> logits [B, L, V]

`encode` calls its embedder once, a submodule with a parameter `embedding` [V, D]. A token 0 is
masked as padding, others are text (ptjax says by lengths which are, whatever their ids). With
`decode=True` each call of `decode` takes one more target and keeps what it needs in the collection
`cache`: arrays [B, ...], and scalars that count the targets before. The first such call, over all
`max_decode_length` targets, only makes the empty cache. `t5x/models.py` calls its network so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from ptjax.errors import InputError
from ptjax.models.family import Family, check_supported
from ptjax.models.prompt import Prompt
from ptjax.models.t5 import Encoded

Variables = Mapping[str, Any]

PADDING, TEXT = 0, 1
"""What the module is told of a position; a token's own id stands for text unless it is 0."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheForm:
    """Of a module's cache, what does not change: how many targets it has places for.

    Attributes:
        scalars: path and dtype of what counts the targets so far. ptjax counts them itself.
    """

    length: int
    scalars: tuple[tuple[str, str], ...]


class ModuleApply:
    """`apply_fn(variables, ..., method=)` of a module: `PromptedT5.apply` for all who call it.

    One object for one family and config, for jit caches by it.
    """

    def __init__(
        self,
        family: Family,
        module: nn.Module,
        embedder: str,
        dropout: bool,
        collections: Sequence[str] = ("params",),
    ) -> None:
        """Of the variables, the module is given `collections`."""
        self.family, self.module, self.embedder, self.dropout = family, module, embedder, dropout
        self.collections = collections

    def __call__(
        self, variables: Variables, *arguments: Any, method: str | None = None, **settings: Any
    ) -> Any:
        if method == "prompt_states":
            check_supported(self.family, "blind prompts")
        methods = {
            None: self._logits,
            "encode": self._encode,
            "decode": self._decode,
            "init_cache": self._init_cache,
            "decode_step": self._decode_step,
        }
        return methods[method](variables, *arguments, **settings)

    def _logits(
        self,
        variables: Variables,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        encoder_lengths: jax.Array | None = None,
        prompt_ids: jax.Array | None = None,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        encoded = self._encode(
            variables,
            encoder_input_tokens,
            encoder_segment_ids,
            encoder_lengths=encoder_lengths,
            prompt_ids=prompt_ids,
            train=train,
            rngs=_fold(rngs, 0),
        )
        # Another key: two modules of one name would drop the same places.
        return self._decode(
            variables,
            encoded,
            decoder_input_tokens,
            decoder_segment_ids,
            train=train,
            rngs=_fold(rngs, 1),
        )

    def _encode(
        self,
        variables: Variables,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        encoder_lengths: jax.Array | None = None,
        prompt_ids: jax.Array | None = None,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Encoded:
        """What the decoder reads, P + T positions a row."""
        if segment_ids is not None:
            check_supported(self.family, "packing")
        if encoder_lengths is None:
            raise InputError("rows of one example need encoder_lengths")
        real = jnp.arange(tokens.shape[1]) < encoder_lengths[:, None]
        seen = jnp.where(real, jnp.maximum(tokens, TEXT), PADDING)
        prompt = _prompt_rows(variables, len(tokens), prompt_ids)
        if prompt is not None:
            seen = jnp.concatenate([prompt[1].astype(seen.dtype) * TEXT, seen], axis=1)
        calls: list[tuple[int, ...]] = []

        def embed(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path != self.embedder:
                return call(*args, **kwargs)
            given, *rest = args or (seen,)
            calls.append(jnp.shape(given))
            if jnp.shape(given) != seen.shape:
                return call(*args, **kwargs)  # refused below
            embedded = call(tokens, *rest, **kwargs)
            if prompt is None:
                return embedded
            return jnp.concatenate([prompt[0].astype(embedded.dtype), embedded], axis=1)

        with nn.intercept_methods(embed):
            states: Any = self.module.apply(
                self._own(variables),
                seen,
                enable_dropout=train and self.dropout,
                rngs=rngs,
                method="encode",
            )
        self._check_encoded(calls, seen.shape, jnp.shape(states))
        return Encoded(states, (seen != PADDING).astype(jnp.int32))

    def _own(self, variables: Variables, *more: str) -> dict[str, Any]:
        """What of the variables the module knows."""
        names = (*self.collections, *more)
        return {name: variables[name] for name in names if name in variables}

    def _check_encoded(
        self, calls: Sequence[tuple[int, ...]], seen: tuple[int, ...], states: tuple[int, ...]
    ) -> None:
        """A prompt that is not in front of the input is never left out without a word."""
        kind, embedder = type(self.module).__name__, self.embedder
        if len(calls) != 1:
            raise InputError(
                f"{kind}.encode called its embedder {embedder!r} {len(calls)} times instead of "
                "once, so the prompt has no place in front of the input; name the module that "
                "embeds the input with flax_module(module, embedder=...)"
            )
        if calls != [seen] or states[:2] != seen:
            raise InputError(
                f"{kind}.encode of tokens {list(seen)} embedded {list(calls[0])} and gave "
                f"{list(states)}; rows and positions have to stay as they are for a prompt"
            )

    def _run_decoder(
        self,
        variables: Variables,
        encoded: tuple[jax.Array, jax.Array],
        tokens: jax.Array,
        *,
        train: bool = False,
        **settings: Any,
    ) -> Any:
        # Targets all count as text, so that a mask of them is causal alone: at places that count,
        # the result is the same.
        own = self._own(variables, "cache")
        enable_dropout = train and self.dropout
        return self.module.apply(
            own,
            *encoded,
            tokens,
            jnp.full_like(tokens, TEXT),
            enable_dropout=enable_dropout,
            method="decode",
            **settings,
        )

    def _decode(
        self,
        variables: Variables,
        encoded: Encoded,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Float32 logits of whole targets."""
        if segment_ids is not None:
            check_supported(self.family, "packing")
        states = encoded.states, encoded.segment_ids
        logits = self._run_decoder(variables, states, tokens, train=train, rngs=rngs)
        return logits.astype(jnp.float32)

    def _init_cache(self, variables: Variables, encoded: Encoded, length: int) -> Any:
        """One `layer` for all of the module, as `decoding` takes them: its arrays by their paths.

        With the encoder's output: a beam needs its row's.
        """
        rows = len(encoded.states)
        tokens = jnp.full((rows, length), TEXT, jnp.int32)
        _, made = self._run_decoder(
            variables,
            (encoded.states, encoded.segment_ids),
            tokens,
            decode=True,
            max_decode_length=length,
            mutable=["cache"],
        )
        cached = _flat(made.get("cache", {}))
        scalars = {path: x.dtype.name for path, x in cached.items() if x.ndim == 0}
        arrays = {path: x for path, x in cached.items() if x.ndim}
        wrong = next((path for path, x in arrays.items() if len(x) != rows), None)
        if not arrays or wrong is not None:
            what = f"{wrong} {list(arrays[wrong].shape)}" if wrong else "nothing"
            raise InputError(
                f"{type(self.module).__name__}.decode(decode=True) keeps {what} in the collection "
                f"'cache'; to generate, ptjax needs arrays there whose first axis is the {rows} "
                "rows of the batch"
            )
        form = CacheForm(length, tuple(sorted(scalars.items())))
        return [{"self_arrays": arrays, "states": encoded.states, "form": form}]

    def _decode_step(
        self,
        variables: Variables,
        tokens: jax.Array,
        cache: Any,
        position: jax.Array | int,
        encoded: Encoded,
    ) -> tuple[jax.Array, Any]:
        [layer] = cache
        states, form = (layer["states"], encoded.segment_ids), layer["form"]
        if tokens.shape[1] > 1:
            if not isinstance(position, int) or position:
                raise InputError(
                    "a module's cache takes one target at a time, or all from the first"
                )
            whole = Encoded(*states)
            return self._decode(variables, whole, tokens), cache
        counts = {path: jnp.asarray(position, dtype) for path, dtype in form.scalars}
        held = traverse_util.unflatten_dict(layer["self_arrays"] | counts, sep="/")
        logits, made = self._run_decoder(
            {**variables, "cache": held},
            states,
            tokens,
            decode=True,
            max_decode_length=form.length,
            mutable=["cache"],
        )
        cached = _flat(made["cache"])
        arrays = {path: cached[path] for path in layer["self_arrays"]}
        return logits.astype(jnp.float32), [layer | {"self_arrays": arrays}]


def _prompt_rows(
    variables: Variables, rows: int, prompt_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """(P float32 [B, P, D], which of its places a row's prompt has [B, P]) or None."""
    held = variables.get("prompt")
    bank = held is not None and "lengths" in held
    if bank != (prompt_ids is not None):
        raise InputError(
            "a bank of prompts needs prompt_ids, one for every row; -1 is none"
            if bank
            else "prompt_ids choose from a bank of prompts, and there is none"
        )
    if held is None:
        return None
    made: Any = Prompt().apply({"prompt": held}, rows, prompt_ids, method="rows")
    return made[:2]


def _flat(cache: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(meta.unbox(cache), sep="/")


def _fold(rngs: dict[str, jax.Array] | None, number: int) -> dict[str, jax.Array] | None:
    if rngs is None:
        return None
    return {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
