"""Records what the transformers of this interpreter makes of tiny T5, mT5 and umT5 models.

    python tests/oracles/record_models.py

writes `tests/fixtures/transformers/models-VERSION.json`, and `.npz` beside it with the logits. It
needs torch; the tests that read the files do not. Recorded with 4.57.6 and 5.24.0 (`make oracle`),
and once with 5.0.0, which scaled the logits of every T5.

Weights come from numpy's `RandomState`, whose stream never changes, so that no file holds them.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "transformers"
SIZES: dict[str, int] = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
KINDS = ("t5", "mt5", "umt5")
KEYS = (None, True, False)
HEADS = ("none", "equal", "own")
INPUTS = np.array([[7, 3, 30, 5, 9, 9, 2, 31, 4, 12, 6, 1], [4, 8, 15, 16, 1, 0, 0, 0, 0, 0, 0, 0]])
TARGETS = np.array([[0, 3, 9, 9, 4], [0, 5, 1, 2, 31]])
ACTIVATIONS = (
    # feed_forward_proj, dense_act_fn, is_gated_act; None is left out
    (None, None, None),
    ("relu", None, None),
    ("gelu", None, None),
    ("gelu_new", None, None),
    ("gated-gelu", None, None),
    ("gated-relu", None, None),
    ("gated-silu", None, None),
    ("gated-gelu", "silu", None),
    ("gated-gelu", "gelu", None),
    ("gated-gelu", "gelu_new", False),
    ("relu", "gelu_new", None),
    ("relu", None, True),
    ("gated-silu", "relu", False),
    (None, "silu", True),
)
LOGITS = (("gated-silu", None, None), ("relu", "gelu_new", None), ("gated-gelu", "gelu", None))
"""Of `ACTIVATIONS`, those whose logits are recorded."""
WRITTEN_KEYS = (
    "model_type",
    "transformers_version",
    "tie_word_embeddings",
    "scale_decoder_outputs",
    "feed_forward_proj",
    "dense_act_fn",
    "is_gated_act",
)
CURVE = np.array([-3.5, -1.7, -0.6, 0.0, 0.4, 1.1, 2.9])


def make_tensors(kind: str, *, gated: bool, head: str) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, float32; `head` is one of `HEADS`."""
    d, joined = SIZES["d_model"], SIZES["num_heads"] * SIZES["d_kv"]
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (SIZES["vocab_size"], d)}
    for stack in ("encoder", "decoder"):
        for layer in range(SIZES["num_layers"]):
            block = f"{stack}.block.{layer}.layer"
            attentions = ["0.SelfAttention", "1.EncDecAttention"][: 1 + (stack == "decoder")]
            for name in attentions:
                shapes |= {f"{block}.{name}.{x}.weight": (joined, d) for x in "qkv"}
                shapes[f"{block}.{name}.o.weight"] = (d, joined)
            if layer == 0 or kind == "umt5":
                shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (
                    SIZES["relative_attention_num_buckets"],
                    SIZES["num_heads"],
                )
            mlp = f"{block}.{len(attentions)}.DenseReluDense"
            shapes |= {
                f"{mlp}.{x}.weight": (SIZES["d_ff"], d)
                for x in (("wi_0", "wi_1"), ("wi",))[not gated]
            }
            shapes[f"{mlp}.wo.weight"] = (d, SIZES["d_ff"])
            shapes |= {f"{block}.{n}.layer_norm.weight": (d,) for n in range(len(attentions) + 1)}
        shapes[f"{stack}.final_layer_norm.weight"] = (d,)
    random = np.random.RandomState(0)
    tensors = {
        name: (random.randn(*shapes[name]) * 0.3 + (len(shapes[name]) == 1)).astype(np.float32)
        for name in sorted(shapes)
    }
    own = random.randn(SIZES["vocab_size"], d).astype(np.float32)
    heads = {"none": None, "equal": tensors["shared.weight"].copy(), "own": own}
    return tensors if heads[head] is None else tensors | {"lm_head.weight": heads[head]}


def folder_key(kind: str, tie: bool | None, scale: bool | None, head: str) -> str:
    """The name of a case of `readings`."""
    return f"{kind} tie_word_embeddings={tie} scale_decoder_outputs={scale} head={head}"


def config_of(kind: str, **keys: Any) -> dict[str, Any]:
    """A `config.json` with these keys besides the sizes; None is left out."""
    return {"model_type": kind, **SIZES} | {k: v for k, v in keys.items() if v is not None}


def model_class(kind: str) -> Any:
    import transformers

    return getattr(transformers, f"{kind.upper()}ForConditionalGeneration")


