"""The command `ptjax.plan`: from gin files to answers, and what it says of mistakes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from conftest import make_settings
from step_specs import TOY, V5E

import ptjax
from ptjax import cli
from ptjax.errors import InputError
from ptjax.files import gin_configs
from ptjax.planning import compiler, show
from ptjax.planning.plan import model_sizes
from ptjax.planning.workload import ParallelConfig

XXL = ("--gin_file=models/t5_1_1_xxl.gin", "--gin_file=runs/prompt_tune.gin")
NANO = ("--gin_file=quickstart.gin",)


@pytest.fixture(autouse=True)
def environment(own_process, monkeypatch):
    """The command settles where JAX runs; undone afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_quick_answers_without_weights_data_or_compiler(call):
    code, out, err = call("plan", *XXL, "--slice=v5e-8,v4-16", "--slice=h100x8", "--quick")
    assert code == 0, err
    assert "11,135,741,952 parameters, 409,600 train (0.0037%)" in out
    assert "prompts of 100: forward 2.235e+14 FLOPs, step 4.517e+14 (2.02 forward)" in out
    assert [out.count(name) for name in ("v5e-8 ", "v4-16 ", "h100x8 ")] == [1, 1, 1]
    assert "4x2, remat none, fused, unrolled  counted  > 10.37 of 15.75" in out


