"""Whose messages a Python user sees."""

from __future__ import annotations

import io
import logging

import pytest
from absl import logging as absl_logging

import ptjax
from ptjax import messages

pytestmark = pytest.mark.usefixtures("own_process")
RECORDS = [
    (messages.PACKAGE + "/tuning.py", "absl", logging.INFO, "we start"),
    (messages.PACKAGE + "/tuning.py", "absl", logging.WARNING, "we wonder"),
    ("/x/site-packages/orbax/checkpoint.py", "absl", logging.INFO, "orbax info"),
    ("/x/site-packages/orbax/checkpoint.py", "absl", logging.WARNING, "orbax warns"),
    ("/x/site-packages/grain/loader.py", "absl", logging.INFO, "grain info"),
    ("/x/site-packages/jax/xla.py", "absl", logging.INFO, "somebody's info"),
    ("/x/site-packages/jax/xla_bridge.py", "jax._src.xla_bridge", logging.WARNING, "no GPU"),
    ("/x/mine.py", "mine", logging.WARNING, "the user's own"),
]


def fresh(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The root logger as Python makes it, and absl as it is after its import.

    Not a fixture: pytest adds handlers of its own when a test begins.
    """
    root, absl_logger = logging.getLogger(), absl_logging.get_absl_logger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(absl_logger, "filters", [])
    absl_logging.set_verbosity(absl_logging.WARNING)
    return root


def log_all() -> None:
    for path, name, level, message in RECORDS:
        logger = logging.getLogger(name)
        if logger.isEnabledFor(level):
            logger.handle(logger.makeRecord(name, level, path, 1, message, (), None))


def test_ours_reach_a_python_user_and_the_chatter_of_others_does_not(monkeypatch, capsys):
    fresh(monkeypatch)
    assert callable(ptjax.tune)  # the first use of a public name
    messages.show()  # a second time changes nothing
    log_all()
    assert capsys.readouterr().err.splitlines() == [
        "we start",
        "warning: we wonder",
        "warning: no GPU",
        "warning: the user's own",
    ]
    absl_logging.set_verbosity(absl_logging.ERROR)
    assert callable(ptjax.tune)
    log_all()  # the user's choice stays
    assert "we" not in capsys.readouterr().err


def test_the_users_own_logging_gets_ours_and_no_second_copy_is_written(monkeypatch, capsys):
    root = fresh(monkeypatch)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("mine: %(message)s"))
    root.addHandler(handler)
    messages.show()
    log_all()
    assert stream.getvalue().splitlines() == [
        "mine: we start",
        "mine: we wonder",
        "mine: no GPU",
        "mine: the user's own",
    ]
    assert capsys.readouterr().err == "" and root.handlers == [handler]


def test_a_command_replaces_what_python_set_up(monkeypatch, capsys):
    root = fresh(monkeypatch)
    messages.show()
    messages.take_over()
    log_all()
    shown = ["we start", "warning: we wonder", "warning: no GPU"]
    assert capsys.readouterr().err.splitlines() == shown
    assert len(root.handlers) == 1
