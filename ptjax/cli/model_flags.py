"""Finds the prompt, backbone and task of a command: from its flags, a run or a gin file."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from ptjax.cli.gin_files import TASK, configured, declared, left_out, load_gin, settings
from ptjax.cli.gin_macros import macro
from ptjax.errors import InputError, missing
from ptjax.files import Metadata
from ptjax.model_dir import BEST_PROMPT, BEST_PROMPTS, ExportKind, ModelDir

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone
    from ptjax.data.tasks import Task
    from ptjax.inference.records import InputFormat

# Public names, with which `settings` and `configured` need no import.
TUNE = "ptjax.tune"
SETTINGS = "ptjax.RunSettings"
LOAD_BACKBONE = "ptjax.load_backbone"
_PROMPTS = (
    "*.safetensors", "*.npy", "*/adapter_*", *(f"*/{best}" for best in BEST_PROMPTS)
)  # fmt: skip
"""Patterns of the files that --prompts=DIR reads."""
_CHOICES = ("prompt", "prompts", "adapter")
"""The flags of which one at most may be set."""


def add_flags(parser: argparse.ArgumentParser, many: str) -> None:
    """Adds the flags that name prompts and a backbone, from --model_dir to --trust_config.

    Args:
        many: the help text of --prompts in this command.
    """
    group = parser.add_argument_group("which prompt, on which backbone")
    group.add_argument(
        "--model_dir",
        metavar="DIR",
        help="what `python -m ptjax.train` wrote: its config.gin (unless --gin_file is given) "
        "and its best prompt or adapter are used",
    )
    group.add_argument(
        "--prompt",
        metavar="PATH",
        help="a prompt instead of the best one of DIR: ptjax's file, a .npy, a PEFT directory; "
        "'none' uses the backbone alone",
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
        "--adapter",
        metavar="FILE",
        help="instead of a prompt: what another method tuned, such as LoRA",
    )
    group.add_argument(
        "--allow_mismatch",
        action="store_true",
        help="use prompts that were tuned on another backbone or tokenizer",
    )
    add_trust_flag(group)


def add_tokenizer_flag(group: argparse._ActionsContainer) -> None:
    """Adds --tokenizer to a parser or group; see `bind_tokenizer`."""
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="the backbone's tokenizer: a SentencePiece *.model, a folder, a hub id or byt5; "
        "default: the one beside the weights, which a T5X checkpoint lacks",
    )


def add_trust_flag(group: argparse._ActionsContainer) -> None:
    """Adds --trust_config to a parser or group; see `load`."""
    group.add_argument(
        "--trust_config",
        action="store_true",
        help="run DIR/config.gin even if it names code that is not ptjax's; only for a DIR whose "
        "author you trust",
    )


def bind_tokenizer(arguments: argparse.Namespace) -> None:
    """Appends the binding for --tokenizer to `arguments.gin_bindings`, if the flag is set."""
    if arguments.tokenizer is not None:
        arguments.gin_bindings.append(f"ptjax.load_backbone.tokenizer = {arguments.tokenizer!r}")


def load(arguments: argparse.Namespace, *, reads_data: bool = False) -> None:
    """Reads the gin files that the flags name, or else MODEL_DIR/config.gin, into gin's config.

    MODEL_DIR/config.gin is untrusted: without --trust_config it may name only ptjax's own settings.
    A file of --gin_file is trusted. Changes `gin_file` and `gin_bindings` of `arguments`.

    Args:
        arguments: the parsed flags of `make_parser` and `add_flags`.
        reads_data: whether the command reads the task's splits, which needs DATA_DIR.

    Raises:
        InputError: two of --prompt, --prompts and --adapter are set, MODEL_DIR does not exist, or
            `load_gin` finds a mistake in a gin file or binding.
    """
    chosen = [name for name in _CHOICES if getattr(arguments, name) is not None]
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} are mutually exclusive")
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
    """Lists the local files and folders that the flags name, for `output.check`.

    They are the inputs of the command, which --output must not overwrite.
    """
    flags = [
        arguments.prompt,
        arguments.adapter,
        arguments.backbone,
        arguments.tokenizer,
        *arguments.gin_file,
    ]
    paths = [epath.Path(name).expanduser() for name in flags if name and "://" not in name]
    if arguments.model_dir is not None and "://" not in arguments.model_dir:
        run = ModelDir(epath.Path(arguments.model_dir).expanduser())
        paths += [run.config, run.best_prompt(), run.best_adapter(), run.best_model]
        paths += map(run.best_prompt, run.members())
        paths += map(run.best_adapter, run.members("adapter"))
    if arguments.prompts is not None and "://" not in arguments.prompts:
        directory = epath.Path(arguments.prompts).expanduser()
        for pattern in _PROMPTS:
            paths += directory.glob(pattern)
    return [os.fspath(path) for path in paths]


def model_dir(arguments: argparse.Namespace) -> epath.Path | None:
    """MODEL_DIR from --model_dir, else from the gin files, else None."""
    if arguments.model_dir is not None:
        return epath.Path(arguments.model_dir).expanduser()
    try:
        path = settings(TUNE, "model_dir").get("model_dir")
    except (TypeError, ValueError):  # the gin file does not set the macro
        return None
    return None if path is None else epath.Path(path).expanduser()


def prompt_path(arguments: argparse.Namespace) -> str | None:
    """The path of the prompt or adapter: --prompt or --adapter, else the best one in MODEL_DIR.

    None if neither is used: --prompt is "none", or the run in MODEL_DIR tuned the whole model.

    Raises:
        InputError: neither --prompt nor MODEL_DIR is set, or MODEL_DIR holds no prompt or a sweep.
    """
    if arguments.prompt is not None:
        return None if arguments.prompt == "none" else arguments.prompt
    if arguments.adapter is not None:
        return arguments.adapter
    directory = model_dir(arguments)
    if directory is None:
        raise InputError(
            "which prompt? Name one with --prompt=PATH or --model_dir=DIR; --prompt=none uses the "
            "backbone alone"
        )
    run = ModelDir(directory)
    for best in (run.best_prompt(), run.best_adapter()):
        if best.exists():
            return os.fspath(best)
    if run.best_model.exists():
        return None
    kinds: dict[ExportKind, Callable[[str], epath.Path]] = {
        "prompt": run.best_prompt,
        "adapter": run.best_adapter,
    }
    for kind, best in kinds.items():
        if names := run.members(kind):
            raise InputError(
                f"the run of {directory} is a sweep of {', '.join(names)}; name one of them with "
                f"--{kind}={best(names[0])}"
            )
    raise InputError(
        f"{directory} has no {BEST_PROMPT} (the run has not been evaluated yet, or it tuned no "
        "prompt); name one with --prompt=PATH, or --prompt=none for the backbone alone"
    )


def trained_bank(arguments: argparse.Namespace) -> str | None:
    """Returns the folder that holds the best prompts of the sweep in MODEL_DIR.

    Returns None if no MODEL_DIR is set, or no member of a sweep has saved a best prompt there.
    """
    directory = model_dir(arguments)
    if directory is None or not ModelDir(directory).members():
        return None
    return os.fspath(ModelDir(directory).prompts())


def load_backbone(arguments: argparse.Namespace, metadata: Metadata) -> Backbone:
    """Loads the backbone, with the gin files' settings of `load_backbone`.

    Its path is the first of these that exists: --backbone; the model that the run in MODEL_DIR
    tuned (ignored if --prompt, --prompts or --adapter is set); the path in the gin files; the name
    of the backbone in the prompt's metadata.

    Args:
        arguments: the parsed flags.
        metadata: the prompt's metadata; {} without a prompt.

    Raises:
        InputError: nothing names a backbone, or it cannot be loaded.
    """
    from ptjax.backbones import load

    path, directory = arguments.backbone, model_dir(arguments)
    named_here = any(getattr(arguments, name) is not None for name in _CHOICES)
    if path is None and not named_here and directory is not None:
        run = ModelDir(directory)
        if run.best_model.exists() and not run.best_prompt().exists():
            path = os.fspath(run.best_model)
    bound = settings(LOAD_BACKBONE, "path")
    named = metadata.get("backbone_name")
    if path is None and not bound:
        if reason := left_out(f"{TUNE}.backbone"):
            raise InputError(f"{reason}; use it there, or give the backbone with --backbone=PATH")
        if named is None:
            raise InputError("which backbone? Name it with --backbone=PATH or a --gin_file")
        with naming_it(named):
            return configured(LOAD_BACKBONE, load.load_backbone)(named)
    if path is None:
        of_run = settings(TUNE, "backbone").get("backbone")
        return of_run or configured(LOAD_BACKBONE, load.load_backbone)()
    # The other settings of the gin file (tokenizer, mesh, dtype) apply to this path as well.
    return configured(LOAD_BACKBONE, load.load_backbone)(path)


@contextlib.contextmanager
def naming_it(name: str) -> Iterator[None]:
    """A context manager for loading a backbone that only the prompt's metadata name.

    An InputError raised in it also says where the name is from, and how to give another path.

    Args:
        name: the backbone's name in the prompt's metadata.
    """
    try:
        yield
    except InputError as error:
        problem = str(error).splitlines()[0]  # gin appends lines to errors that pass through it
        raise InputError(
            f"{problem}; the prompt was tuned on {name}: give its path with --backbone=PATH"
        ) from error


def load_prompt(arguments: argparse.Namespace) -> Any:
    """Loads what is at `prompt_path`, a `PromptFile` or an `Adapter`; None if neither is used."""
    from ptjax.interop import prompt_file
    from ptjax.methods.adapter import load_adapter

    path = prompt_path(arguments)
    if path is None:
        return None
    directory = model_dir(arguments)
    of_run = None if directory is None else os.fspath(ModelDir(directory).best_adapter())
    if arguments.adapter is not None or (arguments.prompt is None and path == of_run):
        return load_adapter(path)
    return prompt_file.load_prompt(path)


def load_bank(arguments: argparse.Namespace) -> Any:
    """Loads the prompts in the folder --prompts, which must be set, as a `PromptBank`.

    Raises:
        InputError: a prompt cannot be loaded, or they cannot be used together.
    """
    from ptjax.inference.bank import make_bank
    from ptjax.interop import prompt_file

    prompts = prompt_file.load_prompts(arguments.prompts)
    try:
        return make_bank(prompts)
    except InputError as error:
        raise InputError(f"--prompts={arguments.prompts}: {error}") from error


def task(metadata: Metadata, *, needed: bool = True) -> Task | None:
    """Returns the task that gin binds to `ptjax.tune`, else one that the gin files declare.

    If the files declare several tasks, the one that the prompt was tuned on is chosen. Returns None
    if the files declare no task, or several of which the prompt's is not one.

    Args:
        metadata: the prompt's metadata.
        needed: what to do if several tasks are declared and the prompt records no task: True
            raises an InputError, False returns None.

    Raises:
        InputError: the task is ambiguous, or lacks a setting.
    """
    if (of_run := settings(TUNE, "task").get("task")) is not None:
        return of_run
    tasks = declared(TASK, unless_of="ptjax.TaskComponent")
    described = metadata.get("task")
    name = described.get("name") if isinstance(described, Mapping) else described
    if matching := [task for task in tasks.values() if task.name == name]:
        return matching[0]
    if len(tasks) <= 1:
        return next(iter(tasks.values()), None)
    if name is not None or not needed:
        return None
    listed = ", ".join(f"{reference} is {task.name}" for reference, task in tasks.items())
    raise InputError(
        f"which task? The gin files declare {len(tasks)}: {listed}; choose one with "
        f"--gin.ptjax.tune.task={next(iter(tasks))}"
    )


def lengths(metadata: Metadata) -> dict[str, int]:
    """Returns the maximum lengths of an example in tokens: {"inputs": T, "targets": L}.

    A length that neither the metadata nor the gin files set is left out.

    Args:
        metadata: the prompt's metadata, which take precedence over the gin files.
    """
    from ptjax.inference.records import recorded_lengths

    of_run = settings("ptjax.Batching", "feature_lengths").get("feature_lengths")
    return dict(of_run or macro("TASK_FEATURE_LENGTHS") or {}) | recorded_lengths(metadata)


def input_format(metadata: Metadata, *, raw: bool) -> InputFormat:
    """Makes the input format of a prompt: the task that formats its inputs, and their lengths.

    Both are taken from the prompt's metadata or, if it lacks them, from the gin files.

    Args:
        metadata: the prompt's metadata.
        raw: whether inputs are formatted already, so that no task is needed.
    """
    from ptjax.inference import records

    known = lengths(metadata)
    fallback = records.task_of(metadata, task(metadata, needed=not raw))
    return records.InputFormat(fallback, known.get("inputs"), known.get("targets"))
