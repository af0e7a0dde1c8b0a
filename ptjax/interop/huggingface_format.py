"""How Hugging Face's T5 names things: parameters and `config.json`, both ways.

`torch.nn.Linear` keeps [out, in] where T5X's kernels are [in, out], so every kernel is transposed;
norm scales and embeddings are not. Facts after `transformers/models/t5/modeling_t5.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from ptjax import untrusted
from ptjax.errors import InputError
from ptjax.models.config import T5Config

EMBEDDING = "token_embedder/embedding"
LOGITS = "decoder/logits_dense/kernel"

# T5X's name, Hugging Face's name, transposed; {i} is the layer. In both, `wi_0` is the GELU side.
_TABLE: tuple[tuple[str, str, bool], ...] = (
    (EMBEDDING, "shared.weight", False),
    (LOGITS, "lm_head.weight", True),
    *(
        row
        for stack, mlp in (("encoder", 1), ("decoder", 2))
        for row in (
            (
                f"{stack}/relpos_bias/rel_embedding",
                f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                True,
            ),
            (f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight", False),
            *(
                (
                    f"{stack}/layers_{{i}}/mlp/{wi}/kernel",
                    f"{stack}.block.{{i}}.layer.{mlp}.DenseReluDense.{wi}.weight",
                    True,
                )
                for wi in ("wi", "wi_0", "wi_1", "wo")
            ),
        )
    ),
    *(
        (
            f"{stack}/layers_{{i}}/{attention}/{ours}/kernel",
            f"{stack}.block.{{i}}.layer.{layer}.{theirs}.{ours[0]}.weight",
            True,
        )
        for stack, attention, layer, theirs in (
            ("encoder", "attention", 0, "SelfAttention"),
            ("decoder", "self_attention", 0, "SelfAttention"),
            ("decoder", "encoder_decoder_attention", 1, "EncDecAttention"),
        )
        for ours in ("query", "key", "value", "out")
    ),
    *(
        (
            f"{stack}/layers_{{i}}/{norm}_layer_norm/scale",
            f"{stack}.block.{{i}}.layer.{layer}.layer_norm.weight",
            False,
        )
        for stack, layer, norm in (
            ("encoder", 0, "pre_attention"),
            ("encoder", 1, "pre_mlp"),
            ("decoder", 0, "pre_self_attention"),
            ("decoder", 1, "pre_cross_attention"),
            ("decoder", 2, "pre_mlp"),
        )
    ),
)

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
_ACTIVATIONS = {"relu": ("relu",), "gated-gelu": ("gelu", "linear")}


# Names


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))


_TO_HUGGINGFACE = [(_pattern(ours), theirs, turned) for ours, theirs, turned in _TABLE]
_TO_T5X = [(_pattern(theirs), ours, turned) for ours, theirs, turned in _TABLE]


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


def to_t5x(name: str) -> tuple[str, bool] | None:
    """(T5X's name, transposed) of a Hugging Face name, None where there is none."""
    return _translate(name, _TO_T5X)


def expected_names(fields: Mapping[str, Any]) -> Iterator[str]:
    """Every parameter of a T5 with these config fields, but for the logits."""
    gated = len(fields["mlp_activations"]) == 2
    absent = {LOGITS}
    for ours, _, _ in _TABLE:
        stack = ours.split("/")[0]
        if ours in absent or ours.split("/")[-2] in (("wi",) if gated else ("wi_0", "wi_1")):
            continue
        layers = fields[f"num_{stack}_layers"] if "{i}" in ours else 1
        yield from (ours.format(i=i) for i in range(layers))


# config.json


def load_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of `T5Config` that `config.json` states.

    Without `logits_via_embedding`: transformers 5 writes `tie_word_embeddings: true` for untied
    models too, so the weights decide that (`load_huggingface`).

    Raises:
        InputError: a key is missing, or the model is no T5.
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
    # The files of T5 1.0 of 2020 have no such key; relu is what it was introduced with.
    activation = raw.get("feed_forward_proj", "relu")
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"{where}: feed_forward_proj is {activation!r}; ptjax knows {', '.join(_ACTIVATIONS)}"
        )
    return fields | {"mlp_activations": _ACTIVATIONS[activation]}


def make_config_json(config: T5Config, dtype: str) -> dict[str, Any]:
    """What `config.json` says of `config`; `load_config` is its inverse.

    `tie_word_embeddings: false` also tells transformers not to scale the decoder's output.
    """
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if tuple(config.mlp_activations) not in activations:
        raise InputError(
            f"mlp_activations {tuple(config.mlp_activations)} have no name in Hugging Face's T5; "
            f"it has {', '.join(map(str, activations))}"
        )
    proj = activations[tuple(config.mlp_activations)]
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{key: getattr(config, field) for field, key in (_REQUIRED | _OPTIONAL).items()},
        "feed_forward_proj": proj,
        "dense_act_fn": "gelu_new" if proj == "gated-gelu" else proj,
        "is_gated_act": proj == "gated-gelu",
        "tie_word_embeddings": config.logits_via_embedding,
        "is_encoder_decoder": True,
        "use_cache": True,
        "initializer_factor": 1.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": dtype,
    }


def read_config(directory: epath.Path) -> dict[str, Any]:
    """`config.json` as it stands, after a check that it is a T5's."""
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{path}: the file is missing; a Hugging Face model has one")
    try:
        raw = untrusted.read_json(path)
    except ValueError as error:
        raise InputError(f"{path}: the file is truncated or no JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: the file is no JSON object")
    kind = raw.get("model_type", "t5")
    if kind not in ("t5", "mt5"):
        raise InputError(
            f"{path}: model_type is {kind!r}, another network; ptjax reads t5 and mt5 (T5, Flan-T5,"
            " mT5, ByT5)"
        )
    return raw
