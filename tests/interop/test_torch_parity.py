"""The network and the name mapping against torch's T5 (transformers): recorded, and live.

`fixtures/torch_parity` holds random models that transformers wrote, with inputs and logits; ByT5's
shape is one where d_model is not heads * d_kv and the stacks differ in depth. float32 on both
sides; the sums run in another order, which moves logits of order 1-10 by up to 1e-5, and 1e-4 is
the bound that T5X's own fixtures have.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import FIXTURES
from t5_ids import with_lengths

from ptjax.backbones.load import Backbone, load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.interop.huggingface_format import COPIES
from ptjax.models.config import T5Config
from ptjax.models.t5 import init_params
from ptjax.trees import flatten_paths

PARITY = FIXTURES / "torch_parity"
NAMES = ("t5_1_0", "t5_1_1", "byt5_shaped")
TOLERANCE = 1e-4


def logits_of(backbone: Backbone, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float32 [B, L, V] of ptjax."""
    return np.asarray(jax.jit(with_lengths(backbone.apply_fn))(backbone.variables, inputs, targets))


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    assert theirs.std() > 0.1  # or the tolerance would hold anything
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


# Recorded


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_torch_computed(name):
    with np.load(PARITY / name / "expected.npz") as recorded:
        expected = dict(recorded)
    inputs, targets = expected["input_ids"], expected["decoder_input_ids"]
    np.testing.assert_array_equal(expected["attention_mask"], inputs > 0)
    assert (inputs[:, -1] == 0).any()  # some rows are padded
    # Torch too lets real positions see all real ones before them, so none is left out here.
    assert_same_logits(logits_of(load_backbone(PARITY / name), inputs, targets), expected["logits"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
def test_what_is_loaded_and_saved_is_bitwise_the_original_file(tmp_path, name, max_shard_bytes):
    backbone = load_backbone(PARITY / name)
    params = backbone.variables["params"]
    save_backbone(
        tmp_path, backbone.config, params, dtype="float32", max_shard_bytes=max_shard_bytes
    )
    saved: dict[str, np.ndarray] = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= safetensors.numpy.load_file(file)
    original = safetensors.numpy.load_file(PARITY / name / "model.safetensors")
    for copy in COPIES:
        if copy in original:
            np.testing.assert_array_equal(original.pop(copy), original["shared.weight"])
    assert set(saved) == set(original)
    for tensor, value in original.items():
        assert saved[tensor].dtype == value.dtype
        np.testing.assert_array_equal(saved[tensor], value, err_msg=tensor)
    again = load_backbone(tmp_path)
    assert (again.config, again.fingerprint) == (backbone.config, backbone.fingerprint)


@pytest.mark.parametrize(("name", "tied"), [("t5_1_0", True), ("t5_1_1", False)])
def test_the_config_says_whether_the_logits_are_tied(tmp_path, name, tied):
    backbone = load_backbone(PARITY / name)
    assert backbone.config.logits_via_embedding == tied
    save_backbone(tmp_path, backbone.config, backbone.variables["params"])
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == tied


# Live

SIZES: dict[str, dict[str, Any]] = {
    "t5_1_0": {"d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2},
    "t5_1_1": {"d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2},
    "byt5": {"d_model": 12, "d_kv": 8, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 1},
}


def make_torch_model(kind: str, seed: int) -> Any:
    """A random T5 of transformers; tied and with relu for 1.0, else untied and gated."""
    import torch
    import transformers

    old = kind == "t5_1_0"
    config = transformers.T5Config(
        vocab_size=90 + seed,
        d_ff=20 + seed,
        relative_attention_num_buckets=(32, 16)[seed % 2],
        relative_attention_max_distance=(128, 40)[seed % 2],
        feed_forward_proj="relu" if old else "gated-gelu",
        tie_word_embeddings=old,
        **SIZES[kind],
    )
    # The trap of transformers 5: the constructor turns False into True.
    config.tie_word_embeddings = old
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_input_embeddings(model.shared)  # which the trap unties as well
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Its own initialisation leaves norm scales at 1 and logits near 0.
            weight.mul_(0.5).add_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
            assert torch.isfinite(weight).all(), name
    return model


def make_tokens(vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [3, 45] with padding, long enough for logarithmic buckets, and targets [3, 20]."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, vocab_size, (3, 45)).astype(np.int32)
    inputs[1, 20:] = inputs[2, 1:] = 0
    targets = rng.integers(2, vocab_size, (3, 20)).astype(np.int32)
    targets[:, 0] = 0
    return inputs, targets


def torch_logits(model: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs > 0, dtype=torch.long),
            decoder_input_ids=torch.tensor(targets, dtype=torch.long),
        ).logits.numpy()


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "seed"), list(itertools.product(SIZES, range(3))))
def test_ptjax_computes_what_torch_computes(tmp_path, kind, seed):
    model = make_torch_model(kind, seed)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone.config.logits_via_embedding == (kind == "t5_1_0")
    inputs, targets = make_tokens(90 + seed, seed)
    theirs = torch_logits(model, inputs, targets)
    assert_same_logits(logits_of(backbone, inputs, targets), theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("max_shard_bytes", [None, 12_000])
def test_transformers_loads_what_ptjax_wrote(tmp_path, kind, max_shard_bytes):
    sizes = SIZES[kind]
    config = T5Config(
        vocab_size=77,
        emb_dim=sizes["d_model"],
        num_heads=sizes["num_heads"],
        num_encoder_layers=sizes["num_layers"],
        num_decoder_layers=sizes["num_decoder_layers"],
        head_dim=sizes["d_kv"],
        mlp_dim=20,
        mlp_activations=("relu",) if kind == "t5_1_0" else ("gelu", "linear"),
        logits_via_embedding=kind == "t5_1_0",
        relpos_buckets=16,
        relpos_max_distance=40,
        layer_norm_epsilon=1e-5,
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    save_backbone(tmp_path, config, params, dtype="float32", max_shard_bytes=max_shard_bytes)
    model = load_into_torch(tmp_path)
    assert_tied(model, config.logits_via_embedding)
    backbone = load_backbone(tmp_path)
    inputs, targets = make_tokens(config.vocab_size, 7)
    ours = logits_of(backbone, inputs, targets)
    assert_same_logits(ours, torch_logits(model, inputs, targets))
    # And once around: what transformers writes of it is the same backbone.
    model.save_pretrained(tmp_path / "again")
    again = load_backbone(tmp_path / "again")
    assert again.fingerprint == backbone.fingerprint
    for path, value in flatten_paths(again.variables["params"]).items():
        np.testing.assert_array_equal(value, flatten_paths(params)[path], err_msg=path)
    assert dataclasses.replace(again.config, dropout_rate=0.1) == config


def load_into_torch(directory: Path) -> Any:
    """`from_pretrained`, with nothing missing and nothing left over."""
    import transformers

    model, report = transformers.T5ForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def assert_tied(model: Any, tied: bool) -> None:
    same = model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
    assert same == tied


@pytest.mark.oracle
def test_a_head_that_transformers_unties_by_itself_is_kept(tmp_path):
    """The trap: an untied model whose config was made with `tie_word_embeddings=False` alone."""
    import transformers

    config = transformers.T5Config(
        vocab_size=90, d_ff=20, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        **SIZES["t5_1_1"],
    )  # fmt: skip
    model = make_torch_model("t5_1_1", 0)
    model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)  # what such a model's config.json looks like
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is True, "transformers has mended it: simplify"
    backbone = load_backbone(tmp_path)
    assert not backbone.config.logits_via_embedding
    loaded = load_into_torch(tmp_path)
    assert_tied(loaded, False)
    inputs, targets = make_tokens(90, 1)
    assert_same_logits(logits_of(backbone, inputs, targets), torch_logits(loaded, inputs, targets))
