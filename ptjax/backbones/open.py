"""Opens a backbone: what a path holds, its config and tokenizer, weights still in their files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from etils import epath

from ptjax.backbones import shipped
from ptjax.data.tokenizer import Tokenizer, check_vocabulary, find_tokenizer, load_tokenizer
from ptjax.errors import InputError, check_path, missing, near
from ptjax.interop import huggingface
from ptjax.interop.formats import Opened, open_directory
from ptjax.interop.lazy_array import LazyArray
from ptjax.interop.prompt_file import T5X_PROMPT
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.models.family import Family, Feature, check_supported
from ptjax.models.t5_family import T5_FAMILY
from ptjax.trees import flatten_paths

_CHOSEN_FIELDS = {"dtype", "scan_layers", "remat"}
"""Of `T5Config`: how the network is run, which no file could tell."""


@dataclasses.dataclass(frozen=True)
class OpenBackbone:
    """A backbone whose weights are still in their files; `prompt` is one beside them."""

    arrays: dict[str, LazyArray]
    prompt: LazyArray | None
    config: Any
    tokenizer: Tokenizer | None
    name: str
    assumed: tuple[str, ...]
    family: Family = T5_FAMILY


def open_backbone(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    family: Family = T5_FAMILY,
    **config_overrides: Any,
) -> OpenBackbone:
    """`load_backbone` up to the point where weights would be read; args and errors as there."""
    chosen = _supported(family, config_overrides)
    arrays, told, name, folders = _open(path, chosen, family)
    prompt = arrays.pop(T5X_PROMPT, None)
    config, assumed = _make_config(arrays, told, chosen, dtype, name, family)
    _check(arrays, config, name, family)
    # Before the weights are read: a wrong tokenizer is found in a second, not after minutes.
    found = _tokenizer_of(tokenizer, folders)
    if found is not None:
        check_vocabulary(found, config.vocab_size)
        check_end_of_sequence(found, config)
    return OpenBackbone(arrays, prompt, config, found, name, assumed, family)


def _open(path: str | os.PathLike[str], chosen: Collection[str], family: Family) -> Opened:
    """What `path` holds, wherever that lies."""
    check_path("the path of the backbone", path)
    name = os.fspath(path)
    directory = shipped.find(name) or epath.Path(path).expanduser()
    if not directory.exists():
        if not _may_be_hub_id(name):
            raise missing("backbone", name)
        repo_id, _, revision = name.partition("@")
        directory, revision = huggingface.download(repo_id, revision or None, [shipped.NANO])
        name = f"{repo_id}@{revision}"
    return open_directory(directory, name, chosen, family)


def _may_be_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~", "gs://"))


def would_download(path: str | os.PathLike[str]) -> bool:
    """Whether `path` may be a model of the hub of which this machine has no copy."""
    name = os.fspath(path)
    if shipped.find(name) or not _may_be_hub_id(name) or epath.Path(path).exists():
        return False
    repo_id, _, revision = name.partition("@")
    return not huggingface.is_downloaded(repo_id, revision or None)


def _supported(family: Family, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` that the family's config has; InputError for what its networks cannot do."""
    chosen = dict(overrides)
    plain: tuple[tuple[Feature, str, Any], ...] = (
        ("scanned layers", "scan_layers", False),
        ("remat", "remat", "none"),
    )
    for feature, field, unused in plain:
        if feature in family.lacks and chosen.pop(field, unused) != unused:
            check_supported(family, feature)
    return chosen


def _tokenizer_of(
    tokenizer: str | os.PathLike[str] | Tokenizer | None, folders: Iterable[epath.Path]
) -> Tokenizer | None:
    """The tokenizer that the user names, else the first one in `folders`."""
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return tokenizer
    return next(filter(None, map(find_tokenizer, folders)), None)


def _make_config(
    stored: Mapping[str, LazyArray],
    told: Mapping[str, Any],
    overrides: Mapping[str, Any],
    dtype: str,
    name: str,
    family: Family,
) -> tuple[Any, tuple[str, ...]]:
    """(config, fields at the family's values that neither files nor user tell).

    What config.json tells stands above what names and shapes tell, and the user above both.
    """
    inferred, kind_of_config = family.infer_config(stored, name), family.config_type
    defaults: dict[str, Any] = {
        f.name: f.default
        for f in dataclasses.fields(kind_of_config)
        if f.default is not dataclasses.MISSING
    }
    kinds: dict[str, Any] = {f: type(value) for f, value in (defaults | inferred).items()}
    kinds |= {"forced_bos_id": int | None, "eos_ids": tuple | list}
    for field, value in overrides.items():
        if field not in kinds:
            owner = kind_of_config.__name__
            raise InputError(f"load_backbone: {owner} has no field {field!r}{near(field, kinds)}")
        if not isinstance(value, (int, float) if kinds[field] is float else kinds[field]):
            kind = getattr(kinds[field], "__name__", kinds[field])
            raise InputError(f"load_backbone: {field} = {value!r} is no {kind}")
    told = {field: value for field, value in told.items() if field in kinds}
    # Names tell one branch from two, not what is applied to them.
    untold = {*defaults} - (set(inferred) - {"mlp_activations"})
    assumed = tuple(sorted(untold - set(told) - set(overrides) - _CHOSEN_FIELDS))
    settings: dict[str, Any] = {**inferred, **told, **overrides, "dtype": dtype}
    if "eos_ids" in settings:
        settings["eos_ids"] = tuple(settings["eos_ids"])
    return kind_of_config(**settings), assumed


def _check(stored: Mapping[str, LazyArray], config: Any, name: str, family: Family) -> None:
    """Every parameter of `config`, each of its shape, and no other."""
    family.check_depth(stored, config, name)
    try:
        of_layers = dataclasses.replace(config, scan_layers=False) if config.scan_layers else config
        expected = flatten_paths(family.parameter_shapes(of_layers))
    except InputError:
        raise
    except Exception as error:  # sizes of 0 or activations unknown to Flax, deep inside the network
        what = family.title.removeprefix("a ")
        raise InputError(f"{name}: these sizes make no {what}: {config} ({error})") from error
    for path, leaf in expected.items():
        if path not in stored:
            raise InputError(f"{name}: parameter {path} is missing; is the checkpoint complete?")
        if stored[path].shape != leaf.shape:
            raise InputError(
                f"{stored[path].where}: parameter {path} has shape {stored[path].shape}, the "
                f"config wants {leaf.shape}"
            )
    if extra := sorted(set(stored) - set(expected)):
        raise InputError(
            f"{name}: parameter {extra[0]} does not belong to {family.title} of this config"
        )
