"""Prompts with their model cards: saved, pushed to a hub on this machine, loaded from there."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import TOKEN, Hub, serve
from huggingface_hub import constants

from ptjax.backbones.describe import describe
from ptjax.errors import InputError
from ptjax.interop.model_card import make_card, record_of_run
from ptjax.interop.prompt_file import PromptFile, load_prompt, load_prompts, save_prompt
from ptjax.models.t5 import PromptStates

# The hub's client uploads through a deprecated argument of its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COMMIT = "1b" * 20
PROMPT = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
SECRET = "/home/someone/models"
METADATA: dict[str, Any] = {
    "ptjax_version": "0.1.0",
    "backbone_name": f"{SECRET}/my-t5",
    "task": {
        "name": "tickets",
        "inputs": "ticket: {body}",
        "targets": None,
        "label": "category",
        "verbalizer": {"0": "billing", "1": "bug"},
        "metrics": ["accuracy", "f1"],
    },
    "input_length": 64,
    "target_length": 4,
    "seed": 5,
    "sees_input": True,
    "step": 200,
    "metric": "accuracy",
    "value": 0.75,
}
RESULTS: dict[str, Any] = {
    "task": "tickets",
    "split": "test",
    "metric": "f1",
    "value": 0.875,
    "metrics": {"accuracy": 0.9, "f1": 0.875, "per_class": {"bug": 1}},
    "majority": 0.25,
    "before": 0.5,
    "hard_prompts": {"instruction": 0.625},
    "selected_on": "validation",
    "examples": {"train": 1200, "validation": 150, "test": 140},
    "seed": 5,
    "step": 200,
    "trained_steps": 500,
    "settings": {
        "method": {
            "is": "PromptTuning",
            "initializer": {"is": "FromFile", "path": f"{SECRET}/old.safetensors"},
        },
        "optimizer": {
            "is": "Adafactor",
            "learning_rate": 0.3,
            "learning_rate_scale": "embedding_rms",
        },
        "batching": {"batch_size": 16},
    },
    "backbone": f"{SECRET}/my-t5",
}
ON_HUB = METADATA | {"backbone_name": f"google/t5-small-lm-adapt@{COMMIT}"}


@pytest.fixture
def run(tmp_path) -> Path:
    """The MODEL_DIR of a finished run, as far as a card needs it."""
    save_prompt(tmp_path / "run" / "prompts" / "best.safetensors", PROMPT, METADATA)
    (tmp_path / "run" / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path / "run"


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


# Cards


def test_a_card_has_the_metadata_of_the_hub(run, tmp_path):
    """As the hub's own library reads them."""
    load_prompt(run).save(tmp_path / "tickets")
    data = huggingface_hub.ModelCard.load(tmp_path / "tickets" / "README.md").data.to_dict()
    metrics = {"f1": 0.875, "accuracy": 0.9}
    assert data == {
        "library_name": "ptjax",
        "metrics": ["f1", "accuracy"],
        "pipeline_tag": "text-classification",
        "tags": ["ptjax", "t5", "prompt-tuning", "soft-prompt", "peft"],
        "model-index": [
            {
                "name": "tickets",
                "results": [
                    {
                        "task": {"type": "text-classification"},
                        "dataset": {"name": "tickets", "type": "tickets", "split": "test"},
                        "metrics": [{"type": k, "name": k, "value": v} for k, v in metrics.items()],
                    }
                ],
            }
        ],
    }
    data = huggingface_hub.ModelCard(make_card("me/x", (3, 8), ON_HUB, peft=True)).data.to_dict()
    assert data["base_model"] == "google/t5-small-lm-adapt"
    assert data["base_model_relation"] == "adapter" and "model-index" not in data


def test_a_card_says_what_a_multitask_prompt_started_from():
    """By its name; the initialiser is not used then."""
    method = {"is": "MultitaskPromptTuning", "initializer": None, "start": "/home/me/runs/sst2"}
    record = record_of_run({"settings": {"method": method}})
    card = make_card("me/x", (3, 8), ON_HUB | {"run": record}, peft=True)
    assert "- Initialisation: from `sst2`" in card and "sampled tokens" not in card


