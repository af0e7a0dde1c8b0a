"""Prompts on the Hugging Face hub: downloads the files of one, and uploads a folder."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from etils import epath

from ptjax.errors import InputError
from ptjax.interop import peft

PROMPT = "prompt.safetensors"
"""ptjax's own prompt file in a folder that `PromptFile.save` writes."""
_PEFT = (peft.CONFIG, peft.WEIGHTS)
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[^@\s]+)?")
_FILES = (".safetensors", ".npy", ".json", ".bin")


def may_be_name(path: str) -> bool:
    """Whether a path that does not exist may be a name on the hub, as "me/tickets@v1" is."""
    return (
        _NAME.fullmatch(path) is not None
        and not path.startswith((".", "~"))
        and not path.endswith(_FILES)
    )


def download(name: str, revision: str | None = None) -> tuple[epath.Path, str]:
    """Downloads the files of a prompt, unless the hub's cache holds them; never a pickle.

    Args:
        name: "me/tickets-prompt", or "me/tickets-prompt@REVISION".
        revision: a branch, tag or commit; None: the default branch.

    Returns:
        (the folder in the cache, the name with its commit: "me/tickets-prompt@COMMIT").

    Raises:
        InputError: the repository or revision does not exist or is private, holds no prompt, or
            the hub cannot be reached and its cache does not hold the prompt; or both arguments
            name a revision.
    """
    from ptjax import hub  # imported late: few prompts are from the hub

    repo_id, _, named = name.partition("@")
    if named and revision is not None:
        raise InputError(f"{name}: it names a revision already; leave revision={revision!r} out")
    revision = named or revision
    folder = hub.download(repo_id, [PROMPT], revision)
    if not (folder / PROMPT).exists():
        folder = hub.download(repo_id, _PEFT, revision)
        if not all((folder / file).exists() for file in _PEFT):
            raise InputError(
                f"{name}: the repository holds no prompt that ptjax loads, neither {PROMPT} nor "
                f"PEFT's {' and '.join(_PEFT)}"
            )
    return epath.Path(folder), f"{repo_id}@{folder.name}"


def upload(
    folder: Path,
    repo_id: str,
    *,
    ours: Collection[str],
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Uploads the files of a local folder in one commit, and creates the repository if needed.

    Args:
        ours: the names of files that the commit removes if `folder` has no such file.
        private, token, revision, commit_message: as for `PromptFile.push_to_hub`.

    Returns:
        the URL of the commit.

    Raises:
        InputError: the id is invalid, the hub refuses the upload, or it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = sorted(file for file in folder.iterdir() if file.is_file())
        stale = {*ours} - {file.name for file in files}
        if stale:
            stale &= {*api.list_repo_files(repo_id, revision=revision)}
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(file.name, file) for file in files),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=commit_message,
            revision=revision,
        )
    except Exception as error:
        # The client wraps what fails in one of its threads.
        causes = (error, error.__cause__)
        reason = next(filter(None, (_refusal(x) for x in causes if x is not None)), None)
        if reason is None:
            raise
        raise InputError(f"{repo_id}: the prompt was not uploaded: {reason}") from error
    return str(commit.commit_url)


def _refusal(error: BaseException) -> str | None:
    """Why the hub did not take an upload, and what to do; None for an error of another kind."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in with `hf auth login`, set HF_TOKEN, or pass token="
    if isinstance(error, errors.HFValidationError):
        return "it is not a repository id (namespace/name)"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return f"the Hugging Face hub does not know you; {log_in}"
    if status == 403:
        return f"your token may not write there; {log_in} with one that may"
    if status is not None:
        said = str(getattr(error, "server_message", None) or "").split("\n")[0]
        return f"the Hugging Face hub answered HTTP {status}" + (f" ({said})" if said else "")
    # Which HTTP client the hub's library uses differs by its version.
    unreachable = type(error).__module__.split(".")[0].startswith(("httpx", "requests", "urllib3"))
    if unreachable or isinstance(error, errors.OfflineModeIsEnabled | ConnectionError):
        return (
            "the Hugging Face hub cannot be reached; check the network (and HF_HUB_OFFLINE), or "
            "write the same files with save(path)"
        )
    return None
