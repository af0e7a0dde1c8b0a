"""A run whose MODEL_DIR was damaged between two starts: it goes on exactly, or says the way out."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import outcome, tune, without_seconds
from etils import epath

from ptjax import cli, files
from ptjax.backbones.load import Backbone
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.settings import TrainSchedule
from ptjax.trainer import loop
from ptjax.trainer.exports import Exports
from ptjax.trainer.metrics_log import MetricsLog
from ptjax.training.optimizer import Adafactor


@pytest.fixture(scope="module")
def whole(
    backbone: Backbone, task: Task, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run of twelve steps."""
    directory = tmp_path_factory.mktemp("whole")
    tune(directory, task, backbone)
    return directory, outcome(directory)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes({"emptied": b"", "cut": data[: len(data) // 2]}[how])


def test_case_5_4_the_run_goes_on_from_the_checkpoint_before(
    whole, backbone, task, tmp_path, caplog
):
    """The newest is damaged, and so are two lines of metrics.jsonl."""
    copy = tmp_path / "run"
    shutil.copytree(whole[0], copy)
    damage(copy / "checkpoints" / "12" / "progress" / "data.json", "cut")
    rows = copy / "metrics.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    with caplog.at_level(logging.INFO, logger="absl"):
        tune(copy, task, backbone)
    assert outcome(copy) == whole[1]
    damaged = [line for line in caplog.messages if "the checkpoint of step 12 is damaged" in line]
    assert len(damaged) == 1 and damaged[0].endswith("; going back to step 9")
    assert f"resuming from step 9 of {copy}" in caplog.messages
    assert f"{rows}: dropped 1 damaged line(s)" in caplog.messages


def test_case_5_4_metrics_are_cut_at_the_last_whole_line(whole, backbone, task, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole[0], copy)
    rows = copy / "metrics.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    for rest in (b"\xff\x00", b"[" * 10_000, b'{"step": 1', b"[]\n", b'{"loss": 1}\n', b"3\n"):
        rows.write_bytes(b"".join(lines[:4]) + rest)
        MetricsLog().on_start(epath.Path(copy), 100)
        assert rows.read_bytes().splitlines() == [line.rstrip() for line in lines[:4]]


@pytest.mark.parametrize("text", [b"", b'{"value": 0.', b"[]", b"[" * 10_000, b"\xff"])
def test_case_5_4_damaged_results_are_made_again(whole, backbone, task, tmp_path, caplog, text):
    copy = tmp_path / "run"
    shutil.copytree(whole[0], copy)
    (copy / "results.json").write_bytes(text)
    assert without_seconds(tune(copy, task, backbone)) == whole[1]["results"]
    assert outcome(copy) == whole[1]
    assert [line for line in caplog.messages if f"{copy / 'results.json'}: damaged (" in line]


@pytest.mark.parametrize("how", ["emptied", "cut", "removed"])
def test_case_5_5_a_damaged_prompt_of_the_best_step_is_made_again(
    whole, backbone, task, tmp_path, how
):
    """From the best one, which is the same."""
    directory, made = whole
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    damage(copy / "prompts" / f"{made['results']['step']}.safetensors", how)
    tune(copy, task, backbone)
    assert outcome(copy)["prompts"] == made["prompts"]


@pytest.mark.parametrize("steps", [3, 6])
def test_case_5_5_without_both_the_checkpoint_makes_it_or_the_way_out_is_named(
    backbone, task, tmp_path, caplog, steps
):
    """The prompt never moves, so that of step 3 stays the best; one checkpoint is step 3's."""
    schedule = TrainSchedule(train_steps=steps, eval_period=3)
    settings = {"schedule": schedule, "optimizer": Adafactor(0.0, weight_decay=0.0)}
    tune(tmp_path, task, backbone, **settings)
    files = [tmp_path / "prompts" / f"{name}.safetensors" for name in ("3", "best")]
    before = files[1].read_bytes()
    for file in files:
        damage(file, "emptied")
    if steps == 3:
        tune(tmp_path, task, backbone, **settings)
        assert [file.read_bytes() for file in files] == [before, before]
        said = [line for line in caplog.messages if "restored from the checkpoint" in line]
        assert len(said) == 1 and said[0].startswith(f"{files[0]}: ")
        return
    with pytest.raises(InputError) as refused:
        tune(tmp_path, task, backbone, **settings)
    problem = str(refused.value)
    assert problem.startswith(f"{files[0]}: ") and len(problem.splitlines()) == 1
    assert f"remove {tmp_path / 'checkpoints'} to start from step 0" in problem


def inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@pytest.fixture
def disk(monkeypatch) -> list[tuple[str, Any]]:
    """What this process syncs ("sync", inode) and renames ("rename", new path), in order."""
    events: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(file):
        fsync(file)
        events.append(("sync", inode(os.fstat(file))))

    def noting_replace(source, target, **kwargs):
        replace(source, target, **kwargs)
        events.append(("rename", os.fspath(target)))

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return events


def test_case_5_5_a_file_and_its_folders_outlast_a_loss_of_power(tmp_path, disk):
    path = tmp_path / "new" / "folder" / "file"
    files.write_bytes(path, b"data")
    synced = {path: "file", path.parent: "folder", tmp_path / "new": "new", tmp_path: "there"}
    names = {inode(place.stat()): name for place, name in synced.items()}
    order = [names[what] if kind == "sync" else "renamed" for kind, what in disk]
    # The names of new folders first; the data before its name, and then the name.
    assert order == ["there", "new", "file", "renamed", "folder"]


def test_case_5_5_what_a_checkpoint_names_is_synced_before_it(
    backbone, task, tmp_path, monkeypatch, disk
):
    save, seen = loop.Checkpoints.save, []

    def checking(self, step, *args):
        synced = {what for kind, what in disk if kind == "sync"}
        beside = [tmp_path / "metrics.jsonl", *(tmp_path / "prompts").iterdir()]
        seen.extend((path.name, inode(path.stat()) in synced) for path in beside)
        save(self, step, *args)

    monkeypatch.setattr(loop.Checkpoints, "save", checking)
    tune(tmp_path, task, backbone, schedule=TrainSchedule(train_steps=2, eval_period=2))
    names = ("metrics.jsonl", "2.safetensors", "best.safetensors")
    assert dict(seen) == dict.fromkeys(names, True)


def test_case_5_11_a_full_disk_is_one_line(
    backbone, task, tmp_path, own_process, monkeypatch, capsys
):
    """Files may not grow past a limit, as under a quota: the first checkpoint does not fit. (The
    captured stderr is in memory: a file would be full as well.)

    What was running ends, and with room the same command goes on.
    """

    def train() -> object:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: tune(directory, task, backbone, schedule=schedule))
        return stopped.value.code or 0

    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's write to files
    directory, schedule = tmp_path / "run", TrainSchedule(train_steps=4, eval_period=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500, hard))
    try:
        code = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()
    assert code == 1 and said[-1] == (
        f"failed: MODEL_DIR = {directory}: it is full (File too large); free some space and "
        "rerun the same command to resume from the last checkpoint"
    )
    assert not [line for line in said if "Traceback" in line or line.startswith("error")]
    assert train() == 0


def test_case_5_14_leftovers_of_a_kill_are_removed(whole, backbone, task, tmp_path):
    """Ours alone, by their exact names; a file of the user's stays."""
    copy = tmp_path / "run"
    shutil.copytree(whole[0], copy)
    hexes = "0123456789abcdef" * 2
    ours = [
        copy / f".{hexes}.tmp",
        copy / f".metrics.jsonl.{hexes}.tmp",
        copy / "prompts" / f".12.safetensors.{hexes}.tmp",
    ]
    others = [copy / ".notes.tmp", copy / f"results.{hexes}.tmp", copy / ".a.0123.tmp"]
    for path in ours + others:
        path.write_bytes(b"half")
    tune(copy, task, backbone)
    assert not any(path.exists() for path in ours)
    assert all(path.read_bytes() == b"half" for path in others)


def test_case_5_14_leftovers_inside_of_a_model_are_removed(tmp_path):
    exports = Exports(epath.Path(tmp_path), "", lambda *args: None, lambda path: {})
    leftover = tmp_path / "best" / f".model.safetensors.{'0' * 32}.tmp"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    exports.remove_leftovers()
    assert not leftover.exists() and leftover.parent.exists()
