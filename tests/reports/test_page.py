"""The page of a run: well-formed, escaped, alone, the same every time; and its text."""

from __future__ import annotations

import html.parser
import json
import re
import sys

import pytest
from made_run import EVIL, LABELS, RESULTS, ROWS, make_record, make_sweep, save_run

from ptjax.errors import InputError
from ptjax.reports import figures, members
from ptjax.reports.files import write_page
from ptjax.reports.markup import columns, duration, number, quantity, shorten
from ptjax.reports.report import Comparison, Report
from ptjax.trainer.tune import Run

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(html.parser.HTMLParser):
    """Every element is closed in order; collects tags, ids, text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    references = set(re.findall(r'(?:url\(|href=")#([^")]+)', page))
    assert references <= set(checker.ids)
    return checker


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "words", {"": make_record()})


@pytest.fixture(scope="module")
def page(run):
    return Report.read(run).to_html()


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    checker = checked(page)
    assert {"svg", "table", "style", "figure"} <= checker.tags
    assert not checker.tags & {"script", "link", "img", "iframe", "object"}
    assert "http" not in page and "@import" not in page
    urls = [value for name, value in checker.attributes if name in ("src", "href", "xlink:href")]
    assert urls and all(url.startswith("#") for url in urls)
    assert not [name for name, _ in checker.attributes if name.startswith("on")]


def test_what_comes_from_data_is_text_in_the_page(page):
    assert EVIL not in page and "<script" not in page
    text = "".join(checked(page).texts)
    assert text.count(EVIL) >= 3 and "\x00" not in page
    assert "text <script>alert('x')</script> \ufffd of $\\frac{a}$" in text
    # Dollar signs do not start mathematics, in labels of the matrix or beside bars.
    assert LABELS[2] in text and "hard prompt: asked $politely$" in text


@pytest.mark.parametrize(
    "part",
    [
        "Against the baselines", "untrained prompt", "majority label", "Validation accuracy",
        "best 0.750", "Training loss", "Learning rate", "Per class", "macro average", "Confusion",
        "Calibration", "Expected calibration error 0.200", "Most confident mistakes",
        "Prompt rows", "10 more rows", "method.length", "v2:0123", "166 MB", "1 min 15 s", "0.10.2",
        "\u00b1 0.171", "words", "accuracy on the split test, 8 examples",
    ],
)  # fmt: skip
def test_the_page_has_every_part(page, part):
    assert part in " ".join("".join(checked(page).texts).split())


def test_the_page_is_the_same_every_time_and_has_no_date(run, page):
    assert Report.read(run).to_html() == page
    assert not re.search(r"dc:date|20\d\d-\d\d-\d\d", page)


def test_figures_take_the_colours_of_the_page(page):
    drawn = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawn) == 6
    for svg in drawn:
        assert "var(--accent)" in svg and not set(figures.VARIABLES) & set(
            re.findall("#[0-9a-f]{6}", svg)
        )
    names = set(figures.VARIABLES.values())
    declared = re.findall(r"(--[\w-]+):", page)
    assert all(declared.count(name) >= 2 for name in names - {"--series-2"}), "light and dark"


def test_a_notebook_gets_a_part_of_a_page_whose_style_stays_inside(run):
    shown = Report.read(run)._repr_html_()
    assert "<!DOCTYPE" not in shown and "<body" not in shown
    checked(shown)
    sheet = re.search(r"<style>(.*?)</style>", shown, re.S)
    assert sheet is not None
    selectors = re.findall(r"^([^@{}]+)\{", sheet[1], re.M)
    assert len(selectors) > 30
    for selector in selectors:
        assert all(x.strip().startswith(".ptjax-report") for x in selector.split(",")), selector


def test_the_text_is_a_table(run):
    assert str(Report.read(run)) == (
        f"words {EVIL}: accuracy on the split test, 8 examples\n\n"
        "tuned prompt                   0.625 \u00b1 0.171\n"
        "untrained prompt               0.250\n"
        "majority label                 0.500\n"
        "hard prompt: asked $politely$  0.375\n"
        "best step                      20\n\n"
        "trainable parameters      64\n"
        "export                    1 MB\n"
        "optimizer state           272 B\n"
        "checkpoint                528 B\n"
        "FLOPs a step              13.8 G\n"
        "memory (compiler's plan)  166 MB\n"
        "examples/s                1,234.6\n"
        "duration                  1 min 15 s\n\n"
        "class             precision  recall     F1  support\n"
        "good                  0.750   0.750  0.750        4\n"
        "bad                   0.500   0.500  0.500        2\n"
        "$x_1$ so-so           1.000   0.500  0.667        2\n"
        "macro average         0.750   0.583  0.639        8\n"
        "weighted average      0.750   0.625  0.667        8\n\n"
        "expected \\ predicted  good  bad  $x_1$ so-so  other text\n"
        "good                     3    1            0           0\n"
        "bad                      1    1            0           0\n"
        "$x_1$ so-so              0    0            1           1\n\n"
        "expected calibration error 0.200. The model is overconfident: probabilities are 0.05 "
        "above the share of right predictions, on average.\n"
    )


def test_open_text_shows_the_worst_predictions_instead(tmp_path):
    worst = make_record()["mistakes"][0] | {"value": 0.25}
    record = make_record(labels=None, ranked=False, measured_by="squad_f1", mistakes=[worst])
    run = save_run(tmp_path, {"": record | {"prompt_rows": None}})
    page, text = Report.read(run).to_html(), str(Report.read(run))
    assert "Worst predictions" in page and "squad_f1" in page and "0.250" in page
    assert (
        "the worst predictions:\nexpected  predicted  squad_f1\ngood      bad           0.250"
        in text
    )
    for part in ("Per class", "Confusion", "Calibration", "Prompt rows"):
        assert part not in page


def test_model_tuning_is_called_so_and_has_no_prompt_rows(tmp_path):
    results = RESULTS | {"settings": {"is": "RunSettings", "method": {"is": "ModelTuning"}}}
    page = Report.read(save_run(tmp_path, {"": make_record(prompt_rows=None)}, results)).to_html()
    assert "tuned model" in page and "the backbone, untuned" in page
    assert "Prompt rows" not in page and "untrained prompt" not in page


def test_an_old_run_says_what_is_missing_and_how_to_get_it(tmp_path):
    run = save_run(tmp_path / "old", results=RESULTS | {"examples": {"test": 8, "train": 4}})
    advice = f"python -m ptjax.evaluate --model_dir={run} --report={run} adds them"
    assert advice in str(Report.read(run))
    page = Report.read(run).to_html()
    assert advice in "".join(checked(page).texts)
    assert "Against the baselines" in page and "Training loss" in page and "Per class" not in page


def test_a_sweep_compares_its_members_and_shows_its_best(tmp_path):
    results, records = make_sweep(10)
    names = [f"seed_{i}" for i in range(10)]
    rows = [
        {f"{k}/{n}": v for n in names for k, v in r.items()} | {"step": r["step"]} for r in ROWS
    ]
    report = Report.read(save_run(tmp_path, records, results, rows))
    assert [member.name for member in report.members][:2] == ["seed_0", "seed_1"]
    text = "".join(checked(report.to_html()).texts)
    assert "10 members" in text and "Training of seed_0" in text and "the 8 members" in text
    assert "seed_0 has the highest value on the split that selects prompts" in text
    assert str(report).splitlines()[2:5] == [
        "member  value  before  step",
        "seed_9  0.715   0.250    20",
        "seed_8  0.705   0.250    20",
    ]


def test_a_comparison_has_a_line_for_each_run(tmp_path, run):
    settings = {"is": "RunSettings", "method": {"is": "PromptTuning", "length": 8}}
    other = RESULTS | {"value": 0.75, "settings": settings, "split": "validation"}
    save_run(tmp_path / "b" / "words", {"": make_record()}, other)
    results, records = make_sweep(2)
    save_run(tmp_path / "sweep", records, results)
    paths = (run, tmp_path / "b" / "words", tmp_path / "sweep")
    comparison = Comparison([Report.read(path) for path in paths])
    lines = str(comparison).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [f"{run.parent.name}/words", "b/words"]
    assert lines[3].startswith("sweep \u203a seed_0  ")
    [method] = [line.split() for line in lines if line.startswith("method.length")]
    assert method == ["method.length", "4", "8", "4"]
    page = comparison.to_html()
    text = "".join(checked(page).texts)
    for part in (
        "3 runs compared", "compare with care", "Costs", "F1 per class", "Settings that differ",
    ):  # fmt: skip
        assert part in text
    assert "http" not in page and EVIL not in page and comparison.to_html() == page
    checked(comparison._repr_html_())


def test_costs_beside_those_of_a_run_that_recorded_none(tmp_path, run):
    """Before `costs` existed a run recorded its parameters and its duration."""
    old = {name: value for name, value in RESULTS.items() if name != "costs"}
    save_run(tmp_path / "old", {"": make_record()}, old | {"trainable_parameters": 1_000_000})
    reports = [Report.read(path) for path in (tmp_path / "old", run)]
    lines = str(Comparison(reports)).splitlines()
    assert [re.split("  +", line) for line in lines[4:7]] == [
        ["run", "trainable parameters", "export", "optimizer state", "checkpoint", "FLOPs a step",
         "memory (compiler's plan)", "examples/s", "duration"],
        ["old", "1,000,000", *["\u2013"] * 6, "1 min 15 s"],
        ["words", "64", "1 MB", "272 B", "528 B", "13.8 G", "166 MB", "1,234.6", "1 min 15 s"],
    ]  # fmt: skip
    assert '<th class="number">examples/s</th>' in Comparison(reports).to_html()
    of_old, page = str(reports[0]), reports[0].to_html()
    assert "duration              1 min 15 s\n" in of_old and "checkpoint" not in of_old
    assert "<dd>1,000,000</dd>" in page and "checkpoint" not in page
    bare = {name: RESULTS[name] for name in ("task", "split", "metric", "value")}
    bare = Report.read(save_run(tmp_path / "bare", {"": make_record()}, bare))
    assert "Costs" not in bare.to_html() + Comparison([bare, bare]).to_html()
    assert str(Comparison([bare, bare])).count("\n") == 3


def test_many_classes_and_labels_of_any_script(tmp_path):
    labels = [f"{i} \u30e9\u30d9\u30eb $" for i in range(40)]
    record = make_record(labels=labels, targets=labels, predictions=labels[1:] + labels[:1])
    record |= {"confidences": [0.5] * 40, "mistakes": []}
    report = Report.read(save_run(tmp_path, {"": record}))
    assert "Every prediction is right" in report.to_html()
    assert "... 10 more" in str(report) and "confused most frequently" in str(report)


def test_pieces_of_text():
    assert [number(x) for x in (1234, 0.5, 0.0001, 0.0, None, "x")] == [
        "1,234", "0.500", "0.0001", "0.000", "\u2013", "x",
    ]  # fmt: skip
    values = ((0, "B"), (999.4, "B"), (999.5, "B"), (11_360, "B"), (7.21e14, ""))
    assert [quantity(*x) for x in values] == ["0 B", "999 B", "1 kB", "11.4 kB", "721 T"]
    assert [duration(x) for x in (59.4, 125, 7300)] == ["59 s", "2 min 5 s", "2 h 1 min"]
    assert shorten("a\nb  c", 4) == "a b\u2026" and shorten("abcd", 4) == "abcd"
    assert columns([["\u30e9", "1"], ["abc", "22"]]) == "\u30e9    1\nabc  22"
    paths = ["x/seed_0/run", "x/seed_1/run"]
    assert members.unique_names(paths) == ["seed_0/run", "seed_1/run"]
    assert members.unique_names(["a", "a"]) == ["a", "a"]


# Files


def test_without_the_libraries_a_line_names_the_extra(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="absl")
    run = save_run(tmp_path / "run", {"": make_record()})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib.figure", None)
        write_page(run)
        [line] = caplog.messages
        assert line.startswith("no report.html: a report needs matplotlib (")
        assert line.endswith("; run: pip install 'ptjax[report]'")
        assert not (run / "report.html").exists()
        save_run(run, {"": make_record()})  # report.json, without statistics
        assert json.loads((run / "report.json").read_text())["members"][""]["statistics"] is None
        for read in (Report.read, lambda path: Run(path, RESULTS).report()):
            with pytest.raises(InputError, match=r"pip install 'ptjax\[report\]'"):
                read(run)
    write_page(run)  # installed now: both files are completed
    assert json.loads((run / "report.json").read_text())["members"][""]["statistics"]
    assert (run / "report.html").read_text() == Report.read(run).to_html()


def test_a_dry_run_has_no_report_even_beside_another_run(tmp_path):
    save_run(tmp_path, {"": make_record()})
    assert Run(tmp_path, RESULTS).report().content["results"] == RESULTS
    with pytest.raises(InputError, match="a dry run has no report"):
        Run(tmp_path, {}).report()


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no run at .*: the path does not exist"):
        Report.read(tmp_path / "missing")
    with pytest.raises(InputError, match="no finished run; train it to the end first"):
        Report.read(tmp_path)
    with pytest.raises(InputError, match="folder is empty"):
        Report.read("")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["format"], 2),
        (["format"], None),
        (["results"], []),
        (["results", "value"], "0.5"),
        (["results", "settings"], 1),
        (["results", "seconds"], "long"),
        (["results", "costs"], [1]),
        (["results", "costs", "step_bytes"], "<b>"),
        (["results", "costs", "step_bytes"], 10**400),
        (["results", "before"], EVIL),
        (["results", "hard_prompts"], {"a": "b"}),
        (["results", "members"], {"a": {"value": 1}}),
        (["members"], []),
        (["members", ""], None),
        (["members", "", "targets"], []),
        (["members", "", "targets"], ["good"]),
        (["members", "", "predictions", 0], 3),
        (["members", "", "confidences"], [0.5]),
        (["members", "", "labels"], "good"),
        (["members", "", "ranked"], "yes"),
        (["members", "", "mistakes"], {}),
        (["members", "", "mistakes", 0], "a"),
        (["members", "", "mistakes", 0, "inputs"], None),
        (["members", "", "mistakes", 0, "confidence"], "<b>"),
        (["members", "", "prompt_rows"], [[["a"]]]),
        (["members", "", "prompt_rows"], [[["a", "<b>"]]]),
        (["members", "", "measured_by"], 1),
    ],
)
def test_a_file_that_ptjax_did_not_write_is_refused(run, tmp_path, place, value):
    content = json.loads((run / "report.json").read_text())
    *parents, last = place
    inner = content
    for name in parents:
        inner = inner[name]
    inner[last] = value
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"report\.json: (not what ptjax writes|its format is)"):
        Report.read(tmp_path)


def test_statistics_in_the_file_are_not_trusted(run, tmp_path):
    content = json.loads((run / "report.json").read_text())
    content["members"][""]["statistics"] = {"accuracy": EVIL}
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert Report.read(tmp_path).members[0].statistics == Report.read(run).members[0].statistics


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_figures_of_one_value_or_of_zeros(tmp_path, value):
    rows = [{"step": 1, "train/learning_rate": value, "train/loss": value}]
    results = RESULTS | {"value": value, "before": 0.0, "majority": 0.0, "hard_prompts": {}}
    report = Report.read(save_run(tmp_path, {"": make_record()}, results, rows))
    assert report.to_html().count("<svg") == 5  # without a curve of the metric


def test_damaged_rows_are_left_out(tmp_path):
    run = save_run(tmp_path, {"": make_record()})
    lines = ['{"step": 1, "train/loss": 3.5}', "{", "[1]", '{"step": "x"}', "\udcff"]
    (run / "metrics.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert Report.read(run).rows == [{"step": 1, "train/loss": 3.5}]
    assert "Training loss" in Report.read(run).to_html()


def test_a_report_is_saved_whole(run, tmp_path, page):
    file = tmp_path / "new" / "page.html"
    Report.read(run).save(file)
    assert file.read_text("utf-8") == page
    assert repr(Report.read(run)) == f"<Report of {run}>"
