"""Fingerprints: what changes them, what does not, and prompts that record the older one alone."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from tiny import save_tiny, tiny_config

from ptjax.backbones import describe
from ptjax.backbones.fingerprint import (
    V1_KEY,
    V2_KEY,
    Fingerprints,
    fingerprint,
    pick_on_device,
    sample_of,
)
from ptjax.backbones.load import load_backbone
from ptjax.backbones.open import open_backbone
from ptjax.backbones.save import save_backbone
from ptjax.errors import InputError
from ptjax.inference import prompts
from ptjax.inference.bank import make_bank
from ptjax.inference.prompt_kv import precompute_prompt_kv
from ptjax.interop.prompt_file import PromptFile
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes
from ptjax.models.t5_family import T5_FAMILY
from ptjax.trees import flatten_paths, unflatten_paths

NANO_V1 = "sha256:665265e64af0924f5c731cba4b2a60c51eb9232fd7e122317da033dac8505781"
"""What prompts of ptjax-nano recorded before there was a v2 (commit 324cea1)."""


def changed(backbone, path, change) -> Fingerprints:
    """The fingerprints after `change` of one parameter."""
    flat = dict(flatten_paths(backbone.variables["params"]))
    flat[path] = change(flat[path])
    return fingerprint(backbone.config, unflatten_paths(flat))


def low_rank(kernel):
    """Merged LoRA of rank 1, 1% of the kernel's size."""
    a, b = (jax.random.normal(jax.random.key(i), (n,)) for i, n in enumerate(kernel.shape))
    return kernel + 0.01 * jnp.std(kernel) * jnp.outer(a, b)


PARAMETERS = sorted(
    flatten_paths(parameter_shapes(tiny_config(num_encoder_layers=2, num_decoder_layers=2)))
)


@pytest.mark.parametrize("path", PARAMETERS)
def test_case_1_13_any_changed_parameter_is_another_backbone(t5_1_1, path):
    for change in (lambda x: 2 * x, lambda x: -x) if "norm" in path else (low_rank, lambda x: -x):
        assert changed(t5_1_1, path, change).v2 != t5_1_1.fingerprint


@pytest.mark.parametrize(
    "path",
    ["decoder/logits_dense/kernel", "encoder/layers_0/attention/query/kernel"],
)
def test_case_1_13_v1_does_not_see_what_v2_sees(t5_1_1, path):
    own = changed(t5_1_1, path, lambda x: -x)
    assert own.v1 == t5_1_1.fingerprint_v1 and own.v2 != t5_1_1.fingerprint


def test_case_1_13_a_head_of_a_large_kernel_is_sampled():
    """Any 61 neighbouring rows or columns hold a sampled entry, whatever the size."""
    for size in (1, 63, 64, 127, 128, 384, 512, 768, 1024, 4096, 10240, 16384, 65536):
        (rows, columns) = T5_FAMILY.fingerprint_parts(
            "decoder/layers_3/mlp/wi_0/kernel", (size, 2 * size)
        )["grid"]
        picked = range(size)[rows]
        assert picked.step <= 61 and len(picked) >= min(size, 64) and columns.start is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerators_sample_the_same_values_as_the_cpu(dtype):
    """On a CPU, NumPy picks the values; elsewhere, a compiled function. Also halfway values."""
    bits = np.random.default_rng(0).integers(0, 2**31, (256, 128), np.uint32)
    bits[::2] = bits[::2] & 0xFFFF0000 | 0x8000  # halfway between two values of bfloat16
    finite = np.where(np.isfinite(x := bits.view(np.float32)), x, 1.0)
    array = jnp.asarray(finite, dtype)
    path = "decoder/layers_0/mlp/wi_0/kernel"
    parts = T5_FAMILY.fingerprint_parts("wi_0/kernel", array.shape)
    for kind, part in parts.items():
        ((_, held),) = sample_of(path, array, T5_FAMILY)[path][kind].held
        indices = [np.arange(size)[along] for size, along in zip(array.shape, part, strict=True)]
        picked = np.asarray(pick_on_device(array, indices))
        assert isinstance(held, np.ndarray) and held.tobytes() == picked.tobytes()


def test_case_1_13_every_field_of_the_config_is_classified(t5_1_1):
    """A new field changes the fingerprint, unless it is named as one that changes no logits."""
    other_values = {
        "vocab_size": 8, "emb_dim": 8, "num_heads": 8, "num_encoder_layers": 8,
        "num_decoder_layers": 8, "head_dim": 4, "mlp_dim": 8, "mlp_activations": ("relu",),
        "logits_via_embedding": True, "relpos_buckets": 8, "relpos_max_distance": 64,
        "relpos_per_layer": True, "layer_norm_epsilon": 1e-5, "dtype": "bfloat16",
        "dropout_rate": 0.5, "scan_layers": True, "remat": "full",
    }  # fmt: skip
    names = [field.name for field in dataclasses.fields(T5Config)]
    assert set(names) - set(T5_FAMILY.not_computed) <= set(other_values), "add the new field here"
    params = t5_1_1.variables["params"]
    for name in set(names) & set(other_values):
        config = dataclasses.replace(t5_1_1.config, **{name: other_values[name]})
        same = fingerprint(config, params).v2 == t5_1_1.fingerprint
        assert same == (name in T5_FAMILY.not_computed), name


