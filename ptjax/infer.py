"""`python -m ptjax.infer`: predictions for texts, lines or records, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ptjax import cli
from ptjax.cli import chosen, distributed
from ptjax.errors import InputError

FORMATS = ("jsonl", "text", "csv", "tsv")


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
        "--raw",
        action="store_true",
        help="inputs are formatted already: plain lines, or the field 'inputs' of each record",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="written whole or not at all; default: standard output"
    )
    chosen.add_flags(
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
    from ptjax import atomic, prediction, prompting
    from ptjax.scale import processes

    if arguments.input == "-" and processes.several():
        raise InputError("standard input reaches only one of several processes; give --input=FILE")
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size={arguments.batch_size}: it has to be at least 1")
    chosen.load(arguments)
    many = arguments.prompts is not None
    prompt = chosen.load_bank(arguments) if many else chosen.load_prompt(arguments)
    records = records_of(arguments)
    if many:
        ids = [prediction.prompt_of(record, prompt) for record in records]
        # The backbone alone stands last, where -1 finds it.
        said = [metadata or {} for metadata in (*prompt.metadata, None)]
    else:
        ids, said = None, [{} if prompt is None else prompt.metadata]
    used = ids or [0] * len(records)
    known = {i: manner_of(said[i]) for i in set(used)}
    manners = [known[i] for i in used]
    prediction.check_prompt_fields(records, manners, ids)
    # Before the backbone is loaded: a bad line is found in a second, not after minutes.
    formatted = [
        prediction.format_record(record, None if arguments.raw else manner.task)
        for record, manner in zip(records, manners, strict=True)
    ]
    tells = next((metadata for metadata in said if metadata.get("backbone_name")), {})
    loaded = chosen.load_backbone(arguments, tells)
    if prompt is not None:
        check = prompting.check_bank if many else prompting.check_prompt
        prompt = check(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    found = prediction.predict(
        loaded,
        [text for text, _ in formatted],
        manners,
        prompt,
        ids,
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
    for (text, fields), one in zip(formatted, found, strict=True):
        row = fields | {"inputs": text, "prediction": one.text, "score": one.score}
        if one.probabilities is not None:
            row["probabilities"] = one.probabilities
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if arguments.output:
        atomic.write_bytes(arguments.output, "".join(lines).encode())
    else:
        sys.stdout.write("".join(lines))


def manner_of(metadata: dict[str, Any]) -> Any:
    from ptjax import prediction

    lengths = chosen.lengths(metadata)
    task = prediction.task_of(metadata, chosen.task())
    return prediction.Manner(task, lengths.get("inputs"), lengths.get("targets"))


def records_of(arguments: argparse.Namespace) -> list[Any]:
    """The inputs as records; a plain line is one with the field `prediction.PLAIN`."""
    from ptjax import prediction
    from ptjax.data import sources

    if arguments.texts:
        return [
            sources.Record({prediction.PLAIN: text}, "the command line, text", i)
            for i, text in enumerate(arguments.texts, 1)
        ]
    name, kind = arguments.input, arguments.format
    if name == "-":
        name, data = "standard input", sys.stdin.buffer.read()
        kind = kind or ("jsonl" if data.lstrip()[:1] == b"{" else "text")
        bad = sources.BadRecords()
        found = sources.parse_records(data, name, kind, bad)
        records = sources.non_empty(sources.Records(found, bad), name)
    else:
        records = sources.read_records(name, format=kind)
        stem = name.removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2")
        kind = kind or ("text" if os.path.splitext(stem)[1] == ".txt" else None)
    if kind != "text":
        return list(records)
    return [sources.Record({prediction.PLAIN: r.fields["text"]}, r.file, r.line) for r in records]


if __name__ == "__main__":
    main()