def test_json_has_all_of_it(call):
    code, out, _ = call("plan", *XXL, "--slice=v5e-8", "--quick", "--json", "--gin.MESH='1x8'")
    [found] = json.loads(out)
    own = found["own"]
    assert code == 0 and found["best"] is None and found["tried"] == []
    assert own["settings"] == {
        "MESH": "1x8", "FSDP": False, "SCAN_LAYERS": False, "REMAT": "none", "QUANTIZE": None,
        "dtype": None, "ATTENTION": "fused", "MICROBATCHES": 1,
    }  # fmt: skip
    assert own["flops"]["forward"] == 223_450_438_303_744
    norms = (24 * 2 + 24 * 3 + 2) * 4096  # whole on every device
    assert own["bytes_per_device"]["frozen"] == 2 * ((11_135_332_352 - norms) // 8 + norms)


def test_sizes_may_come_from_the_checkpoint(call):
    code, out, _ = call("plan", *NANO, "--slice=v5e-1", "--quick", "--json")
    [found] = json.loads(out)
    assert code == 0 and found["own"]["trainable"] == 20 * 128
    assert found["own"]["examples"] == 32


OF_METHODS = {
    "runs/residual.gin": 100 * 128 + (128 * 400 + 400) + (400 * 128 + 128) + 2 * 128,
    "runs/multitask.gin": 100 * 128 + 100 + 128,
    "runs/per_layer.gin": 4 * 100 * 128,
    "runs/p_tune.gin": 100 * 128 + 3 * (128 * 128 + 128),
    "runs/prefix_tune.gin": 2 * 100 * 128 * (4 + 2 + 2),
    "runs/lora.gin": 8 * (128 + 128) * 2 * (4 + 2 + 2),
    "runs/ia3.gin": 2 * 128 * (4 + 2 + 2) + 512 * (4 + 2),
    "runs/bitfit.gin": 128 * (4 * 2 + 1 + 2 * 3 + 1),
}
"""The gin files of methods -> how many parameters they train on ptjax-nano: D = 128, F = 512, 4
layers in the encoder and 2, each with two attentions, in the decoder."""


@pytest.mark.parametrize("file", OF_METHODS)
def test_a_methods_gin_file_plans_what_it_trains(call, file):
    flags = ("--gin_file=models/ptjax_nano.gin", f"--gin_file={file}")
    code, out, err = call("plan", *flags, "--slice=v5e-1", "--quick", "--json")
    assert code == 0, err
    [found] = json.loads(out)
    assert found["own"]["trainable"] == OF_METHODS[file]


def test_a_bank_is_as_large_as_its_members(call):
    bank = ("--gin_file=models/t5_1_1_small.gin", "--gin_file=runs/sweep.gin")
    code, out, err = call("plan", *bank, "--slice=v5e-8", "--quick", "--json")
    assert code == 0, err
    [found] = json.loads(out)
    members = found["own"]["trainable"] / (100 * 512)
    assert members > 1 and found["own"]["examples"] == 32 * members


def test_a_layout_that_a_run_would_refuse_is_an_answer(call):
    small = ("--gin_file=models/t5_1_1_small.gin", "--gin_file=runs/prompt_tune.gin")
    code, out, _ = call("plan", *small, "--slice=v5e-8", "--quick", "--gin.MESH='1x8'")
    assert code == 0
    assert "  gin file: num_heads = 6 is not a multiple of 8, the model axis of the mesh 1x8" in out


def test_settings_are_shown_as_they_are_bound_and_as_they_were_written(call):
    """Not as markup of the terminal, which brackets would be."""
    code, out, err = call("plan", *XXL, "--slice=v5e-8", "--quick", "--gin.MESH='[/a]'")
    assert code == 0, err
    assert "MESH must be 'auto', data x model such as '8x1'" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*XXL, "--slice=v5e-3"), "--slice=v5e-3: unknown size"),
        (XXL, "the following arguments are required: --slice"),
        ((*XXL, "--slice=,"), "--slice=: unknown slice"),
        (("--slice=v5e-8",), "no run to plan: add --gin_file=runs/prompt_tune.gin"),
        (
            (
                "--gin_file=runs/lm_adapt.gin",
                "--gin.CORPUS_DIR='corpus'",
                "--gin.CORPUS_FILES={'train': '*.txt'}",
                "--slice=v5e-8",
            ),
            "(pre-training is not planned)",
        ),
        (("--gin_file=runs/prompt_tune.gin", "--slice=v5e-8"), "which T5? Add its sizes"),
        ((*XXL, "--slice=v5e-8", "--timeout_seconds=0"), "--timeout_seconds"),
        (
            (*XXL, "--slice=v5e-8", "--gin.ptjax.RunSettings.method='model_tuning'"),
            "it takes a reference such as @ptjax.PromptTuning() or a reference such as ",
        ),
        (
            (*XXL, "--slice=v5e-8", "--gin.REMAT='all'"),
            "remat takes one of 'none', 'dots'",
        ),
        ((*XXL, "--slice=v5e-8", "--gin.BATCH_SIZE=0"), "BATCH_SIZE"),
        (
            (*XXL, "--slice=v5e-8", "--gin.MICROBATCHES=3"),
            "must be divisible by MICROBATCHES (3)",
        ),
        ((*XXL, "--slice=v5e-8", "--gin.TASK_FEATURE_LENGTHS={'input': 5}"), "has 'input', not"),
        ((*XXL, "--slice=v5e-8", "--gin.load_backbone.dtype='float16'"), "dtype = 'float16'"),
        (
            (
                "--gin_file=runs/prompt_tune.gin",
                "--slice=v5e-8",
                "--gin.INITIAL_CHECKPOINT_PATH='google/t5-xxl-lm-adapt'",
            ),
            "is not on this machine, and planning downloads no weights",
        ),
    ],
)
def test_mistakes_are_one_line(call, flags, message):
    code, out, err = call("plan", *flags, "--quick")
    [line] = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-8", "v5e-8 needs libtpu: pip install 'ptjax[plan]'"),
        ("h100x8", "h100x8 needs jax_cuda13_plugin: pip install 'ptjax[plan-gpu]'"),
    ],
)
def test_without_the_compiler_it_says_what_to_install(call, monkeypatch, name, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("plan", *XXL, f"--slice={name}")
    assert (code, err) == (2, f"error: compiling for {message}, or use --quick\n")


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        pytest.param("v5e-4", 2, marks=pytest.mark.tpu),  # int8 products too
        pytest.param("h100x4", 1, marks=pytest.mark.cuda),
    ],
)
def test_compiled_searched_and_remembered(call, tmp_path, name, compiled):
    flags = (*NANO, f"--slice={name}", f"--cache_dir={tmp_path}", "--gin.SCAN_LAYERS=True")
    code, out, err = call("plan", *flags)
    assert code == 0, err
    # The gin file's own layout is the fastest here, and was compiled already.
    assert err.count("compiling") == len(list(tmp_path.iterdir())) == compiled
    assert "fits" in out and "MESH = '4x1'" in out
    *_, used = [line for line in out.splitlines() if line.startswith("best ")]
    assert " - " in used
    again = call("plan", *flags)
    assert again == (0, out, "")
    # Another setting is another answer, for which there is not time enough.
    other = (*flags, "--no_search", "--gin.BATCH_SIZE=64", "--timeout_seconds=1")
    assert "compiling" in call("plan", *other)[2]


@pytest.mark.tpu
def test_a_compiler_that_crashes_or_takes_too_long_is_an_answer(call, tmp_path, monkeypatch):
    flags = (*NANO, "--slice=v5e-4", "--no_search", f"--cache_dir={tmp_path}")
    code, out, _ = call("plan", *flags, "--timeout_seconds=1")
    assert code == 0 and "compiler took too long" in out and "more than 1 s" in out
    monkeypatch.setattr("sys.executable", str(crashing(tmp_path)))
    code, out, _ = call("plan", *flags)
    assert code == 0 and "compiler crashed" in out and "signal 11" in out
    # Neither is remembered.
    assert [path.suffix for path in tmp_path.iterdir()] == [".sh"]


