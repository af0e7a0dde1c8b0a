"""The pages work: every `python -m ptjax.*` line and Python block of README and docs is run as it
stands there, with small real files in place of what a page leaves to its reader (`FILLED`).

A placeholder that nothing fills fails, so a new line is covered from the start.
"""

from __future__ import annotations

import ast
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import FIXTURES

from ptjax.__main__ import COMMANDS
from ptjax.data.sentencepiece_tokenizer import train_sentencepiece
from ptjax.interop.prompt_file import load_prompt, save_prompt
from ptjax.launch import reserved_port
from ptjax.sharding.rules import RULES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_process")]
ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "ptjax" / "assets").glob("*/README.md")),
    ROOT / "tpu_scripts" / "README.md",
]

# What a page leaves open -> what it stands for here. {place} is the folder of the fixture `place`,
# {new} one of each test, {t5x} a tiny T5 1.1 that T5X wrote, {hf} a tiny Hugging Face folder.
FILLED = {
    "/path/to/run": "{new}/run",
    "/path/to/data": "{place}/data",
    "/path/to/t5_1_1_lm100k_base/checkpoint_1100000": "{t5x}",
    "/path/to/checkpoint_1100000": "{t5x}",
    "/path/to/sentencepiece.model": "{place}/spiece.model",
    "/path/to/t5-v1_1-base": "{hf}",
    "--prompts=DIR": "--prompts={place}/prompts",
    "--similar_to=DIR": "--similar_to={place}/prompts",
    "--model_dir=DIR": "--model_dir={place}/runs/quickstart",
    "--input=FILE": "--input={place}/texts.jsonl",
    "--output=FILE": "--output=answers.jsonl",
    "/path/to/prompt.npy": "{place}/t5x_prompt.npy",
    "/path/to/new_checkpoint": "{new}/checkpoint",
    "PROMPT": "{place}/runs/quickstart/prompts/best.safetensors",
    "RUN/prompts/best.safetensors": "{place}/sees_no_input.safetensors",
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model": "{place}/spiece.model",
    # docs/multi_host.md
    "gs://BUCKET/runs/sst2": "{new}/run",
    "gs://BUCKET/data": "{place}/data",
    "gs://BUCKET/t5_1_1_lm100k_xxl/checkpoint_1100000": "{t5x}",
    "/shared/runs/sst2": "{new}/run",
    "/shared/data": "{place}/data",
    "/shared/t5-v1_1-xxl": "{hf}",
    "/config/run.gin": "{place}/run.gin",
    "/shared/run.gin": "{place}/run.gin",
    "--processes=8": "--processes=2",
    "--coordinator_address=10.0.0.1:1234": "--coordinator_address=127.0.0.1:{port}",
    "--num_processes=2": "--num_processes=1",
    # ptjax/assets/nano/README.md
    "'DIR'": "'{new}/run'",
    "'DATA'": "'{place}/data'",
    "'CORPUS'": "'{place}/corpus'",
    "'LAST_DIR/models/best'": "'{hf}'",
    # docs/tfds.md
    "DATA_DIR/glue/sst2/2.0.0": "{tfds}/all_features/small/1.2.3",
    "NEW_DIR/glue/sst2/2.0.0": "{new}/all_features/small/1.2.3",
    # docs/report.md
    "runs/seed_1": "{place}/runs/quickstart",
    # Python
    "/path/to/tensorflow_datasets": "{tfds}",
    '"DIR"': '"{place}/prompts"',
}
OPEN = re.compile(r"\.\.\.|/path/to|/shared|gs://|(?<!\w)[A-Z][A-Z_]+(?!\w)")

