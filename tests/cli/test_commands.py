"""evaluate, infer, inspect and export, from their flags to their output, on a tiny backbone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from etils import epath
from markers import SHARED
from tiny import save_tiny, tiny_config

from ptjax import cli
from ptjax.backbones import describe
from ptjax.backbones.load import load_backbone
from ptjax.data.sources import Record
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.inference import predict, records
from ptjax.inference.generate import generate, generate_with_scores
from ptjax.inference.prompts import check_prompt
from ptjax.interop import huggingface
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import PromptFile, load_prompt, save_prompt

pytestmark = pytest.mark.usefixtures("own_process")
FIXTURES = Path(__file__).parents[1] / "fixtures"
SENTIMENT = Task(
    name="sentiment",
    inputs="sentence: {text}",
    label="label",
    verbalizer={"positive": "positive", "negative": "negative"},
)


@pytest.fixture
def fails(call):
    def run(command: str, *arguments: object, stdin: bytes = b"") -> str:
        code, out, err = call(command, *arguments, stdin=stdin)
        assert (code, out) == (2, ""), err
        return next(line for line in err.splitlines() if line.startswith("error: "))[7:]

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny backbone, another one, and prompts for the first."""
    folder = tmp_path_factory.mktemp("commands")
    tokenizer = load_tokenizer("package:nano/spiece.model")
    for seed, name in enumerate(("backbone", "other"), start=1):
        save_tiny(folder / name, tiny_config(8192), seed=seed, tokenizer=tokenizer)
    backbone = load_backbone(folder / "backbone")
    embedding = np.asarray(backbone.variables["params"]["token_embedder"]["embedding"])
    metadata = {
        "ptjax_version": "0.1.0",
        "backbone_name": str(folder / "backbone"),
        **backbone.fingerprints.as_metadata(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "task": SENTIMENT.describe(),
        "input_length": 24,
        "target_length": 5,
        "step": 3,
        "metric": "accuracy",
        "value": 0.5,
    }
    prompt = 2 * embedding[[7, 4000, 11]]
    save_prompt(folder / "prompt.safetensors", prompt, metadata)
    np.save(folder / "bare.npy", prompt)
    np.save(folder / "narrow.npy", prompt[:, :8])
    open_task = Task(name="copy", inputs="{a} and {b}", targets="{a}")
    save_prompt(folder / "open.safetensors", prompt, metadata | {"task": open_task.describe()})
    return folder


@pytest.fixture(scope="module")
def backbone(place):
    return load_backbone(place / "backbone")


@pytest.fixture
def run_dir(place, tmp_path) -> Path:
    """MODEL_DIR as `tune` leaves it, made in a folder that is gone: its config.gin is relative."""
    folder = tmp_path / "moved"
    (folder / "prompts").mkdir(parents=True)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "checkpoints" / "12").mkdir()
    (folder / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir()
    shutil.copy(place / "prompt.safetensors", folder / "prompts" / "best.safetensors")
    flags = [
        "--gin_file=quickstart.gin",
        "--gin_file=tasks/sentiment.gin",
        "--gin.MODEL_DIR='relative/and/gone'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{place / 'backbone'}'",
        "--gin.EVAL_EXAMPLES=12",
        "--gin.ptjax.Task.inputs='sentence: {text}'",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 5}",
    ]
    cli.load_gin(cli.parse(cli.make_parser("x", ""), flags))
    (folder / "config.gin").write_text(cli.config_text())
    (folder / "results.json").write_text('{"task": "sentiment", "value": 0.625}\n')
    gin.clear_config()
    return folder


def _rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# evaluate


def test_evaluate_a_run_whose_model_dir_has_moved(call, run_dir, place, backbone):
    code, out, err = call("evaluate", f"--model_dir={run_dir}", "--output=p/predictions.jsonl")
    assert code == 0, err
    result = json.loads(out)
    rows = _rows(Path("p/predictions.jsonl").read_text())
    right = [row["prediction"] == row["targets"] == row["label"] for row in rows]
    assert result["value"] == result["metrics"]["accuracy"] == sum(right) / 12
    assert {k: result[k] for k in ("task", "split", "metric", "examples", "step")} == {
        "task": "sentiment", "split": "test", "metric": "accuracy", "examples": 12, "step": 3,
    }  # fmt: skip
    assert result["prompt"] == str(run_dir / "prompts" / "best.safetensors")
    # The prompt's own input length, 24, and not the gin file's 16.
    prompt = load_prompt(place / "prompt.safetensors")
    ranked = predict.rank(
        backbone, [r["inputs"] for r in rows], ("negative", "positive"), prompt, input_length=24,
        target_length=5,
    )  # fmt: skip
    assert [row["prediction"] for row in rows] == [one.text for one in ranked]
    assert {row["prediction"] for row in rows} == {"positive", "negative"}
    assert all(row["inputs"] == f"sentence: {row['text']}" for row in rows)


