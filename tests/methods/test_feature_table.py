"""docs/method_features.md: its cells are tests, and those of which no other file holds the test."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import save_tiny, tiny_config

import ptjax
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.inference.model import bind
from ptjax.inference.prompts import open_prompt
from ptjax.methods.adapter import ADAPTERS, Adapter, AdapterMethod, to_paths
from ptjax.trainer.sweep import check_members

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "method_features.md").read_text()
LEGEND = dict(re.findall(r"^- (\w+): `([\w/.]+::\w+)`$", PAGE, re.M))
TABLE = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
METHODS = {
    "bitfit": ptjax.BitFit(),
    "ia3": ptjax.IA3(),
    "lora": ptjax.LoRA(rank=2),
    "per_layer_prompts": ptjax.PerLayerPrompts(2, initializer=ptjax.Uniform(1.0)),
    "prefix_tuning": ptjax.PrefixTuning(2, initializer="random"),
}


def test_a_row_for_every_method_and_a_test_for_every_cell() -> None:
    public = [getattr(ptjax, name) for name in ptjax.__all__]
    methods = {x.__name__ for x in public if ptjax.Method in getattr(x, "__mro__", ())}
    assert {row[0].strip(" `") for row in TABLE} == methods - {"Method"}
    used = {key for row in TABLE for cell in row[1:] for key in re.findall(r"[A-Z]\d+", cell)}
    assert used == set(LEGEND) and all(re.search(r"[A-Z]\d", x) for row in TABLE for x in row[1:])


def test_the_tests_are_there_and_refusals_are_asserted() -> None:
    refused = {key for row in TABLE for key in re.findall(r"\*\*refused\*\* (\w+)", "|".join(row))}
    for key, name in LEGEND.items():
        file, _, test = name.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        [found] = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == test]
        assert key not in refused or "pytest.raises(InputError" in ast.unparse(found), name


def test_every_adapter_is_here() -> None:
    assert set(METHODS) == set(ADAPTERS)
    assert all(METHODS[name].name == name for name in METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(8192, num_encoder_layers=2)
    return save_tiny(
        tmp_path_factory.mktemp("backbone"), config, tokenizer=load_tokenizer("package:nano")
    )


@pytest.fixture(scope="module")
def int8(folder):
    return ptjax.load_backbone(folder, quantize="int8")


def adapter_of(method: AdapterMethod, backbone) -> Adapter:
    """Random arrays around the first ones, as after some steps."""
    context = ptjax.InitContext(
        backbone.embedding, backbone.tokenizer, None, list, backbone.config, backbone=backbone
    )
    rng, made = np.random.default_rng(0), to_paths(method.init(jax.random.key(0), context))
    arrays = {k: x + rng.normal(0, 0.3, x.shape).astype("f4") for k, x in made.items()}
    return Adapter(method, arrays, {"backbone_name": backbone.name})


@pytest.mark.parametrize("name", ["per_layer_prompts", "prefix_tuning"])
def test_a_mesh_and_int8_change_nothing(name, folder, int8) -> None:
    how = {"mesh": "4x2", "fsdp": True, "quantize": "int8", "scan_layers": True, "remat": "full"}
    tokens = np.arange(8 * 5).reshape(8, 5) % 40 + 4
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": tokens[:, :3]}
    adapter = adapter_of(METHODS[name], int8)
    expected = ptjax.forward(int8, batch, adapter)
    found = ptjax.forward(ptjax.load_backbone(folder, **how), batch, adapter)
    # To float32 rounding: devices and scans sum in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - ptjax.forward(int8, batch)).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["per_layer_prompts"])
def test_it_decodes_as_it_is_taught(name, int8) -> None:
    """Target by target through the cache, and all at once."""
    model = bind(int8, open_prompt(int8, adapter_of(METHODS[name], int8)))

    @jax.jit
    def both(variables, tokens):
        run = functools.partial(model.apply_fn, variables)
        encoded = run(tokens, encoder_lengths=jnp.array([3]), method="encode")
        cache, steps = run(encoded, 4, method="init_cache"), []
        for i in range(4):
            logits, cache = run(tokens[:, i : i + 1], cache, i, encoded, method="decode_step")
            steps.append(logits[:, 0])
        return jnp.stack(steps, axis=1), run(encoded, tokens, method="decode")

    steps, whole = both(model.variables, jnp.arange(4, 8)[None])
    np.testing.assert_allclose(steps, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_not_mixed_in_a_batch(name, int8) -> None:
    adapter = Adapter(METHODS[name], {}, {})
    with pytest.raises(InputError, match=f"{name} changes the network for all rows of a batch"):
        ptjax.make_bank({"a": adapter})


@pytest.mark.parametrize("method", [ptjax.PerLayerPrompts(), ptjax.ModelTuning()])
def test_a_method_without_sweeps_is_refused_by_name(method) -> None:
    with pytest.raises(InputError, match=f"^{type(method).__name__} does not support sweeps"):
        check_members(ptjax.sweep(seeds=(1, 2)), ptjax.RunSettings(method=method))


@pytest.mark.parametrize("name", ["per_layer_prompts"])
def test_what_peft_cannot_run_is_refused_by_name(name, int8, tmp_path) -> None:
    adapter = adapter_of(METHODS[name], int8)
    with pytest.raises(InputError, match=f"PEFT cannot run {name} as ptjax does"):
        ptjax.export(adapter, tmp_path / "peft", to="peft", backbone=int8)
    assert not (tmp_path / "peft").exists()


def test_a_tuned_model_is_no_prompt(tmp_path) -> None:
    (tmp_path / "models" / "best").mkdir(parents=True)
    for use in (ptjax.make_bank, lambda one: ptjax.export(one["a"], tmp_path / "x", to="peft")):
        with pytest.raises(InputError, match="the run tuned the whole model, and has no prompt"):
            use({"a": tmp_path})


@pytest.mark.parametrize(
    ("file", "trained"),
    [
        # ptjax-nano: D = 128, F = 512, 4 layers in the encoder and 2, each with two attentions,
        # in the decoder.
        ("runs/prefix_tune.gin", 2 * 100 * 128 * (4 + 2 + 2)),
        ("runs/lora.gin", 8 * (128 + 128) * 2 * (4 + 2 + 2)),
        ("runs/ia3.gin", 2 * 128 * (4 + 2 + 2) + 512 * (4 + 2)),
        ("runs/bitfit.gin", 128 * (4 * 2 + 1 + 2 * 3 + 1)),
    ],
)
def test_a_gin_file_plans_what_it_trains(call, file, trained) -> None:
    flags = ("--gin_file=models/ptjax_nano.gin", f"--gin_file={file}")
    code, out, err = call("plan", *flags, "--slice=v5e-1", "--quick", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["own"]["trainable"] == trained
