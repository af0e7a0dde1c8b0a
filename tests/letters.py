"""A tokenizer of single letters, for the tiny model's 64 ids, and texts for it."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import numpy as np

from ptjax.backbones.fingerprint import Fingerprints
from ptjax.data.preprocess import TokenizedExamples
from ptjax.data.vocabulary import NO_ID
from ptjax.inference.batches import tokenize_inputs
from ptjax.models.prompted import make_apply_fn
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.meshes import make_mesh


class LetterTokenizer:
    """'a' is 2, 'b' is 3, ...; every id of the tiny model's 64 is a text of its own."""

    name, vocab_size, pad_id, eos_id, unk_id = "letters", 64, 0, 1, NO_ID
    fingerprint, former_fingerprints, prefix = "sha256:letters", (), ()

    def encode_batch(self, texts):
        return [[ord(c) - 95 for c in text] for text in texts]

    def decode(self, ids):
        ids = [*ids, 1]
        return "".join(chr(i + 95) for i in ids[: ids.index(1)] if i)


LETTERS: Any = LetterTokenizer()


def make_backbone(tiny: Any) -> Any:
    """What the inference functions need of a `Backbone`, on one device."""
    return types.SimpleNamespace(
        config=tiny.config,
        variables={"params": tiny.params},
        apply_fn=tiny.apply_fn(),
        make_apply_fn=functools.partial(make_apply_fn, tiny.config),
        tokenizer=LETTERS,
        fingerprints=Fingerprints("sha256:0", "v2:0"),
        name="tiny",
        family=T5_FAMILY,
        mesh=make_mesh(devices=jax.devices()[:1]),
    )


def text_source(texts: list[str]) -> TokenizedExamples:
    return tokenize_inputs(texts, LETTERS, 64)


def random_texts(count: int, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(count)
    return [
        "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, longest)))
        for _ in range(count)
    ]