def test_evaluate_without_a_prompt_and_on_another_split(call, run_dir):
    flags = ("--gin_file", run_dir / "config.gin", "--prompt=none", "--split=validation")
    code, out, err = call("evaluate", *flags)
    assert code == 0, err
    result = json.loads(out)
    assert (result["prompt"], result["split"], result["step"]) == (None, "validation", None)


def test_evaluate_a_run_that_tuned_the_backbone(call, run_dir, place):
    (run_dir / "prompts" / "best.safetensors").unlink()
    shutil.copytree(place / "other", run_dir / "models" / "best")
    code, out, err = call("evaluate", f"--model_dir={run_dir}")
    assert code == 0, err
    assert json.loads(out)["backbone"] == str(run_dir / "models" / "best")
    assert json.loads(out)["prompt"] is None


def test_evaluate_refuses(fails, run_dir, place):
    directory = f"--model_dir={run_dir}"
    assert "no split 'tset'" in fails("evaluate", directory, "--split=tset")
    assert fails("evaluate", "--model_dir=nowhere").startswith("no run at nowhere: ")
    assert fails("evaluate", "--prompt=none").startswith("which task? ")
    other = f"--backbone={place / 'other'}"
    assert "override with --allow_mismatch" in fails("evaluate", directory, other)
    (run_dir / "prompts" / "best.safetensors").unlink()
    assert "has no prompts/best.safetensors" in fails("evaluate", directory)


# infer


def test_infer_ranks_the_labels_with_the_prompts_template_and_lengths(
    call, run_dir, place, backbone
):
    code, out, err = call("infer", "a fine film", "no", f"--model_dir={run_dir}")
    assert code == 0, err
    rows = _rows(out)
    prompt = load_prompt(place / "prompt.safetensors")
    for row, text in zip(rows, ["a fine film", "no"], strict=True):
        assert row["text"] == text and row["inputs"] == f"sentence: {text}"
        shares = row["probabilities"]
        assert sum(shares.values()) == pytest.approx(1) and set(shares) == set(SENTIMENT.labels)
        assert row["prediction"] == max(shares, key=shares.__getitem__)
    one = predict.rank(backbone, ["sentence: no"], SENTIMENT.labels, prompt, input_length=24,
                          target_length=5)[0]  # fmt: skip
    assert rows[1]["score"] == pytest.approx(one.score, abs=1e-5)
    assert np.log(rows[1]["probabilities"][one.text]) > one.score  # among the labels, not all texts


def test_infer_finds_the_prompts_backbone_whatever_the_flags_set_for_it(call, place):
    """The backbone is the one that the prompt was tuned on."""
    for flag in ("--tokenizer=package:nano/spiece.model", "--gin.ptjax.load_backbone.mesh='auto'"):
        code, out, err = call("infer", f"--prompt={place / 'prompt.safetensors'}", flag, "fine")
        assert code == 0 and _rows(out)[0]["inputs"] == "sentence: fine", err


def test_infer_keeps_order_and_fields_of_a_file_and_writes_whole_files(call, place):
    texts = [f"text {'long ' * (i % 5)}{i}" for i in range(9)]
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    Path("in.jsonl").write_text("".join(lines))
    flags = (f"--prompt={place / 'prompt.safetensors'}", "--input=in.jsonl", "--output=out.jsonl")
    code, out, err = call("infer", *flags, "--batch_size=4")
    assert (code, out) == (0, ""), err
    rows = _rows(Path("out.jsonl").read_text())
    assert [(row["id"], row["text"]) for row in rows] == list(enumerate(texts))
    Path("in.jsonl").write_text("".join([*lines, '{"id": 9, "txet": "x"}\n']))
    before = Path("out.jsonl").read_bytes()
    flags += ("--force",)
    code, out, err = call("infer", *flags)
    assert code == 2 and "error: in.jsonl:10: task sentiment: no field 'text'" in err
    Path("in.jsonl").write_text("".join([*lines, "{nope\n"]))
    code, out, err = call("infer", *flags)
    assert code == 2 and "error: in.jsonl:10: not valid JSON" in err
    assert Path("out.jsonl").read_bytes() == before