def crashing(folder):
    """A Python that ends as a compiler does that overflows its stack."""
    script = folder / "python.sh"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("name", ["t5_1_0_11b", "byt5_small", "mt5_xl", "ptjax_nano"])
def test_every_family_can_be_planned(call, name):
    flags = (f"--gin_file=models/{name}.gin", "--gin_file=runs/prompt_tune.gin")
    code, out, err = call("plan", *flags, "--slice=v5p-16", "--quick", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["own"]["trainable"] > 0


def test_adapters_are_planned_without_weights(call):
    """T5 1.1 small: 8 + 8 layers of width 512, 6 heads of 64, 1,024 inner activations."""
    attentions, joined = 8 + 8 + 8, 6 * 64
    wanted = {"lora": attentions * 2 * 8 * (512 + joined)}
    wanted |= {"ia3": attentions * 2 * joined + 16 * 1024}
    for name, count in wanted.items():
        flags = ("--gin_file=models/t5_1_1_small.gin", f"--gin_file=runs/{name}.gin")
        flags += ("--gin.SCAN_LAYERS=True", "--slice=v5p-16", "--quick", "--json")
        code, out, err = call("plan", *flags)
        assert code == 0, err
        assert json.loads(out)[0]["own"]["trainable"] == count


def report(verdict, dtype="bfloat16", quantize=None):
    """As `plan_slice` puts it together, but for the numbers."""
    return {
        "verdict": verdict,
        "settings": ParallelConfig("8x1", quantize=quantize, dtype=dtype).settings(),
        "dtype": dtype,
        "usable_bytes": 1,
        "bytes_per_device": {},
        "flops": {"executed": 1},
        "examples": 1,
        "estimate": {"low": 1.0, "high": None, "utilisation": [None, 1.0]},
    }


@pytest.mark.parametrize(
    ("verdicts", "searched", "says"),
    [
        (["fits"], True, "nothing else that may be faster fits"),
        (["fits"], False, None),
        (["does not fit"], False, None),
        (["does not fit", "does not fit"], True, "nothing fits: more devices"),
        (["refused", "does not fit"], True, "nothing fits: more devices"),
        (["tight", "does not fit"], True, "nothing fits with room to spare"),
        (["does not fit", "tight"], True, "nothing fits with room to spare"),
        (["compiler crashed", "does not fit"], True, None),
    ],
)
def test_what_is_concluded_without_a_best(capsys, verdicts, searched, says):
    own, *tried = map(report, verdicts)
    show.show_slice(
        show.make_console(),
        {"slice": "v5e-8", "own": own, "searched": searched, "tried": tried, "best": None},
    )
    out = capsys.readouterr().out
    assert ("nothing" in out) == (says is not None)
    assert says is None or says in out


def test_the_best_that_rounds_less_is_shown_too(capsys):
    own, plain = report("does not fit", "float32"), report("fits")
    slow = report("fits") | {"settings": ParallelConfig("1x8").settings()}
    best = report("fits", quantize="int8")
    found = {"slice": "v5e-8", "own": own, "searched": True, "best": best}
    lines = importlib.import_module("ptjax.plan").gin_lines
    show.show_slice(
        show.make_console(), found | {"tried": [own, slow, plain, best]}, setting_lines=lines
    )
    _, less = capsys.readouterr().out.split("rounding the weights less:")
    assert "ptjax.load_backbone.dtype = 'bfloat16'" in less and "quantize = None" in less
    assert "mesh = '8x1'" in less  # the faster one
    show.show_slice(show.make_console(), found | {"tried": [own, best]})
    assert "rounding" not in capsys.readouterr().out


# The function


def settings_of(call, *flags):
    """(the settings of a run of these flags, what the command prints, its JSON)."""
    code, out, err = call("plan", *flags, "--quick")
    assert code == 0, err
    _, as_json, _ = call("plan", *flags, "--quick", "--json")
    return cli.settings("ptjax.tune", "settings")["settings"], out, json.loads(as_json)


def test_the_function_plans_what_the_command_plans(call):
    flags = ("--slice=v5e-8,h100x8", "--gin.MICROBATCHES=2", "--gin.MESH='1x8'")
    flags += ("--gin.SCAN_LAYERS=True", "--gin.REMAT='dots'")
    settings, out, reports = settings_of(call, *XXL, *flags)
    environment = os.environ.copy()
    given = {"mesh": "1x8", "scan_layers": True, "remat": "dots", "quick": True}
    plan = ptjax.plan("t5_1_1_xxl", "v5e-8, h100x8", settings, **given)
    assert os.environ == environment
    assert json.loads(json.dumps(list(plan.slices.values()))) == reports
    assert str(plan).split() == out.replace("gin file", "own").split()
    assert repr(plan) == str(plan)
    listed = ptjax.plan("t5_1_1_xxl", ["h100x8"], settings, **given)
    assert listed.slices == {"h100x8": plan.slices["h100x8"]}
    bank = ptjax.plan("t5_1_1_xxl", "v5e-8", settings, members=3, **given).slices["v5e-8"]["own"]
    assert bank["trainable"] == 3 * reports[0]["own"]["trainable"]


def test_the_network_may_be_given_in_every_form(backbone):
    """A float32 backbone on a CPU is planned as devices load it: in bfloat16."""
    half = dataclasses.replace(backbone.config, dtype="bfloat16")
    plans = [
        ptjax.plan(network, "v5e-1", quick=True).slices
        for network in (backbone, half, backbone.name, Path(backbone.name))
    ]
    assert plans[0]["v5e-1"]["own"]["dtype"] == "bfloat16"
    assert all(plan == plans[0] for plan in plans)
    whole = ptjax.plan(backbone.config, "v5e-1", quick=True).slices["v5e-1"]["own"]
    assert whole["dtype"] == "float32"
    again = ptjax.plan(half, "v5e-1", dtype="float32", quick=True).slices["v5e-1"]["own"]
    assert again == whole


def test_sizes_by_name_are_those_of_the_gin_files():
    names = [file.stem for file in gin_configs().glob("models/*.gin")]
    assert len(names) > 20
    fields = [field.name for field in dataclasses.fields(ptjax.T5Config)]
    for name in names:
        flags = [f"--gin_file=models/{name}.gin"]
        cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))
        assert model_sizes(name) == cli.settings(ptjax.T5Config, *fields), name
    assert model_sizes("../models/t5_1_1_xxl") is None


