"""SPoT's retrieval: similarities, the initialiser, the command."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest

import ptjax
from ptjax.errors import InputError
from ptjax.interop.prompt_file import load_prompts
from ptjax.trainer.identity import describe

TARGET = np.array([[3.0, 0.0], [0.0, 1.0]])
SOURCES = {
    "far": np.array([[0.0, -1.0], [0.0, -1.0]]),
    "near": np.array([[2.0, 1.0], [2.0, 1.0]]),
    "turned": np.array([[0.0, 1.0], [3.0, 0.0]]),
    "zero": np.zeros((2, 2)),
}


@pytest.fixture
def folder(tmp_path):
    for name, prompt in SOURCES.items():
        ptjax.save_prompt(tmp_path / "sources" / f"{name}.safetensors", prompt, {})
    ptjax.save_prompt(tmp_path / "target.safetensors", TARGET, {})
    return tmp_path


def nearest(folder, **settings):
    return ptjax.NearestPrompt(folder / "sources", folder / "target.safetensors", **settings)


def cosine(a, b) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 0.0 if norms == 0 else float(a @ b / norms)


def test_both_similarities_of_the_paper(folder) -> None:
    """Section 3.3, written out, the highest first."""
    for by, expected in {
        "average": {n: cosine(TARGET.mean(0), x.mean(0)) for n, x in SOURCES.items()},
        "per_token": {
            n: np.mean([cosine(a, b) for a, b in itertools.product(TARGET, x)])
            for n, x in SOURCES.items()
        },
    }.items():
        found = ptjax.prompt_similarity(folder / "target.safetensors", folder / "sources", by)
        assert found == pytest.approx(expected)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    # The averages ignore the order of the rows, and do not see how long each row is alike.
    average = ptjax.prompt_similarity(folder / "target.safetensors", folder / "sources")
    assert average["turned"] == pytest.approx(1) and next(iter(average)) == "turned"
    assert found["turned"] == pytest.approx(0.5) and next(iter(found)) == "near"


def test_prompts_in_memory_and_of_other_lengths_are_compared(folder) -> None:
    sources = load_prompts(folder / "sources")
    ptjax.save_prompt(folder / "long.safetensors", np.tile(TARGET, (3, 1)), {})
    long = ptjax.load_prompt(folder / "long.safetensors")
    for by in ("average", "per_token"):
        short = ptjax.prompt_similarity(
            ptjax.load_prompt(folder / "target.safetensors"), sources, by
        )
        assert ptjax.prompt_similarity(long, sources, by) == pytest.approx(short)


def test_a_prompt_starts_from_the_nearest(folder) -> None:
    np.testing.assert_array_equal(nearest(folder)(None, 2, None), SOURCES["turned"])
    by_token = nearest(folder, by="per_token")
    np.testing.assert_array_equal(by_token(None, 2, None), SOURCES["near"])
    ptjax.save_prompt(folder / "sources" / "own.safetensors", TARGET, {})  # it is no source
    np.testing.assert_array_equal(nearest(folder)(None, 2, None), SOURCES["turned"])


def test_a_prompt_starts_from_the_weighted_average_of_the_nearest(folder) -> None:
    similar = ptjax.prompt_similarity(folder / "target.safetensors", folder / "sources")
    (first, a), (second, b) = list(similar.items())[:2]
    assert a > b > 0
    made = nearest(folder, top_k=2)(None, 2, None)
    expected = (a * SOURCES[first] + b * SOURCES[second]) / (a + b)
    np.testing.assert_allclose(made, expected, rtol=1e-6)  # stored in float32
    assert made.dtype == np.float32


def test_the_identity_is_what_was_chosen(folder) -> None:
    """Not where it is, nor what else is there."""
    before = describe(nearest(folder))
    (folder / "sources" / "far.safetensors").unlink()
    moved = folder / "moved"
    shutil.copytree(folder / "sources", moved / "sources")
    shutil.copy(folder / "target.safetensors", moved)
    assert describe(nearest(moved)) == before
    assert describe(nearest(moved, top_k=2))["sources"] != before["sources"]
    ptjax.save_prompt(moved / "sources" / "turned.safetensors", 1.01 * SOURCES["turned"], {})
    changed = describe(nearest(moved))
    assert changed["sources"] != before["sources"] and changed["target"] == before["target"]


def test_what_cannot_be_compared_is_refused(folder) -> None:
    with pytest.raises(InputError, match=r"the prompt turned has 2 rows, but the run expects 3; "):
        nearest(folder)(None, 3, None)
    with pytest.raises(InputError, match=r"not 3 prompts are similar .* smallest .* 0\); set Near"):
        nearest(folder, top_k=3)(None, 2, None)
    with pytest.raises(InputError, match=r"holds 4 prompts other than the target, and .* is 5$"):
        nearest(folder, top_k=5)(None, 2, None)
    with pytest.raises(InputError, match=r"^NearestPrompt\.top_k must be >= 1, got 0$"):
        nearest(folder, top_k=0)
    with pytest.raises(InputError, match=r"^NearestPrompt\.by must be one of 'average', 'per_tok"):
        nearest(folder, by="mean")
    ptjax.save_prompt(folder / "sources" / "wide.safetensors", np.ones((2, 3)), {})
    with pytest.raises(
        InputError, match=r"^the source prompt wide has rows of 3, the target of 2;"
    ):
        nearest(folder)(None, 2, None)
    with pytest.raises(InputError, match="needs at least one source prompt"):
        ptjax.prompt_similarity(folder / "target.safetensors", {})


@pytest.mark.usefixtures("own_process")
def test_the_command_ranks_them(folder, call) -> None:
    target, similar_to = folder / "target.safetensors", f"--similar_to={folder / 'sources'}"
    code, out, err = call("inspect", target, similar_to, "--json")
    assert code == 0, err
    shown = json.loads(out)
    for entry, by in (("similarity", "average"), ("similarity_per_token", "per_token")):
        expected = ptjax.prompt_similarity(target, folder / "sources", by)
        assert shown[entry] == expected and list(shown[entry]) == list(expected)
    code, out, err = call("inspect", target, similar_to)
    assert "similarity per token:\n  near: 0.6708\n  turned: 0.5\n" in out
    code, out, err = call("inspect", "ptjax-nano", similar_to)
    assert code == 2 and "--similar_to compares prompts; ptjax-nano is not a prompt" in err
