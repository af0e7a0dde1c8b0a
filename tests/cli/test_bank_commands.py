"""infer and evaluate with --prompts, from their flags to their output, on a tiny backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_prompts import RECORDS, save_prompts, write_mood

from ptjax.data.tasks import Task
from ptjax.interop.prompt_file import load_prompt, save_prompt

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("banks"))


@pytest.fixture
def fails(call):
    def run(command: str, *arguments: object, stdin: bytes = b"") -> str:
        code, out, err = call(command, *arguments, stdin=stdin)
        assert (code, out) == (2, ""), err
        return next(line for line in err.splitlines() if line.startswith("error: "))[7:]

    return run


@pytest.fixture
def gin_file(tmp_path) -> str:
    return write_mood(tmp_path)


def _rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_record_is_read_with_its_own_prompt(call, place):
    """Each with its template, its lengths and its labels, as a run with that prompt alone."""
    Path("mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    many = (f"--prompts={place / 'mixed'}", "--batch_size=4", "--input=mixed.jsonl")
    paths = {
        "mood": "mood/best.safetensors",
        "kind": "kind.safetensors",
        "copy": "copy/prompts/best.safetensors",
    }
    for flags in ((), ("--decode", "--num_beams=2")):
        code, out, err = call("infer", *many, *flags)
        assert code == 0, err
        mixed = _rows(out)
        assert [{k: row[k] for k in RECORDS[0]} for row in mixed] == RECORDS
        for name, path in paths.items():
            own = [row for row in RECORDS if row["prompt"] == name]
            Path("own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
            one = (f"--prompt={place / 'mixed' / path}", "--input=own.jsonl")
            code, out, err = call("infer", *one, *flags)
            assert code == 0, err
            got = [row for row in mixed if row["prompt"] == name]
            for row, want in zip(got, _rows(out), strict=True):
                for key in ("score", "probabilities"):
                    assert row.pop(key, 0) == pytest.approx(want.pop(key, 0), abs=1e-4)
                assert row == want
    code, out, err = call("infer", *many, "--num_beams=2")  # for what is written, here
    assert code == 0 and "probabilities" in _rows(out)[0] and "probabilities" not in _rows(out)[2]


def test_records_without_a_prompt_go_to_the_backbone_alone(call, place):
    lines = [
        {"prompt": "none", "inputs": "one two"},
        {"prompt": "mood", "inputs": "three"},
        {"prompt": None, "inputs": "one two"},
    ]
    Path("raw.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    flags = (f"--prompts={place / 'mixed'}", "--raw", "--decode", "--max_new_tokens=4")
    code, out, err = call("infer", *flags, "--input=raw.jsonl")
    assert code == 0, err
    backbone = f"--backbone={place / 'backbone'}"
    plain = ("--prompt=none", backbone, "--raw", "--decode", "--max_new_tokens=4")
    _, alone, err = call("infer", *plain, "one two")
    first, middle, last = _rows(out)
    assert first["prediction"] == last["prediction"] == _rows(alone)[0]["prediction"], err
    assert (first["prompt"], last["prompt"]) == ("none", None)
    _, alone, err = call("infer", f"--prompt={place / 'mixed/mood/best.safetensors'}", *plain[2:],
                         "three")  # fmt: skip
    assert middle["prediction"] == _rows(alone)[0]["prediction"], err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "in.jsonl:2: no field 'prompt', which names one of the prompts"),
        (
            {"text": "x", "prompt": "moot"},
            "in.jsonl:2: no prompt is called 'moot'; did you mean mood?",
        ),
        ({"text": "x", "prompt": 0}, "in.jsonl:2: the field 'prompt' is 0, not a prompt's name"),
        ({"text": "x", "prompt": ""}, "in.jsonl:2: no prompt is called ''"),
        ({"txet": "x", "prompt": "mood"}, "in.jsonl:2: task mood: no field 'text'"),
        ({"text": "x", "prompt": None}, "in.jsonl:2: no text in the field 'inputs'"),
    ],
)
def test_a_record_whose_prompt_is_missing_is_named(fails, place, record, message):
    lines = [{"text": "x", "prompt": "mood"}, record]
    Path("in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    said = fails("infer", f"--prompts={place / 'mixed'}", "--input=in.jsonl")
    assert said.startswith(message)


def test_infer_refuses_what_names_no_prompt(fails, place, tmp_path):
    many = f"--prompts={place / 'mixed'}"
    one = f"--prompt={place / 'mixed' / 'kind.safetensors'}"
    assert fails("infer", many, one, "x").startswith(
        "--prompt and --prompts are mutually exclusive"
    )
    plain = "a plain text names no prompt of many; give records, or one --prompt"
    plain += " (in Python prompt_ids)"
    assert fails("infer", many, "x") == f"the command line, text:1: {plain}"
    assert fails("infer", many, "--input=-", stdin=b"x\n") == f"standard input:1: {plain}"
    assert fails("infer", "--prompts=gone", "x") == (
        "no prompts at gone: the path does not exist; correct it"
    )
    shutil.copytree(place / "mixed", tmp_path / "bank")
    np.save(tmp_path / "bank" / "narrow.npy", np.ones((2, 8), np.float32))
    said = fails("infer", f"--prompts={tmp_path / 'bank'}", "--input=-", stdin=b'{"prompt": "x"}')
    assert said.startswith(f"--prompts={tmp_path / 'bank'}: prompt 'narrow' has shape [2, 8]")


def test_a_member_of_another_backbone_is_named(call, fails, place, tmp_path):
    shutil.copytree(place / "mixed", tmp_path / "bank")
    file = load_prompt(place / "mixed" / "kind.safetensors")
    other = file.metadata | {"backbone_fingerprint": "sha256:" + "0" * 64}
    save_prompt(tmp_path / "bank" / "odd.safetensors", file.prompt, other)
    flags = ("infer", f"--prompts={tmp_path / 'bank'}", "--input=-")
    record = b'{"prompt": "mood", "text": "x"}'
    assert fails(*flags, stdin=record).startswith("prompt 'odd' was tuned on ")
    code, _, err = call(*flags, "--allow_mismatch", stdin=record)
    assert code == 0 and "warning: prompt 'odd' was tuned on" in err


def test_a_field_called_prompt_is_data_a_choice_or_warned_about(call, fails, place, tmp_path):
    one = f"--prompt={place / 'mixed' / 'kind.safetensors'}"
    record = b'{"prompt": "mood", "text": "x"}\n{"text": "y"}\n'
    code, out, err = call("infer", one, "--input=-", stdin=record)
    assert code == 0 and _rows(out)[0]["prompt"] == "mood"
    assert "warning: 1 of 2 records have a field 'prompt', which is ignored without" in err
    task = Task(name="ask", inputs="answer: {prompt}", targets="{t}")
    file = load_prompt(place / "mixed" / "kind.safetensors")
    reads_it = tmp_path / "bank" / "ask.safetensors"
    save_prompt(reads_it, file.prompt, file.metadata | {"task": task.describe()})
    record = b'{"prompt": "ask"}'
    code, out, err = call("infer", f"--prompt={reads_it}", "--input=-", stdin=record)
    assert code == 0 and _rows(out)[0]["inputs"] == "answer: ask" and "is ignored" not in err
    said = fails("infer", f"--prompts={reads_it.parent}", "--input=-", stdin=record)
    assert said.startswith(
        "standard input:1: the field 'prompt' names the prompt, but the template"
    )


# evaluate


def test_evaluate_prints_members_average_best_and_ensemble(call, place, gin_file):
    directory = place / "seeds" / "prompts"
    flags = (gin_file, f"--backbone={place / 'backbone'}")
    code, out, err = call("evaluate", *flags, f"--prompts={directory}", "--output=rows.jsonl")
    assert code == 0, err
    result, rows = json.loads(out), _rows(Path("rows.jsonl").read_text())
    names = ["seed_0", "seed_1", "seed_2"]
    alone = {}
    for name in names:
        prompt = f"--prompt={directory / name / 'best.safetensors'}"
        code, out, err = call("evaluate", *flags, prompt, f"--output={name}.jsonl")
        assert code == 0, err
        alone[name] = json.loads(out)
        own = [row["prediction"] for row in _rows(Path(f"{name}.jsonl").read_text())]
        assert [row["predictions"][name] for row in rows] == own
    assert result["members"] == {name: one["metrics"] for name, one in alone.items()}
    values = [one["value"] for one in alone.values()]
    assert result["average"] == {"accuracy": pytest.approx(np.mean(values))}
    assert result["best"] == {"name": names[int(np.argmax(values))], "value": max(values)}
    for way in ("majority_vote", "mean_likelihood"):
        right = [row[way] == row["targets"] for row in rows]
        assert result["ensemble"][way] == {"accuracy": np.mean(right)}
    for row in rows:  # of three votes on two labels, one has two
        said = [row["predictions"][name] for name in names]
        assert row["majority_vote"] == max(said, key=said.count)
    assert {k: result[k] for k in ("task", "split", "examples", "metric", "prompts")} == {
        "task": "mood", "split": "test", "examples": 12, "metric": "accuracy",
        "prompts": str(directory),
    }  # fmt: skip
    assert len(set(values)) > 1, values


def test_prompts_go_to_the_backbone_of_the_gin_file(call, place, gin_file, tmp_path):
    """And not to one that the run of --model_dir tuned."""
    run_dir = tmp_path / "run"
    shutil.copytree(place / "backbone", run_dir / "models" / "best")
    backbone = f"'{place / 'backbone'}'"
    named = f"ptjax.load_backbone.path = {backbone}\n"
    gin_text = Path(gin_file.removeprefix("--gin_file=")).read_text()
    (run_dir / "config.gin").write_text(
        gin_text + named + "ptjax.tune.backbone = @ptjax.load_backbone()\n"
    )
    prompts = f"--prompts={place / 'seeds' / 'prompts'}"
    code, out, err = call("evaluate", f"--model_dir={run_dir}", prompts)
    assert code == 0, err
    assert json.loads(out)["backbone"] == str(place / "backbone")


def test_evaluate_refuses_prompts_that_are_no_ensemble(fails, place, gin_file, tmp_path):
    flags = (gin_file, f"--backbone={place / 'backbone'}")
    said = fails("evaluate", *flags, f"--prompts={place / 'mixed'}")
    assert said.startswith("prompt 'kind' has the task 'kind', prompt 'copy' 'copy'; ")
    shutil.copytree(place / "seeds" / "prompts", tmp_path / "bank")
    file = load_prompt(place / "seeds" / "prompts" / "seed_0" / "best.safetensors")
    longer = file.metadata | {"input_length": 48}
    save_prompt(tmp_path / "bank" / "longer.safetensors", file.prompt, longer)
    said = fails("evaluate", *flags, f"--prompts={tmp_path / 'bank'}")
    assert said.startswith("prompt 'seed_0' has the input length 24, prompt 'longer' 48; ")
    said = fails("evaluate", *flags, f"--prompts={place / 'seeds'}")
    assert said == (
        f"{place / 'seeds'}: no prompt in this directory; did you mean {place / 'seeds'}/prompts?"
    )
    both = (f"--prompts={place / 'mixed'}", "--prompt=none")
    assert fails("evaluate", *flags, *both).startswith("--prompt and --prompts are")


def test_the_model_dir_of_a_bank(call, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "run/prompts" / name).mkdir(parents=True)
        path = tmp_path / f"run/prompts/{name}/best.safetensors"
        save_prompt(path, rng.normal(size=(3, 128)).astype(np.float32), {})
    files = ("--gin_file=quickstart.gin", "--gin.EVAL_EXAMPLES=8")
    code, out, err = call("evaluate", f"--model_dir={tmp_path / 'run'}", *files)
    assert code == 0, err
    assert set(json.loads(out)["members"]) == {"a", "b"}
    assert json.loads(out)["examples"] == 8
    code, _, err = call("infer", f"--model_dir={tmp_path / 'run'}", *files, "a text")
    assert code == 2
    assert "is a sweep of a, b; name one of them" in err
    assert "run/prompts/a/best.safetensors" in err
