"""Predictions for texts: the likeliest label of a closed set, or a generated text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from ptjax.backbones.damage import check_scores
from ptjax.backbones.load import Backbone
from ptjax.data.preprocess import check_labels
from ptjax.errors import InputError, check_at_least
from ptjax.inference.bank import PromptIds, choose_prompts
from ptjax.inference.batches import tokenize_inputs
from ptjax.inference.generate import (
    INPUT_LENGTH,
    MAX_NEW_TOKENS,
    Decoding,
    Settings,
    generate_with_scores,
    tokenizer_of,
)
from ptjax.inference.labels import label_probabilities, make_label_tokens, predict_labels
from ptjax.inference.model import bind
from ptjax.inference.prompts import PromptLike, open_prompt
from ptjax.inference.records import InputFormat

LABEL_LENGTH = 16
"""The maximum number of tokens of a label if neither the caller nor the prompt's format sets it."""


_SHOWN = 5


@dataclasses.dataclass(frozen=True, repr=False)
class Prediction:
    """The prediction for one input.

    Attributes:
        text: the label or the generated text.
        score: the log-likelihood of `text`; after a beam search, with its brevity penalty.
        probabilities: if labels were ranked, the probability of each label, normalised to a sum of
            1; otherwise None.
    """

    text: str
    score: float
    probabilities: dict[str, float] | None = None

    def __repr__(self) -> str:
        """Rounds numbers to four digits, and shows the likeliest `_SHOWN` labels, likeliest first.

        >>> Prediction("billing", -0.11909, {"no": 0.1122, "billing": 0.8878})
        Prediction(text='billing', score=-0.1191, probabilities={'billing': 0.8878, 'no': 0.1122})
        """
        parts = [f"text={self.text!r}", f"score={self.score:.4g}"]
        if self.probabilities is not None:
            likeliest = sorted(self.probabilities.items(), key=lambda item: -item[1])
            shown = [f"{label!r}: {share:.4g}" for label, share in likeliest[:_SHOWN]]
            more = ["..."] * (len(likeliest) > _SHOWN)
            parts.append(f"probabilities={{{', '.join(shown + more)}}}")
        return f"Prediction({', '.join(parts)})"


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
    """Predicts for each text the likeliest of a closed set of labels; keeps the order of texts.

    Args:
        texts: formatted inputs; a prompt's template is not applied here.
        labels: one list of labels for all texts, or one list for each text.
        prompt, prompt_ids: as for `ptjax.forward`.
        input_length, target_length: the maximum number of tokens of inputs and labels: one for all
            texts, or one for each. Longer inputs are truncated, with a warning. Longer labels raise
            an error.

    Raises:
        InputError: the backbone has no tokenizer, a label is too long, cannot be represented by the
            vocabulary or has the same tokens as another, the prompt does not fit the backbone, or a
            score is not finite (if a damaged weight is the cause, it is named).
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
    shares = label_probabilities(likelihoods)
    return [
        Prediction(names[i], float(row[i]), dict(zip(names, map(float, share), strict=False)))
        for names, i, row, share in zip(sets, chosen, likelihoods, shares, strict=True)
    ]


def _sets_of(labels: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """The label set of each of `count` texts."""
    if isinstance(labels[0], str):
        return [tuple(map(str, labels))] * count
    return [tuple(labels_of_text) for labels_of_text in labels]


def generate_answers(
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


def predict_texts(
    backbone: Backbone,
    texts: Sequence[str],
    formats: Sequence[InputFormat],
    prompt: PromptLike = None,
    prompt_ids: PromptIds = None,
    *,
    decode: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    **settings: Unpack[Settings],
) -> list[Prediction]:
    """Predicts for each text: ranks the labels if its task has a closed set, else generates.

    Args:
        texts: formatted inputs.
        formats: the task and the maximum lengths for each text.
        prompt, prompt_ids: as for `ptjax.forward`.
        decode: generate even if the task has a closed set of labels.
        max_new_tokens: the maximum length of generated texts; default: the formats' target lengths.
        settings: the settings of generation, as for `ptjax.generate`.

    Raises:
        InputError: as for `rank` and `generate_answers`; or all texts are ranked, but `num_beams`,
            `temperature` or `top_p` differs from its default.
    """
    Decoding(**settings)  # refuses bad values even if nothing is generated
    check_at_least(1, batch_size=batch_size)
    labels = [None if x.task is None or decode else x.task.labels for x in formats]
    ranked = [i for i, labels_of_text in enumerate(labels) if labels_of_text is not None]
    generated = sorted(set(range(len(texts))) - set(ranked))
    if ranked and not generated and _changes_generation(settings):
        raise InputError(
            f"the task has a closed set of labels ({', '.join(labels[0] or ())}), which are ranked;"
            " --num_beams, --temperature and --top_p need --decode (decode=True)"
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
        answers = generate_answers(
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
