"""Planning: what is counted, what is searched, and that it is the step of a real run."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import pytest
from step_specs import SIZES, TOY, V5E, XXL, blind, changed

from ptjax.cli import load_gin
from ptjax.errors import InputError
from ptjax.methods.bitfit import BitFit
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prefix_tuning import PrefixTuning
from ptjax.planning import search
from ptjax.planning.estimate import bytes_on_device, count, link_seconds
from ptjax.planning.slices import parse_slice
from ptjax.planning.workload import ParallelConfig, abstract_mesh, abstract_step, resolve
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.rules import shardings_of
from ptjax.trainer import tune
from ptjax.training import compile

# Counting


@pytest.mark.parametrize(("remat", "most"), [("none", 2.25), ("dots", 2.30), ("full", 2.90)])
def test_the_work_of_a_step_of_xxl(remat, most):
    found = count(XXL, ParallelConfig("8x1", remat=remat), V5E)
    assert (found["parameters"], found["trainable"]) == (11_135_332_352 + 409_600, 409_600)
    flops = found["flops"]
    assert flops["useful"] <= 2.25 * flops["forward"]
    assert 2 * flops["forward"] < flops["executed"] <= most * flops["forward"]
    assert (flops["executed"] > flops["useful"]) == (remat != "none")


@pytest.mark.parametrize(
    ("parallel", "share"),
    [
        (ParallelConfig("1x8"), 1 / 8),
        (ParallelConfig("4x2"), 1 / 2),
        (ParallelConfig("2x4", fsdp=True), 1 / 8),
        (ParallelConfig("8x1", quantize="int8"), 1 / 2),
    ],
)
def test_bytes_of_the_frozen_weights(parallel, share):
    """Up to what is left whole: norms, with FSDP embedding and logits, which int8 leaves too."""
    whole = 2 * 11_135_332_352
    held = count(XXL, parallel, V5E)["bytes_per_device"]
    rest = 2 * 32128 * 4096 if parallel.quantize or parallel.fsdp else 0
    assert whole * share <= held["frozen"] <= whole * share + rest + 2e7
    # The prompt in float32 and, it has fewer than 128 rows, a second moment for each entry.
    assert held["state"] == pytest.approx(2 * 4 * 100 * 4096 + 200, abs=200_000)


def test_bytes_are_those_of_the_real_arrays(tiny):
    spec = dataclasses.replace(TOY, config=tiny.config)
    mesh = make_mesh((4, 2))
    abstract = abstract_step(spec, ParallelConfig("4x2", scan_layers=False), mesh)
    params = {"params": tiny.params}
    real = jax.device_put(params, shardings_of(params, mesh))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real))
    assert bytes_on_device(abstract.frozen) == held


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (XXL, (32, 512, 16, False, None)),
        (dataclasses.replace(XXL, pack=True), (32, 612, 16, True, None)),
        (dataclasses.replace(XXL, pack=True, row_length=700), (32, 700, 16, True, None)),
        (blind(dataclasses.replace(XXL, pack=True)), (32, 512, 16, True, None)),
        (dataclasses.replace(XXL, members=3), (32, 512, 16, False, 3)),
    ],
)
def test_the_largest_batch(spec, shape):
    assert tuple(spec.shape()) == shape


def test_a_prompt_that_sees_nothing_and_a_bank_are_counted_as_they_run():
    seen = count(TOY, ParallelConfig("8x1"), V5E)["flops"]["useful"]
    unseeing = count(blind(TOY), ParallelConfig("8x1"), V5E)["flops"]["useful"]
    bank = dataclasses.replace(changed(TOY, sweep=True), members=3)
    many = count(bank, ParallelConfig("8x1"), V5E)
    assert unseeing < seen
    assert many["flops"]["useful"] == 3 * seen
    assert many["examples"] == 48 and many["trainable"] == 3 * 20 * 256


@pytest.mark.parametrize("width", [None, 32])
def test_a_prefix_takes_no_positions_but_attention(width):
    """Its own parameters, by the formula; what its positions cost is the attention to them."""
    config, parallel = TOY.config, ParallelConfig("8x1")
    method = PrefixTuning(20, reparameterization=width)
    found = count(dataclasses.replace(TOY, method=method), parallel, V5E)
    joined, layers = config.num_heads * config.head_dim, 2 + 2 * 2
    if width is None:
        assert found["trainable"] == 2 * 20 * joined * layers
    else:
        inputs = 20 * config.emb_dim + config.emb_dim * width + width
        assert found["trainable"] == 3 * inputs + (width + 1) * 2 * joined * layers
        return
    none = dataclasses.replace(TOY, method=BitFit())
    queries = 16 * (108 * 2 + 16 * 2 * 2)  # of all rows and layers
    grown = found["flops"]["forward"] - count(none, parallel, V5E)["flops"]["forward"]
    assert grown == 4 * queries * 20 * joined


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (ParallelConfig("4x4"), {}, "a mesh of 4x4 is 16 devices, and there are 8"),
        (ParallelConfig("8"), {}, "MESH must be .* got '8'"),
        (ParallelConfig("1x8"), {"config": SIZES["small"]}, "num_heads = 6 is not a multiple of 8"),
        (
            ParallelConfig("8x1"),
            {"batch_size": 12},
            "batch size 12 is not a multiple of the 8 devices",
        ),
        (ParallelConfig("8x1", fsdp=True, scan_layers=False), {}, "FSDP = True needs SCAN_LAYERS"),
    ],
)
def test_what_does_not_fit_together_is_said(parallel, changes, message):
    with pytest.raises(InputError, match=message):
        resolve(dataclasses.replace(TOY, **changes), parallel, V5E)


def test_auto_is_what_a_run_would_take():
    assert resolve(XXL, ParallelConfig("auto"), V5E).mesh == "4x2"
    assert resolve(XXL, ParallelConfig("auto"), parse_slice("2xv5e-16")).mesh == "2x8x2"
    assert resolve(XXL, ParallelConfig("auto"), parse_slice("h100x8")).mesh == "8x1"
    auto = ParallelConfig("8x1", attention="auto")
    assert resolve(XXL, auto, V5E).attention == "fused"
    whole = dataclasses.replace(XXL, method=ModelTuning())  # its biases train
    assert resolve(whole, auto, V5E).attention == "plain"
    fused = ParallelConfig("8x1", attention="fused")  # cuDNN gives the biases their gradient
    assert resolve(whole, fused, parse_slice("h100x8")).attention == "gpu"
    assert resolve(changed(XXL, microbatches=2), auto, V5E).microbatches == 2


def test_estimates_follow_from_the_published_rates():
    found = count(XXL, ParallelConfig("1x8", remat="full"), V5E)
    estimate, flops = found["estimate"], found["flops"]
    assert estimate["compute"] == flops["executed"] / (8 * 197e12)
    assert estimate["memory"] == 3 * found["bytes_per_device"]["frozen"] / 819e9
    # What FSDP gathers is read as whole as without it.
    alike = [count(XXL, ParallelConfig("8x1", fsdp=fsdp), V5E)["estimate"] for fsdp in (0, 1)]
    assert alike[0]["memory"] == alike[1]["memory"] and alike[1]["links"] > alike[0]["links"]
    # 14 sums of [32, 612, 4096] and [32, 16, 4096] bfloat16 a layer pair, around a ring of eight.
    assert estimate["links"] == pytest.approx(2 * 7 / 8 * 24.0e9 / 90e9, rel=0.1)
    assert estimate["low"] == max(estimate[x] for x in ("compute", "memory", "links"))
    assert estimate["utilisation"] == [None, flops["useful"] / (8 * 197e12) / estimate["low"]]


@pytest.mark.parametrize(
    ("name", "mesh", "axes", "rate"),
    [
        ("v5e-8", "4x2", ("data",), 90e9),
        ("h100x8", "8x1", ("data",), 450e9),
        # One network card for each GPU, and for all that are in a group.
        ("h100x16", "2x8x1", ("replica",), 50e9),
        ("h100x16", "2x8x1", ("replica", "data"), 400e9),
        ("h100x16", "16x1", ("data",), 400e9),
        ("h100x16", "2x1x8", ("model",), 450e9),
        ("2xv5e-16", "2x2x8", ("replica",), 3.12e9),
        ("2xv5e-16", "2x16x1", ("replica", "data"), 16 * 3.12e9),
    ],
)
def test_what_crosses_the_network_takes_longer(name, mesh, axes, rate):
    slice_ = parse_slice(name)
    counted = abstract_mesh(ParallelConfig(mesh), slice_)
    members = math.prod(counted.shape[axis] for axis in axes)
    found = link_seconds({("all-reduce", *axes): 10**9}, counted, slice_)
    assert found == pytest.approx(2 * (members - 1) / members * 1e9 / rate)


def test_estimates_of_model_tuning_and_microbatches():
    tuned = count(dataclasses.replace(TOY, method=ModelTuning()), ParallelConfig("8x1"), V5E)
    prompted = count(TOY, ParallelConfig("8x1"), V5E)
    assert tuned["estimate"]["memory"] == prompted["estimate"]["memory"] > 0
    # All gradients cross data, not the prompt's alone.
    parameters = tuned["trainable"]
    assert tuned["estimate"]["links"] == pytest.approx(2 * 7 / 8 * 2 * parameters / 90e9)
    parts = count(changed(TOY, microbatches=2), ParallelConfig("8x1"), V5E)
    assert parts["estimate"]["memory"] == 2 * prompted["estimate"]["memory"]


def test_packed_rows_follow_the_mesh():
    spec = dataclasses.replace(TOY, batch_size=12, pack=True)
    assert resolve(spec, ParallelConfig("8x1"), V5E) == ParallelConfig("8x1", microbatches=1)
    assert abstract_step(
        spec, ParallelConfig("8x1"), abstract_mesh(ParallelConfig("8x1"), V5E)
    ).shape[:2] == (16, 128)


# It is the step of a real run


OTHERS = (
    "ResidualPromptTuning",
    "PTuning",
    "MultitaskPromptTuning",
    "PerLayerPrompts",
    "PrefixTuning",
    "LoRA",
    "IA3",
    "BitFit",
)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        pytest.param(["SEES_INPUT = False", "MICROBATCHES = 2"], marks=pytest.mark.slow),
        ["SCAN_LAYERS = True", "FSDP = True", "REMAT = 'dots'"],
        pytest.param(["QUANTIZE = 'int8'"], marks=pytest.mark.slow),
        ["ptjax.RunSettings.method = @ptjax.ModelTuning()", "LEARNING_RATE = 0.001"],
        *(
            pytest.param([f"ptjax.RunSettings.method = @ptjax.{name}()"], marks=pytest.mark.slow)
            for name in OTHERS
        ),
    ],
    ids=["PromptTuning", "groups", "fsdp", "int8", "ModelTuning", *OTHERS],
)
def test_the_plan_lowers_the_step_that_a_run_compiles(own_process, monkeypatch, extra):
    """Word for word, with the same arguments on the same devices."""
    import argparse

    from ptjax.cli import bound
    from ptjax.plan import NOT_NEEDED, read_spec

    bindings = [
        "MODEL_DIR = 'run'", "MESH = '4x2'", "LEARNING_RATE_SCALE = 'absolute'",
        "ptjax.Batching.buckets = [(64, 4)]", "ptjax.load_backbone.dtype = 'float32'", *extra,
    ]  # fmt: skip
    arguments = argparse.Namespace(
        gin_file=["quickstart.gin"], gin_search_paths="", gin_bindings=bindings
    )
    load_gin(arguments, defaults=NOT_NEEDED)
    spec, parallel = read_spec()
    lowered = []

    def record(step, state, frozen, shapes, mesh):
        [shape] = shapes
        lowered.append(compile.lower_step(step, state, frozen, shape, mesh).as_text())
        return {}

    monkeypatch.setattr("ptjax.trainer.loop.compile_steps", record)
    bound(tune.tune)(dry_run=True)
    mesh = make_mesh((4, 2))
    assert abstract_step(spec, parallel, mesh).lower().as_text() == lowered[0]


# Searching


def compiler(spec, slice_, fits):
    """What `search` asks for, with the verdict of `fits(layout)`; and what it was asked."""
    asked = []

    def compile_one(parallel):
        asked.append(parallel)
        verdict = "fits" if fits(parallel) else "does not fit"
        return count(spec, parallel, slice_) | {"verdict": verdict}

    return compile_one, asked


def test_the_fastest_that_fits_is_found_first():
    compile_one, asked = compiler(XXL, V5E, lambda parallel: True)
    tried, best = search.search(XXL, V5E, None, compile_one)
    # In bfloat16 8x1 does not even hold the weights; with int8 kernels it does.
    assert [(parallel.mesh, parallel.quantize, parallel.microbatches) for parallel in asked] == [
        ("4x2", None, 1),
        ("4x2", None, 2),
        ("8x1", "int8", 2),
        ("8x1", "int8_products", 1),
        ("8x1", "int8_products", 2),
    ]
    # With two microbatches there is room for all activations.
    assert [parallel.remat for parallel in asked] == [
        "attention", "none", "none", "attention", "none"
    ]  # fmt: skip
    assert best == tried[-1]
    seconds = [search.expected_seconds(one) for one in tried]
    assert all(b < search.WORTH * a for a, b in itertools.pairwise(seconds))


def test_what_the_gin_file_says_of_int8_stays():
    compile_one, asked = compiler(XXL, V5E, lambda parallel: True)
    search.search(XXL, V5E, "int8", compile_one)
    assert {parallel.quantize for parallel in asked} == {"int8"}


def test_a_float32_run_is_tried_in_bfloat16():
    spec = dataclasses.replace(XXL, config=dataclasses.replace(XXL.config, dtype="float32"))
    slice_ = parse_slice("h100x8")
    compile_one, asked = compiler(spec, slice_, lambda parallel: True)
    tried, best = search.search(spec, slice_, None, compile_one)
    assert [(parallel.dtype, parallel.quantize) for parallel in asked] == [
        (None, None), ("bfloat16", None)
    ]  # fmt: skip
    assert best == tried[1] and best["settings"]["dtype"] == "bfloat16"
    # GPUs take float32 in TF32, at half the rate, and twice the bytes are held and read.
    held, compute, memory = (
        [one["bytes_per_device"]["frozen"] for one in tried],
        [one["estimate"]["compute"] for one in tried],
        [one["estimate"]["memory"] for one in tried],
    )
    assert held[0] == pytest.approx(2 * held[1]) and memory[0] == pytest.approx(2 * memory[1])
    assert compute[0] == pytest.approx(2 * compute[1], rel=0.01)  # remat may differ
    # Weights that train stay as they are.
    compile_one, asked = compiler(spec, slice_, lambda parallel: True)
    search.search(dataclasses.replace(spec, method=ModelTuning()), slice_, None, compile_one)
    assert {parallel.dtype for parallel in asked} == {None}


def test_int8_is_left_where_it_gains_nothing():
    slice_ = parse_slice("v6e-8")
    compile_one, asked = compiler(XXL, slice_, lambda parallel: True)
    tried, _ = search.search(XXL, slice_, None, compile_one)
    assert [(parallel.mesh, parallel.quantize) for parallel in asked] == [
        ("8x1", None), ("8x1", "int8_products")
    ]  # fmt: skip
    # It gains by its products, not by its bytes.
    compute, memory = ([one["estimate"][name] for one in tried] for name in ("compute", "memory"))
    assert compute[1] < 0.6 * compute[0] and memory[0] < compute[1]


def test_what_saves_the_most_is_tried_last():
    compile_one, asked = compiler(XXL, V5E, lambda parallel: parallel.mesh == "1x8")
    _, best = search.search(XXL, V5E, None, compile_one)
    assert best["settings"]["MESH"] == "1x8"
    first = [x for x in asked if x.microbatches == 1 and x.quantize is None]
    remats = [x.remat for x in first if (x.mesh, x.fsdp) == ("4x2", False)]
    assert remats == ["attention", "full"]  # all activations cannot fit: that is not compiled
    assert len(asked) < 60


def test_nothing_fits():
    compile_one, asked = compiler(XXL, V5E, lambda parallel: False)
    tried, best = search.search(XXL, V5E, None, compile_one)
    assert best is None and len(tried) == len(asked) > 0
    # What cannot fit, such as all weights of XXL on one chip, is not even compiled.
    whole = dataclasses.replace(XXL, method=ModelTuning())
    assert search.search(whole, parse_slice("v5e-1"), None, compile_one) == ([], None)