def test_infer_reads_standard_input_as_lines_or_records(call, fails, place):
    prompt = f"--prompt={place / 'prompt.safetensors'}"
    _, out, err = call("infer", prompt, "--input=-", stdin=b"one\n\n  two words\n")
    assert [row["inputs"] for row in _rows(out)] == ["sentence: one", "sentence:   two words"], err
    _, out, err = call("infer", prompt, "--input=-", stdin=b'\n{"text": "one", "n": 1}\n')
    assert [(row["text"], row["n"]) for row in _rows(out)] == [("one", 1)], err
    _, out, err = call("infer", prompt, "--input=-", "--format=text", stdin=b"{one}\n")
    assert [row["inputs"] for row in _rows(out)] == ["sentence: {one}"], err
    said = fails("infer", prompt, "--input=-", stdin=b'{"text": "a"}\n{"text": 3\n')
    assert said.startswith("standard input:2: not valid JSON")
    assert fails("infer", prompt, "--input=-").startswith("standard input: no records in it")


def test_infer_decodes_on_request_and_for_open_targets(call, place, backbone):
    prompt = load_prompt(place / "prompt.safetensors")
    flags = (f"--prompt={place / 'prompt.safetensors'}", "a text")
    _, out, err = call("infer", *flags, "--decode", "--num_beams=3", "--max_new_tokens=4")
    texts, scores = generate_with_scores(
        backbone, ["sentence: a text"], prompt, num_beams=3, max_new_tokens=4
    )
    row = _rows(out)[0]
    assert row["prediction"] == texts[0] and "probabilities" not in row, err
    assert row["score"] == pytest.approx(float(scores[0]), abs=1e-5)
    sampled = ("--decode", "--temperature=1.5", "--top_p=0.9", "--seed=5")
    _, out, err = call("infer", *flags, *sampled)
    expected = generate(backbone, ["sentence: a text"], prompt, temperature=1.5, top_p=0.9, seed=5)
    assert _rows(out)[0]["prediction"] == expected[0], err
    open_targets = (f"--prompt={place / 'open.safetensors'}", "--input=-")
    _, out, err = call("infer", *open_targets, stdin=b'{"a": "x", "b": "y"}\n')
    assert _rows(out)[0]["prediction"] == generate(backbone, ["x and y"], prompt)[0], err


def test_infer_raw_takes_inputs_as_they_are(call, place):
    flags = (f"--prompt={place / 'prompt.safetensors'}", "--raw", "--input=-")
    _, out, err = call("infer", *flags, stdin=b'{"inputs": "sentence: x", "id": 4}\n')
    row = _rows(out)[0]
    assert (row["inputs"], row["id"]) == ("sentence: x", 4), err
    _, out, err = call("infer", *flags, stdin=b"sentence: x\n")
    assert _rows(out)[0] == {k: v for k, v in row.items() if k != "id"}, err


def test_infer_without_a_prompt_takes_the_gin_files_task(call, run_dir, place):
    flags = ("--gin_file", run_dir / "config.gin", "--prompt=none")
    _, out, err = call("infer", "x", *flags)
    assert _rows(out)[0]["inputs"] == "sentence: x", err
    _, out, err = call("infer", "x", "--prompt=none", f"--backbone={place / 'backbone'}")
    assert _rows(out)[0]["inputs"] == "x" and "probabilities" not in _rows(out)[0], err


def test_infer_says_when_it_cuts_inputs(call, place):
    _, _, err = call("infer", f"--prompt={place / 'prompt.safetensors'}", "long " * 60, "short")
    assert "warning: 1 of 2 texts were cut to 24 tokens" in err


def test_infer_refuses(fails, place):
    prompt = f"--prompt={place / 'prompt.safetensors'}"
    assert fails("infer", "x").startswith("which prompt? ")
    assert fails("infer", "x", "--prompt=gone.npy").startswith("no prompt at gone.npy: ")
    assert fails("infer", "x", "--prompt=none").startswith("which backbone? ")
    assert "need --decode" in fails("infer", prompt, "x", "--num_beams=2")
    assert fails("infer", prompt, "x", "--batch_size=0") == "--batch_size must be >= 1, got 0"
    none = fails("infer", prompt, "x", "--decode", "--max_new_tokens=0")
    assert none == "max_new_tokens must be >= 1, got 0"
    two_fields = f"--prompt={place / 'open.safetensors'}"
    said = fails("infer", two_fields, "x")
    assert said.startswith("the command line, text:1: task copy: a plain line cannot fill")
    assert fails("infer", prompt, "--input=no.txt").startswith("no records at no.txt: ")
    Path("in.weird").write_text("x\n")
    assert "set Task.format (infer: --format) to one of" in fails(
        "infer", prompt, "--input=in.weird"
    )


