"""`python -m ptjax.infer`: predicts for texts, lines or records, and writes JSON lines."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from ptjax import cli
from ptjax.cli import distributed, model_flags, output
from ptjax.errors import InputError, check_at_least

if TYPE_CHECKING:
    from ptjax.data.sources import Records
    from ptjax.inference.inputs import Reading

FORMATS = ("jsonl", "text", "csv", "tsv")
ON_BAD_RECORD = ("error", "skip")
QUOTING = {"true": True, "false": False}
ANSWERING = (
    "decode", "max_new_tokens", "batch_size", "num_beams", "temperature", "top_p", "seed"
)  # fmt: skip
"""The flags that are arguments of `ptjax.infer` too."""


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "infer",
        """
        Predicts for texts on the command line, or for the records of a file. Inputs are formatted,
        cut and tokenised as the prompt was trained. Where its task has a closed set of labels, they
        are ranked by likelihood; otherwise, or with --decode, the answer is generated.

        Writes one JSON object per input, in order: the record's own fields, "inputs" (what the
        model read), "prediction", "score" (its log-likelihood; after a beam search with brevity
        penalty) and, where labels were ranked, "probabilities".

        With --prompts=DIR, the field "prompt" of every record names the prompt that it is read
        with ("none" or null: the backbone alone); each record gets that prompt's template, lengths
        and labels, and records of different prompts share batches.

          python -m ptjax.infer --model_dir=runs/quickstart 'a text of your own'
          python -m ptjax.infer --prompt=best.safetensors --input=new.jsonl --output=answers.jsonl
          python -m ptjax.infer --prompts=DIR --input=mixed.jsonl --output=answers.jsonl
        """,
        gin_help="It names the backbone where --backbone and --model_dir do not.",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a plain text; may be repeated")
    parser.add_argument(
        "--input", metavar="FILE", help="records or plain lines; '-' is standard input"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of the input; default: by the file's name, of standard input by its first character. "
        "Plain lines (text) fill the template's only field; empty ones are left out",
    )
    parser.add_argument(
        "--columns",
        type=lambda names: names.split(","),
        metavar="NAMES",
        help="comma-separated names of the fields, of a csv or tsv without a header line",
    )
    parser.add_argument(
        "--quoting",
        choices=QUOTING,
        help="whether double quotes enclose fields; default: true in csv, false in tsv",
    )
    parser.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help="of the input; default: utf-8"
    )
    parser.add_argument(
        "--on_bad_record",
        choices=ON_BAD_RECORD,
        default="error",
        help="skip leaves records out that cannot be used, and counts them; default: error",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="inputs are formatted already: plain lines, or the field 'inputs' of each record",
    )
    output.add_flags(parser, "written atomically; default: standard output")
    output.add_prefix_flag(parser)
    model_flags.add_flags(
        parser,
        "the prompts in DIR (files, PEFT directories, folders with a best.safetensors), each named "
        "as its file or folder; every record of --input names its own in the field 'prompt'",
    )
    add_decoding_flags(parser)
    distributed.add_flags(parser)
    arguments = cli.parse(parser)
    if bool(arguments.texts) == bool(arguments.input):
        parser.error("give either texts or --input=FILE ('-' is standard input)")
    cli.run(lambda: infer(arguments), arguments)


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for how answers are generated, from --decode to --batch_size."""
    group = parser.add_argument_group("how")
    group.add_argument(
        "--decode", action="store_true", help="generate, even where a closed set of labels is known"
    )
    group.add_argument(
        "--num_beams", type=int, default=1, metavar="N", help="beam search; default: 1, greedy"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="above 0: sample; default: 0"
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample from the likeliest tokens that together reach this; default: 1",
    )
    group.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="default: the target length that the prompt was tuned with",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default: 0")
    group.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="inputs at once; default: 32"
    )


def infer(arguments: argparse.Namespace) -> None:
    """Predicts for the inputs that the flags name, and writes the results.

    `ptjax.infer` with a difference: the inputs are read before the backbone is loaded, so that a
    bad line is reported in a second, not after minutes.

    Args:
        arguments: the parsed flags.
    """
    from ptjax import output as writing
    from ptjax.inference import infer, requests
    from ptjax.sharding import processes

    if arguments.input == "-" and processes.several():
        raise InputError("standard input reaches only one of several processes; give --input=FILE")
    check_at_least(1, **{"--batch_size": arguments.batch_size})
    if arguments.output:
        output.check(arguments.output, force=arguments.force, inputs=inputs_of(arguments))
    model_flags.load(arguments)
    many = arguments.prompts is not None
    prompt = model_flags.load_bank(arguments) if many else model_flags.load_prompt(arguments)
    records = read_records(arguments)
    asked = requests.make_requests(
        records,
        prompt,
        lambda metadata: model_flags.input_format(metadata, raw=arguments.raw),
        raw=arguments.raw,
        prefix=arguments.prefix,
    )
    requests.check_left_out(asked, records.bad, arguments.input or "the command line")
    of_prompts = requests.metadata_of(prompt)
    named = next((metadata for metadata in of_prompts if metadata.get("backbone_name")), {})
    rows = infer.answer(
        model_flags.load_backbone(arguments, named),
        asked,
        prompt,
        arguments.prefix,
        allow_mismatch=arguments.allow_mismatch,
        **{name: getattr(arguments, name) for name in ANSWERING},
    )
    if arguments.output:
        infer.write_rows(arguments.output, rows)
    elif processes.first():
        output.show(writing.json_lines(rows))


def read_records(arguments: argparse.Namespace) -> Records:
    """Reads the inputs that the flags name, as records.

    Raises:
        InputError: the input is missing or empty, or a record in it cannot be read.
    """
    from ptjax.inference import inputs

    if arguments.texts:
        records = inputs.records_of_texts(arguments.texts, "the command line, text")
        records.bad.policy = arguments.on_bad_record
        return records
    reading: Reading = {
        "format": arguments.format,
        "columns": arguments.columns,
        "quoting": QUOTING.get(arguments.quoting),
        "encoding": arguments.encoding,
    }
    policy = arguments.on_bad_record
    if arguments.input == "-":
        data = sys.stdin.buffer.read()
        return inputs.read_stream(data, "standard input", on_bad_record=policy, **reading)
    return inputs.read_inputs(arguments.input, on_bad_record=policy, **reading)


def inputs_of(arguments: argparse.Namespace) -> list[str]:
    """Lists the local files and folders that the command reads; --output may not be one."""
    from ptjax.data import sources

    files = [] if arguments.input in (None, "-") else sources.find_files(arguments.input)
    return [*map(os.fspath, files), *model_flags.inputs(arguments)]


if __name__ == "__main__":
    main()
