"""Runs a Flax module with T5X's interface and a prompt, for `module_family`.

The module is neither edited nor copied: an interceptor on its embedder prepends the prompt while
`encode` runs. The module must have the methods

    encode(encoder_input_tokens, enable_dropout=) -> [B, S, D]
    decode(encoded, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
           enable_dropout=, decode=, max_decode_length=) -> logits [B, L, V]

`encode` calls its embedder once, a submodule with a parameter `embedding` [V, D]. It masks token 0
as padding and treats all others as text (ptjax derives padding from lengths, whatever the ids).
With `decode=True` each call of `decode` takes one more target and keeps its state in the collection
`cache`: arrays [B, ...], and scalars that count the previous targets. The first such call, over all
`max_decode_length` targets, only creates the empty cache. `t5x/models.py` calls its network like
this.
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
from ptjax.models.prompt import Prompt, check_prompt_ids
from ptjax.models.t5 import Encoded
from ptjax.trees import Tree, Variables

_Context = nn.module.InterceptorContext

PADDING, TEXT = 0, 1
"""Token ids passed to the module to mark positions; any id other than 0 is text to it."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CacheForm:
    """What `decode_step` must know of a module's decoding cache, in addition to its arrays.

    Attributes:
        length: the number of targets that the cache has room for.
        scalars: (path, dtype) of each scalar in the module's collection `cache`. ptjax does not
            store their values: before each step it sets all of them to the target's position.
    """

    length: int
    scalars: tuple[tuple[str, str], ...]


@dataclasses.dataclass(eq=False)
class ModuleApply:
    """Runs a user's Flax module when called like `PromptedT5.apply`: (variables, ..., method=).

    `embedder` is the path of the submodule that embeds the input's tokens. `dropout` says whether
    calls with `train=True` apply the module's dropout. `collections` names the collections of
    variables that are passed to the module.
    """

    family: Family
    module: nn.Module
    embedder: str
    dropout: bool
    collections: Sequence[str] = ("params",)

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
        # Different keys, or modules with the same name would use the same dropout mask.
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
        """What the decoder reads, P + T positions per row."""
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

        def embed(call: Tree, args: Tree, kwargs: Tree, context: _Context) -> Tree:
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
                self._module_variables(variables),
                seen,
                enable_dropout=train and self.dropout,
                rngs=rngs,
                method="encode",
            )
        kind = type(self.module).__name__
        _check_encoded(kind, self.embedder, calls, seen.shape, jnp.shape(states))
        return Encoded(states, (seen != PADDING).astype(jnp.int32))

    def _module_variables(self, variables: Variables, *more: str) -> Variables:
        """The collections of `variables` that the module knows."""
        names = (*self.collections, *more)
        return {name: variables[name] for name in names if name in variables}

    def _run_decoder(
        self,
        variables: Variables,
        encoded: tuple[jax.Array, jax.Array],
        tokens: jax.Array,
        *,
        train: bool = False,
        **settings: Any,
    ) -> Any:
        # All targets are marked as text, so that their mask is only causal; this does not change
        # the result at real positions.
        return self.module.apply(
            self._module_variables(variables, "cache"),
            *encoded,
            tokens,
            jnp.full_like(tokens, TEXT),
            enable_dropout=train and self.dropout,
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
        """Float32 logits for whole targets (teacher forcing)."""
        if segment_ids is not None:
            check_supported(self.family, "packing")
        states = encoded.states, encoded.segment_ids
        logits = self._run_decoder(variables, states, tokens, train=train, rngs=rngs)
        return logits.astype(jnp.float32)

    def _init_cache(self, variables: Variables, encoded: Encoded, length: int) -> Tree:
        """A cache of one layer, as `decoding` expects it, that holds all arrays of the module.

        It includes the encoder's output, which all beams of a row share.
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
        _check_cache(type(self.module).__name__, arrays, rows)
        form = CacheForm(length, tuple(sorted(scalars.items())))
        return [{"self_arrays": arrays, "states": encoded.states, "form": form}]

    def _decode_step(
        self,
        variables: Variables,
        tokens: jax.Array,
        cache: Tree,
        position: jax.Array | int,
        encoded: Encoded,
    ) -> tuple[jax.Array, Tree]:
        [layer] = cache
        states, form = _of_beams(layer["states"], encoded, len(tokens)), layer["form"]
        if tokens.shape[1] > 1:
            if not isinstance(position, int) or position:
                raise InputError("a module's cache takes one target at a time, or all at once")
            return self._decode(variables, Encoded(*states), tokens), cache
        counts = {path: jnp.asarray(position, dtype) for path, dtype in form.scalars}
        cached = traverse_util.unflatten_dict(layer["self_arrays"] | counts, sep="/")
        logits, made = self._run_decoder(
            {**variables, "cache": cached},
            states,
            tokens,
            decode=True,
            max_decode_length=form.length,
            mutable=["cache"],
        )
        cached = _flat(made["cache"])
        arrays = {path: cached[path] for path in layer["self_arrays"]}
        return logits.astype(jnp.float32), [layer | {"self_arrays": arrays}]


def _of_beams(states: jax.Array, encoded: Encoded, rows: int) -> tuple[jax.Array, jax.Array]:
    """The states and segment ids of the encoder's output, repeated for each row's beams."""
    beams = rows // len(states)
    return jnp.repeat(states, beams, axis=0), jnp.repeat(encoded.segment_ids, beams, axis=0)


def _check_encoded(
    kind: str,
    embedder: str,
    calls: Sequence[tuple[int, ...]],
    seen: tuple[int, ...],
    states: tuple[int, ...],
) -> None:
    """InputError if the prompt was not prepended; otherwise it would be silently missing."""
    if len(calls) != 1:
        raise InputError(
            f"{kind}.encode called its embedder {embedder!r} {len(calls)} times instead of once, "
            "so the prompt cannot be prepended; name the module that embeds the input with "
            "flax_module(module, embedder=...)"
        )
    if calls != [seen] or states[:2] != seen:
        raise InputError(
            f"{kind}.encode of tokens {list(seen)} embedded {list(calls[0])} and returned "
            f"{list(states)}; with a prompt, the number of rows and positions must not change"
        )


def _check_cache(kind: str, arrays: Mapping[str, jax.Array], rows: int) -> None:
    """InputError unless a module's cache has arrays, all of them with one entry per row."""
    wrong = next((path for path, x in arrays.items() if len(x) != rows), None)
    if not arrays or wrong is not None:
        what = f"{wrong} {list(arrays[wrong].shape)}" if wrong else "nothing"
        raise InputError(
            f"{kind}.decode(decode=True) keeps {what} in the collection 'cache'; to generate, "
            f"ptjax needs arrays there whose first axis is the {rows} rows of the batch"
        )


def _prompt_rows(
    variables: Variables, rows: int, prompt_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """(prompts float32 [B, P, D], which of their positions are not padding [B, P]) or None."""
    prompt = variables.get("prompt")
    check_prompt_ids(prompt is not None and "lengths" in prompt, prompt_ids)
    if prompt is None:
        return None
    made: Any = Prompt().apply({"prompt": prompt}, rows, prompt_ids, method="rows")
    return made[:2]


def _flat(cache: Tree) -> Tree:
    return traverse_util.flatten_dict(meta.unbox(cache), sep="/")


def _fold(rngs: dict[str, jax.Array] | None, number: int) -> dict[str, jax.Array] | None:
    if rngs is None:
        return None
    return {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