def test_a_prompt_of_another_backbone_is_refused_unless_allowed(call, fails, place):
    flags = (f"--prompt={place / 'prompt.safetensors'}", f"--backbone={place / 'other'}", "x")
    said = fails("infer", *flags)
    assert said.startswith(f"the prompt was tuned on {place / 'backbone'} with the backbone v2:")
    code, out, err = call("infer", *flags, "--allow_mismatch")
    assert code == 0 and len(_rows(out)) == 1
    assert "warning: the prompt was tuned on" in err and "does not say" not in err
    bare = (f"--prompt={place / 'bare.npy'}", f"--backbone={place / 'other'}", "x")
    code, _, err = call("infer", *bare)
    assert code == 0 and err.count("does not say which backbone") == 1
    narrow = f"--prompt={place / 'narrow.npy'}"
    assert "does not fit" in fails("infer", narrow, *bare[1:], "--allow_mismatch")


def test_check_prompt_looks_at_the_tokenizer_too(place, backbone):
    file = load_prompt(place / "prompt.safetensors")
    check_prompt(backbone, file)
    file.metadata["tokenizer_fingerprint"] = "sha256:" + "0" * 64
    with pytest.raises(InputError, match="with the tokenizer sha256:0000"):
        check_prompt(backbone, file)
    check_prompt(backbone, file, allow_mismatch=True)


def test_check_prompt_takes_a_hub_id_for_any_commit_of_it(backbone, caplog):
    """PEFT writes the id alone."""
    of_hub = dataclasses.replace(backbone, name="google/t5@" + "0a" * 20)
    prompt = np.ones((3, 16), np.float32)
    for name in (of_hub.name, "google/t5"):
        check_prompt(of_hub, PromptFile(prompt, {"backbone_name": name}))
    assert not caplog.records
    for name in ("google/t5@main", "google/mt5"):
        check_prompt(of_hub, PromptFile(prompt, {"backbone_name": name}))
        assert f"tuned on {name} and records no fingerprint" in caplog.text


def test_a_users_own_preprocess_comes_from_the_gin_files_task():
    task = Task(name="t", inputs="{a}", targets="{b}", preprocess=_doubled)
    metadata = {"task": json.loads(json.dumps(task.describe()))}
    with pytest.raises(InputError, match="give the task's gin file"):
        records.task_of(metadata)
    same = records.task_of(metadata, task)
    assert same is not None
    record = Record({"a": "x", "b": ""}, "f", 1)
    assert records.format_record(record, same)[0] == "xx"
    assert records.task_of({}, task) is task


def _doubled(fields):
    yield fields | {"a": fields["a"] * 2}


# inspect


def test_inspect_a_prompt(call, place):
    code, out, err = call("inspect", place / "prompt.safetensors", "--json", "--tokens=2")
    assert code == 0, err
    described = json.loads(out)
    assert (described["kind"], described["shape"]) == ("prompt", [3, 16])
    assert described["metadata"]["input_length"] == 24
    pieces = [load_tokenizer("package:nano/spiece.model").id_to_piece(i) for i in (7, 4000, 11)]
    nearest = described["nearest_tokens"]
    assert [row[0][0] for row in nearest] == pieces and {len(row) for row in nearest} == {2}
    assert [row[0][1] for row in nearest] == pytest.approx([1, 1, 1])
    norms = np.linalg.norm(load_prompt(place / "prompt.safetensors").prompt, axis=1)
    assert described["row_norms"]["greatest"] == pytest.approx(norms.max())
    code, out, err = call("inspect", place / "prompt.safetensors")
    assert "shape: 3, 16" in out and f"{pieces[1]} 1.00" in out


