"""`python -m ptjax.export`: writes a prompt in other formats."""

from __future__ import annotations

import argparse
import io
import os
import re
from typing import TYPE_CHECKING

from absl import logging

from ptjax import cli
from ptjax.cli import model_flags, output
from ptjax.errors import InputError
from ptjax.files import Metadata

if TYPE_CHECKING:
    from ptjax.interop.prompt_file import PromptFile

PEFT = ("peft", "huggingface")
"""The two names of PEFT's format."""
FORMATS = ("safetensors", "kv_cache", "npy", *PEFT)


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "export",
        """
        Writes a prompt in another format. safetensors: ptjax's own file, one tensor `prompt` [P, D]
        with its metadata in the header. kv_cache: the same file with precomputed keys and values of
        every layer of its backbone, for a prompt that does not see its input (SEES_INPUT = False).
        npy: the numpy file that google-research/prompt-tuning reads, without metadata. peft, or
        huggingface: a directory for peft.PeftModel.from_pretrained, which needs the backbone's
        sizes. ptjax reads the task's template from it; PEFT does not, so pass it on with the
        directory.

          python -m ptjax.export --model_dir=runs/quickstart --to=npy --output=prompt.npy
        """,
        gin_help="It may name MODEL_DIR and the backbone.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PROMPT",
        help="any prompt that ptjax reads; default: the best one of MODEL_DIR",
    )
    parser.add_argument("--prompt", metavar="PATH", help="the same, as the flag of other commands")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--output", required=True, metavar="PATH", help="a file, or a directory")
    parser.add_argument("--model_dir", metavar="DIR", help="what `python -m ptjax.train` wrote")
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="the backbone whose keys and values kv_cache needs, or whose sizes peft needs; "
        "default: the gin file's or the prompt's own",
    )
    model_flags.add_tokenizer_flag(parser)
    parser.add_argument("--force", action="store_true", help="overwrite existing output")
    model_flags.add_trust_flag(parser)
    parser.set_defaults(prompts=None)  # one at a time
    arguments = cli.parse(parser)
    cli.run(lambda: export(arguments))


def export(arguments: argparse.Namespace) -> None:
    """Writes a prompt in the format of --to; `arguments` are the parsed flags."""
    from etils import epath

    if arguments.path is not None and arguments.prompt is not None:
        raise InputError(f"two prompts, {arguments.path} and {arguments.prompt}; name one")
    arguments.prompt = arguments.prompt or arguments.path
    model_flags.load(arguments)
    source = model_flags.prompt_path(arguments)
    prompt = model_flags.load_prompt(arguments)
    if source is None or prompt is None:
        raise InputError("no prompt to export: the run tuned the backbone itself")
    if arguments.to in ("npy", *PEFT) and not prompt.attends_to_input:
        raise InputError(
            f"{source} does not see its input, which --to={arguments.to} cannot record: it "
            "would be used differently from how it was tuned"
        )
    if arguments.to in PEFT:
        export_directory(arguments, prompt, source)
    else:
        read = [os.path.expanduser(source), *model_flags.inputs(arguments)]
        output.check(arguments.output, force=arguments.force, inputs=read)
        with output.target(arguments.output) as real:
            export_file(arguments, prompt, real)
    path = os.fspath(epath.Path(arguments.output).expanduser())
    # The file itself may go to standard output.
    report = f"{path}: {arguments.to}, {list(prompt.prompt.shape)} from {source}"
    logging.info("%s", report) if output.is_stream(arguments.output) else output.show(report)


def export_file(arguments: argparse.Namespace, prompt: PromptFile, path: str) -> None:
    """Writes a prompt to a file at `path`, for every format except PEFT's."""
    import numpy as np

    from ptjax import files
    from ptjax.inference.prompt_kv import precompute_prompt_kv
    from ptjax.inference.prompts import check_prompt
    from ptjax.interop.prompt_file import save_prompt

    array = np.asarray(prompt.prompt)
    if arguments.to == "safetensors":
        save_prompt(path, array, prompt.metadata)
    elif arguments.to == "kv_cache":
        loaded = model_flags.load_backbone(arguments, prompt.metadata)
        file = precompute_prompt_kv(loaded, check_prompt(loaded, prompt))
        save_prompt(path, array, file.metadata, file.states)
    else:
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        files.write_bytes(path, stream.getvalue())


def export_directory(arguments: argparse.Namespace, prompt: PromptFile, source: str) -> None:
    """Writes a prompt to the directory --output, for PEFT.

    Args:
        source: the path that the prompt was read from.

    Raises:
        InputError: the directory exists (without --force) or cannot be written, or the prompt does
            not fit its backbone.
    """
    import numpy as np
    from etils import epath

    from ptjax.interop import peft
    from ptjax.interop.prompt_file import wrong_width

    directory = epath.Path(arguments.output).expanduser()
    if directory.exists() and not arguments.force:
        raise InputError(f"{directory} already exists; overwrite it with --force")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a directory for --to={arguments.to}")
    read = epath.Path(source).expanduser()
    if directory.exists() and read.exists() and directory.resolve() == read.resolve():
        raise InputError(f"--output={directory}: this is the input {source}; name another one")
    if "://" not in arguments.output:
        output.check_place(arguments.output)
    name, heads, layers, width = backbone_sizes(arguments, prompt.metadata)
    # ptjax records a model of the hub as "id@commit".
    hub = re.fullmatch(r"(.+)@([0-9a-f]{40})", name)
    if width != prompt.prompt.shape[1]:
        tuned_on = prompt.metadata.get("backbone_name")
        raise wrong_width(source, prompt.prompt.shape, name, width, tuned_on)
    peft.export_peft(
        directory,
        np.asarray(prompt.prompt),
        num_heads=heads,
        num_layers=layers,
        base_model=hub[1] if hub else name,
        revision=hub[2] if hub else None,
        metadata=prompt.metadata,
    )


def backbone_sizes(arguments: argparse.Namespace, metadata: Metadata) -> tuple[str, int, int, int]:
    """Reads (name, heads, encoder layers, width) of the backbone, and a sample of its weights.

    The backbone is that of --backbone, else the gin file's, else the one that the prompt records.

    Args:
        metadata: the prompt's.

    Raises:
        InputError: no backbone is named, or the prompt was tuned on another one.
    """
    from ptjax.backbones import describe
    from ptjax.backbones.open import open_backbone

    path = arguments.backbone or cli.settings(model_flags.LOAD_BACKBONE, "path").get("path")
    named = metadata.get("backbone_name")
    if path is None and named is None:
        raise InputError(f"--to={arguments.to} needs the backbone's sizes; name it with --backbone")
    if path is None:
        with model_flags.naming_it(str(named)):
            opened = open_backbone(str(named))
    else:
        opened = open_backbone(str(path))
    if describe.fingerprints_of(opened).contradict(metadata):
        raise InputError(
            f"the prompt was not tuned on the weights of {opened.name}; name its backbone, "
            f"{named}, with --backbone"
        )
    config = opened.config
    return opened.name, config.num_heads, config.num_encoder_layers, config.emb_dim


if __name__ == "__main__":
    main()
