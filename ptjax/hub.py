"""The Hugging Face hub: files of a model, from its cache where there is no network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors

from ptjax.errors import InputError, near

TOKENIZER_FILES = (
    "spiece.model",
    "sentencepiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
"""All that a tokenizer's folder may be made of."""


def download(
    repo_id: str,
    patterns: Iterable[str],
    revision: str | None = None,
    ours: Iterable[str] = (),
) -> Path:
    """A local folder with the files of a model that fit the patterns, from the cache if offline.

    Args:
        ours: names that ptjax itself gives; one that is alike is suggested.

    Raises:
        InputError: there is no such model or revision, it is private or gated, or the hub cannot
            be reached.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns)
        )
    except (OSError, RuntimeError, ValueError) as error:
        hint = near(repo_id, ours, listed=False)
        raise InputError(f"{repo_id}: {_reason(error, revision)}{hint}") from error
    return Path(folder)


def _reason(error: Exception, revision: str | None) -> str:
    """What is wrong and what to do about it."""
    errors = huggingface_hub.errors
    # Where the hub fails, the error of its answer stands behind one that speaks of the cache.
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    hub = "not a path here, and the Hugging Face hub"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return "neither a path here nor a model id (namespace/name); correct the path"
    if isinstance(error, errors.GatedRepoError):  # of the class of missing ones
        return f"{hub} gives this model only to those it knows; {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has no revision {revision!r} of this model; correct it"
    if status in (401, 403):
        return f"{hub} does not show it to everybody: private, or misspelt; {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no such model; correct the path or the id"
    if status is not None:
        return f"{hub} fails (HTTP {status}); try again later"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{hub} cannot be reached, nor does its cache here hold the model; check the network "
            "(and HF_HUB_OFFLINE), or download it first"
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{hub} does not give this model ({reason})"
