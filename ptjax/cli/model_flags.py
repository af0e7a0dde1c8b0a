"""Which prompt, backbone and task a command works with: from its flags, a run, a gin file."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from ptjax.cli.gin_files import TASK, configured, declared, load_gin, macro, settings
from ptjax.errors import InputError, missing
from ptjax.model_dir import BEST_PROMPT, BEST_PROMPTS, ModelDir

TUNE = "ptjax.tune"
SETTINGS = "ptjax.RunSettings"
LOAD_BACKBONE = "ptjax.load_backbone"
_PROMPTS = (
    "*.safetensors", "*.npy", "*/adapter_*", *(f"*/{best}" for best in BEST_PROMPTS)
)  # fmt: skip
"""What --prompts=DIR reads."""


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
    add_tokenizer_flag(group)
    group.add_argument("--prompts", metavar="DIR", help=many)
    group.add_argument(
        "--allow_mismatch",
        action="store_true",
        help="use prompts that were tuned on another backbone or tokenizer",
    )
    add_trust_flag(group)


def add_tokenizer_flag(group: Any) -> None:
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="the backbone's: a SentencePiece *.model, a folder, a hub id or byt5; default: the "
        "one beside the weights, which a T5X checkpoint lacks",
    )


def add_trust_flag(group: Any) -> None:
    group.add_argument(
        "--trust_config",
        action="store_true",
        help="run DIR/config.gin even if it names code that is not ptjax's; never for a DIR of "
        "someone you do not trust",
    )


def bind_tokenizer(arguments: argparse.Namespace) -> None:
    """Turns --tokenizer into the binding that it stands for."""
    if arguments.tokenizer is not None:
        arguments.gin_bindings.append(f"ptjax.load_backbone.tokenizer = {arguments.tokenizer!r}")


def load(arguments: argparse.Namespace, *, reads_data: bool = False) -> None:
    """Reads the gin files that the flags name, MODEL_DIR/config.gin where they name none.

    That config.gin may come from anywhere, so it may name nothing but ptjax's own settings unless
    --trust_config says so; a file of --gin_file is the user's own choice.

    Args:
        reads_data: the command reads the task's splits, so it cannot do without DATA_DIR.

    Raises:
        InputError: flags that contradict each other, or what `load_gin` refuses.
    """
    if arguments.prompts is not None and arguments.prompt is not None:
        raise InputError("--prompt is one prompt, --prompts=DIR many; give one of the flags")
    macros, config = {}, None
    if arguments.model_dir is not None:
        model_dir = epath.Path(arguments.model_dir).expanduser()
        if not model_dir.exists():
            raise missing("run", arguments.model_dir)
        if not arguments.gin_file and ModelDir(model_dir).config.exists():
            config = os.fspath(ModelDir(model_dir).config)
            arguments.gin_file = [config]
        macros = {"MODEL_DIR": os.fspath(model_dir)}
    bind_tokenizer(arguments)
    defaults = {"MODEL_DIR": None, "TASK_FEATURE_LENGTHS": None}
    load_gin(
        arguments,
        macros,
        defaults=defaults if reads_data else defaults | {"DATA_DIR": ""},
        of_run=config,
        trusted=arguments.trust_config,
    )


def inputs(arguments: argparse.Namespace) -> list[str]:
    """The local files and folders that the flags name to be read; --output overwrites none."""
    flags = [arguments.prompt, arguments.backbone, arguments.tokenizer, *arguments.gin_file]
    found = [epath.Path(name).expanduser() for name in flags if name and "://" not in name]
    if arguments.model_dir is not None and "://" not in arguments.model_dir:
        run = ModelDir(epath.Path(arguments.model_dir).expanduser())
        found += [run.config, run.best_prompt(), run.best_model]
        found += map(run.best_prompt, run.members())
    if arguments.prompts is not None and "://" not in arguments.prompts:
        directory = epath.Path(arguments.prompts).expanduser()
        for pattern in _PROMPTS:
            found += directory.glob(pattern)
    return [os.fspath(path) for path in found]


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
    run = ModelDir(directory)
    if run.best_prompt().exists():
        return os.fspath(run.best_prompt())
    if run.best_model.exists():
        return None
    if names := run.members():
        raise InputError(
            f"the run of {directory} trained a bank, {', '.join(names)}; name one of them with "
            f"--prompt={run.best_prompt(names[0])}"
        )
    raise InputError(
        f"{directory} has no {BEST_PROMPT} (its run has not come to an evaluation, or it tuned no "
        "prompt); name one with --prompt=PATH, or --prompt=none for the backbone alone"
    )


def trained_bank(arguments: argparse.Namespace) -> str | None:
    """Where the run of MODEL_DIR left the prompts of its bank, if it trained one."""
    directory = model_dir(arguments)
    if directory is None or not ModelDir(directory).members():
        return None
    return os.fspath(ModelDir(directory).prompts())


def load_backbone(arguments: argparse.Namespace, metadata: dict[str, Any]) -> Any:
    """The backbone of the flags, else tuned by the run, else of the gin file, else the prompt's."""
    from ptjax.backbones import load

    path, directory = arguments.backbone, model_dir(arguments)
    named_here = arguments.prompt is not None or arguments.prompts is not None
    if path is None and not named_here and directory is not None:
        run = ModelDir(directory)
        if run.best_model.exists() and not run.best_prompt().exists():
            path = os.fspath(run.best_model)
    bound = settings(LOAD_BACKBONE, "path", "tokenizer")
    named = metadata.get("backbone_name")
    if path is None and not bound:
        if named is None:
            raise InputError("which backbone? Name it with --backbone=PATH or a --gin_file")
        with naming_it(named):
            return configured(LOAD_BACKBONE, load.load_backbone)(named)
    if path is None:
        found = settings(TUNE, "backbone").get("backbone")
        return found or configured(LOAD_BACKBONE, load.load_backbone)()
    # The other settings of the gin file (tokenizer, mesh, dtype) hold for this path as well.
    return configured(LOAD_BACKBONE, load.load_backbone)(path)


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
    from ptjax.inference.bank import make_bank
    from ptjax.interop import prompt_file

    prompts = prompt_file.load_prompts(arguments.prompts)
    try:
        return make_bank(prompts)
    except InputError as error:
        raise InputError(f"--prompts={arguments.prompts}: {error}") from error


