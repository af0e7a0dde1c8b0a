"""A pytest plugin: the CPU seconds of each test, and which lines it runs (coverage's contexts).

A fixture of the session and a function's compilation count for the first test that needs them;
that test alone runs them again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

SECONDS: dict[str, float] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    current, began = coverage.Coverage.current(), time.process_time()
    assert current is not None
    current.switch_context(item.nodeid)
    result = yield
    current.switch_context("")
    SECONDS[item.nodeid] = time.process_time() - began
    return result


def pytest_sessionfinish() -> None:
    Path(os.environ["PTJAX_TEST_SECONDS"]).write_text(json.dumps(SECONDS))
