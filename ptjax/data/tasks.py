"""A task: where its records are, how they become text, and how predictions are scored.

Tasks are declared in gin (`gin_configs/tasks/`), one file each. T5's conventions: the inputs are
'<feature>: <text> ...', a label is a word, everything the model does is text to text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptjax.data import catalogue
from ptjax.data.catalogue import Preprocess
from ptjax.data.metrics import METRICS
from ptjax.data.sources import BadRecords, Format, OnBadRecord, Record, Records, read_records
from ptjax.data.templates import RecordError, Template, as_text, find_field, parse_template
from ptjax.data.tfds_source import is_tfds, read_tfds
from ptjax.errors import InputError, near


@dataclass(frozen=True, slots=True)
class Example:
    """One example as text, the fields it was made of, and where its record stands."""

    inputs: str
    targets: str
    fields: dict[str, Any]
    file: str
    line: int


class Examples(list[Example]):
    """The examples of a split.

    `bad` counts the records that were left out; `digest` is that of the source, see `Records`.
    """

    def __init__(self, examples: Iterable[Example], bad: BadRecords, digest: str = "") -> None:
        super().__init__(examples)
        self.bad, self.digest = bad, digest


@dataclass(frozen=True, kw_only=True)
class Task:
    """A text-to-text task.

    Args:
        name: for messages, results and exported prompts.
        inputs: the template of the model's input, over the record's fields.
        splits: split name -> file or glob below `data_dir`, or a TFDS data set, see
            `ptjax.data.tfds_source.read_tfds`.
        label, verbalizer: the field that holds the label, and label value -> target text. Values
            are compared as text (1 and '1' are the same), True also as 'true'. The texts are the
            closed label set.
        targets: instead of a verbalizer, the template of the target.
        metrics: names of `ptjax.data.metrics.METRICS`; of several, their mean selects.
        positive_label: the label text whose F1 the metric f1 takes; default: the verbalizer's last.
        data_dir: where relative paths start ('package:NAME' is data shipped with ptjax), and
            TFDS's folder of prepared data sets.
        format, columns, quoting, encoding: see `ptjax.data.sources.read_records`.
        on_bad_record: 'error' stops at a record that does not fit, 'skip' counts it.
        preprocess: the fields of a record -> the fields of the examples made of it.
        train_preprocess: the same for the split 'train', where that one differs.
        answers: the field with all right answers, for exact_match and squad_f1.
        group: the field that tells which examples belong together, for group_exact_match.
        sentinels: `<extra_id_N>` in a record's field is T5's sentinel, as it is in a template; by
            default it is spelt out there like any text.
        held_out: where there is no split 'validation', one is made of this many examples, taken
            evenly out of 'train', which then lacks them.

    Raises:
        InputError: settings that contradict each other, an unknown metric, a broken template.
    """

    name: str
    inputs: str
    splits: Mapping[str, str] = field(default_factory=dict)
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
                raise self._error(f"two keys of the verbalizer read the same: {self.verbalizer}")
            object.__setattr__(self, "verbalizer", texts)
        BadRecords(self.on_bad_record)  # refuses what is no policy
        if self.held_out and ("validation" in self.splits or self.held_out < 0):
            raise self._error(f"held_out={self.held_out} beside a split 'validation'; drop one")
        self._check_targets()
        self._check_metrics()

    def _error(self, problem: str) -> InputError:
        return InputError(f"task {self.name}: {problem}")

    def _check_targets(self) -> None:
        inputs = self._parse("inputs", self.inputs)
        if not inputs.fields:
            raise self._error(f"inputs={self.inputs!r} names no field, such as {{text}}")
        if self.targets is not None:
            self._parse("targets", self.targets)
        if self.verbalizer is not None and self.label is None:
            raise self._error("it has a verbalizer; set `label` to the field with the label")
        if (self.verbalizer is None) == (self.targets is None):
            raise self._error("set either `label` and `verbalizer`, or `targets`")
        if self.verbalizer is not None:
            for value, text in self.verbalizer.items():
                if not isinstance(text, str) or not text.strip():
                    raise self._error(f"the verbalizer's text for {value!r} is {text!r}")

    def _check_metrics(self) -> None:
        if not self.metrics:
            raise self._error("it has no metric; set `metrics`")
        have = {
            "labels": self.labels is not None,
            "positive_label": True,  # by default the last label
            "answers": True,  # without a field of answers the target is the only one
            "groups": self.group is not None,
            "label_values": self.label is not None,
        }
        settings = {"labels": "verbalizer", "groups": "group", "label_values": "label"}
        for name in self.metrics:
            if name not in METRICS:
                raise self._error(f"no metric is called '{name}'{near(name, METRICS)}")
            for need in METRICS[name].needs:
                if not have[need]:
                    raise self._error(f"the metric {name} needs `{settings[need]}`")
        if "f1" in self.metrics and len(self.labels or ()) != 2:
            raise self._error(f"the metric f1 takes two labels, not {self.labels}; see mean_f1")
        if self.positive_label is not None and self.positive_label not in (self.labels or ()):
            known = ", ".join(map(repr, self.labels or ())) or "none"
            raise self._error(
                f"positive_label={self.positive_label!r} is no text of its verbalizer ({known})"
            )

    def _parse(self, what: str, text: str) -> Template:
        try:
            return parse_template(text)
        except ValueError as error:
            raise self._error(f"{what}={text!r}: {error}") from error

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed label set, in the verbalizer's order; None where the targets are open."""
        if self.verbalizer is None:
            return None
        return tuple(dict.fromkeys(self.verbalizer.values()))

    @property
    def positive(self) -> str | None:
        """The label whose F1 is taken, where the metric f1 is one of the task's."""
        if "f1" not in self.metrics or self.labels is None:
            return None
        return self.labels[-1] if self.positive_label is None else self.positive_label

    def load(self, split: str, limit: int | None = None) -> Examples:
        """The examples of a split, in the order of the files.

        Args:
            split: one of `splits`.
            limit: take only this many, evenly spread over the split (files are often sorted by
                label, so that the first ones would be of one class).

        Raises:
            InputError: no such split, nothing in it, or a record that does not fit (file, line).
        """
        if self.held_out and split in ("train", "validation"):
            examples = self._divide(split)
        elif split not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise self._error(f"no split '{split}' (splits: {known})")
        else:
            examples = self._load(split)
        if limit is not None and limit < len(examples):
            if limit < 1:
                raise self._error(f"a limit of {limit} examples; it must be at least 1")
            kept = [examples[i * len(examples) // limit] for i in range(limit)]
            return Examples(kept, examples.bad, examples.digest)
        return examples

    def _divide(self, split: str) -> Examples:
        """'train' without the held-out examples, or those alone; files are often sorted."""
        train = self._load("train")
        if self.held_out >= len(train):
            raise self._error(f"held_out={self.held_out} of {len(train)} training examples")
        held = {i * len(train) // self.held_out for i in range(self.held_out)}
        wanted = split == "validation"
        chosen = (e for i, e in enumerate(train) if (i in held) == wanted)
        return Examples(chosen, train.bad, train.digest)

    def _load(self, split: str) -> Examples:
        try:
            return self._make_examples(self._read(split), split)
        except InputError as error:
            raise self._error(f"split '{split}': {error}") from error

    def _read(self, split: str) -> Records:
        source = os.fspath(self.splits[split])
        if is_tfds(source):
            return read_tfds(source, split=split, data_dir=self.data_dir)
        absolute = source.startswith(("/", "~", "package:")) or "://" in source
        if self.data_dir and not absolute:
            source = f"{os.fspath(self.data_dir).rstrip('/')}/{source}"
        return read_records(
            source,
            format=self.format,
            columns=self.columns,
            quoting=self.quoting,
            encoding=self.encoding,
            on_bad_record=self.on_bad_record,
        )

    def _make_examples(self, records: Records, split: str) -> Examples:
        preprocess = self.preprocess
        if split == "train" and self.train_preprocess is not None:
            preprocess = self.train_preprocess
        inputs = parse_template(self.inputs)
        targets = None if self.targets is None else parse_template(self.targets)
        bad = dataclasses.replace(records.bad, policy=self.on_bad_record)
        examples = []
        for record in records:
            try:
                # All of a record's examples or none.
                examples += [
                    Example(
                        inputs.render(fields, sentinels=self.sentinels),
                        self._target(fields, targets),
                        fields,
                        record.file,
                        record.line,
                    )
                    for fields in _apply(preprocess, record.fields)
                ]
            except RecordError as error:
                bad.report(record.where, str(error), record.lines)
        if not examples:
            raise InputError(_why_empty(records, bad))
        return Examples(examples, bad, records.digest)

    def _target(self, fields: Mapping[str, Any], template: Template | None) -> str:
        if template is not None:
            return template.render(fields, sentinels=self.sentinels)
        assert self.verbalizer is not None and self.label is not None  # by _check_targets
        value = find_field(fields, self.label)
        key = as_text(value, self.label).strip()
        for spelling in (key, key.lower()) if isinstance(value, bool) else (key,):
            if spelling in self.verbalizer:
                return self.verbalizer[spelling]
        known = ", ".join(repr(known) for known in self.verbalizer)
        raise RecordError(
            f"the label {value!r} in field '{self.label}' is not in the verbalizer ({known})"
        )

    def format_inputs(self, record: Mapping[str, Any]) -> str:
        """The model's input for a record without a target, for inference.

        Raises:
            InputError: a field of the template is missing, or the record makes several examples.
        """
        try:
            examples = list(_apply(self.preprocess, dict(record)))
            if len(examples) != 1:
                raise RecordError(f"the record makes {len(examples)} examples, give one at a time")
            return parse_template(self.inputs).render(examples[0], sentinels=self.sentinels)
        except RecordError as error:
            raise self._error(f"{error}; its inputs are {self.inputs!r}") from error

    def format_line(self, line: str) -> str:
        """The model's input for a plain line of text, where the template has a single field.

        Raises:
            InputError: the template has several fields.
        """
        fields = parse_template(self.inputs).fields
        if len(fields) != 1:
            raise self._error(
                f"a plain line cannot fill the fields {', '.join(fields)}; give JSON lines"
            )
        return self.format_inputs({fields[0]: line})

    def evaluate(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """All metrics of the predictions [N] for the examples [N], as fractions.

        Raises:
            InputError: an example lacks a field that a metric needs.
            ValueError: no example, or not one prediction for each.
        """
        if len(predictions) != len(examples) or not examples:
            raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
        targets = [example.targets for example in examples]
        values = {}
        for name in self.metrics:
            metric = METRICS[name]
            needs = {need: self._needed(need, examples) for need in metric.needs}
            values[name] = metric.function(list(predictions), targets, **needs)
        return values

    def _needed(self, need: str, examples: Sequence[Example]) -> Any:
        if need in ("labels", "positive_label"):
            return self.labels if need == "labels" else self.positive
        name = {"answers": self.answers, "groups": self.group, "label_values": self.label}[need]
        if name is None:
            return None
        try:
            values = [find_field(example.fields, name) for example in examples]
            return [_answers(value, name) for value in values] if need == "answers" else values
        except RecordError as error:
            raise self._error(f"{error}, which its metrics need") from error

    def describe(self) -> dict[str, Any]:
        """What an exported prompt has to know of its task, as plain JSON values.

        `from_description` makes a task for inference of it.
        """
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
            "preprocess": _function_name(self.preprocess),
            "sentinels": self.sentinels,
        }

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], preprocess: Preprocess | None = None
    ) -> Task:
        """A task that formats and scores as the described one, without splits.

        Args:
            description: what `describe` gave. Unknown keys are of a later version, and ignored.
            preprocess: the described function, where it is not one of ptjax's own catalogue.

        Raises:
            InputError: something needed is missing, or the preprocess function is unknown.
        """
        name = description.get("preprocess")
        if name is not None and preprocess is None:
            preprocess = catalogue.find(str(name))
            if preprocess is None:
                raise InputError(
                    f"task {description.get('name')}: its records were prepared by {name}, which "
                    "is not part of ptjax; give the task's gin file"
                )
        keys = ("name", "inputs", "targets", "label", "verbalizer", "metrics", "answers", "group")
        keys += ("sentinels", "positive_label")
        settings = {key: description[key] for key in keys if description.get(key) is not None}
        for key in ("name", "inputs"):
            if not isinstance(settings.get(key), str):
                raise InputError(f"the description of a task lacks '{key}'; export the prompt anew")
        return cls(**settings, preprocess=preprocess)


def _answers(value: Any, field: str) -> list[str]:
    """All right answers of an example, of which there may be but one."""
    return [as_text(one, field) for one in (value if isinstance(value, list | tuple) else [value])]


def _apply(preprocess: Preprocess | None, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if preprocess is None:
        yield fields
        return
    try:
        yield from preprocess(fields)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(
            f"{_function_name(preprocess)} cannot use it ({type(error).__name__}: {error})"
        ) from error


def _function_name(function: Preprocess | None) -> str | None:
    return None if function is None else catalogue.name_of(function)


def _why_empty(records: Records, bad: BadRecords) -> str:
    first: Record = records[0]
    if bad.count:
        return f"no usable record, {bad.count} bad ones; the first: {bad.first}"
    return f"no record makes an example (the first is {first.where}); check `preprocess`"
