"""Reads and writes special ids in Hugging Face's `config.json` and `generation_config.json`.

transformers trains with one file and generates with the other (tested with 4.57 and 5.24):
`_shift_right` takes `decoder_start_token_id` from config.json; `generate` takes everything from
generation_config.json if it exists, otherwise from config.json.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from absl import logging
from etils import epath

from ptjax import files
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.models.config import T5Config

Ids = int | tuple[int, ...] | None

GENERATION_CONFIG = "generation_config.json"
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "do_sample": False,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
}
"""Settings of `generate` that change greedy decoding unless they have these values."""
_FREE = (
    *("min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "forced_eos_token_id", "exponential_decay_length_penalty"),
)
"""Settings of `generate` that change greedy decoding whenever they are set."""
SPECIAL_IDS = ("pad_id", "eos_ids", "decoder_start_id", "forced_bos_id")
"""The fields of `T5Config` that are special ids."""


def read_special_ids(
    directory: epath.Path, config: Metadata, chosen: Collection[str] = ()
) -> JsonObject:
    """Reads the special ids of `T5Config` from config.json and generation_config.json.

    Ids that neither file states are left out. Which file decides:
        `pad_id`: config.json, else generation_config.json.
        `decoder_start_id`: the two must agree, since training uses one and generation the other;
            `generate` falls back to `bos_token_id`.
        `eos_ids`: generation_config.json, else config.json. (If only config.json has one,
            transformers 5 never stops generating.)
        `forced_bos_id`: generation_config.json alone, if it exists.

    Logs a warning that lists other settings which change what transformers generates.

    Args:
        directory: the folder of both files; generation_config.json is optional.
        config: the content of config.json.
        chosen: the fields that the user sets; they are not read from the files.

    Returns:
        fields of `T5Config` by name.

    Raises:
        InputError: a value is not an id, or the two files disagree about the decoder's start.
    """
    path = directory / GENERATION_CONFIG
    here = directory / "config.json"
    generation, there = (files.read_object(path), path) if path.exists() else (config, here)
    if set(SPECIAL_IDS) - set(chosen):  # else the files are not used
        _report_unused(generation, there)

    def read(raw: Metadata, file: epath.Path, key: str) -> Ids:
        return _check(raw.get(key), f"{file}: {key}", config["vocab_size"])

    def either(key: str, *places: tuple[Metadata, epath.Path]) -> Ids:
        values = (read(*place, key) for place in places)
        return next((value for value in values if value is not None), None)

    trains, generates = (config, here), (generation, there)
    fields: JsonObject = {}
    if "pad_id" not in chosen:
        fields["pad_id"] = either("pad_token_id", trains, generates)
    if "eos_ids" not in chosen:
        ends = either("eos_token_id", generates, trains)
        fields["eos_ids"] = (ends,) if isinstance(ends, int) else ends
    if "decoder_start_id" not in chosen:
        start = read(*trains, "decoder_start_token_id")
        first = read(*generates, "decoder_start_token_id")
        first = read(*generates, "bos_token_id") if first is None else first
        if None not in (start, first) and start != first and generation is not config:
            raise InputError(
                f"{directory}: targets start with {start} (decoder_start_token_id of config.json), "
                f"generated texts with {first} ({GENERATION_CONFIG}); choose one with "
                f"decoder_start_id = {start} or {first}"
            )
        fields["decoder_start_id"] = first if start is None else start
    stated = {field: value for field, value in fields.items() if value is not None}
    if "forced_bos_id" not in chosen:
        stated["forced_bos_id"] = read(*generates, "forced_bos_token_id")
    return stated


def _report_unused(generation: Metadata, file: epath.Path) -> None:
    """Warns of settings that transformers generates with and ptjax ignores."""
    used = [k for k, plain in _NEUTRAL.items() if generation.get(k) not in (None, plain)]
    used += [k for k in _FREE if generation.get(k) not in (None, [], {})]
    if used:
        listed = ", ".join(f"{key} = {generation[key]!r}"[:60] for key in used)
        logging.warning(
            "%s: transformers generates with %s; ptjax ignores this and decodes greedily unless "
            "told otherwise by its own flags or arguments (--num_beams, --temperature)",
            file,
            listed,
        )


def write_special_ids(config: T5Config) -> JsonObject:
    """Returns the special ids as entries of `config.json`; `read_special_ids` is the inverse."""
    ends = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids)
    written = {
        "pad_token_id": config.pad_id,
        "eos_token_id": ends,
        "decoder_start_token_id": config.decoder_start_id,
    }
    if config.forced_bos_id is not None:
        written["forced_bos_token_id"] = config.forced_bos_id
    return written


def check_end_of_sequence(tokenizer: Tokenizer, config: T5Config) -> None:
    """Raises InputError if the tokenizer's `eos_id` is not one of the model's `config.eos_ids`."""
    if tokenizer.eos_id not in config.eos_ids:
        ends = " or ".join(map(str, config.eos_ids))
        raise InputError(
            f"{tokenizer.name}: the tokenizer ends texts with id {tokenizer.eos_id}, the model with"
            f" {ends}; use the model's tokenizer or, if the model's files do not state its end of "
            f"sequence, load_backbone(eos_ids=({tokenizer.eos_id},))"
        )


def _check(value: Any, name: str, vocab_size: int) -> Ids:
    """`value` after a check: an id, a tuple of ids (end of sequence only), or None."""
    several = isinstance(value, list) and name.endswith("eos_token_id")
    ids: list[Any] = value if several else [value]
    for index in ids:
        if index is not None and (type(index) is not int or not 0 <= index < vocab_size):
            raise InputError(
                f"{name} is {value!r}, not an id of a vocabulary of {vocab_size}; correct the file"
            )
    return tuple(ids) or None if several else ids[0]