def test_case_1_13_v1_of_nano_is_what_older_prompts_recorded():
    described = describe.describe("ptjax-nano")
    loaded = load_backbone("ptjax-nano")
    assert loaded.fingerprint_v1 == described["fingerprint_v1"] == NANO_V1
    assert loaded.fingerprint == described["fingerprint"]


@pytest.mark.parametrize("name", ["t5_1_1_tiny_legacy", "t5_1_0_tiny_legacy"])
@pytest.mark.parametrize("how", ["scan_layers", "int8", "mesh", "huggingface", "bfloat16"])
def test_case_1_13_one_backbone_has_one_fingerprint(name, how, tmp_path, request):
    plain = request.getfixturevalue(name.removesuffix("_tiny_legacy"))
    settings = {
        "scan_layers": {"scan_layers": True},
        "int8": {"quantize": "int8"},
        "mesh": {"mesh": "4x2"},
        "bfloat16": {"dtype": "bfloat16"},
    }.get(how, {})
    path = FIXTURES / name
    if how == "huggingface":
        path = tmp_path
        save_backbone(path, plain.config, plain.variables["params"], dtype="bfloat16")
    assert load_backbone(path, **settings).fingerprints == plain.fingerprints
    assert describe.fingerprints_of(open_backbone(path)) == plain.fingerprints


def test_case_1_13_the_sample_read_from_files_is_that_of_a_wide_kernel(tmp_path):
    """Steps above 1, for which files are read in parts."""
    loaded = load_backbone(save_tiny(tmp_path, tiny_config(200, head_dim=96, mlp_dim=130)))
    assert describe.fingerprints_of(open_backbone(tmp_path)) == loaded.fingerprints
    grid = T5_FAMILY.fingerprint_parts("encoder/layers_0/mlp/wi_0/kernel", (16, 130))["grid"]
    assert grid == (slice(None, None, 1), slice(None, None, 2))


def prompt_of(t5, **metadata) -> PromptFile:
    return PromptFile(
        np.zeros((3, t5.config.emb_dim), np.float32), {"backbone_name": "x"} | metadata
    )


def test_case_1_13_a_prompt_with_v2_is_refused_by_a_relative_of_its_backbone(t5_1_1):
    flat = dict(flatten_paths(t5_1_1.variables["params"]))
    path = "encoder/layers_0/attention/query/kernel"
    flat[path] = low_rank(flat[path])
    own = fingerprint(t5_1_1.config, unflatten_paths(flat))
    assert own.v1 == t5_1_1.fingerprint_v1
    merged = dataclasses.replace(t5_1_1, fingerprint=own.v2, fingerprint_v1=own.v1)
    prompt = prompt_of(t5_1_1, **t5_1_1.fingerprints.as_metadata())
    prompts.check_prompt(t5_1_1, prompt)
    with pytest.raises(InputError, match="not with that of"):
        prompts.check_prompt(merged, prompt)
    bank = make_bank({"a": prompt, "b": prompt})
    with pytest.raises(InputError, match="prompt 'a' was tuned on"):
        prompts.check_bank(merged, bank)


def test_case_1_13_a_prompt_with_v1_alone_stays_valid_and_this_is_said(t5_1_1, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    old = prompt_of(t5_1_1, **{V1_KEY: t5_1_1.fingerprint_v1})
    checked = prompts.check_prompt(t5_1_1, old)
    [record] = caplog.records
    assert "before fingerprints covered every parameter" in record.getMessage()
    # With both it is not said again.
    assert checked.metadata[V2_KEY] == t5_1_1.fingerprint
    prompts.check_prompt(t5_1_1, checked)
    assert len(caplog.records) == 1
    caplog.clear()
    bank = make_bank({f"p{i}": old for i in range(7)} | {"new": checked})
    prompts.check_bank(t5_1_1, bank)
    [record] = caplog.records
    assert "prompts p0, p1, p2, p3, p4 and 2 more" in record.getMessage()
    caplog.clear()
    other = prompt_of(t5_1_1, **{V1_KEY: "sha256:0"})
    with pytest.raises(InputError, match="was tuned on"):
        prompts.check_prompt(t5_1_1, other)
    prompts.check_prompt(t5_1_1, other, allow_mismatch=True)
    [record] = caplog.records
    assert "used all the same" in record.getMessage()


def test_case_1_13_states_are_kept_where_v1_alone_is_recorded(t5_1_1):
    prompt = prompt_of(t5_1_1, sees_input=False)
    compiled = precompute_prompt_kv(t5_1_1, prompt)
    assert compiled.metadata[V2_KEY] == t5_1_1.fingerprint
    old = {k: v for k, v in compiled.metadata.items() if k != V2_KEY}
    for metadata, kept in ((old, True), (old | {V2_KEY: "v2:0"}, False)):
        file = PromptFile(compiled.prompt, metadata, compiled.states)
        checked = prompts.check_prompt(t5_1_1, file, allow_mismatch=True)
        assert (checked.states is not None) == kept
