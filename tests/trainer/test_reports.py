"""What a run says and writes of itself, from the functions alone: log lines, display, results."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import struct
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_settings
from etils import epath
from plain_members import plain_member, several
from tensorboardX.proto import event_pb2

from ptjax.data.batching import Batching
from ptjax.data.examples import Example
from ptjax.data.hard_prompt import HardPrompt
from ptjax.errors import InputError
from ptjax.interop.prompt_file import save_prompt
from ptjax.methods.initializers import Uniform
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.settings import Evaluation
from ptjax.sharding.meshes import make_mesh
from ptjax.trainer import lock, results, startup_report, tune
from ptjax.trainer.display import Display
from ptjax.trainer.identity import versions
from ptjax.trainer.members import Members
from ptjax.trainer.results import Scores
from ptjax.trainer.setup import set_up_members
from ptjax.trainer.sweep import MemberOverrides, check_members, sweep
from ptjax.trainer.task_data import load_task_data, make_train_batches
from ptjax.training.optimizer import Adafactor


@pytest.fixture(autouse=True)
def told(caplog):
    """All that is logged."""
    caplog.set_level("INFO", logger="absl")
    return caplog


# Before the first step


def test_sizes_are_those_of_what_trains_and_what_does_not(backbone, told):
    trainable = {"prompt": np.zeros((10, 100), np.float32)}
    state = {"sums": np.zeros((500_000,), np.float32)}
    frozen = {"kernel": np.zeros((3, 3_000), np.float32)}
    startup_report.report_sizes(PromptTuning(), backbone, trainable, state, frozen)
    assert told.messages == [
        f"backbone {backbone.name}, {backbone.fingerprint[:19]}",
        "prompt_tuning: 1,000 trainable parameters (10.0000%), 9,000 frozen (0.04 MB)",
        "optimizer state 2.00 MB, a checkpoint about 2.00 MB",
    ]


@pytest.mark.parametrize(
    ("name", "steps", "warned"),
    [
        ("t5/checkpoint_1100000", 1_130_000, True),
        ("t5/checkpoint_1100000/", 1_130_000, True),
        ("t5/checkpoint_1100000", 1_100_000, False),  # fewer steps than it has made
        ("t5/checkpoint_100", 999, True),
        ("t5/checkpoint_100", 1_000, False),  # a long run on a young checkpoint
        ("t5/checkpoint_100/more", 999, False),
        ("t5/base", 999, False),
    ],
)
def test_steps_that_seem_to_be_t5xs_are_warned_of(backbone, told, name, steps, warned):
    startup_report.report_steps(steps, dataclasses.replace(backbone, name=name))
    assert len(told.messages) == warned
    if steps == 999 and warned:
        assert told.messages == [
            "TRAIN_STEPS = 999 are steps of this run. T5X starts to count at the checkpoint's 100, "
            "and would train for 899: set --gin.TRAIN_STEPS=899 if you mean that"
        ]


def test_the_learning_rate_is_told_in_units_of_the_embedding(told):
    prompt, rate = {"prompt": {}}, Adafactor(learning_rate=0.3)
    startup_report.report_rate(prompt, rate, 10.0)
    assert told.messages == ["learning rate 0.3: 3% of the embedding's RMS (10) a step"]
    told.clear()
    startup_report.report_rate(prompt, rate, 0.5)
    assert told.messages == [
        "learning rate 0.3: 60% of the embedding's RMS (0.5) a step",
        "one step may move a prompt entry by 60% of the embedding's RMS; 1-3% learns best: set "
        "--gin.LEARNING_RATE_SCALE=\"'embedding_rms'\" --gin.LEARNING_RATE=0.03 "
        "(Adafactor.learning_rate_scale and learning_rate)",
    ]
    told.clear()
    startup_report.report_rate({"params": {}}, rate, 0.5)  # weights have a scale of their own
    assert len(told.messages) == 1
    told.clear()
    own = Adafactor(0.1, multiply_by_parameter_scale=True)
    startup_report.report_rate({"prefix": {}}, own, 0.5)
    assert told.messages == ["learning rate 0.1: 10% of each array's own RMS a step"]


@pytest.mark.parametrize("pack", [False, True])
def test_the_padding_of_the_batches_is_told(backbone, task, told, pack):
    """In a packed batch every example has a copy of the prompt."""
    batching = Batching(batch_size=8, feature_lengths={"inputs": 32, "targets": 4}, pack=pack)
    settings = make_settings(batching=batching, method=PromptTuning(length=8))
    data = load_task_data(task, backbone, settings)
    batches = make_train_batches(data, settings, 0)
    [said] = [line for line in told.messages if "batches an epoch" in line]
    slots = 8 if pack else 0
    filled = (data.source.input_lengths.mean() + slots) / (32 + slots)
    how = "packed, all with their prompts" if pack else "in buckets"
    assert said == (
        f"{batches.batches_per_epoch} batches an epoch; padding {100 * (1 - filled):.0f}% -> "
        f"{100 * batches.padding():.0f}% (to 32 tokens -> {how})"
    )


def test_a_member_has_its_own_seed_rate_and_initial_prompt_and_the_rest_from_the_run():
    settings = make_settings()
    assert MemberOverrides().apply(settings) == settings
    assert MemberOverrides(seed=0).apply(settings) == dataclasses.replace(settings, seed=0)
    slower = dataclasses.replace(settings.optimizer, learning_rate=0.0)
    assert MemberOverrides(learning_rate=0.0).apply(settings) == dataclasses.replace(
        settings, optimizer=slower
    )

    def zeros(key: Any, length: int, context: Any) -> Any:
        return np.zeros((length, 16), np.float32)

    own = MemberOverrides(initializer=zeros).apply(settings)
    assert own.method == PromptTuning(length=4, initializer=zeros) and own.seed == 3
    assert own.optimizer == settings.optimizer


def test_the_members_of_a_sweep_are_set_up_from_their_own_settings(backbone, task, tmp_path):
    overrides = {"a": MemberOverrides(seed=5), "b": MemberOverrides(learning_rate=0.2)}
    setups = set_up_members(backbone, task, epath.Path(tmp_path), make_settings(), overrides)
    assert [setup.member.name for setup in setups] == ["a", "b"]
    assert [setup.seed for setup in setups] == [5, 3]
    rates = [setup.member.rate_at(0) / setup.rms for setup in setups]
    np.testing.assert_allclose(rates, [0.05, 0.2], rtol=1e-6)  # float32
    assert setups[0].member.exports.directory == epath.Path(tmp_path) / "prompts" / "a"
    assert list(tmp_path.iterdir()) == []
    for setup in setups:
        assert setup.trainable.keys() == {"prompt"} and setup.frozen.keys() == {"params"}
        assert setup.variables.keys() == {"prompt", "params"}


# While it runs


messages: Any = event_pb2  # made by protobuf: no type checker knows what is in it


def events_of(folder: Path) -> list[Any]:
    """The events of TensorBoard's files, each after its length and a checksum."""
    found: list[Any] = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(messages.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


@pytest.mark.parametrize("step", [0, 4])
def test_tensorboard_forgets_what_a_resumed_run_writes_again(tmp_path, step):
    display = Display(8)
    display.on_start(epath.Path(tmp_path), step)
    display.on_log(step + 2, {"train/loss": 0.5, "train/loss/a": 0.25})
    display.on_end(step + 2)
    events = events_of(tmp_path)
    starts = [
        event.step for event in events if event.session_log.status == messages.SessionLog.START
    ]
    assert starts == ([5] if step else [])
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert scalars == [(step + 2, "train/loss", 0.5), (step + 2, "train/loss/a", 0.25)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_on_stderr_and_no_lines(tmp_path, monkeypatch, told, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    display = Display(8)
    display.on_start(epath.Path(tmp_path), 2)
    display.on_step(3)
    display.on_log(4, {"train/loss": 0.5, "time/examples_per_second": 12.0})
    display.on_evaluation(4, {"validation/accuracy": 0.75, "time/evaluation_seconds": 3.0})
    display.on_step(5)
    display.on_end(5)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.getvalue())  # without colours
    assert shown.splitlines()[-1].startswith("step 5/8 ")
    # The last look: the newest of each number, of whatever row.
    assert "5/8" in shown.splitlines()[-1]
    assert "loss 0.5  examples_per_second 12  validation accuracy 0.75" in shown.splitlines()[-1]
    assert "evaluation_seconds" not in shown
    assert capsys.readouterr().out == ""
    assert not [line for line in told.messages if line.startswith("step ")]


def test_lines_leave_out_what_only_files_have(tmp_path, told):
    display = Display(8)
    display.on_start(epath.Path(tmp_path), 0)
    metrics = {"train/loss": 0.123456, "train/gradient_norm": 1.0, "train/learning_rate": 0.3}
    display.on_log(2, metrics)
    display.on_end(2)
    assert [line for line in told.messages if line.startswith("step ")] == ["step 2/8  loss 0.1235"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_full_disk_at_the_end_hides_no_earlier_error(tmp_path, failing):
    display = Display(8)
    display.on_start(epath.Path(tmp_path), 0)
    events = display._events
    assert events is not None
    close, closed = events.close, []

    def full() -> None:
        closed.append(1)
        raise OSError("No space left on device")

    events.close = full
    try:
        if failing:
            with pytest.raises(KeyError):
                try:
                    raise KeyError
                finally:
                    display.on_end(2)
        else:
            with pytest.raises(OSError, match="No space left"):
                display.on_end(2)
    finally:
        close()
    assert closed == [1]


def test_a_display_that_never_started_ends(told):
    Display(8).on_end(0)


# After the last step


class Scored:
    """An evaluator: its scores are dictated, and what it is asked is noted."""

    metric, reported_split = "accuracy", "test"
    settings, ranks = Evaluation(split="validation"), True

    def __init__(self, positive: str | None) -> None:
        labels = ("good", "bad")
        self.task = types.SimpleNamespace(name="words", positive=positive, labels=labels)
        self.asked: list[Any] = []

    def __call__(self, variables: Any, split: str, rewording: Any = None) -> dict[str, float]:
        self.asked.append(variables)
        assert split == "test"
        value = {"best": 0.9, "before": 0.5}.get(variables, 0.25)
        return {"accuracy": value, "f1": value / 2}

    def predict_with_scores(self, variables: Any, split: str) -> Any:
        assert (variables["of"], split) == ("best", "test")
        return ["good", "bad"], np.log([[0.75, 0.25], [0.25, 0.75]])

    def score(self, predictions: Any, split: str) -> dict[str, float]:
        assert (predictions, split) == (["good", "bad"], "test")
        return self("best", split)

    def examples(self, split: str) -> list[Any]:
        return [Example("a", "good", {}, "", 1), Example("b", "good", {}, "", 2)]

    def majority(self, train: Any, split: str) -> float:
        assert split == "test"
        return 0.75


@pytest.mark.parametrize("positive", [None, "good"])
def test_results_have_the_scores_of_the_best_the_first_and_the_baselines(backbone, positive):
    evaluator = Scored(positive)
    prompts = {"asked": HardPrompt("Good?")}
    settings = make_settings(evaluation=Evaluation(hard_prompts=prompts))
    frozen = dataclasses.replace(backbone, variables="frozen")
    data: Any = types.SimpleNamespace(evaluator=evaluator, train=[])
    scores: Any = Scores(frozen, settings, data)
    expected = {
        "task": "words",
        "split": "test",
        "metric": "accuracy",
        "value": 0.9,
        "metrics": {"accuracy": 0.9, "f1": 0.45},
        "positive_label": "good",
        "seed": 3,
        "majority": 0.75,
        "before": 0.5,
        "hard_prompts": {"asked": 0.25},
        "selected_on": "validation",
        "examples": {"train": 0, "validation": 2, "test": 2},
    }
    if positive is None:
        del expected["positive_label"]
    found, record = scores.tuned({"of": "best"}, "before", 3)
    assert found == expected
    assert record["predictions"] == ["good", "bad"] and record["confidences"] == [0.75, 0.75]
    assert record["prompt_rows"] is None  # no prompt among the variables
    scores.tuned({"of": "best"}, "before", 4)
    assert evaluator.asked.count("frozen") == 1  # baselines are the same for all members


def test_a_row_of_a_study_has_the_whole_settings_and_the_versions(backbone):
    row = results.describe_run(backbone, make_settings(), 1.23456)
    assert (row["backbone"], row["fingerprint"]) == (backbone.name, backbone.fingerprint)
    assert row["seconds"] == 1.235 and row["versions"] == versions()
    assert row["settings"]["schedule"]["keep"] == 2  # which no identity has
    json.dumps(row)


def test_the_best_member_is_the_one_of_the_validation_split(tmp_path):
    run: Any = types.SimpleNamespace(members=several(tmp_path, "a", "b", "c"))
    run.progress = run.members.progress
    for member, value in zip(run.progress.members, (0.5, 0.75, None), strict=True):
        member.best_value = value
    run.progress.members[2].failed = True
    scored = {"a": {"value": 0.9}, "b": {"value": 0.6}, "c": {"value": 0.3}}
    found = results.of_sweep(scored, run)
    assert found == {
        "members": scored,
        "average": pytest.approx(0.6),
        "best": {"member": "b", "value": 0.6},
        "failed": ["c"],
    }
    # A member that failed before its first export has no score.
    assert results.of_sweep({"a": {"value": 0.9}}, run)["best"] == {"member": "a", "value": 0.9}


def test_the_prompt_of_a_run_is_the_best_members(tmp_path):
    made = np.ones((2, 4), np.float32)
    folder = epath.Path(tmp_path)
    assert tune.Run(folder, {}).prompt is None
    assert tune.Run(folder, {"value": 0.5}).prompt is None  # a tuned model
    for name, rows in (("", made), ("b", 2 * made)):
        path = tmp_path / "prompts" / name / "best.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_prompt(path, rows, {})
    alone = tune.Run(folder, {"value": 0.5}).prompt
    best = tune.Run(folder, {"members": {}, "best": {"member": "b"}}).prompt
    assert alone is not None and alone.prompt.tolist() == made.tolist()
    assert best is not None and best.prompt.tolist() == (2 * made).tolist()
    assert tune.Run(folder, {}).prompt is None  # a dry run does not read an older run's


def test_damaged_results_are_as_none_and_said(tmp_path, told):
    folder = epath.Path(tmp_path)
    assert tune._read_results(folder) is None and told.messages == []
    (tmp_path / "results.json").write_text('{"value": 0.5}')
    assert tune._read_results(folder) == {"value": 0.5} and told.messages == []
    (tmp_path / "results.json").write_text("[]")
    assert tune._read_results(folder) is None
    path = tmp_path / "results.json"
    assert told.messages == [f"{path}: damaged (not a JSON object); it is written again"]


def finished(folder: Path, results: Any, step: int = 4, **member: Any) -> Any:
    """What `_finished` says of a run of six steps whose newest checkpoint is of `step`."""
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    members = Members([plain_member(folder)])
    members.progress.step = step
    [own] = members.progress.members
    for name, value in member.items():
        setattr(own, name, value)
    saved = members.progress.to_json()
    return tune._finished(
        types.SimpleNamespace(  # type: ignore[arg-type]
            model_dir=epath.Path(folder),
            members=members,
            schedule=types.SimpleNamespace(train_steps=6),
            checkpoints=types.SimpleNamespace(newest_progress=lambda: saved),
        )
    )


def test_a_run_has_finished_at_its_last_step_or_when_nobody_trains(tmp_path, told):
    six, four = {"trained_steps": 6}, {"trained_steps": 4}
    assert finished(tmp_path, None, step=6) is None
    assert finished(tmp_path, six, step=6) == six
    assert told.messages == [f"{tmp_path}: the run has finished, at step 6"]
    assert finished(tmp_path, four, step=6) is None  # the results are of a shorter run
    assert finished(tmp_path, four, step=4) is None
    assert finished(tmp_path, four, step=4, stopped=True) == four  # out of patience


@pytest.mark.parametrize("damaged", ["4", "best"])
def test_a_run_whose_best_export_is_damaged_has_not_finished(tmp_path, damaged):
    exports, six = plain_member(tmp_path).exports, {"trained_steps": 6}
    exports.write(exports.path(4), {"prompt": [0.0]}, {"step": 4})
    exports.promote(4)
    assert finished(tmp_path, six, step=6, best_step=4) == six
    exports.path(damaged).write_bytes(b"{")
    assert finished(tmp_path, six, step=6, best_step=4) is None


def test_data_of_two_tasks_of_one_name_are_both_in_the_identity(backbone, task):
    class Data:
        def __init__(self, digest: str) -> None:
            self.describe = lambda: {"split": {"the hash": digest}}

    first, second = Data("a"), Data("b")
    setups: Any = [types.SimpleNamespace(data=data) for data in (first, second, first)]
    made = tune._identify(backbone, task, make_settings(), None, setups)
    assert made["data"] == {"split": {"the hash": "a"}, "split (1)": {"the hash": "b"}}
    assert made["settings"]["members"] is None


@pytest.mark.parametrize("results", [None, {"value": 0.5}])
def test_where_nothing_can_be_written_only_a_finished_run_is_read(tmp_path, monkeypatch, results):
    def refuse(self: lock.Lock) -> bool:
        raise lock.NotWritableError("not writable")

    monkeypatch.setattr(lock.Lock, "try_once", refuse)
    held: list[Any] = []

    def attempt(run_lock: lock.Lock | None) -> Any:
        held.append(run_lock)
        return results

    directory = epath.Path(tmp_path)
    with pytest.raises(lock.NotWritableError, match="not writable"):
        tune._under_lock(directory, attempt, needed=True)
    assert held == []  # without results there is nothing to look at
    (tmp_path / "results.json").write_text("{}")
    if results is None:  # they are not those of this run
        with pytest.raises(lock.NotWritableError, match="not writable"):
            tune._under_lock(directory, attempt, needed=True)
    else:
        assert tune._under_lock(directory, attempt, needed=True) == results
    assert held == [None]
    assert tune._under_lock(directory, lambda run_lock: {}, needed=False) == {}


def test_settings_that_do_not_fit_are_refused_before_any_data_are_read(backbone):
    two = dataclasses.replace(backbone, mesh=make_mesh(devices=jax.devices()[:2]))
    tune._check(two, make_settings(batch_size=6), {})
    with pytest.raises(InputError, match="batch size 3 is not a multiple of the 2 devices"):
        tune._check(two, make_settings(batch_size=3), {})
    tune._check(two, make_settings(batch_size=3, pack=True), {})  # whose rows follow
    with pytest.raises(InputError, match="batch size 6, in 2 microbatches,"):
        tune._check(two, make_settings(batch_size=6, microbatches=2), {})


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "-x", "a/b", "a b", "ä\n"])
def test_a_member_is_named_as_a_folder_can_be(name):
    settings = make_settings()
    check_members({"seed1_rate0.3": MemberOverrides(), "a+b-c": MemberOverrides()}, settings)
    check_members({}, make_settings(method=ModelTuning()))
    with pytest.raises(InputError, match=r"invalid name of a member: .*use letters, digits"):
        check_members({name: MemberOverrides()}, settings)
    with pytest.raises(InputError, match=r"^ModelTuning does not support sweeps.*use PromptTuning"):
        check_members({"a": MemberOverrides()}, make_settings(method=ModelTuning()))


def test_a_sweep_combines_tasks_and_initializers_in_this_order(task):
    other = dataclasses.replace(task, name="others")
    made = sweep(seeds=(1,), initializers={"uniform": Uniform()}, tasks=(task, other))
    assert list(made) == ["words_uniform_seed1", "others_uniform_seed1"]
    assert made["others_uniform_seed1"] == MemberOverrides(1, None, Uniform(), other)
    with pytest.raises(InputError, match=r"sweep.tasks has a value twice \(\['words', 'words'\]"):
        sweep(tasks=(task, task))
    with pytest.raises(InputError, match=r"sweep.learning_rates has a value twice"):
        sweep(learning_rates=(0.3, 0.3))


def test_a_method_without_an_initializer_cannot_take_one():
    settings = make_settings(method=ModelTuning())
    with pytest.raises(InputError, match="initializer: ModelTuning has no initialiser; leave it"):
        MemberOverrides(initializer=Uniform()).apply(settings)
