"""What examples/ holds works: each file imports public names alone, trains, exports and loads."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tune
from t5_ids import T5_IDS

import ptjax
from ptjax.models.decoding import decode

EXAMPLES = Path(__file__).parents[2] / "examples"
PUBLIC = {"__future__", "dataclasses", "flax", "importlib", "jax", "json", "ptjax", "sys", "typing"}
MOST_LINES = {"own_method.py": 60, "own_network.py": 150, "tickets.py": 45, "many_prompts.py": 75}


@pytest.fixture
def own_network(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("own_network")


@pytest.fixture
def own_method(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("own_method")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_imports_public_names(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES[path.name]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in PUBLIC - {"ptjax"}, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert all(alias.name in PUBLIC | {"jax.numpy"} for alias in node.names)


def test_a_network_of_one_s_own_trains_evaluates_exports_and_loads(own_network, task, tmp_path):
    family, folder = own_network.family(), tmp_path / "network"
    ptjax.save_backbone(folder, None, own_network.init_params(), dtype="float32", family=family)
    backbone = ptjax.load_backbone(folder, family=family, tokenizer="package:nano")
    results = tune(tmp_path / "run", task, backbone)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    assert results["trainable_parameters"] == 4 * own_network.WIDTH
    prompt = ptjax.load_prompt(tmp_path / "run" / "prompts" / "best.safetensors")
    assert prompt.prompt.shape == (4, own_network.WIDTH)
    again = ptjax.load_backbone(folder, family=own_network.family(), tokenizer="package:nano")
    texts = ["text: lovely great", "text: awful"]
    said = ptjax.generate(again, texts, prompt, max_new_tokens=4)
    assert said == ptjax.generate(backbone, texts, prompt, max_new_tokens=4)
    with pytest.raises(ptjax.InputError, match=r"tuned on .* with the backbone v2:"):
        other = own_network.init_params(seed=1)
        ptjax.save_backbone(tmp_path / "other", None, other, dtype="float32", family=family)
        other = ptjax.load_backbone(tmp_path / "other", family=family, tokenizer="package:nano")
        ptjax.generate(other, texts, prompt)


def test_a_method_of_one_s_own_trains_evaluates_exports_and_loads(
    own_method, backbone, task, tmp_path
):
    method = own_method.LowRankPrompt(length=4, rank=2)
    assert isinstance(method, ptjax.Method)
    results = tune(tmp_path, task, backbone, method=method)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    assert results["trainable_parameters"] == 2 * (4 + 16)
    assert results["settings"]["method"] == {
        "is": "own_method.LowRankPrompt", "length": 4, "rank": 2
    }  # fmt: skip
    best = ptjax.load_prompt(tmp_path / "prompts" / "best.safetensors")
    assert np.linalg.matrix_rank(best.prompt) == 2
    assert best.metadata["task"]["name"] == task.name
    texts = ["text: lovely great", "text: awful"]
    assert len(ptjax.generate(backbone, texts, best, max_new_tokens=4)) == 2


@pytest.fixture
def script(monkeypatch, tmp_path, backbone) -> Callable[[str], ModuleType]:
    """`script("tickets")` -> the module, for two steps of a random backbone in an own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "BACKBONE", backbone.name)
        monkeypatch.setattr(module, "STEPS", 2)
        return module

    return load


def test_the_script_of_tickets_reports_predicts_and_saves(script, capsys):
    tickets = script("tickets")
    tickets.main()
    said = capsys.readouterr().out
    assert "tickets: accuracy on the split test, 180 examples" in said
    for message in tickets.MESSAGES:
        assert f"{message}\n  Prediction(text=" in said
    assert Path(tickets.SHARED, "README.md").exists()
    tickets.main()  # the run is finished, and the folder is ptjax's own
    assert capsys.readouterr().out == said


@pytest.mark.slow
def test_the_script_of_many_prompts_answers_as_each_prompt_alone(script, backbone, capsys):
    many = script("many_prompts")
    many.main()
    answers = capsys.readouterr().out.splitlines()[3:]
    prompts = ptjax.load_prompts(many.PROMPTS)
    assert list(prompts) == ["asks", "sentiment", "tickets"]
    for (message, name), answer in zip(many.BATCH, answers, strict=True):
        (alone,) = ptjax.predict(backbone, [message], prompts[name])
        assert answer.split() == [
            name, *message.split(), alone.text, f"({alone.probabilities[alone.text]:.2f})"
        ]  # fmt: skip


def test_its_cache_decodes_as_whole_targets_do(own_network):
    apply_fn = own_network.family().build(own_network.family().config_type(8192, 16))
    variables = {"params": own_network.init_params()}
    tokens, lengths = jnp.asarray([[7, 9, 3, 0], [5, 0, 0, 0]]), jnp.asarray([3, 1])
    settings = {"ids": T5_IDS, "max_length": 5}
    written, _ = jax.jit(lambda: decode(apply_fn, variables, tokens, lengths, **settings))()
    inputs = jnp.pad(written, ((0, 0), (1, 0)))[:, :-1]
    logits = jax.jit(lambda: apply_fn(variables, tokens, inputs, encoder_lengths=lengths))()
    before_end = np.cumsum(np.asarray(written) == 1, axis=1) == 0
    assert before_end.sum() > 5
    np.testing.assert_array_equal(written[before_end], logits.argmax(-1)[before_end])


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_it_goes_through_the_commands(own_network, tmp_path, call):
    """train, infer, evaluate and export by a gin file that names the family."""
    family, folder, run = own_network.family(), tmp_path / "network", tmp_path / "run"
    ptjax.save_backbone(folder, None, own_network.init_params(), dtype="float32", family=family)
    (tmp_path / "own.gin").write_text(
        "from __gin__ import dynamic_registration\n\nimport own_network\nimport ptjax\n\n"
        "ptjax.load_backbone.family = @own_network.family()\n"
        "TOKENIZER = 'package:nano'\nEVAL_EXAMPLES = 8\nBATCH_SIZE = 8\nPROMPT_LENGTH = 4\n"
        "TRAIN_STEPS = 2\nEVAL_PERIOD = 2\nTASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 4}\n"
        f"INITIAL_CHECKPOINT_PATH = '{folder}'\nMODEL_DIR = '{run}'\n"
    )
    files = ("--gin_file=quickstart.gin", f"--gin_file={tmp_path / 'own.gin'}")

    def done(command: str, *arguments: object) -> str:
        code, out, err = call(command, *arguments)
        assert code == 0, err
        return out

    done("train", *files)
    best = run / "prompts" / "best.safetensors"
    own = (f"--model_dir={run}", "--trust_config")
    assert json.loads(done("evaluate", *own))["backbone"] == str(folder)
    assert done("infer", *own, "a lovely day").strip()
    done("export", best, "--to=npy", f"--output={tmp_path / 'prompt.npy'}")
    assert np.load(tmp_path / "prompt.npy").shape == (4, own_network.WIDTH)
    code, _, err = call("train", *files, "--gin.PACK=True", f"--gin.MODEL_DIR='{tmp_path / 'x'}'")
    assert code == 2 and "PACK = True is not supported by a custom Flax module" in err
