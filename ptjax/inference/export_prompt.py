"""`export`: writes a prompt in the format of another program, or compiled for its backbone."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from etils import epath

from ptjax import files
from ptjax.backbones import describe
from ptjax.backbones.load import Backbone, load_backbone
from ptjax.backbones.open import OpenBackbone, open_backbone
from ptjax.backbones.save import save_backbone
from ptjax.errors import InputError, check_path, near
from ptjax.files import Metadata, PathLike
from ptjax.inference.bank import SinglePrompt, wrap_prompt
from ptjax.inference.prompt_kv import precompute_prompt_kv
from ptjax.inference.prompts import check_adapter, check_prompt
from ptjax.interop import peft, t5x, t5x_write
from ptjax.interop.adapter_file import METHOD, save_adapter
from ptjax.interop.prompt_file import PromptFile, save_prompt, wrong_width
from ptjax.interop.write_prompt import check_folder, hub_id, with_run, write_card
from ptjax.methods.adapter import Adapter, holds_adapter, load_adapter

ExportFormat = Literal["safetensors", "kv_cache", "npy", "peft", "huggingface", "t5x", "merged"]
"""The formats of `export`; "peft" and "huggingface" are two names of one."""
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
PEFT = ("peft", "huggingface")
FOLDERS = (*PEFT, "t5x", "merged")
"""The formats that are folders."""
T = TypeVar("T")
_NEEDED_FOR = {"t5x": "T5X checkpoint"}


def export(
    prompt: SinglePrompt | Adapter,
    output: PathLike,
    *,
    to: ExportFormat,
    backbone: Backbone | PathLike | None = None,
    force: bool = False,
) -> epath.Path:
    """Writes a prompt or an adapter in another format; returns the path, with `~` expanded.

    - "safetensors": ptjax's own file, with the metadata in its header.
    - "kv_cache": the same file with the keys and values that every layer of the backbone computes
      from the prompt, which must be one that does not attend to its input.
    - "npy": the numpy file that google-research/prompt-tuning reads, without metadata.
    - "peft": a folder for `peft.PeftModel.from_pretrained`; of a prompt, with a model card. ptjax
      finds the metadata in it; PEFT ignores them, the template of the task for example.
    - "t5x": a T5X checkpoint, the backbone's with the prompt added as parameter
      `encoder/prompt/prompt/prompt`. It shares its other files with the original by hard links.
    - "merged": a backbone in Hugging Face's layout, float32, whose weights have an adapter's effect
      in them, for LoRA, IA3 and BitFit. `load_backbone` and `transformers` read it.

    Args:
        prompt: as for `ptjax.forward`: a prompt or an adapter, a path or name that `load_prompt` or
            `load_adapter` takes, or an array. An adapter is for "safetensors", "merged" and, if
            PEFT has the method, "peft".
        output: a file; for "peft" a folder, for "t5x" a new one.
        backbone: the backbone or its path, which all except "safetensors" and "npy" need;
            default: the one that the prompt was tuned on. For "t5x" it must be a T5X checkpoint.
        force: overwrite existing output. A T5X checkpoint is never overwritten.

    Raises:
        InputError: the prompt cannot be loaded, does not fit the backbone or cannot be written in
            this format; no backbone is known; or `output` exists, is the prompt's own folder, or
            holds a README.md that is not ptjax's.
    """
    if to not in FORMATS:
        raise InputError(f"to = {to!r}: not a format of export{near(str(to), FORMATS)}")
    check_path("the path of the output", output)
    if isinstance(prompt, str | os.PathLike) and holds_adapter(prompt):
        prompt = load_adapter(prompt)
    if isinstance(prompt, Adapter):
        return _export_adapter(prompt, epath.Path(output).expanduser(), to, backbone, force=force)
    wrapped = wrap_prompt(prompt)
    array, metadata = np.asarray(wrapped.prompt, np.float32), getattr(wrapped, "metadata", {})
    file = PromptFile(array, metadata, getattr(wrapped, "states", None))
    source = getattr(wrapped, "source", None)
    if to in ("npy", *FOLDERS) and not file.attends_to_input:
        raise InputError(
            f"{source or 'the prompt'} does not see its input, which --to={to} cannot record: it "
            "would be used differently from how it was tuned"
        )
    if to == "merged":
        raise InputError("--to=merged is for adapters; a prompt is not part of the weights")
    metadata, target = with_run(file.metadata, source), epath.Path(output).expanduser()
    if to == "t5x":
        checkpoint = _open(backbone, metadata, to)
        _check_width(array, checkpoint, metadata, source)
        if not t5x.is_t5x(epath.Path(checkpoint.name).expanduser()):
            raise InputError(f"{checkpoint.name} is not a T5X checkpoint, which --to=t5x adds to")
        t5x_write.write_t5x(epath.Path(checkpoint.name).expanduser(), array, target)
        return target
    _check_output(target, force=force, folder=to in PEFT)
    if to in PEFT:
        _write_peft(target, array, metadata, _open(backbone, metadata, to), source)
    elif to == "npy":
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        files.write_bytes(target, stream.getvalue())
    elif to == "kv_cache":
        loaded = _load(backbone, metadata, to)
        compiled = precompute_prompt_kv(loaded, check_prompt(loaded, file))
        save_prompt(target, array, {**compiled.metadata, **metadata}, compiled.states)
    else:
        save_prompt(target, array, metadata)
    return target


def _export_adapter(
    adapter: Adapter,
    target: epath.Path,
    to: ExportFormat,
    backbone: Backbone | PathLike | None,
    *,
    force: bool,
) -> epath.Path:
    if to not in ("safetensors", "merged", *PEFT):
        raise InputError(f"--to={to} is a format of prompts, not of {adapter.method.name}")
    _check_output(target, force=force, folder=to in FOLDERS)
    if to == "merged":
        loaded = _load(backbone, adapter.metadata, to, dtype="float32")
        variables = check_adapter(loaded, adapter).variables
        assert variables is not None
        params = adapter.method.merge(loaded.variables["params"], variables)
        kept = {"tokenizer": loaded.tokenizer, "dtype": "float32", "family": loaded.family}
        save_backbone(target, loaded.config, params, **kept)
    elif to in PEFT:
        base_model, revision = hub_id(_open(backbone, adapter.metadata, to).name)
        adapter.method.export_peft(
            target,
            adapter.arrays,
            base_model=base_model,
            revision=revision,
            metadata={k: v for k, v in adapter.metadata.items() if k != METHOD},
        )
    else:
        save_adapter(target, adapter.arrays, adapter.metadata)
    return target


def _check_output(target: epath.Path, *, force: bool, folder: bool) -> None:
    if target.exists() and target.is_dir() != folder:
        kind, named = ("file", "folder") if folder else ("directory", "file")
        raise InputError(f"{target} is a {kind}; name a {named}")
    if target.exists() and not force:
        raise InputError(f"{target} already exists; overwrite it with --force (force=True)")


def _write_peft(
    target: epath.Path,
    prompt: np.ndarray,
    metadata: Metadata,
    backbone: OpenBackbone | Backbone,
    source: str | None,
) -> None:
    if source is not None and target.exists() and target.resolve() == epath.Path(source).resolve():
        raise InputError(f"--output={target}: this is the input {source}; name another one")
    check_folder(target)
    _check_width(prompt, backbone, metadata, source)
    config, (base_model, revision) = backbone.config, hub_id(backbone.name)
    peft.export_peft(
        target,
        prompt,
        num_heads=config.num_heads,
        num_layers=config.num_encoder_layers,
        base_model=base_model,
        revision=revision,
        metadata=metadata,
    )
    # A prompt of another origin records no backbone; the card names this one.
    known = {"backbone_name": backbone.name, **metadata}
    write_card(target, prompt, known, name=target.resolve().name)


def _check_width(
    prompt: np.ndarray,
    backbone: OpenBackbone | Backbone,
    metadata: Metadata,
    source: str | None,
) -> None:
    if backbone.config.emb_dim != prompt.shape[1]:
        tuned_on = metadata.get("backbone_name")
        called, width = source or "the prompt", backbone.config.emb_dim
        raise wrong_width(called, prompt.shape, backbone.name, width, tuned_on)


def _open(
    backbone: Backbone | PathLike | None, metadata: Metadata, to: str
) -> OpenBackbone | Backbone:
    """The backbone, of which a sample of the weights is read to compare it with the prompt's."""
    named = metadata.get("backbone_name")
    if isinstance(backbone, Backbone):
        opened, fingerprints = backbone, backbone.fingerprints
    elif backbone is not None:
        opened = open_backbone(backbone)
        fingerprints = describe.fingerprints_of(opened)
    elif named is None:
        needed = _NEEDED_FOR.get(to, "sizes")
        raise InputError(f"--to={to} needs the backbone's {needed}; name it with --backbone")
    else:
        opened = _named(open_backbone, named)
        fingerprints = describe.fingerprints_of(opened)
    if fingerprints.contradict(metadata):
        raise InputError(
            f"the prompt was not tuned on the weights of {opened.name}; name its backbone, "
            f"{named}, with --backbone"
        )
    return opened


def _load(
    backbone: Backbone | PathLike | None, metadata: Metadata, to: str, **settings: Any
) -> Backbone:
    """The backbone; if it is not loaded yet, with these settings of `load_backbone`."""
    if isinstance(backbone, Backbone):
        return backbone
    if backbone is not None:
        return load_backbone(backbone, **settings)
    named = metadata.get("backbone_name")
    if named is None:
        raise InputError(f"--to={to} needs the backbone; name it with --backbone")
    return _named(functools.partial(load_backbone, **settings), named)


def _named(function: Callable[[str], T], name: object) -> T:
    """Calls `function` with the name of a backbone that the prompt's metadata give."""
    try:
        return function(str(name))
    except InputError as error:
        raise InputError(
            f"{error}; the prompt was tuned on {name}: give its path with --backbone=PATH"
        ) from error
