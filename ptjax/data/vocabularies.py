"""The vocabularies of the released T5s, by number of embedding rows."""

from __future__ import annotations

from collections.abc import Mapping

from ptjax.errors import InputError

RELEASED: Mapping[int, tuple[str, str]] = {
    32128: (
        "T5 (1.0, 1.1, Flan)",
        "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model",
    ),
    250112: ("mT5", "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model"),
    384: ("ByT5", "byt5"),
}
"""Embedding rows -> (models, location of their vocabulary), from T5X's gin files
(`t5x/examples/t5/*/base.gin`): T5X's checkpoints do not include a vocabulary."""


def missing_tokenizer(name: str, embedding_rows: int) -> InputError:
    """Returns the InputError for a backbone without a tokenizer, where text must be tokenised.

    Args:
        name: of the backbone.
        embedding_rows: of the backbone; determines which vocabulary the message suggests.
    """
    hint = ""
    if embedding_rows in RELEASED:
        models, source = RELEASED[embedding_rows]
        hint = f"; with {embedding_rows:,} embedding rows it may be a {models}: PATH = {source}"
    return InputError(
        f"{name} has no tokenizer; name a *.model file, a folder, a hub id or byt5 with "
        f"--tokenizer=PATH, --gin.TOKENIZER=\"'PATH'\" or load_backbone(tokenizer=PATH){hint}"
    )
