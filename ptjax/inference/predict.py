"""Records in, predictions out, in the way that a prompt wants its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from scipy.special import softmax

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.pipeline import make_buckets
from ptjax.data.preprocess import check_labels
from ptjax.data.sources import Record
from ptjax.data.tasks import Task
from ptjax.data.templates import parse_template
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError
from ptjax.inference.answering import (
    make_label_tokens,
    predict_labels,
    rows_at_once,
    stack_label_sets,
    tokenize_inputs,
)
from ptjax.inference.forward import INPUT_LENGTH, MAX_NEW_TOKENS, PromptIds, generate_with_scores
from ptjax.inference.prompts import PromptBank, choose_prompts, prompted
from ptjax.interop.prompt_file import NO_PROMPT

RAW_FIELD = "inputs"
"""The field of a record that holds an input which is formatted already."""

LABEL_LENGTH = 16
"""The most tokens of a label, where nothing says."""

PROMPT_FIELD = "prompt"
"""The field in which a record names its prompt, one of a bank."""

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


@dataclasses.dataclass(frozen=True)
class Manner:
    """How inputs are read with a prompt.

    Attributes:
        task: formats them and knows the labels; None where they are formatted already.
        input_length, target_length: in tokens; None where nothing says.
    """

    task: Task | None
    input_length: int | None = None
    target_length: int | None = None


def prompt_of(record: Record, bank: PromptBank) -> int:
    """The number of the prompt that a record names, -1 for none.

    Raises:
        InputError: it names none, or one that the bank lacks; with file and line.
    """
    try:
        if PLAIN in record.fields:
            raise InputError("a plain text names no prompt of many; give records, or one --prompt")
        if PROMPT_FIELD not in record.fields:
            raise InputError(
                f"no field '{PROMPT_FIELD}', which names one of the prompts ('{NO_PROMPT}' is none)"
            )
        name = record.fields[PROMPT_FIELD]
        if not isinstance(name, str | None):
            raise InputError(f"the field '{PROMPT_FIELD}' is {name!r}, not a prompt's name")
        return bank.id_of(name)
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None


def check_prompt_fields(
    records: Sequence[Record], manners: Sequence[Manner], prompt_ids: Sequence[int] | None
) -> None:
    """A field 'prompt' names a prompt or is part of a template; if neither, that is said.

    Raises:
        InputError: it would be both.
    """
    unread = 0
    for record, manner in zip(records, manners, strict=True):
        template = "" if manner.task is None or manner.task.preprocess else manner.task.inputs
        read = PROMPT_FIELD in (field.split(".")[0] for field in parse_template(template).fields)
        if read and prompt_ids is not None:
            raise InputError(
                f"{record.where}: the field '{PROMPT_FIELD}' names the prompt, and the inputs of "
                f"its task are made of a field of that name, {template!r}; use --prompt for it"
            )
        unread += PROMPT_FIELD in record.fields and not read
    if unread and prompt_ids is None:
        logging.warning(
            "%d of %d records have a field '%s', which chooses none without --prompts",
            unread,
            len(records),
            PROMPT_FIELD,
        )


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
    target_length: int | Sequence[int] = LABEL_LENGTH,
    batch_size: int = 32,
) -> list[Prediction]:
    """The likeliest of a closed set of labels for each text, in order.

    Args:
        texts: formatted inputs.
        labels: one set for all texts, or one for each.
        prompt, prompt_ids: as for `ptjax.forward`.
        input_length, target_length: longer inputs are cut, with a warning; labels may not be. One
            for all texts, or one for each.

    Raises:
        InputError: no tokenizer, a label that it cannot write, a prompt that does not fit, or a
            logit that is not finite (a damaged backbone; its weight is named).
    """
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise missing_tokenizer(backbone.name, backbone.config.vocab_size)
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
    special = backbone.config.special_ids
    tokens = [make_label_tokens(one, tokenizer, length, special) for one, length in sets]
    chosen, likelihoods = predict_labels(
        *prompted(backbone, prompt),
        source,
        stack_label_sets(tokens, special),
        make_buckets(source),
        rows_at_once(len(texts), batch_size),
        ids=special,
        label_sets=np.array([sets.index(key) for key in keys], np.int32),
        prompt_ids=ids,
    )
    # A smaller set's row ends in -inf, and in shares of 0.
    own = [row[: len(one)] for one, row in zip(each, likelihoods, strict=True)]
    check_scores(own, backbone, "the score of a label")
    shares = softmax(likelihoods.astype(np.float64), axis=1)
    return [
        Prediction(str(one[i]), float(row[i]), dict(zip(one, map(float, share), strict=False)))
        for one, i, row, share in zip(each, chosen, likelihoods, shares, strict=True)
    ]


def decode(
    backbone: Backbone, texts: Sequence[str], prompt: Any = None, **settings: Any
) -> list[Prediction]:
    """What the backbone writes for each text, in order; settings as for `ptjax.generate`."""
    written, scores = generate_with_scores(backbone, texts, prompt, **settings)
    return [Prediction(text, float(score)) for text, score in zip(written, scores, strict=True)]


def predict(
    backbone: Backbone,
    texts: Sequence[str],
    manners: Sequence[Manner],
    prompt: Any = None,
    prompt_ids: PromptIds = None,
    *,
    decode_all: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    **settings: Any,
) -> list[Prediction]:
    """A prediction for each text, in order: ranked where its task has labels, else generated.

    Args:
        texts: formatted inputs.
        manners: of the prompt of each.
        prompt, prompt_ids: as for `ptjax.forward`.
        decode_all: generate, whatever the task.
        max_new_tokens: instead of the target lengths, of what is generated.
        seed, settings: of what is generated, as for `ptjax.generate`.

    Raises:
        InputError: as `rank` and `decode`; or settings of generation, and nothing is generated.
    """
    labels = [None if manner.task is None else manner.task.labels for manner in manners]
    ranked = [i for i, one in enumerate(labels) if one is not None and not decode_all]
    written = sorted(set(range(len(texts))) - set(ranked))
    if ranked and not written and settings != dict(num_beams=1, temperature=0.0, top_p=1.0):
        raise InputError(
            f"the task has a closed set of labels ({', '.join(labels[0] or ())}), which are ranked;"
            " --num_beams, --temperature and --top_p go with --decode"
        )
    found: dict[int, Prediction] = {}
    for rows in filter(None, (ranked, written)):
        own = [manners[i] for i in rows]
        shared: dict[str, Any] = {
            "prompt": prompt,
            "prompt_ids": None if prompt_ids is None else [prompt_ids[i] for i in rows],
            "input_length": [manner.input_length or INPUT_LENGTH for manner in own],
            "batch_size": batch_size,
        }
        asked = [texts[i] for i in rows]
        if rows is ranked:
            lengths = [manner.target_length or LABEL_LENGTH for manner in own]
            closed = [labels[i] or () for i in rows]
            said = rank(backbone, asked, closed, target_length=lengths, **shared)
        else:
            lengths = [manner.target_length or MAX_NEW_TOKENS for manner in own]
            most = lengths if max_new_tokens is None else max_new_tokens
            said = decode(backbone, asked, max_new_tokens=most, seed=seed, **shared, **settings)
        found |= dict(zip(rows, said, strict=True))
    return [found[i] for i in range(len(texts))]


def task_of(metadata: Mapping[str, Any], fallback: Task | None = None) -> Task | None:
    """The task that a prompt was tuned for, from its metadata; `fallback` where it names none.

    A `preprocess` function of the user's own is taken from `fallback`.
    """
    description = metadata.get("task")
    if not isinstance(description, Mapping):
        return fallback
    same = fallback is not None and fallback.describe()["preprocess"] == description["preprocess"]
    return Task.from_description(description, fallback.preprocess if fallback and same else None)