def test_a_card_says_what_the_run_knew(run, tmp_path):
    load_prompt(run).save(tmp_path / "tickets")
    lines = card_of(tmp_path / "tickets").splitlines()
    expected = """
        - Input: `ticket: {body}`
        - Labels (field `category`): `billing` for `0`, `bug` for `1`
        - Input length: at most 64 tokens
        - Examples: 1,200 in `train`, 150 in `validation`, 140 in `test`
        | on `test`, 140 examples | |
        | **this prompt**, f1 | 0.875 |
        | **this prompt**, accuracy | 0.9 |
        | before training, f1 | 0.5 |
        | always the most frequent answer, f1 | 0.25 |
        | the instruction instruction instead, f1 | 0.625 |
        The prompt of step 200 was selected by its score on `validation`.
        - Method: `PromptTuning`, 3 rows
        - Initialisation: `FromFile(path="old.safetensors")`
        - Optimizer: `Adafactor`, learning rate 0.3 x the RMS of the embedding
        - Steps: 500
        - Batch size: 16
        - Seed: 5
        backbone = ptjax.load_backbone("my-t5")
        prompt = ptjax.load_prompt("tickets")
        print(ptjax.predict(backbone, ["..."], prompt))
        model = PeftModel.from_pretrained(model, "tickets")
    """
    for line in filter(None, map(str.strip, expected.splitlines())):
        assert line in lines, line
    assert SECRET not in "\n".join(lines) and "someone" not in "\n".join(lines)


def test_a_card_says_what_a_label_stands_for_where_its_text_is_another():
    task = {"label": "category", "verbalizer": {"complaint": "negative", "other": "other"}}
    card = make_card("me/tickets", (3, 8), ON_HUB | {"task": task}, peft=True)
    assert "- Labels (field `category`): `negative` for `complaint`, `other`\n" in card


def test_a_card_names_a_backbone_of_the_hub_with_its_commit():
    card = make_card("me/tickets", (3, 8), ON_HUB, peft=True)
    ours, peft = blocks(card, "python")
    assert f'ptjax.load_backbone("google/t5-small-lm-adapt@{COMMIT}")' in ours
    base = f'from_pretrained("google/t5-small-lm-adapt", revision="{COMMIT}")'
    assert peft.count(base) == 2 and 'tokenizer("ticket: ..."' in peft
    assert "`accuracy` is 0.75 on the examples that selected the prompt" in card


def test_every_copy_of_a_prompt_has_the_same_card(run, tmp_path):
    file = run / "prompts" / "best.safetensors"
    load_prompt(run).save(tmp_path / "a" / "tickets")
    load_prompt(file).save(tmp_path / "b" / "tickets")
    load_prompt(tmp_path / "a" / "tickets").save(tmp_path / "c" / "tickets")
    cards = {card_of(tmp_path / folder / "tickets") for folder in "abc"}
    assert len(cards) == 1 and "**this prompt**, f1" in cards.pop()
    # The results of a run that was resumed may be older than its best prompt.
    (run / "results.json").write_text(json.dumps(RESULTS | {"step": 100}))
    load_prompt(file).save(tmp_path / "d")
    assert "**this prompt**" not in card_of(tmp_path / "d")


