"""Describes a prompt, a run's MODEL_DIR, one of its checkpoints or a backbone, given its path."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from ptjax import files
from ptjax.backbones.fingerprint import Fingerprints, digest
from ptjax.backbones.open import OpenBackbone, open_backbone
from ptjax.data.tokenizer import Tokenizer
from ptjax.errors import InputError, check_path
from ptjax.files import JsonObject
from ptjax.interop import peft, t5x
from ptjax.interop.adapter_file import METHOD, is_adapter, read_adapter
from ptjax.interop.hub import PROMPT
from ptjax.interop.peft_adapters import is_peft_adapter, load_peft_adapter
from ptjax.interop.prompt_file import PromptFile, load_prompt, prompts_below, wrong_width
from ptjax.model_dir import ModelDir


def describe(
    path: str | os.PathLike[str], tokenizer: str | None = None, **config_overrides: Any
) -> JsonObject:
    """Describes a file or folder as JSON values. Reads only a sample of a backbone's weights.

    Args:
        path: a prompt, an adapter, MODEL_DIR, one of its checkpoints, or a backbone (as for
            `load_backbone`).
        tokenizer: a backbone's tokenizer, as for `load_backbone`.
        **config_overrides: as for `load_backbone`.

    Returns:
        the entry "kind" ("prompt", "adapter", "run", "checkpoint" or "backbone"), and the entries
        that the function for this kind returns, such as `describe_prompt`.

    Raises:
        InputError: the path is of no such kind, or its content is damaged.
    """
    check_path("the path to describe", path)
    place = epath.Path(path).expanduser()
    # A MODEL_DIR of T5X has a config.gin too.
    if place.is_dir() and ModelDir(place).is_run() and not t5x.is_t5x(place):
        return {"kind": "run"} | describe_run(place)
    if (place / "identity").is_dir() and (place / "state").is_dir():
        return {"kind": "checkpoint"} | describe_checkpoint(place)
    saved = (place / PROMPT).exists() or peft.is_peft(place)
    if is_peft_adapter(place) or (place.is_file() and is_adapter(place)):
        return {"kind": "adapter"} | describe_adapter(place)
    if saved or (place.is_file() and place.name != "checkpoint"):
        return {"kind": "prompt", "path": os.fspath(path)} | describe_prompt(load_prompt(place))
    backbone_here = t5x.is_t5x(place) or (place / "config.json").exists()
    if place.is_dir() and not backbone_here and (below := prompts_below(place)):
        raise InputError(f"{path} is not a prompt itself; did you mean {below[0]}?")
    opened = open_backbone(path, tokenizer=tokenizer, **config_overrides)
    return {"kind": "backbone"} | describe_backbone(opened)


def describe_backbone(opened: OpenBackbone) -> JsonObject:
    """Describes a backbone: its config, size, dtypes, fingerprints and tokenizer.

    Reads only the weights that the fingerprints sample, so the backbone may be larger than this
    machine's memory. The entry "parameters" is the number of weights, "bytes" their size in the
    dtypes of the files, and "prompt_inside" the shape of a prompt in the same checkpoint, or None.
    """
    fingerprints = fingerprints_of(opened)
    counts = {name: int(np.prod(array.shape)) for name, array in opened.arrays.items()}
    widths = {name: jnp.dtype(array.dtype).itemsize for name, array in opened.arrays.items()}
    tokenizer = opened.tokenizer
    return {
        "name": opened.name,
        "config": {k: v for k, v in dataclasses.asdict(opened.config).items() if k != "dtype"},
        "assumed": list(opened.assumed),
        "parameters": sum(counts.values()),
        "bytes": sum(counts[name] * widths[name] for name in counts),
        "stored_as": sorted({array.dtype for array in opened.arrays.values()}),
        "fingerprint": fingerprints.v2,
        "fingerprint_v1": fingerprints.v1,
        "tokenizer": tokenizer.name if tokenizer else None,
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        "prompt_inside": list(opened.prompt.shape) if opened.prompt else None,
    }


def fingerprints_of(opened: OpenBackbone) -> Fingerprints:
    """Computes the same fingerprints as `load_backbone`, but reads only a sample of the weights."""

    def sample(path: str) -> dict[str, np.ndarray]:
        array = opened.arrays[path]
        parts = opened.family.fingerprint_parts(path, array.shape)
        read = array.read_parts([*parts.values()])
        return {
            kind: np.asarray(part, np.float32).astype(jnp.bfloat16)
            for kind, part in zip(parts, read, strict=True)
        }

    samples = {path: sample(path) for path in opened.arrays}
    return digest(opened.config, samples, opened.family)


def describe_prompt(file: PromptFile) -> JsonObject:
    """Describes a prompt: its shape, its size in memory ("bytes"), its norms and its metadata.

    The norms are the RMS of all entries ("rms"), and the least, median and greatest L2 norm of a
    row ("row_norms").
    """
    norms = np.linalg.norm(file.prompt, axis=1)
    return {
        "shape": list(file.prompt.shape),
        "bytes": file.prompt.nbytes,
        "sees_input": file.attends_to_input,
        "kv_cache": file.states is not None,
        "rms": float(np.sqrt(np.mean(np.square(file.prompt)))),
        "row_norms": {
            "least": float(norms.min()),
            "median": float(np.median(norms)),
            "greatest": float(norms.max()),
        },
        "metadata": file.metadata,
    }


def describe_adapter(path: epath.Path) -> JsonObject:
    """Describes an adapter file, or PEFT's folder: its method, size, arrays and metadata."""
    if is_peft_adapter(path):
        read = load_peft_adapter(path)
        arrays, metadata = read.arrays, read.metadata
        method = {"name": read.method, **read.fields}
    else:
        arrays, metadata = read_adapter(path)
        method = metadata.pop(METHOD)
    return {
        "path": os.fspath(path),
        "method": method,
        "parameters": sum(array.size for array in arrays.values()),
        "bytes": sum(array.nbytes for array in arrays.values()),
        "arrays": {name: list(array.shape) for name, array in arrays.items()},
        "metadata": metadata,
    }