def task(metadata: Mapping[str, Any], *, needed: bool = True) -> Any:
    """The task of the run's gin file, else the one that a gin file declares, or None.

    Args:
        metadata: of the prompt. Of several declared tasks, its own is taken.
        needed: refuse several of which the prompt names none; else they count as none.

    Raises:
        InputError: several, or a task that lacks a setting.
    """
    if (of_run := settings(TUNE, "task").get("task")) is not None:
        return of_run
    found = declared(TASK, unless_of="ptjax.TaskComponent")
    described = metadata.get("task")
    name = described.get("name") if isinstance(described, Mapping) else described
    if own := [task for task in found.values() if task.name == name]:
        return own[0]
    if len(found) <= 1:
        return next(iter(found.values()), None)
    if name is not None or not needed:
        return None
    listed = ", ".join(f"{reference} is {task.name}" for reference, task in found.items())
    raise InputError(
        f"which task? The gin files declare {len(found)}: {listed}; choose one with "
        f"--gin.ptjax.tune.task={next(iter(found))}"
    )


def lengths(metadata: Mapping[str, Any]) -> dict[str, int]:
    """{"inputs", "targets"} as far as they are known: the prompt's own, else the gin file's."""
    of_run = settings("ptjax.Batching", "feature_lengths").get("feature_lengths")
    found = dict(of_run or macro("TASK_FEATURE_LENGTHS") or {})
    for side, key in (("inputs", "input_length"), ("targets", "target_length")):
        if isinstance(metadata.get(key), int):
            found[side] = metadata[key]
    return found