def test_inspect_a_prompt_that_names_no_backbone(call, fails, place):
    _, out, err = call("inspect", place / "bare.npy", "--json")
    assert "--backbone" in json.loads(out)["not_compared"], err
    _, out, err = call("inspect", place / "bare.npy", "--json", f"--backbone={place / 'backbone'}")
    assert json.loads(out)["compared_with"] == str(place / "backbone"), err
    flag = f"--backbone={place / 'backbone'}"
    narrow = fails("inspect", place / "narrow.npy", flag)
    assert narrow.startswith("the prompt [3, 8] does not fit the backbone, whose width is 16")
    _, _, err = call("inspect", place / "prompt.safetensors", f"--backbone={place / 'other'}")
    assert "the prompt was tuned on different weights" in err


def test_inspect_a_prompt_whose_backbone_is_gone(call, place):
    file = load_prompt(place / "prompt.safetensors")
    save_prompt("p.safetensors", file.prompt, file.metadata | {"backbone_name": "/no/such"})
    code, out, err = call("inspect", "p.safetensors", "--json")
    assert code == 0 and "no backbone at /no/such" in json.loads(out)["not_compared"], err


@pytest.mark.parametrize("name", ["t5_1_1_tiny_legacy", "t5_1_0_tiny_legacy", "t5_1_1_tiny_orbax"])
def test_inspect_a_t5x_checkpoint(call, name):
    code, out, err = call("inspect", FIXTURES / name, "--json")
    assert code == 0, err
    described = json.loads(out)
    loaded = load_backbone(FIXTURES / name, dtype="float32")
    assert described["kind"] == "backbone" and described["fingerprint"] == loaded.fingerprint
    leaves = jax.tree.leaves(loaded.variables)
    assert described["parameters"] == sum(leaf.size for leaf in leaves)
    assert "relpos_max_distance" in described["assumed"] and described["tokenizer"] is None
    assert described["config"]["emb_dim"] == loaded.config.emb_dim


def test_inspect_the_shipped_backbone(call):
    _, out, err = call("inspect", "ptjax-nano")
    assert "emb dim: 128" in out and "stored as: bfloat16" in out, err
    _, out, err = call("inspect", "ptjax-nano", "--json")
    assert json.loads(out)["fingerprint"] == load_backbone("ptjax-nano").fingerprint


def test_inspect_a_model_dir(call, run_dir):
    code, out, err = call("inspect", run_dir, "--json")
    assert code == 0, err
    described = json.loads(out)
    assert (described["kind"], described["finished"]) == ("run", True)
    assert described["newest_checkpoint"] == 12
    assert described["results"] == {"task": "sentiment", "value": 0.625}
    assert described["best_prompt"]["shape"] == [3, 16]
    assert len(described["best_prompt"]["nearest_tokens"]) == 3


def test_inspect_a_model_dir_of_t5x(call, tmp_path):
    shutil.copytree(FIXTURES / "t5_1_1_tiny_legacy", tmp_path / "t5x")
    (tmp_path / "t5x" / "config.gin").touch()  # as in ours
    _, out, err = call("inspect", tmp_path / "t5x", "--json")
    assert json.loads(out)["kind"] == "backbone", err


def test_inspect_refuses(fails, tmp_path, run_dir):
    assert fails("inspect", "ptjax-nano", "--tokens=-2") == "--tokens must be >= 1, got -2"
    assert fails("inspect", "/no/such/path").startswith("no backbone at /no/such/path")
    Path("x.safetensors").write_bytes(b"short")
    assert fails("inspect", "x.safetensors").startswith("x.safetensors: ")
    Path("empty").mkdir()
    assert "holds no backbone that ptjax knows" in fails("inspect", tmp_path / "empty")
    export_peft("above/named", np.ones((3, 16), np.float32), num_heads=2, num_layers=1)
    assert fails("inspect", "above").endswith("did you mean above/named?")
    (run_dir / "results.json").write_text("{")
    assert "results.json: the file is truncated or not a JSON object" in fails("inspect", run_dir)


def test_nearest_tokens_are_in_order_and_survive_rows_of_zeros():
    embedding = np.array([[1, 0], [1, 1], [0, 2], [-1, 0]], np.float32)
    rows = describe.nearest_tokens(np.array([[2, 0.1], [0, 0]], np.float32), embedding, None)
    assert [piece for piece, _ in rows[0]] == ["<0>", "<1>", "<2>"]
    assert rows[0][1][1] == pytest.approx(2.1 / np.sqrt(4.01) / np.sqrt(2))
    assert [cosine for _, cosine in rows[1]] == [0, 0, 0]


# export


