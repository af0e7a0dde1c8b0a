"""Reports of real runs of a tiny backbone: what tune, evaluate and the command write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tune
from made_run import RESULTS, make_record, save_run

from ptjax.backbones.describe import nearest_tokens
from ptjax.data.tasks import Task
from ptjax.evaluation.evaluator import Evaluator
from ptjax.evaluation.record import record_predictions
from ptjax.inference.model import bind
from ptjax.interop.prompt_file import load_prompt
from ptjax.reports.content import as_json
from ptjax.reports.report import Report
from ptjax.settings import Evaluation, TrainSchedule

SCHEDULE = TrainSchedule(train_steps=6, eval_period=3, log_period=2)
LENGTHS = {"inputs": 32, "targets": 4}


@pytest.fixture(scope="module")
def run(backbone, task, tmp_path_factory) -> Path:
    """A finished run, with the gin file that names its task and backbone."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    tune(folder, task, backbone, schedule=SCHEDULE)
    bindings = {
        "ptjax.tune.backbone": "@ptjax.load_backbone()",
        "ptjax.tune.task": "@ptjax.Task()",
        "ptjax.load_backbone.path": repr(backbone.name),
        "ptjax.RunSettings.evaluation": "@ptjax.Evaluation()",
        "ptjax.Evaluation.batch_size": "16",
    }
    for name in ("name", "data_dir", "splits", "inputs", "label", "verbalizer"):
        bindings[f"ptjax.Task.{name}"] = repr(getattr(task, name))
    lines = [f"{name} = {value}\n" for name, value in bindings.items()]
    head = "from __gin__ import dynamic_registration\nimport ptjax\n"
    (folder / "config.gin").write_text(head + "".join(lines))
    return folder


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The content and time of both files of a report."""
    names = ("report.json", "report.html")
    return {
        name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in names
    }


def test_a_run_records_the_predictions_of_its_best_prompt(run, backbone, task):
    content = json.loads((run / "report.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert content["results"] == results and list(content["members"]) == [""]
    record = content["members"][""]
    evaluator = Evaluator(task, backbone, backbone.tokenizer, LENGTHS, Evaluation(batch_size=16))
    best = load_prompt(run / "prompts" / "best.safetensors")
    texts, scores = evaluator.predict_with_scores(bind(backbone, best).variables, "test")
    assert texts == evaluator.predict(bind(backbone, best).variables, "test")
    assert record["predictions"] == texts
    assert record["targets"] == [example.targets for example in task.load("test")]
    shares = np.exp(scores.astype(np.float64))
    shares = shares.max(axis=1) / shares.sum(axis=1)
    np.testing.assert_allclose(record["confidences"], shares, atol=1e-6)  # they are rounded
    assert record["statistics"]["accuracy"] == results["value"] == results["metrics"]["accuracy"]
    embedding = np.asarray(backbone.embedding, np.float32)
    for row, expected in zip(
        record["prompt_rows"],
        nearest_tokens(best.prompt, embedding, backbone.tokenizer),
        strict=True,
    ):
        assert row == [[token, round(cosine, 4)] for token, cosine in expected]
    assert (run / "report.html").read_text() == Report.read(run).to_html()


def test_a_second_call_leaves_the_report_and_makes_a_missing_page(run, backbone, task, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "words"))
    before = files_of(copy)
    tune(copy, task, backbone, schedule=SCHEDULE)
    assert files_of(copy) == before
    (copy / "report.html").unlink()  # as if killed before it was written
    tune(copy, task, backbone, schedule=SCHEDULE)
    assert {k: v[0] for k, v in files_of(copy).items()} == {k: v[0] for k, v in before.items()}
    for file in ("report.html", "report.json"):  # as of an older version, which is left as it is
        (copy / file).unlink()
    tune(copy, task, backbone, schedule=SCHEDULE)
    assert not (copy / "report.html").exists() and not (copy / "report.json").exists()


# evaluate


@pytest.mark.usefixtures("own_process")
def test_evaluate_adds_the_report_of_an_old_run(run, tmp_path, call):
    old = Path(shutil.copytree(run, tmp_path / "words"))
    made = json.loads((old / "report.json").read_text())
    (old / "report.json").unlink()
    arguments = ("evaluate", f"--model_dir={old}", f"--report={old}")
    code, out, err = call(*arguments)
    assert code == 0, err
    again = json.loads((old / "report.json").read_text())
    assert again["members"] == made["members"]
    scores = json.loads(out)
    assert scores.pop("prompt").endswith("best.safetensors")  # of the command, not of the function
    assert again["results"] == made["results"] | scores
    assert "Against the baselines" in (old / "report.html").read_text()
    code, _, err = call(*arguments)
    assert code == 2 and "report.json already exists; overwrite it with --force" in err
    # The baselines were scored on the run's split alone.
    code, _, err = call(*arguments, "--force", "--split=validation")
    assert code == 0, err
    results = json.loads((old / "report.json").read_text())["results"]
    assert results["split"] == "validation" and not {"before", "majority"} & set(results)


@pytest.mark.usefixtures("own_process")
def test_evaluate_reports_on_the_backbone_alone_and_on_many_prompts(run, tmp_path, call):
    alone = f"--report={tmp_path / 'alone'}"
    code, _, err = call("evaluate", f"--model_dir={run}", "--prompt=none", alone)
    assert code == 0, err
    text = str(Report.read(tmp_path / "alone"))
    assert text.splitlines()[2].startswith("backbone  0.") and "untrained" not in text
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("a", "b"):
        shutil.copy(run / "prompts" / "best.safetensors", prompts / f"{name}.safetensors")
    many = (f"--gin_file={run / 'config.gin'}", f"--prompts={prompts}")
    code, out, err = call("evaluate", *many, f"--report={tmp_path / 'many'}")
    assert code == 0, err
    report = Report.read(tmp_path / "many")
    values = {member.name: member.results["value"] for member in report.members}
    assert values == {k: v["accuracy"] for k, v in json.loads(out)["members"].items()}


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(
    ("value", "problem"), [("", "--report is empty"), ("file", "it is a file")]
)
def test_evaluate_refuses_a_place_before_it_loads_anything(value, problem, tmp_path, call):
    (tmp_path / "file").touch()
    code, _, err = call("evaluate", "--gin_file=missing.gin", f"--report={value}")
    assert code == 2 and problem in err


# The command


@pytest.mark.usefixtures("own_process")
def test_the_command_prints_the_text_and_writes_the_page(run, tmp_path, call):
    copy = Path(shutil.copytree(run, tmp_path / "words"))
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    code, out, err = call("report", copy)
    assert (code, out) == (0, str(Report.read(copy))), err
    assert (copy / "report.html").read_bytes() == before
    code, _, err = call("report", copy, f"--output={copy / 'report.json'}", "--force")
    assert code == 2 and "this is the input" in err


@pytest.mark.usefixtures("own_process")
def test_the_command_compares_runs(run, tmp_path, call):
    other = save_run(tmp_path / "other", {"": make_record()}, RESULTS)
    code, out, err = call("report", run, other)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["run", "words", "other"]
    assert not (other / "report.html").exists()
    code, _, err = call("report", run, other, "--output=compared.html")
    assert code == 0 and "2 runs compared" in Path("compared.html").read_text(), err
    code, _, err = call("report", run, tmp_path / "none")
    assert code == 2 and "no run at" in err


# Records


class Predicted:
    """An evaluator of open text: only its examples, task and settings are needed."""

    ranks = False

    def __init__(self, task: Task, split: str) -> None:
        self.task, self._examples = task, task.load(split)

    def examples(self, split: str) -> Any:
        return self._examples


@pytest.mark.parametrize(
    ("metric", "predictions", "order"),
    [
        # Of two that are equally wrong the more probable comes first; what is right is left out.
        ("squad_f1", ["red fox", "blue", "green cat", "x"], [("x", 0.0), ("red fox", 2 / 3)]),
        ("accuracy", ["red", "x", "green cat", "y"], [("y", 0.0), ("x", 0.0)]),
    ],
)
def test_the_worst_predictions_of_open_text_are_recorded(tmp_path, metric, predictions, order):
    targets = ["red", "blue", "green cat", "4"]
    rows = [json.dumps({"a": "q", "b": target}) for target in targets]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    splits = {"test": str(tmp_path / "test.jsonl")}
    task = Task(name="copy", inputs="{a}", targets="{b}", splits=splits, metrics=metric)
    evaluator: Any = Predicted(task, "test")
    scores = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    record = record_predictions(evaluator, "test", predictions, scores)
    assert record["measured_by"] == metric and record["labels"] is None
    found = [(mistake["prediction"], mistake["value"]) for mistake in record["mistakes"]]
    assert found == [(text, pytest.approx(value)) for text, value in order]
    assert record["confidences"] == [0.1, 0.2, 0.3, 0.4]
    json.loads(as_json(record))


def test_of_numbers_the_most_distant_come_first(tmp_path):
    rows = [json.dumps({"a": "q", "b": str(n)}) for n in (1, 2, 3)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    splits = {"test": str(tmp_path / "test.jsonl")}
    task = Task(name="sts", inputs="{a}", targets="{b}", splits=splits, metrics="pearson")
    evaluator: Any = Predicted(task, "test")
    record = record_predictions(evaluator, "test", ["1.5", "2", "much"])
    assert [(x["prediction"], x["value"]) for x in record["mistakes"]] == [
        ("much", -4),
        ("1.5", -0.5),
    ]
    assert record["confidences"] is None


def test_a_report_of_a_run_that_trained_on_says_so(tmp_path, caplog):
    save_run(tmp_path)
    Report.read(tmp_path)
    assert not caplog.records
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"step": 50, "train/loss": 0.1}) + "\n")
    Report.read(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the run was continued after step 40 and has not finished again; the report "
        "is of that step"
    ]
