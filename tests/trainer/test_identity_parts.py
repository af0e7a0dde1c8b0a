"""How settings are described and compared, from the functions alone."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptjax
from ptjax import preprocessors
from ptjax.errors import InputError
from ptjax.trainer.identity import (
    FORMAT,
    changed_versions,
    check_same,
    describe,
    digest_array,
    digest_texts,
    make_identity,
    versions,
)


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Own:
    path: Path
    size: int = 1

    def identity(self) -> dict[str, Any]:
        return {"path": self.path.name}


class Plain:
    def __init__(self) -> None:
        self.shown, self._hidden, self.unknown = 1, 2, object()

    def method(self) -> None: ...


def plain(a: int) -> int:
    return a


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (None, None),
        (True, True),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (float("nan"), "nan"),
        (b"ab", f"sha256:{hashlib.sha256(b'ab').hexdigest()}"),
        ({1: (2, 3.0)}, {"1": [2, 3.0]}),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({2, 10}), [10, 2]),  # in the order of their texts
        (Path("/a/b"), "/a/b"),
        (Colour.RED, "RED"),
        (int, "builtins.int"),
        (plain, f"{__name__}.plain"),
        (functools.partial(plain, a=2), {"is": f"{__name__}.plain", "arguments": [], "a": 2}),
        (preprocessors.without_line_breaks, "reviews.without_line_breaks"),
        (ptjax.PromptTuning, "PromptTuning"),
        (Plain(), {"is": f"{__name__}.Plain", "shown": 1}),
        (Plain, f"{__name__}.Plain"),
        (object(), "builtins.object"),
    ],
)
def test_a_setting_is_described_by_plain_values(value, described):
    made = describe(value)
    assert made == described and type(made) is type(described)
    json.dumps(made, allow_nan=False)


def test_a_method_is_described_with_its_object():
    described = describe(Plain().method)
    assert described == {"is": f"{__name__}.Plain.method", "of": describe(Plain())}


def test_a_class_says_what_counts_of_a_field_unless_all_is_wanted():
    own = Own(Path("/there/file"))
    assert describe(own) == {"is": f"{__name__}.Own", "path": "file", "size": 1}
    assert describe([own], whole=True)[0]["path"] == "/there/file"
    schedule = ptjax.TrainSchedule()
    assert describe(schedule) == {"is": "TrainSchedule"}  # no field of it decides
    assert describe({"a": schedule}, whole=True)["a"]["train_steps"] == 30_000


def test_an_array_is_its_dtype_its_shape_and_its_bytes():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    others = [array.reshape(3, 2), array.view(np.uint32), array + 1]
    assert len({digest_array(x) for x in (array, *others)}) == 4
    assert digest_array(np.asfortranarray(array)) == digest_array(array) == describe(array)


def test_texts_are_told_with_their_boundaries():
    assert len({digest_texts(x) for x in (["ab"], ["a", "b"], ["a", "b", ""], [])}) == 4
    assert digest_texts(iter(["a", "\ud800"])) == digest_texts(["a", "\ud800"])


def test_an_identity_has_what_decides_the_data_and_the_versions():
    arguments = {"backbone": 1, "task": 2, "settings": 3, "members": None, "model_dir": "there"}
    made = make_identity(ptjax.tune, arguments, {"split": {"the hash": "a"}})
    assert made == {
        "format": FORMAT,
        "settings": {"is": "tune", "backbone": 1, "task": 2, "settings": 3, "members": None},
        "data": {"split": {"the hash": "a"}},
        "versions": versions(),
    }


def test_versions_that_changed_are_listed_with_those_that_came_and_went():
    old, new = {"jax": "1", "flax": "2", "gone": "3"}, {"jax": "1", "flax": "4", "new": "5"}
    said = changed_versions({"versions": old}, {"versions": new})
    assert said == "flax 4 (was 2), new 5 (was none), gone none (was 3)"
    assert changed_versions({"versions": old}, {"versions": old}) == ""
    assert changed_versions({}, {"versions": None}) == ""


def refusal(saved: Any, now: Any, **more: Any) -> str | None:
    """What is said of two runs with these settings; None if they are the same."""

    def whole(settings: Any) -> dict[str, Any]:
        return {"format": FORMAT, "settings": {"is": "tune", "it": settings}, "data": {}} | more

    try:
        check_same(whole(saved), whole(now), "/run")
    except InputError as refused:
        return str(refused)
    return None


CHOOSE = "; choose another MODEL_DIR or restore that setting"


@pytest.mark.parametrize(
    ("saved", "now", "named"),
    [
        (1, 2, "tune.it = 1, now 2"),
        (1, 1.0, None),
        (1, True, "tune.it = 1, now True"),
        (False, 0.0, "tune.it = False, now 0.0"),
        ("a", "b", "tune.it = 'a', now 'b'"),
        (None, 0, "tune.it = None, now 0"),
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], "tune.it[1] = 2, now 3"),
        ([1, 2], [1], "tune.it = [1, 2], now [1]"),
        ([1], [1, 2], "tune.it = [1], now [1, 2]"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "tune.it['b'] = 2, now 3"),
        ({"a": 1}, {"a": 1, "b": 3}, "tune.it = ['a'], now ['a', 'b']"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "the order of tune.it = ['a', 'b'], now ['b', 'a']"),
        ({"is": "A", "x": 1}, {"is": "A", "x": 2}, "A.x = 1, now 2"),
        ({"is": "A", "x": 1}, {"is": "B", "x": 1}, "tune.it = A(x=1), now B(x=1)"),
        ({"is": "A", "x": 1}, "A", "tune.it = A(x=1), now 'A'"),
        (
            {"a": {"is": "A", "x": 1}},
            {"a": {"is": "A", "x": 2}},
            "A.x (of tune.it['a']) = 1, now 2",
        ),
        (
            {"is": "B", "y": [{"is": "A", "x": 1}]},
            {"is": "B", "y": [{"is": "A", "x": 2}]},
            "A.x (of B.y[0]) = 1, now 2",
        ),
        ("sha256:" + "a" * 64, "sha256:" + "b" * 64, f"tune.it = sha256:{'a' * 12}, now sha256:"),
        ({"is": "Backbone", "fingerprint": 1}, {"is": "Backbone", "fingerprint": 2}, "the back"),
        ({"is": "Backbone", "x": 1}, {"is": "Backbone", "x": 2}, "load_backbone.x = 1, now 2"),
        (
            {"is": "Backbone", "config": {"is": "T5Config", "d": 1}},
            {"is": "Backbone", "config": {"is": "T5Config", "d": 2}},
            "load_backbone.d = 1, now 2",
        ),
        ({"is": "T5Config", "d": 1}, {"is": "T5Config", "d": 2}, "T5Config.d = 1, now 2"),
    ],
)
def test_the_first_difference_is_named_as_in_a_gin_file(saved, now, named):
    said = refusal(saved, now)
    if named is None:
        assert said is None
    else:
        assert said is not None and said.startswith(f"/run holds a run with {named}")
        assert said.endswith(CHOOSE)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ((0.1, 0.3), (0.1, 0.3), True),
        ((0.1, 0.3), (0.1 + 5e-7, 0.3), True),  # 2e-6 of the peak, 0.3, is 6e-7
        ((0.1, 0.3), (0.1 - 5e-7, 0.3), True),
        ((0.1, 0.3), (0.1 + 7e-7, 0.3), False),
        ((0.1, 0.3), (0.1 - 7e-7, 0.3), False),
        ((0.1, 0.3), (0.2, 0.3), False),
        ((0.2, 0.3), (0.1, 0.3), False),
        ((0.1, -0.3), (0.1 + 5e-7, -0.3), True),
        ((0.1, "inf"), (0.1, "inf"), True),
        ((0.1, "inf"), (0.1, 0.3), False),
        ((0.1, 0.3), (0.1, "nan"), False),
        ((0.0, 0.0), (0.0, 0.0), True),
    ],
)
def test_a_schedule_may_differ_by_rounding_of_its_peak(old, new, same):
    saved, now = (
        {"is": "schedule", **{f"step {i}": rate for i, rate in enumerate(rates)}}
        for rates in (old, new)
    )
    said = refusal(saved, now)
    if same:
        assert said is None
        return
    step = 0 if old[0] != new[0] else 1
    was, is_ = repr(old[step]), repr(new[step])
    assert said == f"/run holds a run with tune.it at step {step} = {was}, now {is_}{CHOOSE}"


@pytest.mark.parametrize(("length", "cut"), [(158, False), (159, True)])
def test_values_of_up_to_160_characters_are_shown_whole(length, cut):
    """With their quotes; of longer ones as much, with a quarter of it before the difference."""
    old, new = "x" * length, "x" * (length - 1) + "y"
    said = refusal(old, new)
    assert said is not None
    if not cut:
        assert f" = {old!r}, now {new!r};" in said
        return
    # The difference is at place 159 of the text with its quotes: 40 before it are shown.
    assert f" = ...{'x' * 41}', now ...{'x' * 40}y';" in said


def test_the_beginning_is_shown_where_the_difference_is_there():
    said = refusal("a" + "x" * 300, "b" + "x" * 300)
    shown = "x" * 158
    assert said == f"/run holds a run with tune.it = 'a{shown}..., now 'b{shown}...{CHOOSE}"


def test_a_setting_that_only_one_version_knows_is_finished_with_that_version():
    saved, now = ({"is": "A", **more} for more in ({}, {"new": 1}))
    ending = "; choose another MODEL_DIR or finish it with that version"
    of = "/run holds a run of another ptjax (0.9): A.new was"
    versions = {"versions": {"ptjax": "0.9"}}
    assert refusal(saved, now, **versions) == f"{of} not recorded, now 1{ending}"
    assert refusal(now, saved, **versions) == f"{of} 1, now not recorded{ending}"
    unknown = refusal(saved, now)
    assert unknown is not None and "of another ptjax (an older version): A.new" in unknown


def test_another_format_cannot_be_resumed():
    with pytest.raises(InputError, match=r"another ptjax \(an older version\), whose checkpoints"):
        check_same({}, {"format": FORMAT}, "/run")


def data_refusal(saved: Any, now: Any) -> str | None:
    def whole(data: Any) -> dict[str, Any]:
        return {"settings": {"is": "tune"}, "data": data}

    try:
        check_same(whole(saved), whole(now), "/run")
    except InputError as refused:
        return str(refused)
    return None


def test_data_that_differ_are_named_after_the_settings():
    one, two = {"split a": {"the hash": 1}}, {"split b": {"the hash": 2}}
    assert data_refusal(one, dict(one)) is None
    assert data_refusal(one | two, one) == (
        "/run holds a run that also read split b, which this one does not; choose another "
        "MODEL_DIR or restore it"
    )
    assert data_refusal(one, one | two) == (
        "/run holds a run without split b, which this one has; choose another MODEL_DIR or remove "
        "it"
    )
    assert data_refusal(one, {"split a": {"the hash": 3}}) == (
        "/run holds a run on other data: the hash of split a = 1, now 3; choose another MODEL_DIR "
        "or restore the data"
    )
    assert data_refusal({"split a": {}}, one) == (
        "/run holds a run on other data: the hash of split a = not recorded, now 1; choose another "
        "MODEL_DIR or restore the data"
    )
