"""Which exports are the best, which stay, and when a member stops."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from plain_members import plain_member, plain_state, several

from ptjax.backbones.damage import NotFiniteError
from ptjax.errors import InputError, TrainingError
from ptjax.model_dir import BEST
from ptjax.trainer.exports import Exports
from ptjax.trainer.failures import Failures
from ptjax.trainer.members import Members
from ptjax.trainer.selection import Selection


def selection(members: Members, patience: int | None = None, keep: int = 2) -> Selection:
    return Selection(members, Failures(members, lambda: None), patience=patience, keep=keep)


def kept(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "exports").iterdir()}


def export_each(members: Members, scores: list[float], **how: Any) -> list[set[int | None]]:
    """Exports at step 1, 2, ... with these scores of the first member; prunes as it is told."""
    chosen, keeps = selection(members, **how), []
    for step, score in enumerate(scores, 1):
        members.progress.step = step
        keep = chosen.export(plain_state(), {0: {"score": score}})
        keeps += [keep[0]] if keep else []
        chosen.prune(keep)
    return keeps


def one(folder: Path) -> Members:
    return Members([plain_member(folder, evaluate=lambda tree: {"score": 0.0})])


def test_the_first_of_equal_scores_stays_the_best_and_patience_counts_from_it(tmp_path):
    members = one(tmp_path)
    [progress] = members.progress.members
    counts = []
    for score in (0.5, 0.7, 0.7, 0.6):
        members.progress.step += 1
        selection(members, patience=3).export(plain_state(), {0: {"score": score}})
        counts.append((progress.best_step, progress.best_value, progress.without_gain))
    assert counts == [(1, 0.5, 0), (2, 0.7, 0), (2, 0.7, 1), (2, 0.7, 2)]
    assert not progress.stopped
    best = json.loads((tmp_path / "exports" / "best.json").read_text())
    assert (best["step"], best["metric"], best["value"]) == (2, "score", 0.7)
    members.progress.step = 5
    selection(members, patience=3).export(plain_state(), {0: {"score": 0.1}})
    assert progress.stopped and not progress.failed
    # It no longer trains: nothing is exported of it.
    members.progress.step = 6
    assert selection(members, patience=3).export(plain_state(), {}) == {}
    assert kept(tmp_path) == {"1", "2", "3", "4", "5", "best"}


def test_without_patience_a_run_never_stops_early(tmp_path):
    members = one(tmp_path)
    export_each(members, [1.0, *[0.0] * 9])
    assert members.progress.members[0].without_gain == 9
    assert not members.progress.members[0].stopped


def test_a_gain_ends_the_wait(tmp_path):
    members = one(tmp_path)
    export_each(members, [0.2, 0.1, 0.3, 0.2], patience=2)
    assert members.progress.members[0].without_gain == 1
    assert not members.progress.members[0].stopped


def test_what_stays_are_the_newest_and_what_the_two_newest_checkpoints_refer_to(tmp_path):
    members = one(tmp_path)
    keeps = export_each(members, [0.5, 0.6, 0.4, 0.7, 0.1], keep=1)
    # The step, the one before it, the best one now and as the checkpoints before know it.
    assert keeps == [{None, 1}, {None, 1, 2}, {1, 2, 3}, {2, 3, 4}, {2, 4, 5}]
    assert kept(tmp_path) == {"2", "4", "5", "best"}
    # The run has finished: the newest, the best, and the best of the checkpoint before.
    members.progress.members[0].best_before = None
    selection(members, keep=1).prune_all()
    assert kept(tmp_path) == {"4", "5", "best"}


@pytest.mark.parametrize(("keep", "names"), [(1, {"1", "5"}), (3, {"1", "3", "4", "5"})])
def test_a_finished_run_keeps_the_best_and_so_many_of_the_newest(tmp_path, keep, names):
    members = one(tmp_path)
    export_each(members, [0.5, 0.4, 0.4, 0.4, 0.4], keep=5)
    assert kept(tmp_path) == {"1", "2", "3", "4", "5", "best"}
    selection(members, keep=keep).prune_all()
    assert kept(tmp_path) == {*names, "best"}


def test_without_an_evaluation_the_newest_export_is_the_best(tmp_path):
    members = Members([plain_member(tmp_path)])
    chosen = selection(members, patience=1)
    for members.progress.step in (1, 2, 3):
        assert chosen.evaluate(plain_state()) == {}
        chosen.export(plain_state(), {})
    best = json.loads((tmp_path / "exports" / "best.json").read_text())
    assert best == {"prompt": [0.0, 0.0], "step": 3, "metric": None, "value": None}
    [progress] = members.progress.members
    assert (progress.best_step, progress.best_before, progress.stopped) == (3, 2, False)


def test_every_running_member_is_evaluated_on_its_own_variables(tmp_path):
    def breaks(tree: Any) -> dict[str, float]:
        raise NotFiniteError("not finite")

    def first(tree: Any) -> dict[str, float]:
        return {"score": float(tree["prompt"][0])}

    scores = {"a": first, "b": breaks, "c": None, "d": first, "e": first}
    members = Members([plain_member(tmp_path, name, score) for name, score in scores.items()])
    members.progress.step = 4
    members.progress.members[3].stopped = True
    # The prompt of member i is 100 i.
    assert selection(members).evaluate(plain_state(5)) == {0: {"score": 0.0}, 4: {"score": 400.0}}
    failed = [member.failed for member in members.progress.members]
    assert failed == [False, True, False, False, False]
    assert members.progress.members[1].stopped


def test_the_last_member_that_fails_ends_the_run(tmp_path, caplog):
    members = several(tmp_path, "a", "b")
    members.progress.step, members.progress.members[0].best_step = 8, 6
    failures = Failures(members, lambda: None)
    failures.report(0, "the loss (nan, gradient norm 1.0)")
    assert caplog.messages == [
        "a: the loss (nan, gradient norm 1.0) of a step near 8 is not finite; the prompt of step 6 "
        "is kept. A smaller learning rate usually helps. The other members continue"
    ]
    with pytest.raises(TrainingError) as ended:
        failures.report(1, "the loss", updated=False)
    assert str(ended.value).startswith(
        "b: the loss of a step near 8 is not finite; nothing was exported yet. Nothing was updated"
    )


def test_a_member_that_has_merely_stopped_does_not_keep_a_failing_run_from_going_on(tmp_path):
    members = several(tmp_path, "a", "b")
    members.progress.members[0].stopped = True
    Failures(members, lambda: None).report(1, "the loss")
    assert [m.failed for m in members.progress.members] == [False, True]


def test_an_ordinary_run_has_no_name_to_say(tmp_path):
    members = Members([plain_member(tmp_path)])
    with pytest.raises(TrainingError, match=r"^the loss of a step near 0 is not finite; nothing"):
        Failures(members, lambda: None).report(0, "the loss")


def test_a_damaged_backbone_is_named_before_anybody_is_blamed(tmp_path):
    members = several(tmp_path, "a", "b")

    def check() -> None:
        raise InputError("the backbone has NaN")

    with pytest.raises(InputError, match="the backbone has NaN"):
        Failures(members, check).report(0, "the loss")
    assert not members.progress.members[0].failed


def test_variables_that_are_not_finite_are_named_once_per_member(tmp_path, caplog):
    members, state = several(tmp_path, "a", "b", "c"), plain_state(3)
    prompt = state.trainable["prompt"].at[1].set(float("nan"))
    state = dataclasses.replace(state, trainable={"other": prompt, "prompt": prompt})
    Failures(members, lambda: None).check_trainable(state)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("b: other after the update of a step near 0 is not fin")
    assert [member.failed for member in members.progress.members] == [False, True, False]


# Exports


@pytest.fixture
def exports(tmp_path) -> Exports:
    """Steps 2, 10 and 12, and the best, which is that of 10."""
    made = plain_member(tmp_path).exports
    for step in (2, 10, 12):
        made.write(made.path(step), {"prompt": [step]}, {"step": step})
    made.promote(10)
    (made.directory / "notes.json").write_text("{}")
    return made


def test_steps_are_numbers_in_order(exports):
    assert exports.steps() == [2, 10, 12]
    assert exports.path(12).name == "12.json" and exports.path(BEST).name == "best.json"


def test_exports_that_are_not_kept_or_are_ahead_go(exports):
    exports.prune(set(), newer_than=10)
    assert exports.steps() == [2, 10]
    exports.prune({10, None})
    assert exports.steps() == [10]
    exports.prune(set())
    assert exports.steps() == []
    assert {path.name for path in exports.directory.iterdir()} == {"best.json", "notes.json"}


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_a_damaged_export_comes_back_from_the_best_of_the_same_step_only(exports, caplog, how):
    whole = exports.path(10).read_bytes()
    for step in (2, 10):
        path = exports.path(step)
        path.write_bytes(b"") if how == "emptied" else path.unlink()
    assert str(exports.path(2)) in str(exports.recover(2))
    assert not caplog.messages
    assert exports.recover(10) is None and exports.path(10).read_bytes() == whole
    [said] = caplog.messages
    assert said.endswith(f"; restored from {exports.path(BEST)}")
    assert exports.problem(10) is None


def test_what_is_whole_is_left_alone_and_a_damaged_best_helps_nobody(exports):
    assert exports.recover(12) is None and exports.problem(12) is None
    exports.path(BEST).write_bytes(b"{")
    exports.path(10).write_bytes(b"{")
    assert str(exports.path(10)) in str(exports.recover(10))
    assert exports.path(10).read_bytes() == b"{"


def test_the_best_of_folders_is_a_copy_of_all_files_and_has_no_older_ones(tmp_path, exports):
    models = dataclasses.replace(exports, directory=exports.directory / "models", suffix="")
    for step, names in {3: ("a", "b"), 6: ("b", "c")}.items():
        for name in names:
            path = models.path(step) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} of {step}")
    for step, names in {3: {"a", "b"}, 6: {"b", "c"}}.items():
        models.promote(step)
        best = {path.name: path.read_text() for path in models.path(BEST).iterdir()}
        assert best == {name: f"{name} of {step}" for name in names}
    models.prune({6})
    assert {path.name for path in models.directory.iterdir()} == {"6", "best"}


def test_leftovers_are_removed_only_from_folders_that_are_exports(exports):
    name = f".{'0' * 32}.tmp"
    inner = exports.directory / "mine"
    inner.mkdir()
    for folder in (exports.directory, inner):
        (folder / name).write_bytes(b"half")
    exports.remove_leftovers()
    assert not (exports.directory / name).exists() and (inner / name).exists()
    dataclasses.replace(exports, suffix="").remove_leftovers()
    assert not (inner / name).exists()
    dataclasses.replace(exports, directory=exports.directory / "none").remove_leftovers()