def read_folder(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[Any, list[str]]:
    """(what `from_pretrained` makes of it, the tensors that it missed)."""
    import safetensors.numpy

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
        model, report = model_class(config["model_type"]).from_pretrained(
            path, output_loading_info=True
        )
    return model.eval(), sorted(report["missing_keys"])


def run(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """(logits [B, L, V], what the decoder hands to the head [B, L, D])."""
    import torch

    with torch.no_grad():
        made = model(
            input_ids=torch.tensor(INPUTS),
            attention_mask=torch.tensor(INPUTS > 0).long(),
            decoder_input_ids=torch.tensor(TARGETS),
            output_hidden_states=True,
        )
    return made.logits.numpy(), made.decoder_hidden_states[-1].numpy()


def reading_of(model: Any, tensors: dict[str, np.ndarray], own: np.ndarray) -> str:
    """Which weights make the logits, and whether scaled: "embedding unscaled", ..."""
    logits, states = run(model)
    factor = SIZES["d_model"] ** -0.5
    heads = {"embedding": tensors["shared.weight"], "own": own}
    found = [
        f"{weights} {scale}"
        for (weights, head), (scale, by) in itertools.product(
            heads.items(), {"unscaled": 1.0, "scaled": factor}.items()
        )
        if np.allclose(logits, by * states @ head.T, atol=1e-4)
    ]
    return found[0] if found else "other weights"


def record_readings() -> dict[str, str]:
    """What a folder's keys and its head mean on reading."""
    readings = {}
    for kind, tie, scale, head in itertools.product(KINDS, KEYS, KEYS, HEADS):
        tensors = make_tensors(kind, gated=True, head=head)
        keys = {"tie_word_embeddings": tie, "scale_decoder_outputs": scale}
        config = config_of(kind, feed_forward_proj="gated-gelu", **keys)
        model, missing = read_folder(config, tensors)
        own = make_tensors(kind, gated=True, head="own")["lm_head.weight"]
        reading = f"missing {', '.join(missing)}" if missing else reading_of(model, tensors, own)
        readings[folder_key(kind, tie, scale, head)] = reading
    return readings


def record_written() -> dict[str, dict[str, Any]]:
    """What `save_pretrained` writes of a model, and what the model was.

    Models are those that a constructor makes, with `tie_word_embeddings` or without, and those of
    folders as version 4 wrote them, loaded and saved again.
    """
    import transformers

    written = {}
    for kind, tie in itertools.product(KINDS, KEYS):
        keys = {} if tie is None else {"tie_word_embeddings": tie}
        make_config = getattr(transformers, f"{kind.upper()}Config")
        config = make_config(**SIZES, **keys, feed_forward_proj="gated-gelu")
        written[f"{kind} made, tie_word_embeddings={tie}"] = save(model_class(kind)(config), kind)
    for kind, head in itertools.product(KINDS, ("none", "own")):
        config = config_of(kind, tie_word_embeddings=head == "none", feed_forward_proj="gated-gelu")
        model, _ = read_folder(config, make_tensors(kind, gated=True, head=head))
        written[f"{kind} of version 4 saved again, head={head}"] = save(model, kind)
    return written


def save(model: Any, kind: str) -> dict[str, Any]:
    """The config.json and head of `model.save_pretrained`, and the reading that the model had."""
    import safetensors
    import torch

    model = model.eval()
    own = make_tensors(kind, gated=True, head="own")
    with torch.no_grad():
        for name, weight in own.items():
            model.get_parameter(name).copy_(torch.tensor(weight))
        if model.lm_head.weight is model.shared.weight:
            model.shared.weight.copy_(torch.tensor(own["shared.weight"]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        with safetensors.safe_open(f"{folder}/model.safetensors", "np") as file:
            head = "own" if "lm_head.weight" in file.keys() else "none"  # noqa: SIM118
    config = {key: config[key] for key in WRITTEN_KEYS if key in config}
    return {
        "config": config,
        "head": head,
        "reading": reading_of(model, own, own["lm_head.weight"]),
    }


def record_activations() -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """({case: its keys, function and gate}, {case: logits}); None of `ACTIVATIONS` is no key."""
    from transformers.activations import ACT2FN

    cases, logits = {}, {}
    for kind, (proj, function, gated) in itertools.product(("t5", "mt5"), ACTIVATIONS):
        keys = {"feed_forward_proj": proj, "dense_act_fn": function, "is_gated_act": gated}
        config = config_of(kind, tie_word_embeddings=False, **keys)
        # Which weights it wants is what it makes of the config.
        make_config = type(model_class(kind).config_class())
        read = make_config.from_dict(config)
        model, missing = read_folder(
            config, make_tensors(kind, gated=read.is_gated_act, head="own")
        )
        assert not missing, missing
        name = " ".join(f"{key}={value}" for key, value in ({"kind": kind} | keys).items())
        layer = model.encoder.block[0].layer[-1].DenseReluDense
        assert type(layer.act) is type(ACT2FN[read.dense_act_fn])
        is_gated = hasattr(layer, "wi_0")
        given = {key: value for key, value in keys.items() if value is not None}
        cases[name] = {
            "keys": given | {"model_type": kind},
            "function": read.dense_act_fn,
            "gated": is_gated,
        }
        if kind == "t5" and (proj, function, gated) in LOGITS:
            logits[name] = run(model)[0]
    return cases, logits


def record_curves() -> dict[str, list[float]]:
    """Every activation without weights, at `CURVE`."""
    import torch
    from transformers.activations import ACT2FN

    curves = {}
    for name in sorted(ACT2FN):
        if name in ("prelu", "xielu"):  # have weights
            continue
        values = ACT2FN[name](torch.tensor(CURVE))
        curves[name] = [round(float(value), 7) for value in values]
    return curves


def record_logits() -> dict[str, np.ndarray]:
    """Of the three kinds with a head of its own."""
    config = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return {
        kind: run(
            read_folder(config_of(kind, **config), make_tensors(kind, gated=True, head="own"))[0]
        )[0]
        for kind in KINDS
    }


def main() -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    activations, logits = record_activations()
    about = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "readings": record_readings(),
        "written": record_written(),
        "activations": activations,
        "curves": record_curves(),
    }
    OUT.mkdir(parents=True, exist_ok=True)
    name = f"models-{transformers.__version__}"
    (OUT / f"{name}.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(OUT / f"{name}.npz", **(logits | record_logits()))
    print(f"wrote {OUT / name}.json and .npz", file=sys.stderr)


if __name__ == "__main__":
    main()
