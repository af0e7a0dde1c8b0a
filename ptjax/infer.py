"""`python -m ptjax.infer`: predictions for texts, lines or records, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ptjax import cli
from ptjax.cli import chosen
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

          python -m ptjax.infer --model_dir=runs/quickstart 'a text of your own'
          python -m ptjax.infer --prompt=best.safetensors --input=new.jsonl --output=answers.jsonl
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
    chosen.add_flags(parser)
    add_decoding_flags(parser)
    arguments = cli.parse(parser)
    if bool(arguments.texts) == bool(arguments.input):
        parser.error("give either texts or --input=FILE ('-' is standard input)")
    cli.run(lambda: infer(arguments))


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

    if arguments.batch_size < 1:
        raise InputError(f"--batch_size={arguments.batch_size}: it has to be at least 1")
    chosen.load(arguments)
    prompt = chosen.load_prompt(arguments)
    metadata = {} if prompt is None else prompt.metadata
    task = prediction.task_of(metadata, chosen.task())
    template = None if arguments.raw else task
    # Before the backbone is loaded: a bad line is found in a second, not after minutes.
    formatted = [prediction.format_record(record, template) for record in records_of(arguments)]
    loaded = chosen.load_backbone(arguments, metadata)
    if prompt is not None:
        prompt = prompting.check_prompt(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    texts = [text for text, _ in formatted]
    found = predict(arguments, loaded, texts, prompt, task, chosen.lengths(metadata))
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


def predict(
    arguments: argparse.Namespace,
    backbone: Any,
    texts: list[str],
    prompt: Any,
    task: Any,
    lengths: dict[str, int],
) -> list[Any]:
    from ptjax import prediction

    labels = None if arguments.decode or task is None else task.labels
    settings = {name: getattr(arguments, name) for name in ("num_beams", "temperature", "top_p")}
    length = arguments.max_new_tokens
    if labels is not None:
        if settings != {"num_beams": 1, "temperature": 0.0, "top_p": 1.0}:
            raise InputError(
                f"the task has a closed set of labels ({', '.join(labels)}), which are ranked;"
                " --num_beams, --temperature and --top_p go with --decode"
            )
        return prediction.rank(
            backbone,
            texts,
            labels,
            prompt,
            input_length=lengths.get("inputs", 512),
            target_length=lengths.get("targets", 16),
            batch_size=arguments.batch_size,
        )
    return prediction.decode(
        backbone,
        texts,
        prompt,
        max_new_tokens=lengths.get("targets") if length is None else length,
        input_length=lengths.get("inputs"),
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        **settings,
    )


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
