"""The parts `step` and `peft` of `benchmarks/on_gpu`, and what they share with other benchmarks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, ROOT / "benchmarks", ROOT / "benchmarks" / "on_gpu"]
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch) -> None:
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))


# Sides that wait for the request to start


SIDE = """
import pathlib, sys, time, turns
def start():
    pathlib.Path(sys.argv[1]).touch()
    return turns.Side(lambda: None, lambda: {steps}, {{"trained": 3}})
turns.serve(start)
"""


def make_turns(folder: Path, **steps: str):
    from turns import Turns

    commands = {
        side: [sys.executable, "-c", SIDE.format(steps=does), str(folder / side)]
        for side, does in steps.items()
    }
    path = os.pathsep.join(map(str, FOLDERS))
    return Turns(commands, os.environ | {"PYTHONPATH": path}, optional=["optional"])


def test_a_side_starts_when_it_is_told(tmp_path) -> None:
    with make_turns(tmp_path, first="None", second="None") as turns:
        turns.warm(["first"])
        assert turns.about == {"first": {"trained": 3}}
        assert [len(answers) for answers in turns.take(2).values()] == [2]
        turns.end(["first"])
        assert not (tmp_path / "second").exists()
        turns.warm(["second"])
        assert (tmp_path / "second").exists() and list(turns.take(1)) == ["second"]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("1 / 0", "first: ZeroDivisionError: division by zero"),
        ("sys.exit(5)", "first ended with 5"),
        ("time.sleep(600)", "first ended with -9, limit 1 s"),
    ],
)
def test_a_side_that_fails_says_why(steps, said, tmp_path) -> None:
    from turns import SideError

    with make_turns(tmp_path, first=steps) as turns:
        turns.warm()
        turns.timeout = 1 if "sleep" in steps else None
        began = time.monotonic()
        with pytest.raises(SideError, match=f"^{said}"):
            turns.take(1)
        assert time.monotonic() - began < 300


def test_only_an_optional_side_is_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SIDE", "import sys; sys.exit(3)  # {steps}")
    from turns import SideError

    with make_turns(tmp_path, optional="") as turns:
        turns.warm()
        assert turns.about == {}
    with make_turns(tmp_path, needed="") as turns, pytest.raises(SideError, match="needed ended"):
        turns.warm()


# Weights from names


@pytest.mark.parametrize("scan", [False, True])
def test_weights_are_those_of_their_names(scan) -> None:
    import jax
    import seeded
    from prompt_step import t5_1_1
    from ptjax_side import make_params

    from ptjax.models.stacking import UnstackedView
    from ptjax.models.t5 import parameter_shapes
    from ptjax.trees import flatten_paths

    config = t5_1_1("toy", scan_layers=scan)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), parameter_shapes(config)
    )
    made = UnstackedView(flatten_paths(make_params(shapes, config.head_dim, "float32")))
    assert "encoder/layers_1/mlp/wo/kernel" in made
    for name in made:
        array = np.asarray(made[name])
        spread = seeded.deviation(name, array.shape, config.head_dim)
        if spread is None:
            assert (array == 1).all()
            continue
        index = np.arange(array.size, dtype=np.int32)
        with np.errstate(over="ignore"):
            whole = seeded.noise(index, np.int32(seeded.seed_of(name))).astype(np.float32)
        expected = whole * np.float32(seeded.step_size(spread))
        np.testing.assert_array_equal(array.ravel(), expected)
        # Uniform: of so few entries the estimate is off by some per cent.
        assert abs(array.std() / spread - 1) < 3 / array.size**0.5
        assert abs(array.mean()) < 5 * spread / array.size**0.5


@pytest.mark.oracle
def test_pytorch_makes_the_same_weights(tmp_path) -> None:
    import peft_side
    from prompt_step import t5_1_1
    from ptjax_side import describe_backbone, make_params

    from ptjax.interop.huggingface_format import to_huggingface
    from ptjax.sharding.meshes import make_mesh
    from ptjax.sharding.quantize import sharded_shapes
    from ptjax.trees import flatten_paths

    config = t5_1_1("toy")
    (tmp_path / "backbone.json").write_text(json.dumps(describe_backbone(config, "bfloat16")))
    settings = {"dtype": "bfloat16", "device": "cpu"}
    theirs = dict(peft_side.make_backbone(tmp_path, settings).named_parameters())
    shapes = sharded_shapes(config, "bfloat16", make_mesh(1))
    for name, array in flatten_paths(make_params(shapes, config.head_dim, "bfloat16")).items():
        their_name, transposed = to_huggingface(name)
        other = theirs.pop(their_name).detach().float().numpy()
        np.testing.assert_array_equal(other.T if transposed else other, np.float32(array))
    assert not theirs


# Predictions


@pytest.mark.parametrize("kind", [H100, H200])
def test_a_row_of_the_step_begins_with_a_policy_that_is_predicted_to_fit(kind) -> None:
    import predictions
    import step
    import step_time

    assert {step_time.name_of(row) for row in step.programs()} <= predictions.load(kind).keys()
    first = {name: step.policies(step.settings(name), kind)[0] for name in step.ROWS}
    # XXL keeps 148 GiB without any.
    assert first.pop("XXL int8, T = 512") == "dots"
    assert set(first.values()) == {"none"}
    assert step.policies(step.settings("XL, T = 512"), "another GPU") == ["none", "dots", "full"]


def test_a_shape_that_is_too_large_begins_with_less() -> None:
    import peft_speed

    large = "xl, 32x512+2, bfloat16, remat none, dropout 0.1"
    assert peft_speed.first_policies(H100)[large] == "dots"
    assert large not in peft_speed.first_policies(H200)
    assert peft_speed.first_policies("cpu") == {}


def test_an_h200_reads_faster_and_computes_alike() -> None:
    import predictions

    name = "xl, 32x512+16, bfloat16, remat none"
    h100, h200 = predictions.load(H100)[name], predictions.load(H200)[name]
    assert h200["compute"] == h100["compute"]
    assert h200["memory_most"] / h100["memory_most"] == pytest.approx(3350 / 4800)
    assert predictions.load("cpu") == {}


def test_goals_are_held_against_the_plan() -> None:
    import step

    planned = {"peak_gib": 60.0, "low": 0.1, "high": 0.2}
    found = {
        "remat": "none",
        "batch": 32,
        "compile_seconds": 9.0,
        "compiled_peak_bytes": 2**30,
        "peak_bytes": 62 * 2**30,
        "seconds": 0.19,
    }
    cells = step.describe(found, planned, 0.1, goal=True)
    assert cells["peak_met"] and cells["range_met"] and cells["utilisation_met"]
    cells = step.describe(
        found | {"seconds": 0.21, "peak_bytes": 64 * 2**30}, planned, 0.1, goal=True
    )
    assert [cells[f"{goal}_met"] for goal in ("peak", "range", "utilisation")] == [False] * 3
    assert "utilisation_met" not in step.describe(found, planned, 0.1, goal=False)
    assert "peak_met" not in step.describe(found | {"peak_bytes": None}, planned, 0.1, goal=True)
    assert "planned_gib" not in step.describe(found, None, None, goal=True)


# Data


def test_prepared_examples_are_read_as_they_were(tmp_path, monkeypatch) -> None:
    import peft_speed
    import prepare

    (tmp_path / "sst2").mkdir()
    lines = ["sentence\tlabel", "a fine film\t1", "dull , and long\t0", "fine\t1"]
    (tmp_path / "sst2" / "train.tsv").write_text("\n".join(lines) + "\n")
    data = tmp_path / "data"
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", f"--data_dir={tmp_path}", f"--data={data}", "sst2"]
    )
    prepare.main()
    with np.load(data / "sst2.npz") as stored:
        assert stored["train_ids"].dtype == np.uint16
        assert stored["train_targets"].tolist() == [1, 0, 1]
    examples = peft_speed.read_examples(data, "sst2")
    from ptjax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("package:nano")
    texts = [[tokenizer.decode(ids) for ids in examples.tokens(i, 0)] for i in range(3)]
    assert texts == [
        ["a fine film", "positive"],
        ["dull , and long", "negative"],
        ["fine", "positive"],
    ]
    with pytest.raises(SystemExit, match=r"imdb\.npz is missing: make it with .*prepare\.py"):
        peft_speed.read_examples(data, "imdb")


@pytest.mark.parametrize("part", ["step", "peft_speed"])
def test_nothing_of_full_size_runs_on_a_cpu(part, tmp_path, monkeypatch) -> None:
    module = importlib.import_module(part)
    monkeypatch.setattr(sys, "argv", [part, f"--output={tmp_path}", f"--data={tmp_path}"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit, match="JAX finds no accelerator here; --rehearse"):
        module.main()
    assert not list(tmp_path.iterdir())


def test_a_side_that_waits_has_not_touched_the_device() -> None:
    code = "import ptjax_side; from jax._src.xla_bridge import backends_are_initialized as started"
    code += "; print(started())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert said.stdout == b"False\n", said.stderr.decode()


def test_the_fused_step_is_compared_with_the_plain_ones_around_it() -> None:
    import attention

    def row(seconds: float) -> dict[str, object]:
        return {"seconds": seconds, "compiled_peak_bytes": 3 * 2**30}

    found = attention.describe(row(1.0), row(0.8), row(1.21), goal=True)
    assert found["ratio"] == pytest.approx(1.1 / 0.8) and found["ratio_met"] is True
    assert found["fused_compiled_peak_gib"] == 3
    assert attention.describe(row(1.0), row(0.9), row(1.0), goal=True)["ratio_met"] is False


# Rehearsals


def rehearse(part: str, folder: Path) -> list[dict]:
    """The rows of a rehearsal of `run.sh`, which is complete."""
    command = [str(ROOT / "benchmarks/on_gpu/run.sh"), "--rehearse", "--limit=1500"]
    command += [f"--output={folder}", f"--data={folder / 'none'}", part]
    # Eight virtual devices are for other tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"### {part}: complete" in done.stdout
    return json.loads((folder / f"rehearsal_{part}.json").read_text())["rows"]


@pytest.mark.rehearsal
def test_the_step_is_rehearsed(tmp_path) -> None:
    (row,) = rehearse("step", tmp_path)
    assert row["seconds"] > 0 and row["remat"] == "none" and row["kernels"]["all"] > 0


@pytest.mark.rehearsal
def test_the_attentions_are_rehearsed(tmp_path) -> None:
    rows = rehearse("attention", tmp_path)
    assert [row["row"] for row in rows] == ["T = 512", "T = 512, packed"]
    assert all(row["ratio"] > 0 and "ratio_met" not in row for row in rows)


@pytest.mark.rehearsal
@pytest.mark.oracle
def test_the_comparison_with_peft_is_rehearsed(tmp_path) -> None:
    rows = rehearse("peft", tmp_path)
    assert [row["row"] for row in rows] == [
        "toy, sst2: PEFT",
        "toy, sst2: ptjax, as in the paper",
        "toy, sst2: ptjax, packed, sees_input = False",
    ]
    assert all(row["examples_per_second"] > 0 for row in rows)
    assert rows[0]["attention"] == "sdpa" and rows[0]["ratio"] == 1
    assert rows[1]["logits_met"] and rows[1]["goal"] == 1.5
