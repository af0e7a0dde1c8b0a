"""The pages work: every command line and Python block of README and docs, from the page's own text.

Placeholders stand for small real inputs (`FILLED`); what is too large for a test gets flags behind it
(`MORE`). A placeholder that nobody filled fails here, and so does a page that names a flag, a file or
a function that is not there.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import FIXTURES, WORDS
from jax.sharding import PartitionSpec

from ptjax.cli.gin_files import gin_configs
from ptjax.scale import sharding

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "ptjax" / "assets").glob("*/README.md")),
]
# A small T5 1.1 that T5X wrote, under the path that a page gives to the paper's.
CHECKPOINT = FIXTURES / "t5_1_1_tiny_legacy" / "checkpoint_3"

FILLED = {
    "'/path/to/run'": "'{place}/run'",
    "'/path/to/data'": "'{place}/data'",
    "'/path/to/t5_1_1_lm100k_base/checkpoint_1100000'": "'{checkpoint}'",
    "'/path/to/checkpoint_1100000'": "'{checkpoint}'",
    "'/path/to/sentencepiece.model'": "'{place}/spiece.model'",
    "--prompts=DIR": "--prompts={place}/prompts",
    "--model_dir=DIR": "--model_dir={place}/runs/quickstart",
    "export PROMPT": "export {place}/runs/quickstart/prompts/best.safetensors",
    "'gs://BUCKET/runs/sst2'": "'{place}/pod'",
    "'gs://BUCKET/data'": "'{place}/data'",
    "'gs://BUCKET/t5_1_1_lm100k_xxl/checkpoint_1100000'": "'{checkpoint}'",
    "'LAST_DIR/models/best'": "'ptjax-nano'",
    "'DIR'": "'{place}/pretrained'",
    "'DATA'": "'{place}/data'",
    "'CORPUS'": "'{place}/corpus'",
}
EXAMPLES = 32


class Line(NamedTuple):
    page: str
    command: str
    text: str


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[Line]:
    """Every `python -m ptjax.COMMAND ...`, in blocks and in the text; continued lines are one."""
    text = page.read_text()
    fenced = [body for _, body in code_blocks(page)]
    inline = re.findall(
        r"`(python -m ptjax[^`]*)`", re.sub(r"^```.*?^```$", "", text, 0, re.S | re.M)
    )
    lines = []
    for block in [*fenced, *inline]:
        joined = re.sub(r"\\\n\s*", "", block).replace('\\"', '"')
        for found in re.finditer(r"python -m ptjax\.(\w+)([^\n]*)", joined):
            lines.append(Line(page.name, found[1], found[2].strip()))
    return list(dict.fromkeys(lines))


LINES = [line for page in PAGES for line in command_lines(page)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything lies that the pages speak of, small."""
    from ptjax.data.tokenizer import train_sentencepiece
    from ptjax.interop.prompt_file import load_prompt, save_prompt

    folder = tmp_path_factory.mktemp("pages")
    text = [f"sentence: {word} {other}" for words in WORDS.values() for word in words
            for other in ("negative", "positive", "film")]  # fmt: skip
    train_sentencepiece(text, 60, folder / "spiece.model")
    (folder / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = [f"{WORDS[label][i % 4]}\t{number}\n" for i in range(EXAMPLES)
                for number, label in [(i % 2, ("negative", "positive")[i % 2])]]  # fmt: skip
        (folder / "data" / "sst2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    ptjax(folder, "train", ["--gin_file=quickstart.gin", "--gin.TRAIN_STEPS=2"])
    best = load_prompt(folder / "runs" / "quickstart" / "prompts" / "best.safetensors")
    (folder / "prompts").mkdir()
    for name in ("sst2", "other"):
        save_prompt(folder / "prompts" / f"{name}.safetensors", best.prompt, best.metadata)
    records = [{"text": "A lovely film.", "prompt": name} for name in ("sst2", "other", "none")]
    records[-1]["inputs"] = "A lovely film."
    (folder / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "ptjax").symlink_to(ROOT / "ptjax")
    return folder