@pytest.mark.parametrize("kind", ["safetensors", "npy", "huggingface"])
def test_export_reads_back(call, fails, run_dir, place, kind):
    code, out, err = call("export", f"--model_dir={run_dir}", f"--to={kind}", "--output=out/p")
    assert code == 0 and "[3, 16]" in out, err
    original, copy = load_prompt(place / "prompt.safetensors"), load_prompt("out/p")
    np.testing.assert_array_equal(copy.prompt, original.prompt)
    if kind == "safetensors":
        assert copy.metadata == original.metadata
    if kind == "npy":
        array = np.load("out/p")
        assert array.dtype == np.float32 and array.shape == (3, 16)
    if kind == "huggingface":
        config = json.loads(Path("out/p/adapter_config.json").read_text())
        assert (config["num_layers"], config["num_attention_heads"]) == (1, 2)
        assert config["base_model_name_or_path"] == str(place / "backbone")
    again = ("export", place / "bare.npy", f"--to={kind}", "--output=out/p")
    if kind == "huggingface":
        again += (f"--backbone={place / 'backbone'}",)
    assert fails(*again).startswith("out/p already exists; overwrite it with --force")
    code, out, err = call(*again, "--force")
    assert code == 0, err


def test_export_takes_the_prompt_as_a_flag(call, fails, place):
    flag = f"--prompt={place / 'bare.npy'}"
    code, _, err = call("export", flag, "--to=npy", "--output=p")
    assert code == 0, err
    assert fails("export", "p", flag, "--to=npy", "--output=q").startswith("two prompts")


def test_export_tells_peft_a_model_of_the_hub_and_its_commit(call, place, monkeypatch):
    commit = "0a" * 20
    found = (epath.Path(place / "backbone"), commit)
    monkeypatch.setattr(huggingface, "download", lambda repo_id, revision, ours: found)
    flags = ("--backbone=google/t5", "--to=huggingface", "--output=p")
    code, _, err = call("export", place / "bare.npy", *flags)
    assert code == 0, err
    config = json.loads(Path("p/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("google/t5", commit)


def test_export_refuses(fails, place):
    assert fails("export", "--to=npy", "--output=p").startswith("which prompt? ")
    bare = ("export", place / "bare.npy", "--output=p")
    assert "needs the backbone's sizes" in fails(*bare, "--to=huggingface")
    assert "no prompt at gone: " in fails("export", "gone", "--to=npy", "--output=p")
    narrow = ("export", place / "narrow.npy", "--output=p", "--to=huggingface")
    assert "[3, 8] does not fit " in fails(*narrow, f"--backbone={place / 'backbone'}")
    Path("p").mkdir()
    assert "is a directory" in fails(*bare, "--to=npy", "--force")
    assert not list(Path("p").iterdir())


def test_a_prompt_goes_through_every_format_and_back(call, place):
    """Bitwise, and with all it knows of itself where the format can carry it."""
    original = load_prompt(place / "prompt.safetensors")
    source = place / "prompt.safetensors"
    for i, kind in enumerate(("huggingface", "safetensors", "huggingface", "npy", "safetensors")):
        code, _, err = call("export", source, f"--to={kind}", f"--output={i}")
        assert code == 0, err
        source, copy = Path(f"{i}"), load_prompt(f"{i}")
        assert copy.prompt.tobytes() == original.prompt.tobytes()
        assert copy.metadata == (original.metadata if i < 3 else {})


def test_a_peft_directory_of_ours_is_used_like_our_own_file(call, place):
    """Its backbone, template and labels are in it."""
    own = place / "prompt.safetensors"
    code, _, err = call("export", own, "--to=huggingface", "--output=peft")
    assert code == 0, err
    _, expected, _ = call("infer", f"--prompt={own}", "a text")
    _, out, err = call("infer", "--prompt=peft", "a text")
    assert out == expected and "probabilities" in _rows(out)[0] and "warning" not in err, err
    _, expected, _ = call("inspect", own)
    _, out, err = call("inspect", "peft")
    assert out == expected.replace(f"path: {own}", "path: peft"), err


def test_a_peft_directory_of_others_names_its_backbone_alone(call, fails, place):
    export_peft(
        "peft", load_prompt(place / "bare.npy").prompt, num_heads=2, num_layers=1,
        base_model=str(place / "backbone"),
    )  # fmt: skip
    code, out, err = call("infer", "--prompt=peft", "a text", "--max_new_tokens=2")
    assert code == 0 and _rows(out)[0]["inputs"] == "a text" and "warning" not in err, err
    flags = ("--prompt=peft", "a text", "--max_new_tokens=2", f"--backbone={place / 'other'}")
    code, _, err = call("infer", *flags)
    said = f"warning: the prompt was tuned on {place / 'backbone'} and records no fingerprint"
    assert code == 0 and err.count(said) == 1
    _, out, err = call("inspect", "peft", "--json")
    assert json.loads(out)["compared_with"] == str(place / "backbone"), err
    config = json.loads(Path("peft/adapter_config.json").read_text())
    Path("peft/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/gone/t5"})
    )
    export = ("export", "peft", "--to=huggingface", "--output=p")
    for command in (("infer", "x", "--prompt=peft"), export):
        said = fails(*command)
        assert said.startswith("no backbone at /gone/t5: ") and "--backbone=PATH" in said


