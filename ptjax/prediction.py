"""Records in, predictions out, in the way that a prompt wants its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from ptjax.answering import (
    make_label_tokens,
    predict_labels,
    rows_at_once,
    stack_label_sets,
    tokenize_inputs,
)
from ptjax.backbone import Backbone
from ptjax.data.pipeline import make_buckets
from ptjax.data.preprocess import check_labels
from ptjax.data.sources import Record
from ptjax.data.tasks import Task
from ptjax.data.templates import parse_template
from ptjax.errors import InputError
from ptjax.inference import INPUT_LENGTH, PromptIds, generate_with_scores
from ptjax.prompting import choose_prompts, prompted

RAW_FIELD = "inputs"
"""The field of a record that holds an input which is formatted already."""

PLAIN = "\0line"
"""The one field of a record that is a plain line; no file has a field of this name."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says to one input.

    Attributes:
        text: the label or the generated text.
        score: its log-likelihood (after a beam search with brevity penalty).
        probabilities: of each label among the labels, where they were ranked.
    """

    text: str
    score: float
    probabilities: dict[str, float] | None = None


def format_record(record: Record, task: Task | None) -> tuple[str, dict[str, Any]]:
    """(the model's input, the record's fields).

    A plain line (see `PLAIN`) fills the template's only field.

    Args:
        task: None where the inputs are formatted already.

    Raises:
        InputError: a field is missing; with file and line.
    """
    fields = record.fields
    plain = PLAIN in fields
    try:
        if task is None:
            name = PLAIN if plain else RAW_FIELD
            if not isinstance(fields.get(name), str):
                raise InputError(f"no text in the field '{RAW_FIELD}', which is taken as it is")
            return fields[name], {} if plain else fields
        if plain:
            line = fields[PLAIN]
            text = task.format_line(line)
            return text, {parse_template(task.inputs).fields[0]: line}
        return task.format_inputs(fields), fields
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from error


def rank(
    backbone: Backbone,
    texts: Sequence[str],
    labels: Sequence[str] | Sequence[Sequence[str]],
    prompt: Any = None,
    *,
    prompt_ids: PromptIds = None,
    input_length: int | Sequence[int] = INPUT_LENGTH,
    target_length: int | Sequence[int] = 16,
    batch_size: int = 32,
) -> list[Prediction]:
    """The likeliest of a closed set of labels for each text, in order.

    Args:
        texts: formatted inputs.
        labels: one set for all texts, or one for each.
        prompt, prompt_ids: as for `inference.forward`.
        input_length, target_length: longer inputs are cut, with a warning; labels may not be. One
            for all texts, or one for each.

    Raises:
        InputError: no tokenizer, a label that it cannot write, a prompt that does not fit.
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise InputError(f"{backbone.name} has no tokenizer; set load_backbone.tokenizer")
    ids = choose_prompts(prompt, prompt_ids, len(texts))
    if not texts:
        return []
    each: Any = [labels] * len(texts) if isinstance(labels[0], str) else labels
    lengths = np.broadcast_to(target_length, len(texts)).tolist()
    keys = [(tuple(one), length) for one, length in zip(each, lengths, strict=True)]
    sets = list(dict.fromkeys(keys))
    for one, length in sets:
        check_labels(one, tokenizer, length)
    source = tokenize_inputs(texts, tokenizer, input_length)
    chosen, likelihoods = predict_labels(
        *prompted(backbone, prompt),
        source,
        stack_label_sets([make_label_tokens(one, tokenizer, length) for one, length in sets]),
        make_buckets(source),
        rows_at_once(len(texts), batch_size),
        label_sets=np.array([sets.index(key) for key in keys], np.int32),
        prompt_ids=ids,
    )
    shares = softmax(likelihoods.astype(np.float64), axis=1)
    return [
        # A smaller set's row ends in -inf, and in shares of 0.
        Prediction(str(one[i]), float(row[i]), dict(zip(one, map(float, share), strict=False)))
        for one, i, row, share in zip(each, chosen, likelihoods, shares, strict=True)
    ]


def decode(
    backbone: Backbone, texts: Sequence[str], prompt: Any = None, **settings: Any
) -> list[Prediction]:
    """What the backbone writes for each text, in order; settings as for `inference.generate`."""
    written, scores = generate_with_scores(backbone, texts, prompt, **settings)
    return [Prediction(text, float(score)) for text, score in zip(written, scores, strict=True)]


def task_of(metadata: Mapping[str, Any], fallback: Task | None = None) -> Task | None:
    """The task that a prompt was tuned for, from its metadata; `fallback` where it names none.

    A `preprocess` function of the user's own is taken from `fallback`.
    """
    description = metadata.get("task")
    if not isinstance(description, Mapping):
        return fallback
    same = fallback is not None and fallback.describe()["preprocess"] == description["preprocess"]
    return Task.from_description(description, fallback.preprocess if fallback and same else None)
