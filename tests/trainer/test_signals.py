"""Signals and callbacks: how a run is asked to stop, and who is told."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
from etils import epath

from ptjax.trainer import signals
from ptjax.trainer.callbacks import Callback, CallbackList
from ptjax.trainer.progress import RunProgress


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks_the_run_to_stop_after_the_step(caplog, number, code):
    caplog.set_level("INFO", logger="absl")
    before = handlers()
    with signals.caught() as stop:
        assert not stop.after(1) and stop.caught is None
        os.kill(os.getpid(), number)
        assert stop.after(2) and stop.caught == number
    assert stop.exit_code == code
    assert caplog.messages == [f"signal {int(number)}: saving at the end of this step"]
    assert handlers() == before


def test_a_second_ctrl_c_interrupts_at_once():
    before = handlers()
    with signals.caught():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_a_second_sigterm_ends_the_process():
    with signals.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_by_another_process_is_a_sigterm():
    assert signals.Stop().exit_code == 143


def test_handlers_are_those_of_the_main_thread():
    before, found = handlers(), []

    def run() -> None:
        with signals.caught() as stop:
            found.append((handlers() == before, stop.after(1)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(True, False)]


class Noting(Callback):
    def __init__(self, name: str, notes: list[tuple[Any, ...]], fails: str = "") -> None:
        self.name, self.notes, self.fails = name, notes, fails

    def note(self, *what: Any) -> None:
        self.notes.append((self.name, *what))
        if what[0] == self.fails:
            raise KeyError(self.name)

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        self.note("start", str(model_dir), step)

    def on_step(self, step: int) -> None:
        self.note("step", step)

    def on_log(self, step: int, metrics: Any) -> None:
        self.note("log", step, metrics)

    def on_evaluation(self, step: int, metrics: Any) -> None:
        self.note("evaluation", step, metrics)

    def on_end(self, step: int) -> None:
        self.note("end", step)


def test_callbacks_are_told_in_their_order_and_end_in_the_other():
    notes: list[tuple[Any, ...]] = []
    callbacks = CallbackList([Noting("a", notes), Silent(), Noting("b", notes)])
    progress = RunProgress.at_start(1)
    progress.step = 2
    with callbacks.started(epath.Path("/run"), progress):
        callbacks.on_step(3)
        callbacks.on_log(3, {"x": 1.0})
        callbacks.on_evaluation(3, {"y": 2.0})
        progress.step = 3
    told = [
        ("start", "/run", 2),
        ("step", 3),
        ("log", 3, {"x": 1.0}),
        ("evaluation", 3, {"y": 2.0}),
    ]
    assert notes == [(name, *what) for what in told for name in "ab"] + [
        ("b", "end", 3),
        ("a", "end", 3),
    ]


class Silent(Callback):
    """Overrides nothing."""


def test_only_what_has_started_is_ended():
    notes: list[tuple[Any, ...]] = []
    names = ("a", ""), ("b", "start"), ("c", "")
    callbacks = CallbackList([Noting(name, notes, fails) for name, fails in names])
    with (
        pytest.raises(KeyError, match="b"),
        callbacks.started(epath.Path("/run"), RunProgress.at_start(1)),
    ):
        pass
    assert notes == [("a", "start", "/run", 0), ("b", "start", "/run", 0), ("a", "end", 0)]


def test_an_error_of_one_at_the_end_does_not_keep_the_others_open():
    notes: list[tuple[Any, ...]] = []
    callbacks = CallbackList([Noting("a", notes), Noting("b", notes, fails="end")])
    with (
        pytest.raises(KeyError, match="b"),
        callbacks.started(epath.Path("/run"), RunProgress.at_start(1)),
    ):
        notes.clear()
    assert notes == [("b", "end", 0), ("a", "end", 0)]
