"""Downloads files of models from the Hugging Face hub; offline, its local cache is used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from etils import epy

from ptjax.errors import InputError, near

with epy.lazy_imports():
    import huggingface_hub
    import huggingface_hub.errors

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
"""The names of all files that a tokenizer may consist of."""


def download(
    repo_id: str,
    patterns: Iterable[str],
    revision: str | None = None,
    ours: Iterable[str] = (),
) -> Path:
    """Downloads the files of a model that match `patterns`, unless the hub's cache holds them.

    Args:
        repo_id: the model's id, namespace/name.
        patterns: names of files, with wildcards: "model-*.safetensors".
        revision: a branch, tag or commit; None: the default branch.
        ours: names of ptjax's own models; one that is similar to `repo_id` is suggested in the
            error.

    Returns:
        the folder in the cache that contains the files.

    Raises:
        InputError: the model or revision does not exist, is private or gated, or the hub cannot be
            reached and its cache does not hold the model.
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
    """Explains what failed and what to do."""
    errors = huggingface_hub.errors
    # The hub's HTTP error is the cause of an error about the cache.
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    hub = "not a local path, and the Hugging Face hub"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return "neither a local path nor a model id (namespace/name); correct the path"
    if isinstance(error, errors.GatedRepoError):  # a subclass of RepositoryNotFoundError
        return f"{hub} gives access to this model on request only; {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has no revision {revision!r} of this model; correct it"
    if status in (401, 403):
        return f"{hub} denies access to it: private, or misspelt; {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no such model; correct the path or the id"
    if status is not None:
        return f"{hub} failed (HTTP {status}); try again later"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{hub} cannot be reached; its local cache does not hold the model; check the network "
            "(and HF_HUB_OFFLINE), or download it first"
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{hub} did not provide it ({reason})"
