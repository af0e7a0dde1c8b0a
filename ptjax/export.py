"""`python -m ptjax.export`: writes a prompt in other formats."""

from __future__ import annotations

import argparse
import os

from absl import logging

from ptjax import cli
from ptjax.cli import model_flags, output
from ptjax.errors import InputError

FORMATS = ("safetensors", "kv_cache", "npy", "peft", "huggingface", "t5x", "merged")
"""Those of `ptjax.export`, which is imported late."""


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "export",
        """
        Writes a prompt, or with --adapter what another method tuned, in another format.
        safetensors: ptjax's own file, for a prompt one tensor `prompt` [P, D] with its metadata in
        the header. kv_cache: the same file with precomputed keys and values of
        every layer of its backbone, for a prompt that does not see its input (SEES_INPUT = False).
        npy: the numpy file that google-research/prompt-tuning reads, without metadata. peft, or
        huggingface: a directory for peft.PeftModel.from_pretrained, for a prompt with a model card;
        it needs the backbone's sizes. ptjax reads the task's template from it; PEFT does not. t5x:
        a copy of the backbone's T5X checkpoint with the prompt as a parameter of prompt-tuning,
        which shares its other files with the original (hard links). merged: with --adapter, for
        LoRA, IA3 and BitFit, a backbone whose weights have the adapter's effect in them, in Hugging
        Face's layout.

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
    parser.add_argument(
        "--adapter",
        metavar="FILE",
        help="instead of a prompt: what another method tuned; for safetensors, peft, merged",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--output", required=True, metavar="PATH", help="a file, or a directory")
    parser.add_argument("--model_dir", metavar="DIR", help="what `python -m ptjax.train` wrote")
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="the backbone whose keys and values kv_cache needs, whose sizes peft needs, or "
        "whose T5X checkpoint t5x adds to; "
        "default: the gin file's or the prompt's own",
    )
    model_flags.add_tokenizer_flag(parser)
    parser.add_argument("--force", action="store_true", help="overwrite existing output")
    model_flags.add_trust_flag(parser)
    parser.set_defaults(prompts=None)  # one at a time
    arguments = cli.parse(parser)
    cli.run(lambda: run_export(arguments))


def run_export(arguments: argparse.Namespace) -> None:
    """Writes a prompt in the format of --to; `arguments` are the parsed flags."""
    import functools

    from ptjax.inference.export_prompt import FOLDERS, export

    if arguments.path is not None and arguments.prompt is not None:
        raise InputError(f"two prompts, {arguments.path} and {arguments.prompt}; name one")
    arguments.prompt = arguments.prompt or arguments.path
    model_flags.load(arguments)
    source = model_flags.prompt_path(arguments)
    prompt = model_flags.load_prompt(arguments)
    if source is None or prompt is None:
        raise InputError("no prompt to export: the run tuned the backbone itself")
    write = functools.partial(export, prompt, to=arguments.to)
    if arguments.to in FOLDERS:
        if "://" not in arguments.output:
            output.check_place(arguments.output)
        write(arguments.output, backbone=named_backbone(arguments), force=arguments.force)
    else:
        read = [os.path.expanduser(source), *model_flags.inputs(arguments)]
        output.check(arguments.output, force=arguments.force, inputs=read)
        backbone = None
        if arguments.to == "kv_cache" and not getattr(prompt, "attends_to_input", True):
            backbone = model_flags.load_backbone(arguments, prompt.metadata)
        with output.target(arguments.output) as real:
            write(real, backbone=backbone, force=True)
    path = os.path.expanduser(arguments.output)
    # The file itself may go to standard output.
    written = getattr(prompt, "prompt", None)
    what = prompt.method.name if written is None else list(written.shape)
    report = f"{path}: {arguments.to}, {what} from {source}"
    logging.info("%s", report) if output.is_stream(arguments.output) else output.show(report)


def named_backbone(arguments: argparse.Namespace) -> str | None:
    """The path of the backbone in --backbone, else in the gin file, else None."""
    path = arguments.backbone or cli.settings(model_flags.LOAD_BACKBONE, "path").get("path")
    return None if path is None else os.fspath(path)


if __name__ == "__main__":
    main()