SHORT = (
    "--gin.TRAIN_STEPS=2",
    "--gin.EVAL_PERIOD=2",
    "--gin.EVAL_EXAMPLES=8",
    "--gin.BATCH_SIZE=8",
    "--gin.PROMPT_LENGTH=5",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 8}",
)
# Added behind a command, or a command with this argument, that is too much for a test. Of a setting
# given twice the last one counts.
MORE = {
    "train": SHORT,
    "launch": (*SHORT, "--dry_run"),
    "--gin_file=runs/sweep.gin": ("--gin.SEEDS=(0,)", "--dry_run"),
    "--gin_file=run.gin": ("--dry_run",),
    "pretrain": ("--dry_run", "--gin.ptjax.pretrain.components=[@cb/ptjax.TaskComponent()]"),
    "plan": ("--quick",),
}
EXAMPLES = 16


class Line(NamedTuple):
    """A command line: the page it stands on, the command's name, its arguments."""

    page: Path
    command: str
    arguments: tuple[str, ...]

    @property
    def id(self) -> str:
        where = self.page.relative_to(ROOT).as_posix()
        return " ".join([f"{where}:", self.command, *self.arguments])


def code_of(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, and ("", text) of every code span."""
    text = page.read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", fence.sub("", text))
    return [*fence.findall(text), *(("", " ".join(span.split())) for span in spans)]


def words(shell: str) -> list[str]:
    """A shell line's words; a line in quotes (`--command="..."`) as its own words, in its place."""
    if listed := re.search(r'command: (\["python".*\])', shell):
        return json.loads(listed[1])
    flat = []
    for word in shlex.split(shell, comments=True):
        flat += shlex.split(word) if " -m ptjax." in word else [word]
    return flat


def lines_of(page: Path) -> list[Line]:
    lines = []
    for _, text in code_of(page):
        for shell in re.sub(r"\\\n\s*", "", text).splitlines():
            if re.search(r'-m"?,? "?ptjax\.', shell):
                found = words(shell)
                name = next(i for i, word in enumerate(found) if word.startswith("ptjax."))
                command = found[name].removeprefix("ptjax.")
                lines.append(Line(page, command, tuple(found[name + 1 :])))
    return lines


LINES = [line for page in PAGES for line in dict.fromkeys(lines_of(page))]
BLOCKS = {
    page: [text for language, text in code_of(page) if language == "python"] for page in PAGES
}


def filled(text: str, values: dict[str, Any]) -> str:
    """`text` with real things in the place of what the page leaves open."""
    for placeholder in sorted(FILLED, key=len, reverse=True):
        alone = rf"(?<![\w/]){re.escape(placeholder)}(?![\w/])"
        text = re.sub(alone, lambda _, word=placeholder: f"\0{[*FILLED].index(word)}\0", text)
    value = re.sub(r"^--gin\.\w+=", "", text)  # NAME in --gin.NAME=VALUE is a name
    assert not (left := OPEN.findall(value)), f"{text}: nothing in FILLED for {left}"
    return re.sub(r"\0(\d+)\0", lambda m: [*FILLED.values()][int(m[1])].format(**values), text)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)


