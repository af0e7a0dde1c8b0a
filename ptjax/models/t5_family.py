"""T5 as a family: parameter names, sharding, and how a config is inferred from the weights.

T5 1.0 and 1.1, LM-adapted and Flan-T5, mT5 and ByT5 differ only in sizes. Variants by config: umT5
has relative position biases in every layer (`relpos_per_layer`), UL2 is gated by silu
(`mlp_activations`), MADLAD pads with id 1 (`pad_id`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax
from jax.sharding import PartitionSpec as P

from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata
from ptjax.models import t5
from ptjax.models.attention import AttendFn, plain_attention
from ptjax.models.config import T5Config
from ptjax.models.family import (
    ApplyFn,
    ArrayInfo,
    Feature,
    NameRule,
    Parts,
    Rules,
    embedding_of,
    grid_of,
)
from ptjax.models.prompted import make_apply_fn
from ptjax.models.stacking import GatherFn
from ptjax.trees import Tree

EMBEDDING = "token_embedder/embedding"
LOGITS = "decoder/logits_dense/kernel"

SHARDING_RULES: Rules = (
    (r"params/token_embedder/embedding", P("model", None)),
    (r"params/.*/(query|key|value|wi|wi_0|wi_1|logits_dense)/kernel", P("fsdp", "model")),
    (r"params/.*/(out|wo)/kernel", P("model", "fsdp")),
    (r"params/(.*/)?relpos_bias/rel_embedding", P("model", None)),  # per stack, or in a layer
    (r"params/.*/scale", P()),
    (r"prompt/.*", P()),
)

# `torch.nn.Linear` stores [out, in], T5X's kernels are [in, out], so every kernel is transposed;
# norm scales and embeddings are not. In both, `wi_0` is the GELU side.
_NAMES = (
    NameRule(EMBEDDING, "shared.weight", False),
    NameRule(LOGITS, "lm_head.weight", True),
    *(
        row
        for stack, mlp in (("encoder", 1), ("decoder", 2))
        for row in (
            NameRule(f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight", False),
            *(
                NameRule(
                    f"{stack}/layers_{{i}}/mlp/{wi}/kernel",
                    f"{stack}.block.{{i}}.layer.{mlp}.DenseReluDense.{wi}.weight",
                    True,
                )
                for wi in ("wi", "wi_0", "wi_1", "wo")
            ),
        )
    ),
    *(
        NameRule(
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
        NameRule(
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
# T5 stores a stack's relative position biases in its first layer, umT5 in every layer.
_RELPOS = tuple(
    NameRule(
        f"{stack}/{ours}relpos_bias/rel_embedding",
        f"{stack}.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight",
        True,
    )
    for stack in ("encoder", "decoder")
    for ours, layer in (("", "0"), ("layers_{i}/", "{i}"))
)


@dataclasses.dataclass(frozen=True)
class T5Family:
    """The family of T5 and its variants; see `family.Family`. Use the object `T5_FAMILY`."""

    title: str = "a T5"
    described: str = "a T5 under T5X's names"
    config_type: type = T5Config
    sharding_rules: Rules = SHARDING_RULES
    divided: Sequence[str] = ("num_heads", "mlp_dim", "vocab_size")
    divided_by_fsdp: Sequence[str] = ("emb_dim",)
    embedding_path: str = EMBEDDING
    lacks: Collection[Feature] = ()
    old_fields: Sequence[str] = (
        "vocab_size",
        "emb_dim",
        "num_heads",
        "num_encoder_layers",
        "num_decoder_layers",
        "head_dim",
        "mlp_dim",
        "mlp_activations",
        "logits_via_embedding",
        "relpos_buckets",
    )
    not_computed: Collection[str] = (
        # How the network is run.
        "dtype",
        "dropout_rate",
        "scan_layers",
        "remat",
        # The meaning of its inputs and outputs.
        "pad_id",
        "eos_ids",
        "decoder_start_id",
        "forced_bos_id",
    )

    def check_name(self, path: str, array: ArrayInfo) -> None:
        """Raises InputError for a parameter of a scanned T5X model (`scalable_t5`, umT5).

        Such a parameter has an axis `layers`, over which all layers are stacked.
        """
        parts = path.split("/")
        stacked = parts[:2] in (["encoder", "encoder"], ["decoder", "decoder"])
        if stacked or "scan" in parts or "layers" in parts or len(array.shape) > 2:
            raise InputError(
                f"{array.where}: parameter {path} {list(array.shape)} belongs to a scanned model, "
                "whose layers are stacked along a `layers` axis; ptjax reads unscanned T5X "
                "checkpoints"
            )

    def infer_config(self, lazy_arrays: Mapping[str, ArrayInfo], name: str) -> JsonObject:
        """Infers fields of `T5Config` from parameter names and shapes; see `family.Family`."""

        def shape(ending: str) -> tuple[int, ...]:
            # The most common one of all layers: a later check names the parameter that differs.
            shapes = {path: x.shape for path, x in lazy_arrays.items() if path.endswith(ending)}
            if not shapes:
                what = ending.removeprefix("/")
                raise InputError(
                    f"{name}: parameter {what} is missing; is the checkpoint complete?"
                )
            [(usual, _)] = collections.Counter(shapes.values()).most_common(1)
            if len(usual) != 2 or 0 in usual:
                path = next(path for path in shapes if shapes[path] == usual)
                raise InputError(
                    f"{lazy_arrays[path].where}: parameter {path} has shape {usual}; a T5 has a "
                    "2-D parameter here"
                )
            return usual

        vocab_size, _ = shape(EMBEDDING)
        num_heads, relpos_buckets = shape("/relpos_bias/rel_embedding")
        emb_dim, joined = shape("attention/query/kernel")
        gated = any(path.endswith(("/wi_0/kernel", "/wi_1/kernel")) for path in lazy_arrays)
        return {
            "vocab_size": vocab_size,
            "emb_dim": emb_dim,
            "num_heads": num_heads,
            "num_encoder_layers": _layers(lazy_arrays, "encoder"),
            "num_decoder_layers": _layers(lazy_arrays, "decoder"),
            "head_dim": joined // num_heads,
            "mlp_dim": shape("/mlp/wi_0/kernel" if gated else "/mlp/wi/kernel")[1],
            "mlp_activations": ("gelu", "linear") if gated else ("relu",),
            "logits_via_embedding": LOGITS not in lazy_arrays,
            "relpos_buckets": relpos_buckets,
            "relpos_per_layer": "encoder/layers_0/relpos_bias/rel_embedding" in lazy_arrays,
        }

    def check_depth(
        self, lazy_arrays: Mapping[str, ArrayInfo], config: T5Config, name: str
    ) -> None:
        """Raises InputError if the config has more layers than the files have.

        Does not trace the network: with a wrong number of layers that could take forever.
        """
        for stack, layers in (
            ("encoder", config.num_encoder_layers),
            ("decoder", config.num_decoder_layers),
        ):
            if layers > (count := _layers(lazy_arrays, stack)):
                raise InputError(
                    f"{name}: parameter {stack}/layers_{count}/* is missing; the config has "
                    f"{layers:,} {stack} layers, the weights {count}; is the checkpoint complete?"
                )

    def parameter_shapes(self, config: T5Config) -> Tree:
        return t5.parameter_shapes(config)

    def tensor_names(self, fields: Metadata) -> Sequence[NameRule]:
        """Returns a rule for each parameter: its name in ptjax and in Hugging Face's files.

        Args:
            fields: the config's fields by name. Only `relpos_per_layer` matters: if it is true,
                every block in Hugging Face's files has relative position biases, else block 0.
        """
        return _NAMES + _RELPOS[1 if fields.get("relpos_per_layer") else 0 :: 2]

    def build(
        self,
        config: T5Config,
        *,
        attends_to_input: bool = True,
        attend: AttendFn = plain_attention,
        gather: GatherFn | None = None,
        collections: tuple[str, ...] = (),
    ) -> ApplyFn:
        return make_apply_fn(config, attends_to_input, gather, collections, attend)

    def embedding(self, params: Tree) -> jax.Array:
        return embedding_of(params, EMBEDDING)

    def is_quantized(self, path: str) -> bool:
        """Whether `load_backbone(quantize=...)` quantizes it: every kernel except the logits'.

        The embedding, whose scale the prompt shares, and the logits, which T5 computes in float32,
        are 2% of XXL and are not quantized.
        """
        return path.endswith("/kernel") and "logits_dense" not in path

    def fingerprint_parts(self, path: str, shape: tuple[int, ...]) -> Parts:
        """Returns which entries of a parameter the backbone's fingerprints cover.

        Each part is a tuple of one slice per axis. Both versions of the fingerprint cover the part
        "rows": rows 0, 97, 194, ... of the embedding, whole norm scales, and the first row of each
        `wo` kernel. Only version 2 covers "grid", a regular sample (`family.grid_of`) of each `wo`
        kernel and of all other parameters.

        >>> T5_FAMILY.fingerprint_parts("encoder/layers_0/attention/query/kernel", (512, 384))
        {'grid': (slice(None, None, 8), slice(None, None, 6))}
        """
        *_, module, name = path.split("/")
        every = slice(None)
        if name == "embedding":
            return {"rows": (slice(None, None, 97), every)}
        if name == "scale":
            return {"rows": (every,)}
        grid = grid_of(shape)
        return {"rows": (slice(0, 1), every), "grid": grid} if module == "wo" else {"grid": grid}


def _layers(lazy_arrays: Mapping[str, ArrayInfo], stack: str) -> int:
    return len({path.split("/")[1] for path in lazy_arrays if path.startswith(f"{stack}/layers_")})


T5_FAMILY = T5Family()
