"""A task: where its records are, how they become text, and how predictions are scored.

Tasks are declared in gin (`gin_configs/tasks/`), one file each. They follow T5's conventions: the
inputs are '<feature>: <text> ...', a label is a word, and everything is text to text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptjax.data import catalogue
from ptjax.data.catalogue import Preprocess
from ptjax.data.examples import Example, Examples, Fields, apply_preprocess, make_examples
from ptjax.data.from_records import FromRecords
from ptjax.data.labels import verbalized
from ptjax.data.memory import RecordsInMemory, as_records, not_in_a_file, was_in_memory
from ptjax.data.metrics import METRICS
from ptjax.data.sources import BadRecords, Format, OnBadRecord, Records, read_records
from ptjax.data.templates import RecordError, Template, as_text, find_field, parse_template
from ptjax.data.tfds_source import is_tfds, read_tfds
from ptjax.errors import InputError, near
from ptjax.files import JsonObject, Metadata


@dataclass(frozen=True, kw_only=True)
class Task(FromRecords):
    """A text-to-text task; `Task.from_records` makes one from records in memory.

    Args:
        name: for messages, results and exported prompts.
        inputs: template of the model's input, filled with the record's fields.
        splits: split name -> file or glob below `data_dir`; or a TFDS data set,
            `tfds:NAME[/CONFIG][:VERSION][@SPLIT]`; or records in memory.
        label: the field that holds the label.
        verbalizer: label value -> target text. Values are compared as text (1 and '1' are equal),
            True also as 'true'. The texts are all labels that the task has.
        targets: template of the target, in place of `label` and `verbalizer`.
        metrics: names such as 'accuracy', 'f1' and 'squad_f1'; docs/tasks.md lists all. Several are
            averaged to select the best prompt.
        positive_label: the label text that is positive for f1; default: the verbalizer's last.
        data_dir: base of relative paths ('package:NAME' is data shipped with ptjax), and TFDS's
            folder of prepared data sets.
        format, columns, quoting, encoding: of files. format is 'jsonl', 'csv', 'tsv', 'parquet' or
            'text', by default what the suffix says; columns are for files without a header line.
        on_bad_record: 'error' raises at a record that cannot be used, 'skip' leaves it out.
        preprocess: takes a record's fields (dict), returns one dict of fields per example.
        train_preprocess: used instead of `preprocess` for the split 'train'.
        answers: the field with all correct answers, for exact_match, squad_f1, ROUGE and BLEU.
        group: the field that says to which group an example belongs, for group_exact_match.
        sentinels: treat `<extra_id_N>` in a record's field as T5's sentinel, as in a template; by
            default it is ordinary text there.
        held_out: take this many examples, evenly, out of 'train' for a split 'validation'.

    Raises:
        InputError: contradictory settings, an unknown metric or an invalid template.
    """

    name: str
    inputs: str
    splits: Mapping[str, str | RecordsInMemory] = field(default_factory=dict)
    label: str | None = None
    verbalizer: Mapping[Any, str] | None = None
    targets: str | None = None
    metrics: str | Sequence[str] = ("accuracy",)
    positive_label: str | None = None
    data_dir: str = ""
    format: Format | None = None
    columns: Sequence[str] | None = None
    quoting: bool | None = None
    encoding: str = "utf-8"
    on_bad_record: OnBadRecord = "error"
    preprocess: Preprocess | None = None
    train_preprocess: Preprocess | None = None
    answers: str | None = None
    group: str | None = None
    held_out: int = 0
    sentinels: bool = False

    def __post_init__(self) -> None:
        metrics = (self.metrics,) if isinstance(self.metrics, str) else tuple(self.metrics)
        object.__setattr__(self, "metrics", metrics)
        if self.verbalizer is not None:
            texts = {str(value).strip(): text for value, text in self.verbalizer.items()}
            if len(texts) < len(self.verbalizer):
                raise self.error(f"two keys of the verbalizer read the same: {self.verbalizer}")
            object.__setattr__(self, "verbalizer", texts)
        BadRecords(self.on_bad_record)  # refuses an unknown policy
        if self.held_out and ("validation" in self.splits or self.held_out < 0):
            raise self.error(
                f"held_out={self.held_out} in addition to a split 'validation'; drop one"
            )
        _check_targets(self)
        _check_metrics(self)

    def error(self, problem: str) -> InputError:
        """Returns an InputError whose message begins with the task's name."""
        return InputError(f"task {self.name}: {problem}")

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The label texts, in the verbalizer's order; None if targets may be any text."""
        if self.verbalizer is None:
            return None
        return tuple(dict.fromkeys(self.verbalizer.values()))

    @property
    def positive(self) -> str | None:
        """The label that counts as positive for the metric f1; None if the task has no f1."""
        if "f1" not in self.metrics or self.labels is None:
            return None
        return self.labels[-1] if self.positive_label is None else self.positive_label

    @property
    def in_memory(self) -> bool:
        """Whether a split is in no file, so that only this object can load it."""
        return any(map(was_in_memory, self.splits.values()))

    def load(self, split: str, limit: int | None = None) -> Examples:
        """Reads the examples of a split, in the order of the files.

        Args:
            split: one of `splits`; with `held_out` also 'validation'.
            limit: take at most this many, evenly spread over the split (files are often sorted by
                label, so the first ones would be of one class).

        Raises:
            InputError: no such split, an empty split, a record that cannot be used (the message
                names file and line), a limit below 1, or `held_out` leaves no training examples.
        """
        if self.held_out and split in ("train", "validation"):
            train = _load(self, "train")
            if self.held_out >= len(train):
                raise self.error(f"held_out={self.held_out} of {len(train)} training examples")
            examples = train.divided(self.held_out, validation=split == "validation")
        elif split not in self.splits:
            raise _no_split(self, split)
        else:
            examples = _load(self, split)
        if limit is not None and limit < 1:
            raise self.error(f"a limit of {limit} examples; it must be at least 1")
        return examples.limited(limit)

    def format_inputs(self, record: Fields) -> str:
        """Formats the model's input for a record, for inference; the record needs no target.

        Raises:
            InputError: the record cannot fill the template, or does not make exactly one example.
        """
        try:
            examples = list(apply_preprocess(self.preprocess, dict(record)))
            if len(examples) != 1:
                raise RecordError(f"the record makes {len(examples)} examples, give one at a time")
            return parse_template(self.inputs).render(examples[0], sentinels=self.sentinels)
        except RecordError as error:
            raise self.error(f"{error}; its inputs are {self.inputs!r}") from error

    def format_line(self, line: str) -> str:
        """Formats the model's input for a plain line of text, if the template has a single field.

        Raises:
            InputError: the template has several fields.
        """
        fields = parse_template(self.inputs).fields
        if len(fields) != 1:
            raise self.error(
                f"a plain line cannot fill the fields {', '.join(fields)}; give JSON lines"
            )
        return self.format_inputs({fields[0]: line})

    def evaluate(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Computes the task's metrics, as fractions, of the predictions [N] for the examples [N].

        Raises:
            InputError: an example lacks a field that a metric needs.
            ValueError: `examples` is empty, or differs in length from `predictions`.
        """
        if len(predictions) != len(examples) or not examples:
            raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
        targets = [example.targets for example in examples]
        values = {}
        for name in self.metrics:
            metric = METRICS[name]
            needs = {need: _metric_argument(self, need, examples) for need in metric.needs}
            values[name] = metric.function(list(predictions), targets, **needs)
        return values

    def describe(self) -> JsonObject:
        """Returns the settings that an exported prompt records, for `from_description`."""
        return {
            "name": self.name,
            "inputs": self.inputs,
            "targets": self.targets,
            "label": self.label,
            "verbalizer": None if self.verbalizer is None else dict(self.verbalizer),
            "metrics": list(self.metrics),
            "positive_label": self.positive,
            "answers": self.answers,
            "group": self.group,
            "preprocess": None if self.preprocess is None else catalogue.name_of(self.preprocess),
            "sentinels": self.sentinels,
            **({"in_memory": True} if self.in_memory else {}),
        }

    @classmethod
    def from_description(cls, description: Metadata, preprocess: Preprocess | None = None) -> Task:
        """Makes a task without splits that formats and scores like the described one.

        Args:
            description: the result of `describe`. Unknown keys (of a later version) are ignored.
            preprocess: the function that the description names, if it is not one of ptjax's own.

        Raises:
            InputError: the description lacks a name or inputs or is invalid, or names an unknown
                preprocess function.
        """
        preprocess = preprocess or _find_preprocess(description)
        keys = ("name", "inputs", "targets", "label", "verbalizer", "metrics", "answers", "group")
        keys += ("sentinels", "positive_label")
        settings = {key: description[key] for key in keys if description.get(key) is not None}
        for key in ("name", "inputs"):
            if not isinstance(settings.get(key), str):
                raise InputError(
                    f"the description of a task lacks '{key}'; export the prompt again"
                )
        return cls(**settings, preprocess=preprocess)


def _no_split(task: Task, split: str) -> InputError:
    names = ", ".join(task.splits) or "none"
    hint = ""
    if split == "validation" and "train" in task.splits:
        hint = "; to take one out of 'train', set Task.held_out, or validation of from_records"
    return task.error(f"no split '{split}' (splits: {names}){hint}")


def _find_preprocess(description: Metadata) -> Preprocess | None:
    """The function of ptjax's catalogue that the description names, if any."""
    name = description.get("preprocess")
    if name is None:
        return None
    preprocess = catalogue.find(str(name))
    if preprocess is None:
        raise InputError(
            f"task {description.get('name')}: its records were prepared by {name}, which is not "
            "part of ptjax; give the task's gin file, or in Python the task"
        )
    return preprocess


def _check_targets(task: Task) -> None:
    """InputError unless the templates are valid and there is exactly one kind of target."""
    inputs = _parse(task, "inputs", task.inputs)
    if not inputs.fields:
        raise task.error(f"inputs={task.inputs!r} names no field, such as {{text}}")
    if task.targets is not None:
        _parse(task, "targets", task.targets)
    if task.verbalizer is not None and task.label is None:
        raise task.error("it has a verbalizer; set `label` to the field with the label")
    if (task.verbalizer is None) == (task.targets is None):
        raise task.error("set either `label` and `verbalizer`, or `targets`")
    if task.verbalizer is not None:
        for value, text in task.verbalizer.items():
            if not isinstance(text, str) or not text.strip():
                raise task.error(f"the verbalizer's text for {value!r} is {text!r}")


def _parse(task: Task, setting: str, text: str) -> Template:
    try:
        return parse_template(text)
    except ValueError as error:
        raise task.error(f"{setting}={text!r}: {error}") from error


def _check_metrics(task: Task) -> None:
    """InputError for an unknown metric, or one whose arguments the task does not have."""
    if not task.metrics:
        raise task.error("it has no metric; set `metrics`")
    has = {
        "labels": task.labels is not None,
        "positive_label": True,  # by default the last label
        "answers": True,  # without a field of answers the target is the only one
        "groups": task.group is not None,
        "label_values": task.label is not None,
    }
    settings = {"labels": "verbalizer", "groups": "group", "label_values": "label"}
    for name in task.metrics:
        if name not in METRICS:
            raise task.error(f"no metric is called '{name}'{near(name, METRICS)}")
        for need in METRICS[name].needs:
            if not has[need]:
                raise task.error(f"the metric {name} needs `{settings[need]}`")
    if "f1" in task.metrics and len(task.labels or ()) != 2:
        raise task.error(f"the metric f1 takes two labels, not {task.labels}; see mean_f1")
    if task.positive_label is not None and task.positive_label not in (task.labels or ()):
        texts = ", ".join(map(repr, task.labels or ())) or "none"
        raise task.error(
            f"positive_label={task.positive_label!r} is not a text of its verbalizer ({texts})"
        )


def _load(task: Task, split: str) -> Examples:
    """The examples of a split of `task.splits`."""
    preprocess = task.preprocess
    if split == "train" and task.train_preprocess is not None:
        preprocess = task.train_preprocess
    inputs = parse_template(task.inputs)
    targets = None if task.targets is None else parse_template(task.targets)

    def render(fields: Fields) -> tuple[str, str]:
        return inputs.render(fields, sentinels=task.sentinels), _target(task, fields, targets)

    try:
        records = _read(task, split)
        bad = dataclasses.replace(records.bad, policy=task.on_bad_record)
        return make_examples(records, preprocess, render, bad)
    except InputError as error:
        raise task.error(f"split '{split}': {error}") from error


def _read(task: Task, split: str) -> Records:
    source = task.splits[split]
    if isinstance(source, RecordsInMemory):
        return as_records(source)
    if was_in_memory(source):
        raise not_in_a_file(task.name)
    source = os.fspath(source)
    if is_tfds(source):
        return read_tfds(source, split=split, data_dir=task.data_dir)
    absolute = source.startswith(("/", "~", "package:")) or "://" in source
    if task.data_dir and not absolute:
        source = f"{os.fspath(task.data_dir).rstrip('/')}/{source}"
    return read_records(
        source,
        format=task.format,
        columns=task.columns,
        quoting=task.quoting,
        encoding=task.encoding,
        on_bad_record=task.on_bad_record,
    )


def _target(task: Task, fields: Fields, template: Template | None) -> str:
    """The target text of an example: the filled template, or the verbalizer's text."""
    if template is not None:
        return template.render(fields, sentinels=task.sentinels)
    assert task.verbalizer is not None and task.label is not None  # by _check_targets
    return verbalized(task.verbalizer, find_field(fields, task.label), task.label)


def _metric_argument(task: Task, need: str, examples: Sequence[Example]) -> object:
    """The value of one of `Metric.needs`."""
    if need in ("labels", "positive_label"):
        return task.labels if need == "labels" else task.positive
    name = {"answers": task.answers, "groups": task.group, "label_values": task.label}[need]
    if name is None:
        return None
    try:
        values = [find_field(example.fields, name) for example in examples]
        return [_answers(value, name) for value in values] if need == "answers" else values
    except RecordError as error:
        raise task.error(f"{error}, which its metrics need") from error


def _answers(value: object, field: str) -> list[str]:
    """All correct answers of an example; a single value counts as one answer."""
    answers = value if isinstance(value, list | tuple) else [value]
    return [as_text(answer, field) for answer in answers]