def test_a_card_of_a_sweep_s_member_has_the_member_s_scores(tmp_path):
    best = tmp_path / "prompts" / "low" / "best.safetensors"
    save_prompt(best, PROMPT, METADATA)
    member = {key: RESULTS[key] for key in ("split", "metric", "metrics", "step")}
    shared = {key: RESULTS[key] for key in ("settings", "trained_steps")}
    results = {"members": {"low": member, "high": member | {"metrics": {"f1": 0.1}}}, **shared}
    (tmp_path / "results.json").write_text(json.dumps(results))
    load_prompt(best).save(tmp_path / "saved")
    card = card_of(tmp_path / "saved")
    assert "| **this prompt**, f1 | 0.875 |" in card and "- Steps: 500" in card
    (tmp_path / "results.json").write_text('{"members": ["low"]}')
    load_prompt(best).save(tmp_path / "saved")
    assert "**this prompt**" not in card_of(tmp_path / "saved")
    # A member may have a rate and an initialiser of its own, which the results do not tell.
    assert record_of_run(results, "low")["recipe"] == {
        "method": "PromptTuning",
        "optimizer": "Adafactor",
        "learning_rate_scale": "embedding_rms",
        "batch_size": 16,
        "steps": 500,
    }


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"task": "tickets", "run": [1], "seed": -1, "value": "x", "backbone_name": 7},
        {"task": {"name": 3, "inputs": "{", "verbalizer": ["a"], "label": {}}, "step": True},
        {
            "task": {
                "name": "a\n---\nb: c",
                "inputs": 'x\n```\n# "title" {y}\n```',
                "label": "l`a",
                "verbalizer": {"0": "`", "1": "|\n# no"},
            },
            "run": {
                "metrics": {"f1": float("nan"), "a|b\n# no": 1.0, "t": True},
                "hard_prompts": {"|\n# no": 0.5},
                "recipe": {"method": "a`\n# no", "initializer": {"is": "\n# no"}},
                "examples": {"\n# no": 3},
            },
            "backbone_name": "a\n# no/`b",
            "ptjax_version": "<b>\n# no",
        },
    ],
)
def test_a_card_of_a_header_that_anybody_wrote_stays_whole(metadata):
    card = make_card("me/x", (3, 8), metadata, peft=True)
    assert huggingface_hub.ModelCard(card).data.library_name == "ptjax"
    text = card.split("---\n", 2)[2]
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert {title.lstrip("# ") for title in titles} <= {
        "x", "Task", "Scores", "Recipe", "Use it with ptjax", "Use it with PEFT", "Limits"
    }  # fmt: skip
    assert text.count("\n```") % 2 == 0 and "nan" not in text
    for code in blocks(text, "python"):
        ast.parse(code)


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ({"inputs": "{a} {{and}} {b}, {a}"}, '[{"a": "...", "b": "..."}], prompt'),
        ({"inputs": "x: {a.0}"}, '["x: ..."], prompt, raw=True'),
        ({"inputs": "x: {a}", "preprocess": "multirc"}, '["x: ..."], prompt, raw=True'),
        ({}, '["..."], prompt, raw=True'),
    ],
)
def test_a_card_predicts_with_the_fields_of_the_template(task, arguments):
    card = make_card("me/x", (3, 8), {"task": task}, peft=True)
    assert f"print(ptjax.predict(backbone, {arguments}))\n" in blocks(card, "python")[0]


# Folders and files


def test_a_saved_folder_is_a_prompt_of_ptjax_and_of_peft(run, tmp_path):
    load_prompt(run).save(f"{tmp_path}/tickets/")
    assert {file.name for file in (tmp_path / "tickets").iterdir()} == {
        "prompt.safetensors", "adapter_config.json", "adapter_model.safetensors", "README.md"
    }  # fmt: skip
    copy = load_prompt(tmp_path / "tickets")
    assert copy.source == str(tmp_path / "tickets" / "prompt.safetensors")
    assert copy.prompt.tobytes() == PROMPT.tobytes()
    assert copy.metadata == METADATA | {"run": record_of_run(RESULTS)}
    (tmp_path / "tickets" / "prompt.safetensors").unlink()
    assert load_prompt(tmp_path / "tickets").prompt.tobytes() == PROMPT.tobytes()
    load_prompt(run).save(tmp_path / "all" / "first")
    assert [*load_prompts(tmp_path / "all")] == ["first"]


