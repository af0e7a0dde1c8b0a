"""How Hugging Face's T5 names things: parameters and `config.json`, both ways.

The table of names is the family's. Facts after `transformers/models/t5/modeling_t5.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.interop.special_ids import read_special_ids, write_special_ids
from ptjax.models.config import T5Config
from ptjax.models.t5_family import LOGITS, T5_FAMILY

# Copies of other tensors, and one that old files carry and the network never uses.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

# T5Config's fields, Hugging Face's keys. What its files may leave out is not required.
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

# Names of transformers' activations -> those of `T5Config.mlp_activations`. Its `gelu` is exact,
# Flax's is the tanh approximation. The first name of each is the one that is written.
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
"""model_type and class of what is written; mT5 is written as the T5 that it is."""


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
    """(Hugging Face's name, transposed) of a T5X name, None where there is none.

    `to_huggingface("encoder/layers_3/attention/query/kernel")` is
    `("encoder.block.3.layer.0.SelfAttention.q.weight", True)`; `to_t5x` is its inverse.
    """
    return _translate(name, _TO_HUGGINGFACE)


def to_t5x(name: str, *, relpos_per_layer: bool = False) -> tuple[str, bool] | None:
    """(T5X's name, transposed) of a Hugging Face name, None where there is none.

    Args:
        relpos_per_layer: `T5Config.relpos_per_layer`: a table of biases in block 0 is that
            layer's, not the stack's.
    """
    return _translate(name, _TO_T5X[relpos_per_layer])


def expected_names(fields: Mapping[str, Any]) -> Iterator[str]:
    """Every parameter of a T5 with these config fields, but for the logits."""
    gated = len(fields["mlp_activations"]) == 2
    absent = {LOGITS}
    for ours, _, _ in T5_FAMILY.tensor_names(fields):
        stack = ours.split("/")[0]
        if ours in absent or ours.split("/")[-2] in (("wi",) if gated else ("wi_0", "wi_1")):
            continue
        layers = fields[f"num_{stack}_layers"] if "{i}" in ours else 1
        yield from (ours.format(i=i) for i in range(layers))


# config.json


def load_config(directory: str | os.PathLike[str], chosen: Collection[str] = ()) -> dict[str, Any]:
    """Fields of `T5Config` that `config.json` states; special ids as `read_special_ids` has them.

    Without `logits_via_embedding`: transformers 5 writes `tie_word_embeddings: true` for untied
    models too, so the weights decide that (`load_huggingface`).

    Args:
        chosen: fields that the user sets; contradictions about them do not matter.

    Raises:
        InputError: a key is missing or has no meaning here, or the model is no T5.
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
            raise InputError(f"{where}: the value {value!r} of {field} is no number of its kind")
    return {
        **fields,
        "mlp_activations": _read_activations(raw, where),
        "relpos_per_layer": kind_of(raw) == "umt5",
        **read_special_ids(epath.Path(directory), raw, chosen),
    }


def _read_activations(raw: Mapping[str, Any], where: epath.Path) -> tuple[str, ...]:
    """`mlp_activations`, as transformers 4 and 5 read them.

    `feed_forward_proj` gives the defaults of `dense_act_fn` and `is_gated_act`; where these stand
    in the file themselves, they are what runs.
    """
    # The files of T5 1.0 of 2020 have none of these keys; relu is what they came with.
    proj = raw.get("feed_forward_proj", "relu" if kind_of(raw) == "t5" else "gated-gelu")
    gate, _, name = proj.rpartition("-") if isinstance(proj, str) else ("?", "", "")
    if gate not in ("", "gated"):
        raise InputError(
            f"{where}: feed_forward_proj is {proj!r}; it has to be the name of an activation, "
            "or 'gated-' and one"
        )
    name = raw.get("dense_act_fn", "gelu_new" if proj == "gated-gelu" else name)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        key = "dense_act_fn" if "dense_act_fn" in raw else "feed_forward_proj"
        raise InputError(
            f"{where}: {key} is {raw[key]!r}; ptjax knows the activations {', '.join(_ACTIVATIONS)}"
        )
    gated = raw.get("is_gated_act", gate == "gated")
    return (_ACTIVATIONS[name], "linear") if gated else (_ACTIVATIONS[name],)


def make_config_json(config: T5Config, dtype: str) -> dict[str, Any]:
    """What `config.json` says of `config`; `load_config` is its inverse.

    `tie_word_embeddings: false` also tells transformers 4 not to scale the decoder's output; 5 has
    a key for that, and its first version, 5.0.0, scales every T5 whose config lacks it.
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


def _write_activations(activations: tuple[str, ...]) -> dict[str, Any]:
    """The inverse of `_read_activations`; no two of its keys contradict each other."""
    first, *gate = activations
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    name = names.get("silu" if first == "swish" else first)  # Flax has both names too
    if name is None or gate not in ([], ["linear"]):
        raise InputError(
            f"mlp_activations {tuple(activations)} have no name in Hugging Face's T5; it has one of"
            f" {', '.join(names)}, alone or with 'linear' after it (gated)"
        )
    proj = f"gated-{'gelu' if name == 'gelu_new' else name}" if gate else name
    return {"feed_forward_proj": proj, "dense_act_fn": name, "is_gated_act": bool(gate)}


# The logits


class Logits(NamedTuple):
    """What makes the logits of the decoder's output.

    Attributes:
        own: `lm_head.weight`, not the embedding.
        scaled: the output is multiplied by 1/sqrt(D) before.
    """

    own: bool
    scaled: bool

    def __str__(self) -> str:
        weights = "lm_head.weight" if self.own else "the embedding"
        return f"{weights}, {'scaled by 1/sqrt(d_model)' if self.scaled else 'unscaled'}"


def read_logits(
    raw: Mapping[str, Any], head: Literal["none", "equal", "own"], where: epath.Path
) -> Logits:
    """What transformers makes of a `config.json` and of the `lm_head.weight` beside it.

    Versions 4 (4.57) and 5 (5.24) differ. In 4, `tie_word_embeddings` decides both: tied logits
    come from the embedding and are scaled. In 5, `lm_head.weight` is used wherever it is, and
    `scale_decoder_outputs` decides the scale, `tie_word_embeddings` only where that is missing; an
    mT5 is never scaled. Where the two readings differ, the version that wrote the file decides; a
    file that names none but has a key of version 5 is one of 5.

    Args:
        raw: the content of `config.json`, which `where` names.
        head: whether the weights have an `lm_head.weight`, and one that differs from the embedding.

    Raises:
        InputError: the weights lack a tensor, or nothing decides between two readings.
    """
    kind = kind_of(raw)
    tied = bool(raw.get("tie_word_embeddings", kind != "mt5"))
    if not tied and head == "none":
        raise InputError(
            f"{where.parent}: the tensor lm_head.weight (parameter {LOGITS}) is missing from the "
            "weights, config.json says that it is not tied to the embedding"
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
    # What 4 writes has one of the two, never an lm_head that its own reading would drop.
    if major is not None and by_4.own == by_5.own and "scale_decoder_outputs" not in raw:
        return by_4
    written = f"transformers {version} wrote it" if version else "it does not say who wrote it"
    raise InputError(
        f"{where}: the logits can be read in two ways, and {written}. transformers 4 takes {by_4}; "
        f'transformers 5 takes {by_5}. To choose the latter, set "transformers_version" to '
        f'"5.24.0" in it; for the former, {_choose_4(raw, head)}'
    )


def _choose_4(raw: Mapping[str, Any], head: str) -> str:
    """What to change in a folder so that its logits are read as transformers 4 does."""
    steps = []
    if head == "own":
        steps.append("remove lm_head.weight from the weights")
    if "scale_decoder_outputs" in raw:
        steps.append('remove "scale_decoder_outputs"')
    if kind_of(raw) == "mt5" and not steps:
        steps.append('set it to "4.57.6"')
    return " and ".join(steps)


def kind_of(raw: Mapping[str, Any]) -> str:
    """`model_type`; files without one are T5's."""
    return raw.get("model_type", "t5")


def read_config(directory: epath.Path) -> dict[str, Any]:
    """`config.json` as it stands, after a check that it is a T5's."""
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{path}: the file is missing; a Hugging Face model has one")
    raw = files.read_object(path)
    if kind_of(raw) not in ("t5", "mt5", "umt5"):
        raise InputError(
            f"{path}: model_type is {kind_of(raw)!r}, another network; ptjax reads t5, mt5 and umt5"
            " (T5, Flan-T5, mT5, ByT5, umT5)"
        )
    return raw
