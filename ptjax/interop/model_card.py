"""Model cards: a README.md that says what a prompt is, how it was tuned, and how to load it.

Its first lines are YAML with the metadata that the Hugging Face hub reads. A card is made from the
metadata of the prompt alone, so every copy of a prompt gets the same one. What a run knew beyond
that, its scores and its recipe, is in the metadata under `RUN` (see `record_of_run`).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

from ptjax.data.templates import parse_template
from ptjax.files import JsonObject, Metadata
from ptjax.interop.markdown import block, cell, code, line, section, setting, string

CARD = "README.md"
RUN = "run"
"""The key of a prompt's metadata that holds `record_of_run`."""
_LIBRARY = "library_name: ptjax"
_SCORES = ("split", "metric", "metrics", "majority", "before", "hard_prompts", "selected_on")
_RECIPE = {
    "method": ("settings", "method", "is"),
    "initializer": ("settings", "method", "initializer"),
    "start": ("settings", "method", "start"),
    "optimizer": ("settings", "optimizer", "is"),
    "learning_rate": ("settings", "optimizer", "learning_rate"),
    "learning_rate_scale": ("settings", "optimizer", "learning_rate_scale"),
    "batch_size": ("settings", "batching", "batch_size"),
    "steps": ("trained_steps",),
}
"""Parts of the recipe -> their places in `results.json`."""
_OF_MEMBERS = ("initializer", "learning_rate")
"""What a member of a sweep may override; `results.json` does not say whether it did."""
_ABSENT: Any = object()


def is_card(text: str) -> bool:
    """Whether a README.md is a model card of ptjax, which a newer one may replace."""
    return _LIBRARY in text.splitlines()


def record_of_run(results: Metadata, member: str = "") -> JsonObject:
    """Returns what a card says of a run: its scores, numbers of examples and recipe.

    Args:
        results: the content of `results.json`.
        member: the name of a member of a sweep; "" in an ordinary run.
    """
    own = results_of(results, member)
    record = {key: own[key] for key in (*_SCORES, "examples") if key in own}
    recipe: JsonObject = {}
    for name, path in _RECIPE.items():
        value: Any = results
        for key in path:
            value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is not _ABSENT and not (member and name in _OF_MEMBERS):
            recipe[name] = shareable(value)
    return record | {"recipe": recipe}


def results_of(results: Metadata, member: str) -> Metadata:
    """Returns the part of `results.json` with a member's scores: all of it in an ordinary run."""
    return _mapping(_mapping(results.get("members")).get(member)) if member else results


