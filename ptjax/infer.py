"""`python -m ptjax.infer`: predictions for texts, lines or records, as JSON lines."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from typing import Any

from absl import logging

from ptjax import cli
from ptjax.cli import distributed, model_flags, output
from ptjax.errors import InputError, check_at_least

FORMATS = ("jsonl", "text", "csv", "tsv")
ON_BAD_RECORD = ("error", "skip")
QUOTING = {"true": True, "false": False}


def main() -> None:
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
    from ptjax.inference import predict, prompts
    from ptjax.sharding import processes

    if arguments.input == "-" and processes.several():
        raise InputError("standard input reaches only one of several processes; give --input=FILE")
    check_at_least(1, **{"--batch_size": arguments.batch_size})
    if arguments.output:
        output.check(arguments.output, force=arguments.force, inputs=inputs_of(arguments))
    model_flags.load(arguments)
    many = arguments.prompts is not None
    prompt = model_flags.load_bank(arguments) if many else model_flags.load_prompt(arguments)
    # The backbone alone stands last, where -1 finds it.
    of_many = [metadata or {} for metadata in (*prompt.metadata, None)] if many else []
    said = of_many or [{} if prompt is None else prompt.metadata]
    # Before the backbone is loaded: a bad line is found in a second, not after minutes.
    asked = questions_of(arguments, said, prompt if many else None)
    tells = next((metadata for metadata in said if metadata.get("backbone_name")), {})
    loaded = model_flags.load_backbone(arguments, tells)
    if prompt is not None:
        check = prompts.check_bank if many else prompts.check_prompt
        prompt = check(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    found = predict.predict(
        loaded,
        [one.text for one in asked],
        [one.manner for one in asked],
        prompt,
        [one.prompt_id for one in asked] if many else None,
        decode_all=arguments.decode,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        num_beams=arguments.num_beams,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if not processes.first():
        return
    lines = []
    for question, answer in zip(asked, found, strict=True):
        new = {"inputs": question.text, "prediction": answer.text, "score": answer.score}
        if answer.probabilities is not None:
            new["probabilities"] = answer.probabilities
        row = question.fields | prefixed(new, arguments.prefix)
        lines.append(output.as_json(row, ensure_ascii=False) + "\n")
    if arguments.output:
        output.write(arguments.output, "".join(lines))
        logging.info("wrote %s predictions to %s", f"{len(lines):,}", arguments.output)
    else:
        output.show("".join(lines))


def inputs_of(arguments: argparse.Namespace) -> list[str]:
    """The files that the flags name to be read."""
    from ptjax.data import sources

    files = [] if arguments.input in (None, "-") else sources.find_files(arguments.input)
    return [*map(os.fspath, files), *model_flags.inputs(arguments)]


def prefixed(fields: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class Question:
    """An input that can be answered.

    Attributes:
        text: the model's input.
        fields: the record's own.
        manner: of its prompt, a `predict.Manner`.
        prompt_id: in the bank, -1 for none; 0 without a bank.
    """

    text: str
    fields: dict[str, Any]
    manner: Any
    prompt_id: int


def questions_of(
    arguments: argparse.Namespace, said: list[dict[str, Any]], bank: Any
) -> list[Question]:
    """What the records ask, in order, those left out that --on_bad_record skips.

    Args:
        said: the metadata of every prompt.

    Raises:
        InputError: a record that cannot be used, with its place.
    """
    from ptjax.data import sources
    from ptjax.inference import predict

    records = records_of(arguments)
    bad, manners = records.bad, {}
    kept, asked = [], []
    for record in records:
        try:
            number = 0 if bank is None else predict.prompt_of(record, bank)
            if number not in manners:
                manners[number] = manner_of(said[number], raw=arguments.raw)
            task = None if arguments.raw else manners[number].task
            text, fields = predict.format_record(record, task)
            new = {"inputs": text, "prediction": None, "score": None, "probabilities": None}
            output.check_fields(fields, prefixed(new, arguments.prefix), record.where)
        except InputError as error:
            if bad.policy == "error":
                raise
            bad.report(record.where, str(error).removeprefix(f"{record.where}: "))
            continue
        kept.append(record)
        asked.append(Question(text, fields, manners[number], number))
    ids = None if bank is None else [one.prompt_id for one in asked]
    predict.check_prompt_fields(kept, [one.manner for one in asked], ids)
    sources.non_empty(sources.Records(kept, bad), arguments.input or "the command line")
    if bad.count:
        total = len(kept) + bad.count
        logging.warning("left out %d of %d records; the first: %s", bad.count, total, bad.first)
    return asked


def manner_of(metadata: dict[str, Any], *, raw: bool) -> Any:
    from ptjax.inference import predict

    lengths = model_flags.lengths(metadata)
    task = predict.task_of(metadata, model_flags.task(metadata, needed=not raw))
    return predict.Manner(task, lengths.get("inputs"), lengths.get("targets"))


def records_of(arguments: argparse.Namespace) -> Any:
    """The inputs as `sources.Records`; a plain line is one with the field `predict.PLAIN`."""
    from ptjax.data import sources
    from ptjax.inference import predict

    bad = sources.BadRecords(arguments.on_bad_record)
    if arguments.texts:
        plain = [
            sources.Record({predict.PLAIN: text}, "the command line, text", i)
            for i, text in enumerate(arguments.texts, 1)
        ]
        return sources.Records(plain, bad)
    name, kind = arguments.input, arguments.format
    read: dict[str, Any] = {
        "columns": arguments.columns,
        "quoting": QUOTING.get(arguments.quoting),
        "encoding": arguments.encoding,
    }
    if name == "-":
        name, data = "standard input", sys.stdin.buffer.read()
        kind = kind or ("jsonl" if is_json(data, arguments.encoding) else "text")
        found = sources.parse_records(data, name, kind, bad, **read)
        records = sources.non_empty(sources.Records(found, bad), name)
    else:
        records = sources.read_records(
            name, format=kind, on_bad_record=arguments.on_bad_record, **read
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
    plain = [sources.Record({predict.PLAIN: r.fields["text"]}, r.file, r.line) for r in records]
    return sources.Records(plain, records.bad)


def is_json(data: bytes, encoding: str) -> bool:
    """Whether bytes start like JSON lines, or are a JSON array, which is then refused by name."""
    from ptjax import files

    try:
        start = data.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    except LookupError:  # no such encoding, which the reader says
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