def test_peft_gets_no_prompt_that_it_would_use_in_another_way(tmp_path):
    PromptFile(PROMPT, METADATA).save(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    array = np.ones((2, 3, 1, 4), np.float32)
    states = PromptStates((array, array), (array, array))
    PromptFile(PROMPT, METADATA | {"sees_input": False}, states).save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"prompt.safetensors", "README.md"}
    assert len(blocks(card_of(tmp_path), "python")) == 1
    copy = load_prompt(tmp_path)
    assert copy.states is not None and copy.states.decoder[1].shape == (2, 3, 1, 4)
    assert describe(tmp_path)["kind"] == "prompt"


def test_a_path_with_a_suffix_is_a_file(run, tmp_path):
    load_prompt(run).save(tmp_path / "one.safetensors")
    assert load_prompt(tmp_path / "one.safetensors").metadata["run"]["metric"] == "f1"
    with pytest.raises(InputError, match=r"one\.npy: save\(\) writes \.safetensors; ptjax\.export"):
        load_prompt(run).save(tmp_path / "one.npy")


def test_save_replaces_nothing_of_others(run, tmp_path):
    prompt = load_prompt(run)
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(
        InputError, match=r"README\.md exists, and is not a model card of ptjax; name"
    ):
        prompt.save(tmp_path)
    assert card_of(tmp_path) == "# Mine" and not (tmp_path / "prompt.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; name a folder, or a file that ends in"):
        prompt.save(tmp_path / "file")


