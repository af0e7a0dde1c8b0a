"""`python -m ptjax.inspect`: describes a checkpoint, a prompt or a MODEL_DIR."""

from __future__ import annotations

import argparse

from ptjax import cli
from ptjax.cli import logs, model_flags, output
from ptjax.errors import InputError, check_at_least
from ptjax.files import JsonObject, Metadata


def main() -> None:
    """Runs `python -m ptjax.inspect`: parses the command line and calls `inspect`."""
    parser = cli.make_parser(
        "inspect",
        """
        Describes PATH. A backbone (T5X checkpoint, Hugging Face directory or hub id, ptjax-nano):
        its sizes, those that ptjax assumes because its files do not contain them, parameters,
        fingerprints, tokenizer. A prompt (ptjax's file, .npy, PEFT directory): shape, norms, what
        it was tuned for, and the vocabulary tokens nearest to each row. A MODEL_DIR: its results,
        newest checkpoint and best prompt. A checkpoint in it: its run, step and contents. Weights
        are not loaded, so any size will do.

          python -m ptjax.inspect runs/quickstart/prompts/best.safetensors
        """,
        gin_help="It may name the backbone and its tokenizer.",
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="the backbone whose vocabulary to compare a prompt with; default: the gin file's, or "
        "the one that the prompt names",
    )
    model_flags.add_tokenizer_flag(parser)
    parser.add_argument(
        "--tokens", type=int, default=3, metavar="N", help="nearest tokens per row; default: 3"
    )
    parser.add_argument(
        "--similar_to",
        metavar="DIR",
        help="rank the prompts in DIR by their cosine similarity to the prompt, as SPoT does",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = cli.parse(parser)
    cli.run(lambda: inspect(arguments))


def inspect(arguments: argparse.Namespace) -> None:
    """Prints a description of a backbone, prompt, MODEL_DIR or checkpoint, as text or JSON.

    Args:
        arguments: the parsed flags of `main`; `arguments.path` is what to describe.
    """
    from ptjax.backbones import describe

    check_at_least(1, **{"--tokens": arguments.tokens})
    model_flags.bind_tokenizer(arguments)
    cli.load_gin(arguments, defaults={"MODEL_DIR": None, "DATA_DIR": ""})
    bound = cli.settings(model_flags.LOAD_BACKBONE, "path", "tokenizer")
    described = describe.describe(arguments.path, bound.get("tokenizer"))
    prompt = described.get("best_prompt") or (described if described["kind"] == "prompt" else None)
    if prompt is not None:
        add_tokens(prompt, arguments, bound)
    if arguments.similar_to is not None:
        add_similarity(prompt, arguments)
    as_json = output.as_json(described, indent=2, ensure_ascii=False)
    output.show(as_json if arguments.json else show(described))


def add_tokens(described: JsonObject, arguments: argparse.Namespace, bound: Metadata) -> None:
    """Adds the vocabulary tokens nearest to each row of a prompt to the prompt's description.

    Adds the entries "nearest_tokens" and "compared_with", the backbone's name. If the backbone is
    not available, adds only the entry "not_compared", which gives the reason.

    Args:
        described: the prompt's description; the entries are added to it.
        arguments: the parsed flags.
        bound: the arguments "path" and "tokenizer" of `load_backbone`, where gin sets them.

    Raises:
        InputError: the backbone named by `--backbone` or gin cannot be used.
    """
    from ptjax.backbones import describe
    from ptjax.backbones.open import would_download

    chosen = arguments.backbone or bound.get("path")
    name = chosen or described["metadata"].get("backbone_name")
    if name is None:
        described["not_compared"] = "name the backbone with --backbone to see the nearest tokens"
        return
    if not chosen and would_download(name):
        described["not_compared"] = (
            f"its backbone, {name}, is not on this machine; --backbone={name} downloads it"
        )
        return
    try:
        described["nearest_tokens"] = describe.compare(
            described["path"], name, bound.get("tokenizer"), arguments.tokens
        )
    except InputError as error:
        if chosen:
            raise
        described["not_compared"] = f"{str(error).splitlines()[0]}; name it with --backbone"
        return
    described["compared_with"] = name


def add_similarity(described: JsonObject | None, arguments: argparse.Namespace) -> None:
    """Adds the prompts of `--similar_to=DIR`, ranked, to a prompt's description.

    Adds the entries "similarity" (of the average rows) and "similarity_per_token": cosines by the
    names of the prompts.

    Args:
        described: the prompt's description; the entries are added to it. None if a backbone or an
            adapter is described.
        arguments: the parsed flags.

    Raises:
        InputError: a prompt is missing on one side, or their widths differ.
    """
    from ptjax.methods.nearest_prompt import prompt_similarity

    if described is None:
        raise InputError(f"--similar_to compares prompts; {arguments.path} is not a prompt")
    own, folder = described["path"], arguments.similar_to
    described["similarity"] = prompt_similarity(own, folder)
    described["similarity_per_token"] = prompt_similarity(own, folder, "per_token")


def show(described: Metadata, indent: int = 0) -> str:
    """Formats a description as text: lines "name: value", without the entries that are None.

    Args:
        described: values by name; a dict among them is shown below its name, indented.
        indent: the number of spaces before each line.
    """
    lines = []
    for name, value in described.items():
        shown = logs.printable(name).replace("_", " ")
        if name == "nearest_tokens":
            lines.append(f"{shown} (cosine):")
            lines += [f"  {i:4}  {row_text(row)}" for i, row in enumerate(value)]
        elif isinstance(value, dict) and value:
            lines += [f"{shown}:", show(value, indent=2)]
        elif isinstance(value, list | tuple):
            lines.append(f"{shown}: {', '.join(map(plain, value)) or 'none'}")
        elif value is not None:
            number = isinstance(value, int) and not isinstance(value, bool)
            number = number and not name.endswith("_id")  # an id gets no thousands separators
            lines.append(f"{shown}: {value:,}" if number else f"{shown}: {plain(value)}")
    return "\n".join(" " * indent + line for text in lines for line in text.split("\n"))


def plain(value: object) -> str:
    """Formats a value: a bool as "yes" or "no", a float with 4 digits, others as printable text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else logs.printable(str(value))


def row_text(row: list[tuple[str, float]]) -> str:
    """Formats (token, cosine similarity) pairs as a line."""
    return "  ".join(f"{logs.printable(piece)} {cosine:.2f}" for piece, cosine in row)


if __name__ == "__main__":
    main()
