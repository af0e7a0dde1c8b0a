"""A tiny backbone with prompts of three tasks, and records and data for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny import save_tiny, tiny_config

from ptjax.backbones.load import load_backbone
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.interop.prompt_file import save_prompt

LABELS = {"mood": ("good", "bad"), "kind": ("book", "film", "play")}
GIN = """
from __gin__ import dynamic_registration
import ptjax
ptjax.tune.task = @ptjax.Task()
ptjax.Task.name = 'mood'
ptjax.Task.inputs = 'mood: {text}'
ptjax.Task.splits = {'test': %DATA}
ptjax.Task.label = 'label'
ptjax.Task.verbalizer = {'0': 'good', '1': 'bad'}
"""


def save_prompts(folder: Path) -> Path:
    """A tiny backbone; `mixed`, prompts of three tasks; `seeds`, three prompts of one."""
    tokenizer = load_tokenizer("package:nano/spiece.model")
    save_tiny(folder / "backbone", tiny_config(8192), tokenizer=tokenizer)
    said = {
        "backbone_name": str(folder / "backbone"),
        "backbone_fingerprint": load_backbone(folder / "backbone").fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    rng = np.random.default_rng(0)

    def save(name: str, length: int, task: Task, lengths: tuple[int, int], **more) -> None:
        prompt = 2 * rng.normal(size=(length, 16)).astype(np.float32)
        sizes = dict(zip(("input_length", "target_length"), lengths, strict=True))
        save_prompt(folder / name, prompt, said | sizes | {"task": task.describe()} | more)

    tasks = {
        name: Task(
            name=name,
            inputs=f"{name}: {{text}}",
            label="label",
            verbalizer={str(i): text for i, text in enumerate(labels)},
        )
        for name, labels in LABELS.items()
    }
    opened = Task(name="copy", inputs="copy {text} {other}", targets="{text}")
    save("mixed/mood/best.safetensors", 5, tasks["mood"], (24, 5))
    save("mixed/kind.safetensors", 3, tasks["kind"], (9, 6), attends_to_input=False)
    save("mixed/copy/prompts/best.safetensors", 4, opened, (16, 7))
    for seed in range(3):
        save(f"seeds/prompts/seed_{seed}/best.safetensors", 4, tasks["mood"], (24, 5), seed=seed)
    return folder


def write_mood(folder: Path) -> str:
    """The task `mood` with 12 examples of unequal lengths."""
    rows = [{"text": f"word {'long ' * (i % 5)}{i}", "label": i % 2} for i in range(12)]
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mood.gin").write_text(GIN.replace("%DATA", f"'{data}'"))
    return f"--gin_file={folder / 'mood.gin'}"


RECORDS: list[dict[str, Any]] = [
    {"id": i, "prompt": name, "text": f"some {'long ' * (i % 4)}text {i}", "other": "x"}
    for i, name in enumerate(["kind", "mood", "copy", "mood", "kind", "copy", "copy", "kind"])
]