def describe_run(model_dir: epath.Path) -> JsonObject:
    """Describes the run in a MODEL_DIR: its results, and the step of its newest checkpoint.

    These are None if they do not exist. If the run has saved a best prompt, best prompts of the
    members of a sweep, a best adapter, best adapters or a best model, the entries "best_prompt",
    "best_prompts", "best_adapter", "best_adapters" or "best_model" contain their paths.
    "best_prompt" also has the entries of `describe_prompt`, "best_adapter" those of
    `describe_adapter`.
    """
    run = ModelDir(model_dir)
    described: JsonObject = {
        "path": os.fspath(model_dir),
        "finished": run.results.exists(),
        "newest_checkpoint": max(run.checkpoint_steps(), default=None),
        "results": run.read_results(),
    }
    if members := run.members():
        described["best_prompts"] = {name: os.fspath(run.best_prompt(name)) for name in members}
    if (best := run.best_prompt()).exists():
        described["best_prompt"] = {"path": os.fspath(best)} | describe_prompt(load_prompt(best))
    if members := run.members("adapter"):
        described["best_adapters"] = {name: os.fspath(run.best_adapter(name)) for name in members}
    if run.best_adapter().exists():
        described["best_adapter"] = describe_adapter(run.best_adapter())
    if run.best_model.exists():
        described["best_model"] = os.fspath(run.best_model)
    return described


def describe_checkpoint(folder: epath.Path) -> JsonObject:
    """Describes a checkpoint of a run; reads no array.

    Args:
        folder: MODEL_DIR/checkpoints/STEP.

    Returns:
        "path"; "run" and "progress", the contents of the checkpoint's JSON files `identity` and
        `progress`; "arrays", which maps each array's name to its shape and dtype; and "bytes", the
        size of all arrays in memory.

    Raises:
        InputError: the checkpoint is incomplete or damaged.
    """
    if not (folder / "state" / "manifest.ocdbt").exists():
        raise InputError(f"{folder}: the checkpoint is incomplete, its arrays are missing")
    from orbax.checkpoint import v1 as ocp  # imported late: it takes long

    # Orbax needs an absolute path, and `absolute` does not work for gs://.
    remote = "://" in os.fspath(folder)
    try:
        place = folder if remote else folder.absolute()
        state: Any = ocp.metadata(place, "state").metadata
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the checkpoint is incomplete or damaged ({error})") from error
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    return {
        "path": os.fspath(folder),
        "run": _read_json(folder / "identity" / "data.json"),
        "progress": _read_json(folder / "progress" / "data.json"),
        "arrays": {name: f"{list(leaf.shape)} {leaf.dtype}" for name, leaf in leaves.items()},
        "bytes": sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves.values()),
    }


def nearest_tokens(
    prompt: np.ndarray, embedding: np.ndarray, tokenizer: Tokenizer | None, count: int = 3
) -> list[list[tuple[str, float]]]:
    """Finds the vocabulary tokens nearest to each row of a prompt, by cosine similarity.

    Args:
        prompt: [P, D].
        embedding: the backbone's embedding, [V, D].
        tokenizer: names the tokens; None shows them as ids: "<17>".
        count: the number of tokens per row.

    Returns:
        for each row, a list of (token, cosine similarity), best first.

    Raises:
        InputError: the prompt and the embedding have different widths.
    """
    if prompt.shape[1] != embedding.shape[1]:
        raise wrong_width("the prompt", prompt.shape, "the backbone", embedding.shape[1])
    cosines = _unit(prompt) @ _unit(embedding).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]

    def show(index: int) -> str:
        return tokenizer.id_to_piece(index) if tokenizer else f"<{index}>"

    return [
        [(show(int(i)), float(row[i])) for i in best]
        for row, best in zip(cosines, order, strict=True)
    ]


def compare(
    prompt: str | os.PathLike[str], backbone: str, tokenizer: str | None = None, count: int = 3
) -> list[list[tuple[str, float]]]:
    """Returns `nearest_tokens` for a prompt and a backbone, given by their paths.

    Of the backbone's weights, reads only the embedding and those that the fingerprint samples.
    Logs a warning if the prompt was tuned on a different backbone.

    Args:
        prompt: as for `load_prompt`.
        backbone: as for `load_backbone`.
        tokenizer: as for `load_backbone`.
        count: the number of tokens per row of the prompt.
    """
    file, opened = load_prompt(prompt), open_backbone(backbone, tokenizer=tokenizer)
    if fingerprints_of(opened).contradict(file.metadata):
        logging.warning("the prompt was tuned on different weights than %s", opened.name)
    embedding = opened.arrays[opened.family.embedding_path].read_all().astype(np.float32)
    return nearest_tokens(np.asarray(file.prompt), embedding, opened.tokenizer, count)


def _unit(rows: np.ndarray) -> np.ndarray:
    # Rows of zeros (never trained) have no direction: their cosine is 0.
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _read_json(file: epath.Path) -> JsonObject | None:
    return files.read_object(file) if file.exists() else None
