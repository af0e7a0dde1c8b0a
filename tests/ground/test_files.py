"""Files are whole or not there; JSON of strangers is bounded."""

from __future__ import annotations

import errno
import functools
import json

import pytest
from etils import epath

from ptjax import files
from ptjax.errors import InputError, one_line

DEEP = "[" * 150 + "]" * 150
TOO_DEEP = "nested deeper than 100 levels"


def nested(levels):
    return functools.reduce(lambda inner, _: {"a": inner}, range(levels), "")


def test_a_file_is_whole_or_the_one_before(tmp_path):
    file = tmp_path / "new" / "results.json"
    files.write_bytes(file, b"the first")
    with pytest.raises(KeyError), files.written_whole(file) as stream:
        stream.write(b"half of the th")
        raise KeyError
    assert file.read_bytes() == b"the first"
    files.write_bytes(file, b"the second")
    assert file.read_bytes() == b"the second"
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_leftovers_are_told_by_their_whole_names_and_not_looked_for_below(tmp_path):
    ours = [tmp_path / f".{'0f' * 16}.tmp", tmp_path / f".x.json.{'0f' * 16}.tmp"]
    others = [tmp_path / name for name in ("x.tmp", ".0f.tmp", f"{'0f' * 16}.tmp")]
    others.append(tmp_path / "below" / ours[0].name)
    others[-1].parent.mkdir()
    for path in ours + others:
        path.write_bytes(b"")
    files.remove_leftovers(tmp_path)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in others)
    files.remove_leftovers(tmp_path / "missing")


def test_a_full_disk_is_told_also_from_an_error_around_it():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert files.full_reason(full) == "No space left on device"
    outer = ValueError("the save failed")
    outer.__cause__ = RuntimeError("writing x: No space left on device [os_error_code='28']")
    assert files.full_reason(outer) == "No space left on device"
    assert files.full_reason(ValueError("the save failed")) is None
    assert files.full_reason(OSError(errno.EACCES, "Permission denied")) is None


def test_one_line_of_an_error():
    assert one_line(ValueError("\n  what is wrong\x1b[2J\nand more")) == "what is wrong?[2J"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("x" * 500)) == "x" * 200


def test_case_5_8_depth_is_counted_outside_of_strings():
    assert files.parse_json("[" * 100 + "]" * 100)
    brackets = json.dumps({"a": '[\\"{' * 100, "b": [[1, "]"]]})
    assert files.parse_json(brackets) == json.loads(brackets)
    assert files.parse_json(json.dumps([[1]] * 200)) == [[1]] * 200
    for text in (DEEP, json.dumps(nested(101)), '{"a": "]]]]", "b": ' + DEEP + "}"):
        with pytest.raises(ValueError, match=TOO_DEEP):
            files.parse_json(text)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "[NaN]", "[Infinity]", "[1e999]", '{"a": "\\ud800"}']
)
def test_strict_json_refuses_what_python_reads(text):
    assert files.parse_json(text)
    with pytest.raises(ValueError, match=r"duplicate name|not JSON|out of range|surrogates"):
        files.parse_json(text, strict=True)


def test_an_object_is_read_or_refused_by_name(tmp_path):
    file = epath.Path(tmp_path) / "x.json"
    file.write_text('{"a": [1]}')
    assert files.read_object(file) == files.read_json(file) == {"a": [1]}
    for text, why in (("[]", r"it holds a list"), ("{", "Expecting"), (DEEP, TOO_DEEP)):
        file.write_text(text)
        with pytest.raises(InputError, match=rf"x\.json: the file is truncated .*{why}.*copy it"):
            files.read_object(file)
