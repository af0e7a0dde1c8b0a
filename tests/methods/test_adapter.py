"""Adapter files, and the commands and functions that use them, with BitFit as the method."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_settings, tune
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import save_tiny, tiny_config

import ptjax
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.inference.model import bind
from ptjax.inference.prompts import open_prompt
from ptjax.interop import prompt_header
from ptjax.methods.base import run_with
from ptjax.trees import flatten_paths, unflatten_paths

TEXTS = ["a good film", "a dull film", "what a day"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone of two layers with the shipped vocabulary."""
    tokenizer = load_tokenizer("package:nano")
    config = tiny_config(8192, num_encoder_layers=2)
    return save_tiny(tmp_path_factory.mktemp("two_layers"), config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def backbone(folder):
    return ptjax.load_backbone(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, backbone, task):
    """A run of two steps that trained BitFit."""
    model_dir = tmp_path_factory.mktemp("run")
    schedule = ptjax.TrainSchedule(train_steps=2, eval_period=1, log_period=1)
    results = tune(model_dir, task, backbone, method=ptjax.BitFit(), schedule=schedule)
    return ptjax.Run(model_dir, results)


def test_a_run_exports_its_adapter(run, backbone):
    adapter, best = run.adapter, run.model_dir / "adapters" / "best.safetensors"
    assert run.prompt is None
    assert adapter.method == ptjax.BitFit() and adapter.source == os.path.abspath(best)
    assert adapter.metadata["task"]["name"] == "words"
    norms = {k for k in flatten_paths(backbone.variables) if k.endswith("scale")}
    assert {f"params/{k.removeprefix('bitfit/')}" for k in adapter.arrays} == norms
    trained = sum(array.size for array in adapter.arrays.values())
    assert trained == run.results["trainable_parameters"] == 16 * 9
    moved = [np.abs(array - 1).max() for array in adapter.arrays.values()]
    assert min(moved) > 0, "a scale that does not train"
    assert repr(adapter).startswith("<Adapter bitfit of 144 parameters, task words, tuned on /")


def test_the_network_runs_with_the_trained_scales_in_place_of_its_own(run, backbone):
    params = flatten_paths(backbone.variables["params"])
    params |= {k.removeprefix("bitfit/"): v for k, v in run.adapter.arrays.items()}
    merged = dataclasses.replace(backbone, variables={"params": unflatten_paths(params)})
    batch = {"encoder_input_tokens": np.array([[5, 6, 7]]), "decoder_input_tokens": [[0, 5]]}
    tuned = ptjax.forward(backbone, batch, run.adapter)
    np.testing.assert_array_equal(tuned, ptjax.forward(merged, batch))
    assert np.abs(tuned - ptjax.forward(backbone, batch)).max() > 1e-3


def test_merged_into_the_weights_it_is_a_backbone_of_its_own(run, backbone, folder, tmp_path):
    """The same logits to the bit; of scanned layers and over bfloat16, the scales in float32."""
    batch = {"encoder_input_tokens": np.array([[5, 6, 7]]), "decoder_input_tokens": [[0, 5]]}
    tuned = ptjax.forward(backbone, batch, run.adapter)
    ours = flatten_paths(backbone.variables["params"])
    for how in ({"scan_layers": True}, {"dtype": "bfloat16"}):
        loaded, target = ptjax.load_backbone(folder, **how), tmp_path / "_".join(how)
        ptjax.export(run.adapter, target, to="merged", backbone=loaded)
        merged = ptjax.load_backbone(target)
        params = flatten_paths(merged.variables["params"])
        for path, scale in run.adapter.arrays.items():
            np.testing.assert_array_equal(params.pop(path.removeprefix("bitfit/")), scale)
        rounded = "dtype" in how
        for path, array in params.items():
            expected = ours[path].astype(jnp.bfloat16) if rounded else ours[path]
            np.testing.assert_array_equal(array, expected, err_msg=path)
        if not rounded:
            np.testing.assert_array_equal(ptjax.forward(merged, batch), tuned)
    rounded = ptjax.load_backbone(folder, quantize="int8")
    with pytest.raises(InputError, match="int8 kernels are rounded; load the backbone without q"):
        ptjax.export(run.adapter, tmp_path / "int8", to="merged", backbone=rounded)
    assert not (tmp_path / "int8").exists()


def test_scanned_layers_take_the_same_file(run, backbone, folder):
    scanned = ptjax.load_backbone(folder, scan_layers=True)
    opened = open_prompt(scanned, run.adapter)
    assert opened.variables["bitfit"]["encoder"]["layers"]["pre_mlp_layer_norm"]["scale"].shape == (
        2,
        16,
    )
    one, other = (ptjax.predict(x, TEXTS, run.adapter) for x in (backbone, scanned))
    for a, b in zip(one, other, strict=True):
        assert a.text == b.text
        assert abs(a.score - b.score) < 1e-4  # the compiler sums in another order


def test_its_path_stands_for_it_in_python(run, backbone, tmp_path):
    expected = ptjax.predict(backbone, TEXTS, run.adapter)
    best = run.model_dir / "adapters" / "best.safetensors"
    for path in (run.model_dir, best, str(best)):
        assert ptjax.predict(backbone, TEXTS, path) == expected
    ptjax.export(run.model_dir, tmp_path / "copy.safetensors", to="safetensors")
    assert ptjax.predict(backbone, TEXTS, tmp_path / "copy.safetensors") == expected
    (tmp_path / "damaged.safetensors").write_bytes(best.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged\.safetensors"):
        ptjax.predict(backbone, TEXTS, tmp_path / "damaged.safetensors")


def test_equal_methods_share_one_compiled_program(run, backbone):
    """`jax.jit` knows a network by its function."""
    first = bind(backbone, open_prompt(backbone, run.adapter)).apply_fn
    assert run_with(ptjax.BitFit(), backbone) is first


@pytest.mark.usefixtures("own_process")
def test_every_command_uses_it(run, call, folder, tmp_path):
    best = run.model_dir / "adapters" / "best.safetensors"
    rows = {}
    for flags in ([f"--model_dir={run.model_dir}"], [f"--adapter={best}", f"--backbone={folder}"]):
        code, out, err = call("infer", *flags, *TEXTS)
        assert code == 0, err
        rows[flags[0]] = [json.loads(line) for line in out.splitlines()]
    of_run, of_file = rows.values()
    assert of_run == of_file and [row["inputs"] for row in of_run] == [f"text: {t}" for t in TEXTS]
    code, out, err = call("evaluate", f"--model_dir={run.model_dir}", "--trust_config")
    assert code == 0, err
    assert json.loads(out)["value"] == run.results["value"]
    code, out, err = call("inspect", best)
    assert code == 0 and "parameters: 144" in out and "name: bitfit" in out
    code, out, err = call("inspect", run.model_dir, "--json")
    assert json.loads(out)["best_adapter"]["method"] == {"name": "bitfit"}
    copy = tmp_path / "copy.safetensors"
    code, out, err = call("export", f"--adapter={best}", "--to=safetensors", f"--output={copy}")
    assert code == 0 and "bitfit" in out, err
    assert copy.read_bytes() == best.read_bytes()
    flags = ("--to=peft", f"--output={tmp_path / 'peft'}")
    code, _, err = call("export", f"--model_dir={run.model_dir}", *flags)
    assert code == 0, err
    code, out, err = call("infer", f"--adapter={tmp_path / 'peft'}", *TEXTS)
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == of_file


@pytest.mark.usefixtures("own_process")
def test_it_is_no_prompt_and_a_prompt_is_no_adapter(run, call, folder, tmp_path):
    best = run.model_dir / "adapters" / "best.safetensors"
    prompt = tmp_path / "prompt.safetensors"
    ptjax.save_prompt(prompt, np.ones((2, 16), np.float32), {})
    for flags, said in (
        ([f"--prompt={best}"], "holds an adapter, not a prompt; give it with --adapter"),
        ([f"--adapter={prompt}"], "holds a prompt: load_prompt (--prompt) reads it"),
        ([f"--prompt={prompt}", f"--adapter={best}"], "--prompt and --adapter are mutually excl"),
        ([f"--prompts={best.parent}"], "holds an adapter, not a prompt"),
    ):
        code, out, err = call("infer", *flags, f"--backbone={folder}", "a text")
        assert (code, out) == (2, "") and said in err.splitlines()[-1], err
    for to in ("npy", "t5x"):
        out = f"--output={tmp_path / to}"
        code, _, err = call("export", f"--adapter={best}", f"--to={to}", out)
        assert code == 2 and "bitfit" in err.splitlines()[-1], err
        assert not (tmp_path / to).exists()
    with pytest.raises(InputError, match=r"the run has an adapter, .*best\.safetensors, and no"):
        ptjax.load_prompt(run.model_dir)


def test_it_is_not_mixed_with_other_rows(run, backbone):
    with pytest.raises(InputError, match="bitfit changes the network for all rows of a batch"):
        ptjax.make_bank({"a": run.adapter})
    with pytest.raises(InputError, match="prompt_ids choose prompts; bitfit changes the network"):
        ptjax.predict(backbone, TEXTS, run.adapter, prompt_ids=[0, 0, 0])
    batch = {"encoder_input_tokens": [[5]], "decoder_input_tokens": [[0]]}
    with pytest.raises(InputError, match=r"a prompt is needed here, not an adapter \(bitfit\)"):
        ptjax.loss_and_prompt_gradient(backbone, batch, run.adapter)


def test_another_backbone_is_refused(run, tmp_path):
    def load(name, seed=0, **changes):
        tokenizer = load_tokenizer("package:nano")
        return ptjax.load_backbone(
            save_tiny(tmp_path / name, tiny_config(8192, **changes), seed=seed, tokenizer=tokenizer)
        )

    deeper, other = load("deeper", num_encoder_layers=3), load("other", 1, num_encoder_layers=2)
    with pytest.raises(InputError, match=r"does not fit .*deeper: bitfit/encoder/layers_2/.*None"):
        open_prompt(deeper, run.adapter)
    with pytest.raises(InputError, match=r"the adapter .bitfit. was tuned on .* with the backbone"):
        open_prompt(other, run.adapter)
    assert open_prompt(other, run.adapter, allow_mismatch=True) is not None


def test_damaged_and_foreign_files_are_refused(run, tmp_path):
    best = run.model_dir / "adapters" / "best.safetensors"
    with safe_open(best, "numpy") as file:
        header = file.metadata()
    arrays, path = load_file(best), tmp_path / "changed.safetensors"

    def saved(method=None, *, sealed=True, **changes):
        new = {k: v for k, v in header.items() if not k.startswith(("ptjax_sha", "ptjax_form"))}
        if method is not None:
            new["method"] = method
        tensors = {**arrays, **changes}
        save_file(tensors, path, prompt_header.seal(new, tensors) if sealed else new)
        return path

    for method, said in (
        ('{"name": "bitfot"}', "is of the method 'bitfot', which this ptjax does not know; did"),
        ('{"name": "bitfit", "rank": 4}', "BitFit has no field 'rank' in this ptjax"),
        ('["bitfit"]', "the entry 'method' of its header is damaged"),
    ):
        with pytest.raises(InputError, match=said):
            ptjax.load_adapter(saved(method))
    name = next(iter(arrays))
    with pytest.raises(InputError, match=f"{name} is not finite"):
        ptjax.load_adapter(saved(**{name: np.full(16, np.nan, np.float32)}))
    with pytest.raises(InputError, match=r"changed after ptjax wrote it \(no checksum"):
        ptjax.load_adapter(saved(sealed=False))
    path.write_bytes(best.read_bytes()[:-4] + b"\1\1\1\1")
    with pytest.raises(InputError, match="checksum"):
        ptjax.load_adapter(path)
    with pytest.raises(InputError, match="no adapter in this folder"):
        ptjax.load_adapter(tmp_path)
    with pytest.raises(InputError, match=r"end its name with \.safetensors"):
        run.adapter.save(tmp_path / "folder")
    run.adapter.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == best.read_bytes()


@pytest.mark.slow
def test_sharded_int8_scanned_and_packed_it_is_the_merged_network(run, backbone, folder):
    """The norms stay float32 under int8, so that merged scales are the same network exactly."""
    how = {"mesh": "4x2", "fsdp": True, "quantize": "int8", "scan_layers": True, "remat": "dots"}
    sharded = ptjax.load_backbone(folder, **how)
    scales = flatten_paths(open_prompt(sharded, run.adapter).variables["bitfit"])
    params = flatten_paths(sharded.variables["params"]) | scales
    merged = {"params": unflatten_paths(params)}
    segments = np.array([[1, 1, 1, 2, 2, 0]] * 8)
    tokens = np.arange(8 * 6).reshape(8, 6) % 40 + 4
    batch = tokens, tokens[:, :4], segments, segments[:, :4]
    tuned = bind(sharded, open_prompt(sharded, run.adapter))
    found = jax.jit(tuned.apply_fn)(tuned.variables, *batch)
    np.testing.assert_array_equal(found, jax.jit(sharded.apply_fn)(merged, *batch))
    assert np.abs(found - jax.jit(sharded.apply_fn)(sharded.variables, *batch)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_the_best_adapter_of_a_sweep(backbone, task, folder, call, tmp_path):
    schedule = ptjax.TrainSchedule(train_steps=2, eval_period=1, log_period=1)
    members, method = ptjax.sweep(seeds=(1, 2)), ptjax.BitFit()
    run = ptjax.tune(
        backbone, task, tmp_path, make_settings(method=method, schedule=schedule), members=members
    )
    best = run.results["best"]["member"]
    file = tmp_path / "adapters" / best / "best.safetensors"
    assert run.prompt is None and run.adapter.source == str(file)
    with pytest.raises(InputError, match=r"the run is a sweep of seed1, seed2; name the adapter"):
        ptjax.load_adapter(tmp_path)
    code, _, err = call("infer", f"--model_dir={tmp_path}", *TEXTS)
    assert code == 2 and "name one of them with --adapter=" in err.splitlines()[-1], err
    code, out, err = call("inspect", tmp_path, "--json")
    assert json.loads(out)["best_adapters"][best] == str(file)
    tune(tmp_path / "alone", task, backbone, method=method, schedule=schedule, seed=2)
    alone = ptjax.load_adapter(tmp_path / "alone" / "adapters" / "2.safetensors").arrays
    for path, array in ptjax.load_adapter(tmp_path / "adapters/seed2/2.safetensors").arrays.items():
        # The compiler sums in another order; a step moves an entry by up to 0.05.
        np.testing.assert_allclose(array, alone[path], rtol=0, atol=1e-5)


def test_a_network_that_is_no_t5_is_refused(backbone):
    planned = dataclasses.replace(backbone, config=object())
    with pytest.raises(InputError, match="BitFit trains the scales of T5's layer norms"):
        ptjax.BitFit().check(planned, ptjax.Batching())


def test_its_shapes_need_no_weights(backbone):
    context = ptjax.InitContext(backbone.embedding, None, None, list, backbone=backbone)
    made = ptjax.BitFit().init(jax.random.key(0), context)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
    assert shapes == ptjax.BitFit().variable_shapes(backbone.config)


def test_over_bfloat16_the_trained_scales_stay_float32(run, folder):
    """Rounded to bfloat16, a change below 0.2% would have no effect, and gradients few digits."""
    rounded = ptjax.load_backbone(folder, dtype="bfloat16")
    tuned = bind(rounded, open_prompt(rounded, run.adapter))
    tokens, ones = jnp.array([[5, 6, 7]] * 4), jnp.ones((4, 3), jnp.int32)

    @jax.jit
    def logits(scales):
        variables = {**tuned.variables, "bitfit": scales}
        return tuned.apply_fn(variables, tokens, tokens, ones, ones)

    def scales_of(value):
        return jax.tree.map(lambda x: np.full(x.shape, value, np.float32), run_scales)

    run_scales = tuned.variables["bitfit"]
    assert np.abs(logits(scales_of(1.001)) - logits(scales_of(1.0))).max() > 0
    gradients = jax.grad(lambda scales: logits(scales).astype(jnp.float32).std())(run_scales)
    for path, gradient in flatten_paths(gradients).items():
        assert (gradient.astype(jnp.bfloat16) != gradient).any(), path