def test_inspect_downloads_nothing_unasked(call, place, monkeypatch):
    monkeypatch.setattr(huggingface, "is_downloaded", lambda repo_id, revision: False)
    monkeypatch.setattr(huggingface, "download", None)
    prompt = load_prompt(place / "bare.npy").prompt
    export_peft("peft", prompt, num_heads=2, num_layers=1, base_model="google/t5", revision="v1")
    code, out, err = call("inspect", "peft", "--json")
    assert code == 0, err
    assert json.loads(out)["not_compared"] == (
        "its backbone, google/t5@v1, is not on this machine; --backbone=google/t5@v1 downloads it"
    )


def test_export_tells_peft_no_other_backbone_than_the_prompt_s(fails, call, place):
    flags = ("export", place / "prompt.safetensors", "--to=huggingface", "--output=p")
    said = fails(*flags, f"--backbone={place / 'other'}")
    assert said.startswith(f"the prompt was not tuned on the weights of {place / 'other'}; ")
    assert not Path("p").exists()
    shutil.copytree(place / "backbone", "moved")
    code, _, err = call(*flags, "--backbone=moved")
    assert code == 0, err
    assert json.loads(Path("p/adapter_config.json").read_text())["base_model_name_or_path"] == (
        "moved"
    )


def released(folder: Path) -> Path:
    """Like those that google-research/prompt-tuning released: entries of some tens."""
    prompt = np.random.default_rng(0).normal(scale=30, size=(100, 768)).astype(np.float32)
    np.save(folder / "like_released.npy", prompt)
    return folder / "like_released.npy"


@pytest.fixture(scope="module")
def base_wide(tmp_path_factory) -> Path:
    """A backbone as wide as T5 base, and else tiny."""
    return save_tiny(tmp_path_factory.mktemp("wide"), tiny_config(emb_dim=768))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(released, id="like_released"),
        *(
            pytest.param(
                lambda _, name=name: SHARED / "fixtures" / "released_prompts" / f"{name}.npy",
                marks=pytest.mark.shared,
                id=name,
            )
            for name in ("sst2", "mrpc", "rte")
        ),
    ],
)
def test_a_released_prompt_is_imported_exported_and_inspected(call, tmp_path, base_wide, source):
    file = source(tmp_path)
    prompt = np.load(file)
    _, out, err = call("inspect", file, "--json", f"--backbone={base_wide}")
    described, norms = json.loads(out), np.linalg.norm(prompt, axis=1)
    assert (described["shape"], described["bytes"]) == ([100, 768], 307_200), err
    assert described["row_norms"]["least"] == pytest.approx(norms.min())
    assert described["row_norms"]["least"] > 100 and len(described["nearest_tokens"]) == 100
    flags = {"safetensors": (), "npy": (), "huggingface": (f"--backbone={base_wide}",)}
    for kind, more in flags.items():
        code, _, err = call("export", file, f"--to={kind}", f"--output=to/{kind}", *more)
        assert code == 0, err
        assert load_prompt(f"to/{kind}").prompt.tobytes() == prompt.tobytes()
        code, _, err = call("export", f"to/{kind}", "--to=npy", f"--output=back/{kind}.npy")
        assert code == 0, err
        assert Path(f"back/{kind}.npy").read_bytes() == file.read_bytes()


# train, and what the others make of it


