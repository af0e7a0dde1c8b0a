"""`python -m ptjax.infer`: predicts for texts, lines or records, and writes JSON lines."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from typing import TYPE_CHECKING

from absl import logging

from ptjax import cli
from ptjax.cli import distributed, model_flags, output
from ptjax.errors import InputError, check_at_least
from ptjax.files import JsonObject, Metadata

if TYPE_CHECKING:
    from ptjax.data.sources import Records
    from ptjax.inference.bank import PromptBank
    from ptjax.inference.predict import Prediction
    from ptjax.inference.records import InputFormat
    from ptjax.interop.prompt_file import PromptFile

FORMATS = ("jsonl", "text", "csv", "tsv")
ON_BAD_RECORD = ("error", "skip")
QUOTING = {"true": True, "false": False}


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
    output.add_flags(parser, "written whole or not at all; default: standard output")
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

    Args:
        arguments: the parsed flags.
    """
    from ptjax.inference import predict, prompts
    from ptjax.sharding import processes

    if arguments.input == "-" and processes.several():
        raise InputError("standard input reaches only one of several processes; give --input=FILE")
    check_at_least(1, **{"--batch_size": arguments.batch_size})
    if arguments.output:
        output.check(arguments.output, force=arguments.force, inputs=inputs_of(arguments))
    model_flags.load(arguments)
    many = arguments.prompts is not None
    bank: PromptBank | None = model_flags.load_bank(arguments) if many else None
    single: PromptFile | None = None if many else model_flags.load_prompt(arguments)
    if bank is not None:
        # The backbone alone comes last, where -1 finds it.
        of_prompts = [metadata or {} for metadata in (*bank.metadata, None)]
    else:
        of_prompts = [{} if single is None else single.metadata]
    # Before the backbone is loaded: a bad line is reported in a second, not after minutes.
    requests = read_requests(arguments, of_prompts, bank)
    named = next((metadata for metadata in of_prompts if metadata.get("backbone_name")), {})
    loaded = model_flags.load_backbone(arguments, named)
    prompt = bank if many else single
    prompt = prompts.open_prompt(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    predictions = predict.predict(
        loaded,
        [request.text for request in requests],
        [request.input_format for request in requests],
        prompt,
        None if bank is None else [request.prompt_id for request in requests],
        decode_all=arguments.decode,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if processes.first():
        pairs = zip(requests, predictions, strict=True)
        write(arguments, [row_of(*pair, arguments.prefix) for pair in pairs])


def row_of(request: Request, prediction: Prediction, prefix: str) -> JsonObject:
    """Makes the object that is written for an input: the record's fields and the prediction's.

    Args:
        prefix: is prepended to the names of the prediction's fields.
    """
    new = {"inputs": request.text, "prediction": prediction.text, "score": prediction.score}
    if prediction.probabilities is not None:
        new["probabilities"] = prediction.probabilities
    return request.fields | prefixed(new, prefix)


def write(arguments: argparse.Namespace, rows: list[JsonObject]) -> None:
    """Writes `rows` as JSON lines to --output, else to standard output."""
    text = "".join(output.as_json(row, ensure_ascii=False) + "\n" for row in rows)
    if not arguments.output:
        output.show(text)
        return
    output.write(arguments.output, text)
    logging.info("wrote %s predictions to %s", f"{len(rows):,}", arguments.output)


def inputs_of(arguments: argparse.Namespace) -> list[str]:
    """Lists the local files that the command reads, which --output must not overwrite."""
    from ptjax.data import sources

    files = [] if arguments.input in (None, "-") else sources.find_files(arguments.input)
    return [*map(os.fspath, files), *model_flags.inputs(arguments)]


def prefixed(fields: JsonObject, prefix: str) -> JsonObject:
    """Returns `fields` with `prefix` prepended to their names."""
    return {f"{prefix}{name}": value for name, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class Request:
    """An input to predict for.

    Attributes:
        text: the model's input, formatted by the template.
        fields: the record's own fields.
        input_format: the template and lengths of its prompt.
        prompt_id: the index of its prompt in the bank, or -1 for the backbone alone; 0 without a
            bank.
    """

    text: str
    fields: JsonObject
    input_format: InputFormat
    prompt_id: int


def read_requests(
    arguments: argparse.Namespace, of_prompts: list[JsonObject], bank: PromptBank | None
) -> list[Request]:
    """Reads the inputs in order, without those that --on_bad_record skips.

    Args:
        arguments: the parsed flags.
        of_prompts: the metadata of every prompt; of a bank, followed by {} for the backbone alone.
        bank: None with a single prompt.

    Raises:
        InputError: a record cannot be used (the message has its place), or none is left.
    """
    from ptjax.data import sources
    from ptjax.inference import records as reading

    records = records_of(arguments)
    bad = records.bad
    formats: dict[int, InputFormat] = {}
    kept, requests = [], []
    for record in records:
        try:
            number = 0 if bank is None else reading.prompt_of(record, bank)
            if number not in formats:
                formats[number] = format_of(of_prompts[number], raw=arguments.raw)
            task = None if arguments.raw else formats[number].task
            text, fields = reading.format_record(record, task)
            new = {"inputs": text, "prediction": None, "score": None, "probabilities": None}
            output.check_fields(fields, prefixed(new, arguments.prefix), record.where)
        except InputError as error:
            if bad.policy == "error":
                raise
            bad.report(record.where, str(error).removeprefix(f"{record.where}: "))
            continue
        kept.append(record)
        requests.append(Request(text, fields, formats[number], number))
    ids = None if bank is None else [request.prompt_id for request in requests]
    reading.check_prompt_fields(kept, [request.input_format for request in requests], ids)
    sources.non_empty(sources.Records(kept, bad), arguments.input or "the command line")
    if bad.count:
        total = len(kept) + bad.count
        logging.warning("left out %d of %d records; the first: %s", bad.count, total, bad.first)
    return requests


def format_of(metadata: Metadata, *, raw: bool) -> InputFormat:
    """The input format of a prompt, completed from the gin files.

    Args:
        metadata: the prompt's.
        raw: whether inputs are formatted already, so that no task is needed.
    """
    from ptjax.inference import records

    lengths = model_flags.lengths(metadata)
    task = records.task_of(metadata, model_flags.task(metadata, needed=not raw))
    return records.InputFormat(task, lengths.get("inputs"), lengths.get("targets"))


def records_of(arguments: argparse.Namespace) -> Records:
    """Reads the inputs as records; those that are plain texts have the single field `PLAIN`.

    Raises:
        InputError: the input is missing or empty, or a record in it cannot be read.
    """
    from ptjax.data import sources
    from ptjax.inference.records import PLAIN

    bad = sources.BadRecords(arguments.on_bad_record)
    if arguments.texts:
        plain = [
            sources.Record({PLAIN: text}, "the command line, text", i)
            for i, text in enumerate(arguments.texts, 1)
        ]
        return sources.Records(plain, bad)
    name, kind = arguments.input, arguments.format
    columns, encoding = arguments.columns, arguments.encoding
    quoting = QUOTING.get(arguments.quoting)
    if name == "-":
        name, data = "standard input", sys.stdin.buffer.read()
        kind = kind or ("jsonl" if is_json(data, encoding) else "text")
        parsed = sources.parse_records(
            data, name, kind, bad, columns=columns, quoting=quoting, encoding=encoding
        )
        records = sources.non_empty(sources.Records(parsed, bad), name)
    else:
        records = sources.read_records(
            name,
            format=kind,
            on_bad_record=arguments.on_bad_record,
            columns=columns,
            quoting=quoting,
            encoding=encoding,
        )
        stem = name.removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
        kind = kind or ("text" if os.path.splitext(stem)[1] == ".txt" else None)
    if records.bad.blank:
        logging.warning(
            "%s: %d of %d lines are blank and left out; the others are answered in order",
            name,
            records.bad.blank,
            records.bad.blank + records.bad.count + len(records),
        )
    if kind != "text":
        return records
    plain = [sources.Record({PLAIN: r.fields["text"]}, r.file, r.line) for r in records]
    return sources.Records(plain, records.bad)


def is_json(data: bytes, encoding: str) -> bool:
    """Whether bytes start like JSON lines, or are a JSON array (which the reader rejects).

    Args:
        encoding: the name of the bytes' encoding; an unknown one gives False.
    """
    from ptjax import files

    try:
        start = data.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    except LookupError:  # no such encoding, which the reader reports
        return False
    if not start.startswith("["):
        return start.startswith("{")
    try:
        return isinstance(files.parse_json(start), list)
    except ValueError:
        # Broken, or a line of plain text such as "[1] a footnote".
        return re.match(r"\[\s*\{", start) is not None


if __name__ == "__main__":
    main()
