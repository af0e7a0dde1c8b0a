"""Predictions for texts: the likeliest label of a closed set, or a generated text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from scipy.special import softmax

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.preprocess import check_labels
from ptjax.errors import InputError
from ptjax.inference.bank import PromptIds, choose_prompts
from ptjax.inference.batches import tokenize_inputs
from ptjax.inference.generate import (
    INPUT_LENGTH,
    MAX_NEW_TOKENS,
    Settings,
    generate_with_scores,
    tokenizer_of,
)
from ptjax.inference.labels import make_label_tokens, predict_labels
from ptjax.inference.model import bind
from ptjax.inference.prompts import PromptLike, open_prompt
from ptjax.inference.records import InputFormat

LABEL_LENGTH = 16
"""The most tokens of a label, if neither the caller nor the prompt's format sets it."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one input.

    Attributes:
        text: the label or the generated text.
        score: its log-likelihood; of a beam search, with the brevity penalty.
        probabilities: if labels were ranked, the probability of each, which add up to 1; else None.
    """

    text: str
    score: float
    probabilities: dict[str, float] | None = None


def rank(
    backbone: Backbone,
    texts: Sequence[str],
    labels: Sequence[str] | Sequence[Sequence[str]],
    prompt: PromptLike = None,
    *,
    prompt_ids: PromptIds = None,
    input_length: int | Sequence[int] = INPUT_LENGTH,
    target_length: int | Sequence[int] = LABEL_LENGTH,
    batch_size: int = 32,
) -> list[Prediction]:
    """Predicts the likeliest of a closed set of labels for each text, in order.

    Args:
        texts: formatted inputs.
        labels: one set for all texts, or one for each.
        prompt, prompt_ids: as for `ptjax.forward`.
        input_length, target_length: in tokens, one for all texts or one for each. Longer inputs are
            truncated, with a warning; longer labels are refused.

    Raises:
        InputError: no tokenizer, a label that the vocabulary cannot represent, a prompt that does
            not fit, or a logit that is not finite (if a damaged weight is the cause, it is named).
    """
    tokenizer = tokenizer_of(backbone)
    opened = open_prompt(backbone, prompt)
    ids = choose_prompts(opened, prompt_ids, len(texts))
    if not texts:
        return []
    sets = _sets_of(labels, len(texts))
    lengths = np.broadcast_to(target_length, len(texts)).tolist()
    keys = list(zip(sets, lengths, strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    for labels_of_set, length in numbers:
        check_labels(labels_of_set, tokenizer, length)
    source = tokenize_inputs(texts, tokenizer, input_length)
    special = backbone.config.special_ids
    chosen, likelihoods = predict_labels(
        bind(backbone, opened),
        source,
        [make_label_tokens(set_, tokenizer, length, special) for set_, length in numbers],
        batch_size,
        label_sets=np.array([numbers[key] for key in keys], np.int32),
        prompt_ids=ids,
    )
    # A smaller set's row ends in -inf, and in probabilities of 0.
    own = [row[: len(labels_of_row)] for labels_of_row, row in zip(sets, likelihoods, strict=True)]
    check_scores(own, backbone, "the score of a label")
    shares = softmax(likelihoods.astype(np.float64), axis=1)
    return [
        Prediction(names[i], float(row[i]), dict(zip(names, map(float, share), strict=False)))
        for names, i, row, share in zip(sets, chosen, likelihoods, shares, strict=True)
    ]


def _sets_of(labels: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """The label set of each of `count` texts."""
    if isinstance(labels[0], str):
        return [tuple(map(str, labels))] * count
    return [tuple(labels_of_text) for labels_of_text in labels]


def decode(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: PromptLike = None,
    *,
    prompt_ids: PromptIds = None,
    max_new_tokens: int | Sequence[int] | None = None,
    input_length: int | Sequence[int] | None = None,
    batch_size: int = 32,
    **settings: Unpack[Settings],
) -> list[Prediction]:
    """Generates a text for each input, like `ptjax.generate`, and returns it with its score."""
    generated, scores = generate_with_scores(
        backbone,
        texts,
        prompt,
        prompt_ids=prompt_ids,
        max_new_tokens=max_new_tokens,
        input_length=input_length,
        batch_size=batch_size,
        **settings,
    )
    return [Prediction(text, float(score)) for text, score in zip(generated, scores, strict=True)]


def predict(
    backbone: Backbone,
    texts: Sequence[str],
    formats: Sequence[InputFormat],
    prompt: PromptLike = None,
    prompt_ids: PromptIds = None,
    *,
    decode_all: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    **settings: Unpack[Settings],
) -> list[Prediction]:
    """Predicts for each text: ranks the labels if its task has a closed set, else generates.

    Args:
        texts: formatted inputs.
        formats: the input format of each text's prompt, with its task.
        prompt, prompt_ids: as for `ptjax.forward`.
        decode_all: generate even if the task has labels.
        max_new_tokens: of generated texts, in place of the formats' target lengths.
        settings: of generated texts, as for `ptjax.generate`.

    Raises:
        InputError: as for `rank` and `decode`; or settings of generation were given, but every text
            is ranked.
    """
    labels = [None if x.task is None or decode_all else x.task.labels for x in formats]
    ranked = [i for i, labels_of_text in enumerate(labels) if labels_of_text is not None]
    generated = sorted(set(range(len(texts))) - set(ranked))
    if ranked and not generated and _changes_generation(settings):
        raise InputError(
            f"the task has a closed set of labels ({', '.join(labels[0] or ())}), which are ranked;"
            " --num_beams, --temperature and --top_p need --decode"
        )
    opened = open_prompt(backbone, prompt)

    def ids_of(rows: Sequence[int]) -> list[str | int | None] | None:
        return None if prompt_ids is None else [prompt_ids[i] for i in rows]

    def inputs_of(rows: Sequence[int]) -> tuple[list[str], list[int]]:
        return [texts[i] for i in rows], [formats[i].input_length or INPUT_LENGTH for i in rows]

    predictions: dict[int, Prediction] = {}
    if ranked:
        chosen, lengths = inputs_of(ranked)
        answers = rank(
            backbone,
            chosen,
            [labels[i] or () for i in ranked],
            opened,
            prompt_ids=ids_of(ranked),
            input_length=lengths,
            target_length=[formats[i].target_length or LABEL_LENGTH for i in ranked],
            batch_size=batch_size,
        )
        predictions |= dict(zip(ranked, answers, strict=True))
    if generated:
        chosen, lengths = inputs_of(generated)
        longest = [formats[i].target_length or MAX_NEW_TOKENS for i in generated]
        answers = decode(
            backbone,
            chosen,
            opened,
            prompt_ids=ids_of(generated),
            max_new_tokens=longest if max_new_tokens is None else max_new_tokens,
            input_length=lengths,
            batch_size=batch_size,
            **settings,
        )
        predictions |= dict(zip(generated, answers, strict=True))
    return [predictions[i] for i in range(len(texts))]


def _changes_generation(settings: Settings) -> bool:
    defaults: Settings = {"num_beams": 1, "temperature": 0.0, "top_p": 1.0}
    return any(settings.get(name, default) != default for name, default in defaults.items())