def shareable(value: Any) -> Any:
    """Returns a JSON value in which paths that only hold on one machine are cut to their names.

    These are absolute paths, those in a home folder or a bucket, and all in an entry "path".
    """
    if isinstance(value, Mapping):
        return {
            key: file_name(item) if key == "path" and isinstance(item, str) else shareable(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    local = isinstance(value, str) and re.fullmatch(r"(/|~|\.\.?/|[A-Za-z]:[\\/]|\w+://)\S+", value)
    return file_name(value) if local else value


def file_name(path: str) -> str:
    """The last part of a path."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def hub_model(metadata: Metadata) -> tuple[str, str | None] | None:
    """The hub's (id, commit) of the prompt's backbone; None if it is not from the hub.

    ptjax records the commit of every model of the hub, so a name without one is a path; PEFT often
    records the id alone.
    """
    name = metadata.get("backbone_name")
    match = isinstance(name, str) and re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([0-9a-f]{40}))?", name)
    if not match or (match[2] is None and "ptjax_version" in metadata):
        return None
    return match[1], match[2]


def make_card(name: str, shape: tuple[int, int], metadata: Metadata, *, peft: bool) -> str:
    """Returns the text of the card.

    Values of the wrong type, as in the metadata of a file that ptjax did not write, are left out.

    Args:
        name: what code calls the prompt: its id on the hub, or the name of its folder.
        shape: the prompt's, [P, D].
        metadata: the prompt's metadata, with `RUN` if the run is known.
        peft: whether the folder also holds the files of PEFT.
    """
    card = _Card(name, shape, metadata, peft)
    sections = (
        card.introduction(),
        card.task(),
        card.scores(),
        card.recipe(),
        card.with_ptjax(),
        card.with_peft(),
        card.limits(),
    )
    return f"---\n{_front_matter(card)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _label(value: str, text: str) -> str:
    """A label's text, and the value in the data that it is the text of, if that is another."""
    return code(text) + (f" for {code(value)}" if value != text else "")


class _Card:
    """The sections of a card; "" where nothing is known."""

    def __init__(self, name: str, shape: tuple[int, int], metadata: Metadata, peft: bool) -> None:
        self.name, self.shape, self.metadata, self.peft = name, shape, metadata, peft
        self.described = _mapping(metadata.get("task"))
        self.run = _mapping(metadata.get(RUN))
        self.examples = _mapping(self.run.get("examples"))
        self.on_hub = hub_model(metadata)
        backbone = metadata.get("backbone_name")
        self.backbone = file_name(backbone) if isinstance(backbone, str) else "BACKBONE"
        self.model = self.on_hub[0] if self.on_hub else self.backbone
        verbalizer = _mapping(self.described.get("verbalizer"))
        self.labels = [(x, text) for x, text in verbalizer.items() if isinstance(text, str)]
        task = self.described.get("name")
        self.task_name = task if isinstance(task, str) and task else None
        self.split = str(self.run.get("split") or "validation")
        scores, main = _mapping(self.run.get("metrics")), self.run.get("metric")
        # The metric that selected the prompt is the first.
        ordered = sorted(scores, key=lambda name: (name != main, name))
        self.metrics = {name: scores[name] for name in ordered if _is_number(scores[name])}

    def introduction(self) -> str:
        on = code(self.model) if self.backbone != "BACKBONE" else "a T5"
        if self.on_hub:
            on = f"[{self.model}](https://huggingface.co/{self.model})"
        task = f", tuned for the task {code(self.task_name)}" if self.task_name else ""
        length, width = self.shape
        return (
            f"# {line(self.name.split('/')[-1])}\n\nA soft prompt for {on}{task}: a matrix of "
            f"{length} x {width} numbers, which is prepended to the embedded input of the "
            "frozen model ([Lester et al. 2021](https://aclanthology.org/2021.emnlp-main.243/)). "
            "The model itself is unchanged, and not in these files."
        )

    def task(self) -> str:
        lines = []
        if isinstance(inputs := self.described.get("inputs"), str):
            lines.append(f"- Input: {code(inputs)}")
        if self.labels:
            label = self.described.get("label")
            field = f" (field {code(label)})" if isinstance(label, str) else ""
            lines.append(f"- Labels{field}: {', '.join(_label(*pair) for pair in self.labels)}")
        elif isinstance(targets := self.described.get("targets"), str):
            lines.append(f"- Target: {code(targets)}")
        for side, key in (("Input", "input_length"), ("Target", "target_length")):
            if _is_count(tokens := self.metadata.get(key)):
                lines.append(f"- {side} length: at most {tokens} tokens")
        counts = [f"{n:,} in {code(split)}" for split, n in self.examples.items() if _is_count(n)]
        lines += [f"- Examples: {', '.join(counts)}"] if counts else []
        return section("Task", lines)

    def scores(self) -> str:
        if not self.metrics:
            value, metric = self.metadata.get("value"), self.metadata.get("metric")
            said = "The prompt records no scores."
            if _is_number(value) and isinstance(metric, str):
                said = (
                    f"{code(metric)} is {value:.4g} on the examples that selected the prompt among "
                    "those of its run. It records no other scores."
                )
            return f"## Scores\n\n{said}"
        main = self.run.get("metric")
        rows: list[tuple[str, Any]] = [
            (f"**this prompt**, {cell(metric)}", value) for metric, value in self.metrics.items()
        ]
        rows += [
            (f"before training, {cell(main)}", self.run.get("before")),
            (f"always the most frequent answer, {cell(main)}", self.run.get("majority")),
        ]
        for name, value in _mapping(self.run.get("hard_prompts")).items():
            rows.append((f"the instruction {cell(name)} instead, {cell(main)}", value))
        examples = self.examples.get(self.split)
        count = f", {examples:,} examples" if _is_count(examples) else ""
        table = [f"| on {code(self.split)}{count} | |", "|---|---|"]
        table += [f"| {name} | {value:.4g} |" for name, value in rows if _is_number(value)]
        return "\n".join(["## Scores", "", *table]) + self._selection()

    def _selection(self) -> str:
        """How the prompt was selected among those of its run."""
        selected, step = self.run.get("selected_on"), self.metadata.get("step")
        if not isinstance(selected, str):
            return ""
        when = f" of step {step}" if _is_count(step) else ""
        text = f"\n\nThe prompt{when} was selected by its score on {code(selected)}."
        if selected == self.split:
            text += " The scores above are of the same examples, so they are optimistic."
        return text

    def recipe(self) -> str:
        made, lines = _mapping(self.run.get("recipe")), []
        if isinstance(method := made.get("method"), str):
            lines.append(f"- Method: {code(method)}, {self.shape[0]} rows")
        if isinstance(start := made.get("start"), str):
            lines.append(f"- Initialisation: from {code(start)}")
        elif "initializer" in made:
            default = "the embeddings of " + "the labels, then of " * bool(self.labels)
            default += "sampled tokens of the vocabulary"  # as `PromptTuning` chooses
            chosen = made["initializer"]
            lines.append(f"- Initialisation: {default if chosen is None else setting(chosen)}")
        if isinstance(optimizer := made.get("optimizer"), str):
            relative = made.get("learning_rate_scale") == "embedding_rms"
            of = " x the RMS of the embedding" * relative
            rate = made.get("learning_rate")
            rates = "" if rate is None else f", learning rate {setting(rate)}{of}"
            lines.append(f"- Optimizer: {code(optimizer)}{rates}")
        for name, key in (("Steps", "steps"), ("Batch size", "batch_size")):
            if _is_count(made.get(key)):
                lines.append(f"- {name}: {made[key]:,}")
        if _is_count(seed := self.metadata.get("seed")):
            lines.append(f"- Seed: {seed}")
        if self.metadata.get("sees_input") is False:
            lines.append("- The positions of the prompt do not attend to the input")
        if isinstance(version := self.metadata.get("ptjax_version"), str):
            lines.append(f"- Tuned with ptjax {line(version)}")
        return section("Recipe", lines)

    def with_ptjax(self) -> str:
        name = (
            f"{self.on_hub[0]}@{self.on_hub[1]}" if self.on_hub and self.on_hub[1] else self.model
        )
        lines = [
            "import ptjax",
            "",
            f"backbone = ptjax.load_backbone({string(name)})",
            f"prompt = ptjax.load_prompt({string(self.name)})",
            f"print(ptjax.predict(backbone, {self._arguments()}))",
        ]
        text = f"## Use it with ptjax\n\n{block(lines, 'python')}"
        if self.described:
            command = (
                f"python -m ptjax.infer --prompt={shlex.quote(self.name)} "
                f"--backbone={shlex.quote(name)} --input=records.jsonl"
            )
            text += (
                "\n\nThis command fills in the template with the fields of each record"
                f"{', and ranks the labels' * bool(self.labels)}:\n\n{block([command])}"
            )
        return text

    def with_peft(self) -> str:
        if not self.peft:
            return "PEFT cannot use this prompt, whose positions do not attend to the input."
        base = string(self.model)
        if self.on_hub and self.on_hub[1]:
            base += f", revision={string(self.on_hub[1])}"
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
            f"model = AutoModelForSeq2SeqLM.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(model, {string(self.name)})",
            f'inputs = tokenizer({self._example()}, return_tensors="pt")',
            "answer = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
        ]
        text = f"## Use it with PEFT\n\n{block(lines, 'python')}"
        if not self.on_hub:
            text += (
                "\n\nThe model must have the format of transformers, which "
                "`ptjax.save_backbone` writes."
            )
        return text

    def _parts(self) -> tuple[tuple[str, str | None], ...]:
        """The template in pieces, as those of `Template`; () without a template."""
        inputs = self.described.get("inputs")
        try:
            return parse_template(inputs).parts if isinstance(inputs, str) else ()
        except ValueError:
            return ()

    def _example(self) -> str:
        """An input as Python code: the template, with "..." in place of its fields."""
        text = "".join(literal + ("..." if field else "") for literal, field in self._parts())
        return string(text or "...")

    def _arguments(self) -> str:
        """The arguments of `ptjax.predict` behind the backbone, as Python code."""
        fields = [*dict.fromkeys(field for _, field in self._parts() if field)]
        if self.described.get("preprocess") or not all(map(str.isidentifier, fields)):
            return f"[{self._example()}], prompt, raw=True"
        if len(fields) == 1:
            return '["..."], prompt'
        record = ", ".join(f'{string(field)}: "..."' for field in fields)
        return f"[{{{record}}}], prompt" if fields else f"[{self._example()}], prompt, raw=True"

    def limits(self) -> str:
        named = f", those of {code(self.model)}" if self.backbone != "BACKBONE" else ""
        lines = [f"- The prompt works with the weights that it was tuned on{named}."]
        if self.labels:
            lines.append("- It answers with one of its labels to any input, related or not.")
        if _is_count(length := self.metadata.get("input_length")):
            lines.append(f"- ptjax cuts inputs at {length} tokens, as in training.")
        lines.append(
            "- The scores hold for data like those of the task. The biases of the model and of the "
            "training data remain."
        )
        return section("Limits", lines)


def _front_matter(card: _Card) -> str:
    """The YAML at the top of a card."""
    # Imported late: only cards need it.
    from huggingface_hub import EvalResult, ModelCardData

    kind = "text-classification" if card.labels else "text2text-generation"
    task = card.task_name or "unnamed"
    more: JsonObject = {}
    if card.metrics:
        more["model_name"] = card.name.split("/")[-1]
        more["eval_results"] = [
            EvalResult(
                task_type=kind,
                dataset_type=re.sub(r"[^\w.-]+", "-", task).strip("-") or "unnamed",
                dataset_name=task,
                dataset_split=card.split,
                metric_type=metric,
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in card.metrics.items()
        ]
    if card.on_hub:
        more |= {"base_model": card.on_hub[0], "base_model_relation": "adapter"}
    data = ModelCardData(
        library_name="ptjax",
        tags=["ptjax", "t5", "prompt-tuning", "soft-prompt", *["peft"] * card.peft],
        # No tag of the hub fits open answers of a T5.
        pipeline_tag=kind if card.labels else None,
        metrics=[*card.metrics] or None,
        **more,
    )
    return data.to_yaml().strip()


def _mapping(value: object) -> Metadata:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