class Locked(ptjax.PromptTuning):
    """A method that cannot be sent to another process."""

    def __reduce__(self):
        raise TypeError("it holds a lock")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("t5_1_1_xxl", "v5e-3"), {}, "v5e-3: unknown size"),
        (("t5_1_1_xxl", []), {}, "unknown slice"),
        ((3, "v5e-8"), {}, "which T5.*not a int"),
        (("t5_1_1_xxll", "v5e-8"), {}, "is not on this machine.* t5_1_1_xxl"),
        (("google/t5-xxl-lm-adapt", "v5e-8"), {}, "is not on this machine.* t5_1_1_xxl"),
        (("t5_1_1_small", "v5e-8"), {"members": 0}, "members must be >= 1, got 0"),
        (("t5_1_1_small", "v5e-8"), {"dtype": "float16"}, "dtype must be one of"),
        (("t5_1_1_small", "v5e-8"), {"timeout_seconds": 0}, "timeout_seconds must be >= 1"),
    ],
)
def test_what_the_function_refuses(arguments, options, message):
    with pytest.raises(InputError, match=message):
        ptjax.plan(*arguments, **{"quick": True} | options)


def test_a_mesh_that_a_run_would_refuse_is_an_answer_too():
    plan = ptjax.plan("t5_1_1_small", "v5e-8", mesh="1x8", quick=True)
    assert "  own: num_heads = 6 is not a multiple of 8, the model axis of the mesh" in str(plan)


def test_a_misspelt_argument_is_refused():
    misspelt: dict[str, Any] = {"quik": True}
    with pytest.raises(TypeError, match=r"no argument 'quik'; did you mean quick\?"):
        ptjax.plan("t5_1_1_small", "v5e-8", **misspelt)


def test_settings_that_cannot_be_sent_to_the_compiler_are_refused():
    spec = dataclasses.replace(TOY, method=Locked())
    with pytest.raises(InputError, match=r"\(it holds a lock\); plan with quick=True"):
        compiler.Compiler(spec, V5E)(ParallelConfig("8x1"))


@pytest.mark.tpu
def test_any_code_reaches_the_process_that_compiles(monkeypatch):
    """A schedule is a closure, and a class of a notebook is in no module. JAX stays as it was."""
    monkeypatch.setattr(Locked, "__reduce__", object.__reduce__)
    monkeypatch.setattr(Locked, "__module__", "__main__")
    schedule = optax.linear_schedule(0.3, 0.0, 100)
    settings = make_settings(method=Locked(length=4), optimizer=ptjax.Adafactor(schedule))
    platform = jax.default_backend()
    plan = ptjax.plan(TOY.config, "v5e-4", settings, search=False, cache_dir=None)
    assert plan.slices["v5e-4"]["own"]["verdict"] == "fits", plan
    assert "fits" in str(plan) and jax.default_backend() == platform
