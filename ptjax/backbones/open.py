"""Opens a backbone: finds its format, config and tokenizer; the weights stay in their files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from etils import epath

from ptjax.backbones import shipped
from ptjax.data.tokenizer import Tokenizer, check_vocabulary, find_tokenizer, load_tokenizer
from ptjax.errors import InputError, check_path, missing, near
from ptjax.files import JsonObject, Metadata
from ptjax.interop import huggingface
from ptjax.interop.formats import Opened, open_directory
from ptjax.interop.lazy_array import LazyArray
from ptjax.interop.prompt_file import T5X_PROMPT
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.models.family import Family, Feature, check_supported
from ptjax.models.t5_family import T5_FAMILY
from ptjax.trees import flatten_paths

_CHOSEN_FIELDS = {"dtype", "scan_layers", "remat"}
"""Fields of `T5Config` about how the network is run, which files do not state."""


@dataclasses.dataclass(frozen=True)
class OpenBackbone:
    """A backbone whose weights are still in their files.

    Attributes:
        arrays: the parameters by ptjax's names.
        prompt: a prompt in the same checkpoint, if there is one.
        config, tokenizer, name, assumed, family: as the attributes of `Backbone`.
    """

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
    """Opens a backbone without reading its weights; arguments and errors as `load_backbone`.

    It reads the config and the tokenizer, downloads a hub id, and checks the names and shapes of
    the parameters.
    """
    chosen = _supported(family, config_overrides)
    arrays, from_config, name, folders = _open(path, chosen, family)
    prompt = arrays.pop(T5X_PROMPT, None)
    config, assumed = _make_config(arrays, from_config, chosen, dtype, name, family)
    _check(arrays, config, name, family)
    # Before the weights are read: a wrong tokenizer fails in a second, not after minutes.
    tokenizer = _tokenizer_of(tokenizer, folders)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
        check_end_of_sequence(tokenizer, config)
    return OpenBackbone(arrays, prompt, config, tokenizer, name, assumed, family)


def _open(path: str | os.PathLike[str], chosen: Collection[str], family: Family) -> Opened:
    """Opens `path`: shipped with ptjax, local, remote or on the hub."""
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
    """Whether `load_backbone(path)` would download: `path` may be a hub id that is not cached."""
    name = os.fspath(path)
    if shipped.find(name) or not _may_be_hub_id(name) or epath.Path(path).exists():
        return False
    repo_id, _, revision = name.partition("@")
    return not huggingface.is_downloaded(repo_id, revision or None)


def _supported(family: Family, overrides: Metadata) -> JsonObject:
    """`overrides` without unused settings that the family lacks; InputError if one is used."""
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
    """The tokenizer that the user chose, else the first one in `folders`."""
    if isinstance(tokenizer, str | os.PathLike):
        return load_tokenizer(tokenizer)
    if tokenizer is not None:
        return tokenizer
    return next(filter(None, map(find_tokenizer, folders)), None)


def _make_config(
    lazy_arrays: Mapping[str, LazyArray],
    from_config: Metadata,
    overrides: Metadata,
    dtype: str,
    name: str,
    family: Family,
) -> tuple[Any, tuple[str, ...]]:
    """(config, fields set to the family's defaults because neither files nor user state them).

    The user's fields override those of config.json, and these override the inferred ones.
    """
    inferred, kind_of_config = family.infer_config(lazy_arrays, name), family.config_type
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
            raise InputError(f"load_backbone: {field} must be of type {kind}, got {value!r}")
    from_config = {field: value for field, value in from_config.items() if field in kinds}
    # Parameter names distinguish one MLP branch from two, but do not state the activation.
    not_inferred = {*defaults} - (set(inferred) - {"mlp_activations"})
    assumed = tuple(sorted(not_inferred - set(from_config) - set(overrides) - _CHOSEN_FIELDS))
    settings: dict[str, Any] = {**inferred, **from_config, **overrides, "dtype": dtype}
    if "eos_ids" in settings:
        settings["eos_ids"] = tuple(settings["eos_ids"])
    return kind_of_config(**settings), assumed


def _check(lazy_arrays: Mapping[str, LazyArray], config: Any, name: str, family: Family) -> None:
    """InputError unless the arrays are exactly the parameters of `config`, with their shapes."""
    family.check_depth(lazy_arrays, config, name)
    try:
        of_layers = dataclasses.replace(config, scan_layers=False) if config.scan_layers else config
        expected = flatten_paths(family.parameter_shapes(of_layers))
    except InputError:
        raise
    except Exception as error:  # sizes of 0 or activations unknown to Flax, deep inside the network
        what = family.title.removeprefix("a ")
        raise InputError(f"{name}: invalid config of a {what}: {config} ({error})") from error
    for path, leaf in expected.items():
        if path not in lazy_arrays:
            raise InputError(f"{name}: parameter {path} is missing; is the checkpoint complete?")
        array = lazy_arrays[path]
        if array.shape != leaf.shape:
            raise InputError(
                f"{array.where}: parameter {path} has shape {array.shape}, but the config says "
                f"{leaf.shape}"
            )
    if extra := sorted(set(lazy_arrays) - set(expected)):
        raise InputError(
            f"{name}: parameter {extra[0]} does not belong to {family.title} of this config"
        )
