"""Translates T5's parameter names and config to Hugging Face's, and back.

The table of names is `T5_FAMILY.tensor_names`; the rest follows
`transformers/models/t5/modeling_t5.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.interop.special_ids import read_special_ids, write_special_ids
from ptjax.models.config import T5Config
from ptjax.models.t5_family import LOGITS, T5_FAMILY

# Tensors to ignore: copies of shared.weight, and one that is in old files but never used.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

# Fields of T5Config -> keys of config.json; files may omit the optional ones.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_heads": "num_heads",
    "num_encoder_layers": "num_layers",
}
_OPTIONAL = {
    "num_decoder_layers": "num_decoder_layers",
    "dropout_rate": "dropout_rate",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "relpos_buckets": "relative_attention_num_buckets",
    "relpos_max_distance": "relative_attention_max_distance",
}

# transformers' activation names -> those of `T5Config.mlp_activations`. transformers' `gelu` is
# exact, Flax's is the tanh approximation. Of several names the first is written.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu_accurate": "gelu",
    "gelu_fast": "gelu",
    # Not `gelu`: feed_forward_proj gated-gelu means the approximation.
    "gelu_python": "gelu_exact",
    "gelu": "gelu_exact",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "linear",
}
_NETWORKS = {"t5": "T5ForConditionalGeneration", "umt5": "UMT5ForConditionalGeneration"}
"""model_type -> class written into config.json; an mT5 is written as a T5, which it is."""


# Names


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))


_RULES = {
    of_layer: T5_FAMILY.tensor_names({"relpos_per_layer": of_layer}) for of_layer in (False, True)
}
_TO_HUGGINGFACE = [
    (_pattern(ours), theirs, turned)
    for ours, theirs, turned in dict.fromkeys([*_RULES[False], *_RULES[True]])
]
_TO_T5X = {
    of_layer: [(_pattern(theirs), ours, turned) for ours, theirs, turned in rules]
    for of_layer, rules in _RULES.items()
}


def _translate(
    name: str, table: list[tuple[re.Pattern[str], str, bool]]
) -> tuple[str, bool] | None:
    for pattern, template, transposed in table:
        if match := pattern.fullmatch(name):
            return template.format(i=match[1]) if match.groups() else template, transposed
    return None


def to_huggingface(name: str) -> tuple[str, bool] | None:
    """Translates a T5X name to (Hugging Face's name, whether its array is the transpose).

    Returns None if Hugging Face's T5 has no such parameter.
    `to_huggingface("encoder/layers_3/attention/query/kernel")` is
    `("encoder.block.3.layer.0.SelfAttention.q.weight", True)`; `to_t5x` is its inverse.
    """
    return _translate(name, _TO_HUGGINGFACE)


def to_t5x(name: str, *, relpos_per_layer: bool = False) -> tuple[str, bool] | None:
    """Translates a Hugging Face name to (T5X's name, whether its array is the transpose).

    Returns None for a name that is not part of a T5.

    Args:
        relpos_per_layer: `T5Config.relpos_per_layer`: whether a bias table in block 0 belongs to
            that layer rather than to the whole stack.
    """
    return _translate(name, _TO_T5X[relpos_per_layer])


def expected_names(fields: Metadata) -> Iterator[str]:
    """The T5X names of all parameters of a T5, except the logits' kernel.

    Args:
        fields: fields of `T5Config` by name, as `load_config` returns them.
    """
    gated = len(fields["mlp_activations"]) == 2
    absent = {LOGITS}
    for ours, _, _ in T5_FAMILY.tensor_names(fields):
        stack = ours.split("/")[0]
        if ours in absent or ours.split("/")[-2] in (("wi",) if gated else ("wi_0", "wi_1")):
            continue
        layers = fields[f"num_{stack}_layers"] if "{i}" in ours else 1
        yield from (ours.format(i=i) for i in range(layers))


# config.json


def load_config(directory: PathLike, chosen: Collection[str] = ()) -> JsonObject:
    """Reads the fields of `T5Config` from `config.json`, and special ids by `read_special_ids`.

    `logits_via_embedding` is not among them: transformers 5 writes `tie_word_embeddings: true`
    for untied models too, so `load_huggingface` decides from the weights.

    Args:
        directory: the folder that contains `config.json`.
        chosen: the fields that the user sets; files may contradict each other about them.

    Raises:
        InputError: a key is missing or has an unsupported value, or the model is not a T5.
    """
    raw = read_config(epath.Path(directory))
    where = epath.Path(directory) / "config.json"
    fields = {}
    for field, key in _REQUIRED.items():
        if key not in raw:
            raise InputError(f"{where}: the key {key!r} is missing")
        fields[field] = raw[key]
    fields["num_decoder_layers"] = raw["num_layers"]
    fields |= {field: raw[key] for field, key in _OPTIONAL.items() if raw.get(key) is not None}
    for field, value in fields.items():
        kinds = int if field not in ("dropout_rate", "layer_norm_epsilon") else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "an integer" if kinds is int else "a number"
            raise InputError(f"{where}: {field} must be {kind}, got {value!r}")
    return {
        **fields,
        "mlp_activations": _read_activations(raw, where),
        "relpos_per_layer": kind_of(raw) == "umt5",
        **read_special_ids(epath.Path(directory), raw, chosen),
    }


def _read_activations(raw: Metadata, where: epath.Path) -> tuple[str, ...]:
    """`mlp_activations`, as transformers 4 and 5 read them.

    `feed_forward_proj` gives the defaults of `dense_act_fn` and `is_gated_act`, which take
    precedence if the file has them.
    """
    # The T5 1.0 files of 2020 have none of these keys and use relu.
    proj = raw.get("feed_forward_proj", "relu" if kind_of(raw) == "t5" else "gated-gelu")
    gate, _, name = proj.rpartition("-") if isinstance(proj, str) else ("?", "", "")
    if gate not in ("", "gated"):
        raise InputError(
            f"{where}: feed_forward_proj is {proj!r}; it must be the name of an activation, "
            "optionally after 'gated-'"
        )
    name = raw.get("dense_act_fn", "gelu_new" if proj == "gated-gelu" else name)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        key = "dense_act_fn" if "dense_act_fn" in raw else "feed_forward_proj"
        raise InputError(
            f"{where}: {key} is {raw[key]!r}; supported activations: {', '.join(_ACTIVATIONS)}"
        )
    gated = raw.get("is_gated_act", gate == "gated")
    return (_ACTIVATIONS[name], "linear") if gated else (_ACTIVATIONS[name],)


def make_config_json(config: T5Config, dtype: str) -> JsonObject:
    """Makes the content of `config.json` for weights saved in `dtype`; inverse of `load_config`.

    `tie_word_embeddings: false` also makes transformers 4 leave the decoder's output unscaled;
    version 5 has its own key for that, and 5.0.0 scales every T5 whose config lacks it.
    """
    kind = "umt5" if config.relpos_per_layer else "t5"
    return {
        "architectures": [_NETWORKS[kind]],
        "model_type": kind,
        **{key: getattr(config, field) for field, key in (_REQUIRED | _OPTIONAL).items()},
        **_write_activations(config.mlp_activations),
        "tie_word_embeddings": config.logits_via_embedding,
        "scale_decoder_outputs": config.logits_via_embedding,
        "is_encoder_decoder": True,
        "use_cache": True,
        "initializer_factor": 1.0,
        **write_special_ids(config),
        "torch_dtype": dtype,
    }


def _write_activations(activations: tuple[str, ...]) -> JsonObject:
    """The inverse of `_read_activations`; its keys agree with each other."""
    first, *gate = activations
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    name = names.get("silu" if first == "swish" else first)  # Flax has both names
    if name is None or gate not in ([], ["linear"]):
        raise InputError(
            f"mlp_activations {tuple(activations)} cannot be saved: Hugging Face's T5 has one of "
            f"{', '.join(names)}, alone or followed by 'linear' (gated)"
        )
    proj = f"gated-{'gelu' if name == 'gelu_new' else name}" if gate else name
    return {"feed_forward_proj": proj, "dense_act_fn": name, "is_gated_act": bool(gate)}


# The logits


class Logits(NamedTuple):
    """How the logits are computed from the decoder's output.

    Attributes:
        own: whether it is multiplied by `lm_head.weight`; otherwise by the embedding.
        scaled: whether it is multiplied by 1/sqrt(D) first.
    """

    own: bool
    scaled: bool

    def __str__(self) -> str:
        weights = "lm_head.weight" if self.own else "the embedding"
        return f"{weights}, {'scaled by 1/sqrt(d_model)' if self.scaled else 'unscaled'}"


def read_logits(raw: Metadata, head: Literal["none", "equal", "own"], where: epath.Path) -> Logits:
    """Determines how transformers computes a model's logits.

    Versions 4 (4.57) and 5 (5.24) differ. In 4, `tie_word_embeddings` decides both: tied logits
    use the embedding and are scaled. In 5, `lm_head.weight` is used if present, and
    `scale_decoder_outputs`, or `tie_word_embeddings` without it, decides the scale; an mT5 is
    never scaled. If the two readings differ, the version that wrote the file decides; a file that
    records no version but has a key of version 5 counts as written by 5.

    Args:
        raw: the content of `config.json`.
        head: "none" without an `lm_head.weight`, "equal" if it equals the embedding, else "own".
        where: the path of `config.json`, for messages.

    Raises:
        InputError: the weights lack a tensor, or the two readings differ and no version is known.
    """
    kind = kind_of(raw)
    tied = bool(raw.get("tie_word_embeddings", kind != "mt5"))
    if not tied and head == "none":
        raise InputError(
            f"{where.parent}: the tensor lm_head.weight (parameter {LOGITS}) is missing from the "
            "weights, but config.json says that it is not tied to the embedding"
        )
    by_4 = Logits(own=head == "own" and not tied, scaled=tied)
    by_key = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True) is not False)
    by_5 = Logits(own=head == "own", scaled=kind != "mt5" and bool(by_key))
    version = str(raw.get("transformers_version", ""))
    major = int(version.split(".")[0]) if version.split(".")[0].isdecimal() else None
    if major is None and "scale_decoder_outputs" in raw:
        major = 5
    if by_4 == by_5 or (major is not None and major >= 5):
        return by_5
    # Version 4 never writes an lm_head.weight that it would ignore on loading.
    if major is not None and by_4.own == by_5.own and "scale_decoder_outputs" not in raw:
        return by_4
    written = f"transformers {version} wrote it" if version else "it records no version"
    former = _choose_4(raw, major, remove_head=by_4.own != by_5.own)
    raise InputError(
        f"{where}: the logits can be read in two ways, and {written}. transformers 4 uses {by_4}; "
        f'transformers 5 uses {by_5}. To choose the latter, set "transformers_version" to '
        f'"5.24.0" in it; for the former, {former}'
    )


def _choose_4(raw: Metadata, major: int | None, *, remove_head: bool) -> str:
    """How to edit a folder so that its logits are read as by transformers 4."""
    steps = ['set it to "4.57.6"'] if major is None else []
    if remove_head:
        steps.append("remove lm_head.weight from the weights")
    if "scale_decoder_outputs" in raw:
        steps.append('remove "scale_decoder_outputs"')
    return " and ".join(steps)


def kind_of(raw: Metadata) -> str:
    """The `model_type` of the content of a `config.json`; "t5" if it has none."""
    return raw.get("model_type", "t5")


def read_config(directory: epath.Path) -> JsonObject:
    """Reads `config.json`, unchanged.

    Raises:
        InputError: the file is missing, is not a JSON object, or is not a T5's.
    """
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{path}: the file is missing; a Hugging Face model has one")
    raw = files.read_object(path)
    if kind_of(raw) not in ("t5", "mt5", "umt5"):
        raise InputError(
            f"{path}: unsupported model_type {kind_of(raw)!r}; ptjax reads t5, mt5 and umt5 "
            "(T5, Flan-T5, mT5, ByT5, umT5)"
        )
    return raw
