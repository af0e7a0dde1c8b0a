"""Settings, examples and plans do not change after they were made."""

from __future__ import annotations

from frozen import assert_frozen


def test_the_dataclasses_of_the_room_are_frozen() -> None:
    # It counts what is skipped while a file is read.
    assert_frozen("ptjax.data", "BadRecords")