def test_a_run_in_a_relative_model_dir_is_trained_and_used(
    call, fails, place, tmp_path, monkeypatch
):
    tune = (
        "--gin_file=quickstart.gin",
        "--gin_file=tasks/sentiment.gin",
        "--gin.MODEL_DIR='runs/a'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{place / 'backbone'}'",
        "--gin.ptjax.load_backbone.mesh=None",
        "--gin.ptjax.Evaluation.hard_prompts={}",
        "--gin.TRAIN_STEPS=2",
        "--gin.EVAL_PERIOD=1",
        "--gin.EVAL_EXAMPLES=8",
        "--gin.ptjax.Task.inputs='sentence: {text}'",
        "--gin.BATCH_SIZE=8",
        "--gin.PROMPT_LENGTH=3",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 5}",
    )
    code, out, err = call("train", *tune)
    assert code == 0 and "try it:  python -m ptjax.infer --model_dir=runs/a" in out, err
    assert "absl" not in err and "orbax" not in err
    results = json.loads(Path("runs/a/results.json").read_text())
    _, out, err = call("inspect", "runs/a", "--json")
    assert json.loads(out)["newest_checkpoint"] == 2, err
    _, out, err = call("inspect", "runs/a/checkpoints/2", "--json")
    described = json.loads(out)
    assert described["kind"] == "checkpoint", err
    assert described["run"]["settings"]["settings"]["method"] == {
        "is": "PromptTuning", "length": 3, "initializer": None, "attends_to_input": True,
    }  # fmt: skip
    assert described["arrays"]["trainable/prompt/prompt"] == "[3, 16] float32"
    shutil.copytree("runs/a/checkpoints/2", "cut")
    Path("cut/state/manifest.ocdbt").unlink()
    assert fails("inspect", "cut").startswith("cut: the checkpoint is incomplete")
    refused = fails("infer", "--backbone=runs/a/checkpoints/2", "x", "--prompt=none")
    assert "a checkpoint of a run of ptjax" in refused
    _, out, err = call("evaluate", "--model_dir=runs/a")
    assert json.loads(out)["metrics"] == results["metrics"], err
    monkeypatch.chdir(tmp_path / "runs")
    code, out, err = call("infer", "--model_dir=a", "a text of your own")
    assert _rows(out)[0]["inputs"] == "sentence: a text of your own", err


def test_an_unseeing_prompt_is_compiled_and_used(call, tmp_path) -> None:
    backbone = load_backbone("ptjax-nano")
    rows = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    metadata = {
        "backbone_name": "ptjax-nano",
        **backbone.fingerprints.as_metadata(),
        "sees_input": False,
    }
    save_prompt("blind.safetensors", rows, metadata)
    code, _, err = call("export", "blind.safetensors", "--to=kv_cache", "--output=c.safetensors")
    assert code == 0, err
    file = load_prompt("c.safetensors")
    assert metadata.items() <= file.metadata.items()
    np.testing.assert_array_equal(file.prompt, rows)
    assert file.states is not None and len(file.states.encoder[0]) == 4
    assert "kv cache: yes" in call("inspect", "c.safetensors")[1]
    ask = ("infer", "--raw", "--max_new_tokens=5", "a lovely film", "nothing at all")
    answers = [call(*ask, f"--prompt={name}") for name in ("blind.safetensors", "c.safetensors")]
    assert answers[0][0] == 0, answers[0][2]
    one, other = ([json.loads(x) for x in answer[1].splitlines()] for answer in answers)
    for a, b in zip(one, other, strict=True):
        # Another program of the same sums: float32 rounding.
        assert a["prediction"] == b["prediction"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
    # Its states are what answers: with those of another prompt it says something else.
    assert file.states.encoder[0].shape == (4, 6, 4, 32)
    twisted = jax.tree.map(lambda x: -x, file.states)
    save_prompt("twisted.safetensors", rows, metadata, twisted)
    scores = [
        json.loads(x)["score"] for x in call(*ask, "--prompt=twisted.safetensors")[1].splitlines()
    ]
    assert scores[0] != pytest.approx(one[0]["score"], abs=1e-2)

    # Others would read it in another way.
    for kind in ("npy", "huggingface"):
        code, _, err = call("export", "c.safetensors", f"--to={kind}", "--output=other")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert "does not see its input" in err
    save_prompt("seeing.safetensors", rows, metadata | {"sees_input": True})
    code, _, err = call("export", "seeing.safetensors", "--to=kv_cache", "--output=x.safetensors")
    assert code == 2 and "only a prompt that does not see its input" in err
    assert not (tmp_path / "x.safetensors").exists()
