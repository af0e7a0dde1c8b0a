"""The studies of all methods: that they name what the gin files have, and that both sides agree."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ptjax import cli
from ptjax.files import gin_configs
from ptjax.settings import RunSettings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = (
    *("prompt", "unseeing", "residual", "p_tuning", "multitask", "per_layer"),
    *("prefix", "lora", "ia3", "bitfit", "model"),
)


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def study() -> Any:
    """benchmarks/methods.py."""
    return importlib.import_module("methods")


def test_the_study_has_every_method_that_has_a_gin_file() -> None:
    ways = study().METHODS
    tunes = "include 'runs/prompt_tune.gin'"
    files = [Path(file) for file in (gin_configs() / "runs").glob("*.gin")]
    named = {file.stem for file in files if tunes in file.read_text()} - {"sweep"}
    assert {way.run for way in ways.values()} == named | {"prompt_tune"}
    assert set(METHODS) == set(ways)


@pytest.mark.parametrize("method", METHODS)
def test_its_settings_are_those_of_the_gin_files(method) -> None:
    given = study().settings_of("mrpc", method, seed=2, steps=300, data_dir="data") | {
        "MODEL_DIR": "m"
    }
    flags = [f"--gin_file={file}" for file in study().gin_files("mrpc", method)]
    flags += [f"--gin.{name}={value!r}" for name, value in given.items()]
    cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))
    settings = cli.settings("ptjax.tune", "settings")["settings"]
    assert isinstance(settings, RunSettings)
    assert (settings.schedule.train_steps, settings.schedule.eval_period) == (300, 50)
    assert settings.seed == 2 and settings.batching.lengths == {"inputs": 128, "targets": 8}
    assert getattr(settings.method, "length", 20) == 20
    rate = settings.optimizer.learning_rate, settings.optimizer.learning_rate_scale
    in_units_of_embedding = method in ("prompt", "unseeing", "per_layer")
    assert (rate == (0.03, "embedding_rms")) == in_units_of_embedding
    assert rate != (0.3, "absolute")  # the paper's, for T5's embedding alone
    sees_input = getattr(settings.method, "attends_to_input", True)
    assert sees_input == (method not in ("unseeing", "prefix"))


def results(accuracy: float, seed: int) -> dict[str, object]:
    """What the study reads of a `results.json`."""
    costs = {"export_bytes": 11_300, "optimizer_bytes": 10_240, "checkpoint_bytes": 20_480}
    speed = {"flops_per_step": 13_800_000_000, "step_bytes": 166_000_000}
    return {
        "metrics": {"accuracy": accuracy},
        "majority": 0.499,
        "trainable_parameters": 2560,
        "costs": costs | speed | {"examples_per_second": (30.0, None)[seed]},
        "versions": {"jax": "0.10.2"},
    }


def test_the_table_has_what_has_finished(tmp_path, monkeypatch, capsys) -> None:
    """In a folder of this study, or in the results file of one on another machine."""
    study().write(tmp_path / "kept.json", 300, {"sst2": {"lora": {0: results(0.7, 0)}}})
    folder = tmp_path / "sst2_300_steps" / "lora" / "1"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results(0.8, 1) | {"more": 1}))
    flags = ["--data_dir=none", f"--output_dir={tmp_path}", f"--results={tmp_path / 'kept.json'}"]
    flags += ["--methods=lora", "--tasks=sst2", "--seeds=2"]
    for more in ([], ["--show", "--methods=ia3,lora", "--seeds=9"]):
        monkeypatch.setattr(sys, "argv", ["methods.py", *flags, *more])
        study().main()
        rows = capsys.readouterr().out.split("\n")
        cells = "0.750 | 0.071 | 0.700, 0.800 | 2,560 | 11.3 | 10.2 | 20.5 | 13.8 | 166 | 30.0"
        assert f"| LoRA, rank 8, q and v | {cells} |" in rows
        assert {row.count("|") for row in rows if row} == {12}
    assert study().read(tmp_path / "kept.json", 300)["sst2"]["lora"][1] == results(0.8, 1)
    with pytest.raises(SystemExit, match="has runs of 300 steps; give another --results"):
        study().read(tmp_path / "kept.json", 200)


@pytest.mark.parametrize("flag", ["--methods=lora,rola", "--tasks=sst"])
def test_an_unknown_name_is_refused(flag, capsys) -> None:
    with pytest.raises(SystemExit):
        study().parse(["--data_dir=none", "--output_dir=none", flag])
    assert f"{flag.split('=')[1].split(',')[-1]!r} is none of" in capsys.readouterr().err


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_all_sides_have_equal_losses(method, tmp_path) -> None:
    import torch

    beside = importlib.import_module("methods_beside_peft")
    ours, theirs = (importlib.import_module(f"methods_{side}_side") for side in ("ptjax", "peft"))
    sentences = [f"{'a film to see again ' * (1 + i % 4)}\t{i % 2}" for i in range(16)]
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *sentences, ""]))
    sizes = ["--size=toy", "--batch=4", "--inputs=20", "--prompt=5", "--batches=2"]
    flags = beside.parse([*sizes, f"--methods={method}", f"--data_dir={tmp_path}"])
    ours.write_inputs(tmp_path, flags)
    threads, losses = torch.get_num_threads(), []
    try:
        for part, how in ((theirs, {}), (ours, {}), (ours, {"packed": True})):
            side = part.start(tmp_path, method, **how)
            side.warm_up()
            side.steps()
            losses.append(side.about["losses"])
    finally:
        torch.set_num_threads(threads)
    assert [len(one) for one in losses] == [21, 21, 21]
    peft, *others = losses
    assert max(beside.difference(one, peft) for one in others) < beside.TOLERANCE
    # Of the same batch, it has fallen by far more than the tolerance (1e-3 at a loss of 10).
    assert peft[-1] < peft[0] - 0.05
