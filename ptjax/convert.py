"""`python -m ptjax.convert`: writes a TFDS data set as array_record."""

from __future__ import annotations

import argparse

from ptjax import cli
from ptjax.cli import output


def main() -> None:
    parser = cli.make_parser(
        "convert",
        """
        Writes a TFDS data set that was prepared as tfrecord, TFDS's default, as array_record:
        the same examples in the same order, with its dataset_info.json and features.json.
        TensorFlow is not needed. ptjax reads both formats; other libraries without TensorFlow, such
        as Grain, read array_record. DIR is the folder of one version. The new one appears
        once it is complete.

          python -m ptjax.convert --from=DATA_DIR/glue/sst2/2.0.0 --to=NEW_DIR/glue/sst2/2.0.0
        """,
        gin=False,
    )
    parser.add_argument(
        "--from", required=True, dest="source", metavar="DIR", help="the folder of one version"
    )
    parser.add_argument(
        "--to",
        required=True,
        dest="target",
        metavar="DIR",
        help="a folder that does not exist; for ptjax it ends in NAME[/CONFIG]/VERSION, as --from",
    )
    parser.add_argument(
        "--split", metavar="NAMES", help="the splits to convert, comma-separated; default: all"
    )
    arguments = cli.parse(parser)
    cli.run(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    from ptjax.data.tfds_convert import convert_to_array_record

    if "://" not in arguments.target:
        output.check_place(arguments.target, "--to")
    splits = None if arguments.split is None else arguments.split.split(",")
    counts = convert_to_array_record(arguments.source, arguments.target, splits)
    parts = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    output.show(f"{arguments.target}: array_record, {sum(counts.values()):,} examples ({parts})")


if __name__ == "__main__":
    main()