def test_the_folder_of_a_run_is_its_best_prompt(run, tmp_path):
    assert load_prompt(run).source == str(run / "prompts" / "best.safetensors")
    for name in ("b", "a"):
        save_prompt(tmp_path / "sweep" / "prompts" / name / "best.safetensors", PROMPT, METADATA)
    with pytest.raises(InputError, match=r"a sweep of a, b; name .* \S+/prompts/a/best\.safeten"):
        load_prompt(tmp_path / "sweep")
    (tmp_path / "model" / "models" / "best").mkdir(parents=True)
    with pytest.raises(InputError, match=r"tuned the whole model, .* ptjax\.load_backbone$"):
        load_prompt(tmp_path / "model")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.gin").write_text("")
    with pytest.raises(InputError, match="new: the run has saved no best prompt yet"):
        load_prompt(tmp_path / "new")
    with pytest.raises(InputError, match="a local path has no revisions; leave 'v1' out"):
        load_prompt(run, revision="v1")


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub on this machine in place of the real one, for the client in this process."""
    peft = tmp_path / "of_peft"
    PromptFile(PROMPT, {}).save(peft)
    theirs = {name: (peft / name).read_bytes() for name in ("adapter_config.json", "README.md")}
    weights = {"adapter_model.safetensors": (peft / "adapter_model.safetensors").read_bytes()}
    models = {
        "you/peft": {**theirs, **weights, "adapter_model.bin": b"a pickle"},
        "you/pickle": {**theirs, "adapter_model.bin": b"a pickle"},
    }
    with serve(models) as hub:
        use(monkeypatch, hub.endpoint, tmp_path / "cache")
        yield hub


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_a_prompt_goes_to_the_hub_and_back(run, hub, tmp_path):
    url = load_prompt(run).push_to_hub(
        "me/tickets", private=True, token=TOKEN, commit_message="Better"
    )
    repo = hub.repos["me/tickets"]
    commit = repo.branches["main"]
    assert url == f"{hub.endpoint}/me/tickets/commit/{commit}"
    assert repo.messages == ["Better"] and repo.private  # one commit
    files = repo.commits[commit]
    assert set(files) == {
        ".gitattributes", "README.md", "prompt.safetensors", "adapter_config.json",
        "adapter_model.safetensors",
    }  # fmt: skip
    for name, content in files.items():
        assert b"/home/" not in content and b"someone" not in content, name
    assert b'ptjax.load_prompt("me/tickets")' in files["README.md"]
    hub.requests.clear()
    copy = load_prompt("me/tickets")
    assert copy.source == f"me/tickets@{commit}"
    assert copy.prompt.tobytes() == PROMPT.tobytes()
    assert copy.metadata == METADATA | {
        "run": record_of_run(RESULTS), "backbone_name": "my-t5"
    }  # fmt: skip
    loaded = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert loaded == {"prompt.safetensors"}
    copy.save(tmp_path / "tickets")
    assert card_of(tmp_path / "tickets") == files["README.md"].decode().replace("me/tick", "tick")


def test_revisions_of_the_hub(run, hub):
    prompt = load_prompt(run)
    prompt.push_to_hub("me/tickets", token=TOKEN)
    first = hub.repos["me/tickets"].branches["main"]
    blind = PromptFile(2 * PROMPT, METADATA | {"sees_input": False})
    blind.push_to_hub("me/tickets", token=TOKEN, revision="blind")
    second = hub.repos["me/tickets"].branches["blind"]
    # PEFT must not find the files of an earlier prompt.
    assert set(hub.repos["me/tickets"].commits[second]) == {
        ".gitattributes", "README.md", "prompt.safetensors"
    }  # fmt: skip
    assert hub.repos["me/tickets"].branches["main"] == first
    for asked in (("me/tickets@blind",), ("me/tickets", "blind"), (f"me/tickets@{second}",)):
        assert load_prompt(*asked).source == f"me/tickets@{second}"
        np.testing.assert_array_equal(load_prompt(*asked).prompt, 2 * PROMPT)
    assert load_prompt("me/tickets").source == f"me/tickets@{first}"
    with pytest.raises(InputError, match="names a revision already; leave revision='main' out"):
        load_prompt("me/tickets@blind", revision="main")


def test_peft_s_prompts_of_the_hub_and_no_pickle(hub):
    np.testing.assert_array_equal(load_prompt("you/peft").prompt, PROMPT)
    with pytest.raises(InputError, match=r"you/pickle: the repository holds no prompt that ptjax"):
        load_prompt("you/pickle")
    assert not [line for line in hub.requests if line.endswith(".bin")]


def test_a_local_path_wins_over_the_hub(run, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_prompt(run).save("you/peft")
    assert load_prompt("you/peft").source == str(tmp_path / "you" / "peft" / "prompt.safetensors")
    assert not hub.requests
    with pytest.raises(InputError, match=r"no prompt at you/gone\.safetensors"):
        load_prompt("you/gone.safetensors")
    assert not hub.requests


def test_what_the_hub_refuses_is_one_line(run, hub, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"^you/none: .* hub has no such model; correct the path"):
        load_prompt("you/none")
    with pytest.raises(InputError, match="has no revision 'v9' of this model; correct it"):
        load_prompt("you/peft@v9")
    prompt = load_prompt(run)
    refusals = {
        "me/tickets": ("wrong", "hub does not know you; log in with `hf auth login`, set HF_TOKEN"),
        "org/tickets": (TOKEN, "your token may not write there; log in"),
        "a/b/c": (TOKEN, r"it is not a repository id \(namespace/name\)"),
    }
    for repo_id, (token, said) in refusals.items():
        with pytest.raises(InputError, match=f"^{repo_id}: the prompt was not uploaded: .*{said}"):
            prompt.push_to_hub(repo_id, token=token)
    load_prompt("you/peft")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert load_prompt("you/peft").prompt.shape == (3, 8)  # from the cache
    with pytest.raises(InputError, match=r"hub cannot be reached; .* check the network"):
        load_prompt("you/other")
    with pytest.raises(InputError, match=r"cannot be reached; .* with save\(path\)"):
        prompt.push_to_hub("me/tickets", token=TOKEN)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    prompt = PromptFile(np.ones((2, 4), np.float32), {})
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "inside", tmp_path / "file" / "x.safetensors"):
        with pytest.raises(InputError) as raised:
            prompt.save(path)
        assert str(raised.value) == (
            f"path={path}: {tmp_path}/file is a file, not a folder; name another"
        )
    wrong: Any = None
    with pytest.raises(InputError, match="the path of the prompt is None, not a path; name one"):
        prompt.save(wrong)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
