"""Which prompt, backbone and task a command works with: from its flags, a run, a gin file."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from ptjax.cli.gin_files import configured, load_gin, settings
from ptjax.errors import InputError

TUNE = "ptjax.tuning.tune"
LOAD_BACKBONE = "ptjax.backbone.load_backbone"
BEST_PROMPT = "prompts/best.safetensors"
BEST_MODEL = "models/best"


def add_flags(parser: argparse.ArgumentParser, many: str) -> None:
    """`many`: what --prompts does in this command."""
    group = parser.add_argument_group("which prompt, on which backbone")
    group.add_argument(
        "--model_dir",
        metavar="DIR",
        help="what `python -m ptjax.train` wrote: its config.gin (unless --gin_file is given) "
        "and its best prompt are used",
    )
    group.add_argument(
        "--prompt",
        metavar="PATH",
        help="a prompt instead of the best one of DIR: ptjax's file, a .npy, a PEFT directory; "
        "'none' is the backbone alone",
    )
    group.add_argument(
        "--backbone",
        metavar="PATH",
        help="instead of the one in the gin file: a T5X checkpoint, a Hugging Face directory "
        "or hub id, or ptjax-nano",
    )
    group.add_argument("--prompts", metavar="DIR", help=many)
    group.add_argument(
        "--allow_mismatch",
        action="store_true",
        help="use prompts that were tuned on another backbone or tokenizer",
    )


def load(arguments: argparse.Namespace) -> None:
    """Reads the gin files that the flags name, MODEL_DIR/config.gin where they name none."""
    if arguments.prompts is not None and arguments.prompt is not None:
        raise InputError("--prompt is one prompt, --prompts=DIR many; give one of the flags")
    macros = {}
    if arguments.model_dir is not None:
        model_dir = epath.Path(arguments.model_dir).expanduser()
        if not model_dir.exists():
            raise InputError(f"--model_dir={arguments.model_dir}: no such directory")
        if not arguments.gin_file and (model_dir / "config.gin").exists():
            arguments.gin_file = [os.fspath(model_dir / "config.gin")]
        macros = {"MODEL_DIR": os.fspath(model_dir)}
    load_gin(arguments, macros, defaults={"MODEL_DIR": None})


def model_dir(arguments: argparse.Namespace) -> epath.Path | None:
    """MODEL_DIR of the flag, else of the gin file."""
    if arguments.model_dir is not None:
        return epath.Path(arguments.model_dir).expanduser()
    try:
        found = settings(TUNE, "model_dir").get("model_dir")
    except (TypeError, ValueError):  # the gin file leaves the macro open
        return None
    return None if found is None else epath.Path(found).expanduser()


def prompt_path(arguments: argparse.Namespace) -> str | None:
    """The prompt's path; None is the backbone alone (also one that the run itself tuned).

    Raises:
        InputError: nothing names one.
    """
    if arguments.prompt is not None:
        return None if arguments.prompt == "none" else arguments.prompt
    directory = model_dir(arguments)
    if directory is None:
        raise InputError(
            "which prompt? Name one with --prompt=PATH or --model_dir=DIR; --prompt=none is the "
            "backbone alone"
        )
    if (directory / BEST_PROMPT).exists():
        return os.fspath(directory / BEST_PROMPT)
    if (directory / BEST_MODEL).exists():
        return None
    if bank := trained_bank(arguments):
        names = [path.parent.name for path in sorted(epath.Path(bank).glob("*/best.safetensors"))]
        raise InputError(
            f"the run of {directory} trained a bank, {', '.join(names)}; name one of them with "
            f"--prompt={bank}/{names[0]}/best.safetensors"
        )
    raise InputError(
        f"{directory} has no {BEST_PROMPT} (its run has not come to an evaluation, or it tuned no "
        "prompt); name one with --prompt=PATH, or --prompt=none for the backbone alone"
    )


def trained_bank(arguments: argparse.Namespace) -> str | None:
    """Where the run of MODEL_DIR left the prompts of its bank, if it trained one."""
    directory = model_dir(arguments)
    if directory is None or not any((directory / "prompts").glob("*/best.safetensors")):
        return None
    return os.fspath(directory / "prompts")


def load_backbone(arguments: argparse.Namespace, metadata: dict[str, Any]) -> Any:
    """The backbone of the flags, else tuned by the run, else of the gin file, else the prompt's."""
    from ptjax import backbone

    path, directory = arguments.backbone, model_dir(arguments)
    named_here = arguments.prompt is not None or arguments.prompts is not None
    if path is None and not named_here and directory is not None:
        tuned = directory / BEST_MODEL
        if tuned.exists() and not (directory / BEST_PROMPT).exists():
            path = os.fspath(tuned)
    bound = settings(LOAD_BACKBONE, "path", "tokenizer")
    named = metadata.get("backbone_name")
    if path is None and not bound:
        if named is None:
            raise InputError("which backbone? Name it with --backbone=PATH or a --gin_file")
        with naming_it(named):
            return configured(LOAD_BACKBONE, backbone.load_backbone)(named)
    if path is None:
        found = settings(TUNE, "backbone").get("backbone")
        return found or configured(LOAD_BACKBONE, backbone.load_backbone)()
    # The other settings of the gin file (tokenizer, mesh, dtype) hold for this path as well.
    return configured(LOAD_BACKBONE, backbone.load_backbone)(path)


@contextlib.contextmanager
def naming_it(name: str) -> Iterator[None]:
    """Tells a user who named no backbone where the one that fails to load comes from."""
    try:
        yield
    except InputError as error:
        problem = str(error).splitlines()[0]  # gin appends lines to what is raised inside of it
        raise InputError(
            f"{problem}; the prompt names {name}, where that is now goes into --backbone=PATH"
        ) from error


def load_prompt(arguments: argparse.Namespace) -> Any:
    """The loaded prompt, or None."""
    from ptjax.interop import prompt_file

    path = prompt_path(arguments)
    return None if path is None else prompt_file.load_prompt(path)


def load_bank(arguments: argparse.Namespace) -> Any:
    """The prompts below --prompts, as a bank."""
    from ptjax import prompting
    from ptjax.interop import prompt_file

    prompts = prompt_file.load_prompts(arguments.prompts)
    try:
        return prompting.make_bank(prompts)
    except InputError as error:
        raise InputError(f"--prompts={arguments.prompts}: {error}") from error


def task() -> Any:
    """The task of the gin file, or None."""
    return settings(TUNE, "task").get("task")


def lengths(metadata: dict[str, Any]) -> dict[str, int]:
    """{"inputs", "targets"} as far as they are known: the prompt's own, else the gin file's."""
    found = dict(settings(TUNE, "feature_lengths").get("feature_lengths") or {})
    for side, key in (("inputs", "input_length"), ("targets", "target_length")):
        if isinstance(metadata.get(key), int):
            found[side] = metadata[key]
    return found