def write_data(place: Path, texts: list[str]) -> None:
    """SST-2's files, and of what pretrain_nano.gin reads the part that `MORE` leaves."""
    data = place / "data"
    for split in ("train", "validation", "test"):
        (data / "sst2").mkdir(parents=True, exist_ok=True)
        rows = [f"{text}\t{i % 2}\n" for i, text in enumerate(texts)]
        (data / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    labels = ("entailment", "contradiction", "neutral")
    write_jsonl(
        data / "super_glue" / "CB" / "train.jsonl",
        [{"premise": t, "hypothesis": t, "label": labels[i % 3]} for i, t in enumerate(texts)],
    )
    for name in ("imdb_unsup", "wikipedia_en_2018plus", "gutenberg_30authors"):
        write_jsonl(place / "corpus" / f"{name}.jsonl.xz", [{"text": t} for t in texts])


@pytest.fixture(scope="module")
def place(tmp_path_factory, backbone) -> Path:
    """A folder with the files that the pages speak of, small; runs/ is made by `values`."""
    place = tmp_path_factory.mktemp("pages")
    sentences = (ROOT / "ptjax" / "assets" / "sentiment" / "train.jsonl").read_text().splitlines()
    texts = [" ".join(json.loads(line)["text"].split()[:4]) for line in sentences]
    train_sentencepiece(texts, 156, place / "spiece.model")  # and 100 sentinels: 256 rows
    write_data(place, texts[:EXAMPLES])
    (place / "run.gin").write_text(
        "include 'quickstart.gin'\n"
        f"MODEL_DIR = 'runs/own'\nINITIAL_CHECKPOINT_PATH = '{backbone.name}'\n"
    )
    np.save(place / "t5x_prompt.npy", np.ones((5, 32), np.float32))
    (place / "ptjax").mkdir()
    (place / "ptjax" / "assets").symlink_to(ROOT / "ptjax" / "assets")
    write_jsonl(place / "texts.jsonl", [{"body": text} for text in texts[:4]])
    mixed = [{"body": texts[0], "prompt": name} for name in ("sst2", "other")]
    write_jsonl(place / "mixed.jsonl", [*mixed, {"inputs": texts[0], "prompt": "none"}])
    return place


@pytest.fixture
def values(place, tmp_path, backbone, call, monkeypatch) -> Iterator[dict[str, Any]]:
    """What `FILLED` speaks of; the current folder becomes `place`, with a run of quickstart.gin."""
    monkeypatch.chdir(place)
    if not (place / "prompts").exists():
        code, _, err = call("train", "--gin_file=quickstart.gin", *SHORT)
        assert code == 0, err
        best = load_prompt("runs/quickstart/prompts/best.safetensors")
        (place / "prompts").mkdir()
        for name in ("sst2", "other"):
            save_prompt(place / "prompts" / f"{name}.safetensors", best.prompt, best.metadata)
        blind = best.metadata | {"sees_input": False}
        save_prompt(place / "sees_no_input.safetensors", best.prompt, blind)
    t5x = FIXTURES / "t5_1_1_tiny_legacy" / "checkpoint_3"
    with reserved_port() as port:
        paths = {"place": place, "new": tmp_path, "t5x": t5x, "tfds": FIXTURES / "tfds"}
        yield paths | {"hf": backbone.name, "port": port}


def test_no_line_of_a_page_is_overlooked():
    for page in PAGES:
        mentions = re.findall(r'-m(?:"?,? "?|\s+)ptjax\.', page.read_text())
        assert len(lines_of(page)) == len(mentions), page
    assert {line.command for line in LINES} == set(COMMANDS)
    text = "".join(page.read_text() for page in PAGES)
    assert not [placeholder for placeholder in FILLED if placeholder not in text]


@pytest.mark.parametrize(
    "word", ["--input=/path/to/new", "gs://BUCKET/new", "--prompt=FILE", "..."]
)
def test_a_placeholder_that_nothing_fills_fails(word):
    with pytest.raises(AssertionError, match="nothing in FILLED for"):
        filled(word, {})


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.id)
def test_a_command_line_of_a_page(line, values, call):
    arguments = [filled(word, values) for word in line.arguments]
    more = [flag for key in (line.command, *line.arguments) for flag in MORE.get(key, ())]
    arguments = [*arguments, *more] if arguments else ["--help"]
    if line.command == "launch":
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        command = [sys.executable, "-m", "ptjax.launch", *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        code, err = ran.returncode, ran.stderr
    else:
        code, _, err = call(line.command, *arguments)
    assert code == 0, err


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCKS[page]], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_python_of_a_page(page, values):
    """The blocks of a page in order, in one namespace, each as it stands there."""
    names: dict[str, Any] = {}
    for block in BLOCKS[page]:
        texts = [n.value for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Constant)]
        for text in filter(lambda value: isinstance(value, str), texts):
            block = block.replace(f'"{text}"', filled(f'"{text}"', values))
        block = re.sub(r"\bsteps=\d+", "steps=2", block)  # the one thing that is not as it stands
        exec(compile(block, str(page), "exec"), names)
    if page.name == "sharding.md":
        assert names["SHARDING_RULES"] == RULES
