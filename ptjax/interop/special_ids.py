"""Special ids in Hugging Face's `config.json` and `generation_config.json`.

transformers trains by the one and generates by the other (run with 4.57 and 5.24): `_shift_right`
takes `decoder_start_token_id` of config.json, `generate` takes everything of generation_config.json
where there is one, and only else of config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from absl import logging
from etils import epath

from ptjax import files
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError
from ptjax.models.config import T5Config

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
"""Settings of `generate` that change greedy texts unless they have these values."""
_FREE = (
    *("min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("sequence_bias", "forced_eos_token_id", "exponential_decay_length_penalty"),
)
"""Settings of `generate` that change greedy texts whenever they are set."""
SPECIAL_IDS = ("pad_id", "eos_ids", "decoder_start_id", "forced_bos_id")
"""Fields of `T5Config`."""


def read_special_ids(
    directory: epath.Path, config: Mapping[str, Any], chosen: Collection[str] = ()
) -> dict[str, Any]:
    """The special ids of `T5Config` that the files of a folder state.

    Which file decides:
        `pad_id`: config.json, else generation_config.json.
        `decoder_start_id`: both have to agree, since prompts are tuned with the one and generate
            with the other; `bos_token_id` is what `generate` takes where there is none.
        `eos_ids`: generation_config.json, else config.json. (Where only the latter has one,
            transformers 5 never stops.)
        `forced_bos_id`: generation_config.json alone, if it exists.

    A warning lists other settings there that change what transformers generates.

    Args:
        config: config.json, read.
        chosen: fields that the user sets, which are not looked for.

    Raises:
        InputError: a value is no id, or the two files contradict each other about the start.
    """
    path = directory / GENERATION_CONFIG
    here = directory / "config.json"
    generation, there = (files.read_object(path), path) if path.exists() else (config, here)
    if set(SPECIAL_IDS) - set(chosen):  # else the files are not used
        _report_unused(generation, there)

    def read(raw: Mapping[str, Any], file: epath.Path, key: str) -> Any:
        return _check(raw.get(key), f"{file}: {key}", config["vocab_size"])

    def either(key: str, *places: tuple[Mapping[str, Any], epath.Path]) -> Any:
        values = (read(*place, key) for place in places)
        return next((value for value in values if value is not None), None)

    trains, generates = (config, here), (generation, there)
    fields: dict[str, Any] = {}
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
                f"generated texts with {first} ({GENERATION_CONFIG}); say which with "
                f"decoder_start_id = {start} or {first}"
            )
        fields["decoder_start_id"] = first if start is None else start
    stated = {field: value for field, value in fields.items() if value is not None}
    if "forced_bos_id" not in chosen:
        stated["forced_bos_id"] = read(*generates, "forced_bos_token_id")
    return stated


def _report_unused(generation: Mapping[str, Any], file: epath.Path) -> None:
    """Warns of settings that transformers generates with and ptjax ignores."""
    used = [k for k, plain in _NEUTRAL.items() if generation.get(k) not in (None, plain)]
    used += [k for k in _FREE if generation.get(k) not in (None, [], {})]
    if used:
        listed = ", ".join(f"{key} = {generation[key]!r}"[:60] for key in used)
        logging.warning(
            "%s: transformers generates with %s; ptjax decodes greedily unless its own flags or "
            "arguments say otherwise (--num_beams, --temperature)",
            file,
            listed,
        )


def write_special_ids(config: T5Config) -> dict[str, Any]:
    """What `config.json` says of them; `read_special_ids` is its inverse."""
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
    """Refuses a tokenizer that ends texts with an id that is no end to the model.

    Raises:
        InputError: its `eos_id` is not among `config.eos_ids`.
    """
    if tokenizer.eos_id not in config.eos_ids:
        ends = " or ".join(map(str, config.eos_ids))
        raise InputError(
            f"{tokenizer.name}: texts end with id {tokenizer.eos_id}, those of the model with "
            f"{ends}; use the model's tokenizer or, if the model's files do not state its own end, "
            f"load_backbone(eos_ids=({tokenizer.eos_id},))"
        )


def _check(value: Any, name: str, vocab_size: int) -> Any:
    """An id, or of the end of sequence a tuple of them, or None."""
    several = isinstance(value, list) and name.endswith("eos_token_id")
    ids = value if several else [value]
    for index in ids:
        if index is not None and (type(index) is not int or not 0 <= index < vocab_size):
            raise InputError(
                f"{name} is {value!r}, not an id of a vocabulary of {vocab_size}; correct the file"
            )
    return tuple(ids) or None if several else value
