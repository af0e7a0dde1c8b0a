"""Writes the data that the parts of `run.sh` read, into one folder to copy to the GPU machine.

    python benchmarks/on_gpu/prepare.py --data_dir=DIR [--data=DIR] [--tokenizer=MODEL] sst2 imdb
    python benchmarks/on_gpu/prepare.py --data_dir=DIR [--data=DIR] --corpus_dir=DIR family

The gin files of the tasks and of the family define the layout of --data_dir and --corpus_dir. The
part `pretrain` reads `family` (36 MB, written in about five minutes), `peft` reads `sst2` and
`imdb`, `generate` reads `sst2`; `parity`, `step` and `attention` read nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent), str(ROOT / "models")]

from family import write_from_gin  # noqa: E402
from real_batches import TARGET_LENGTH, load_examples, make_task  # noqa: E402

from ptjax.data.preprocess import tokenize_texts  # noqa: E402
from ptjax.data.tokenizer import load_tokenizer  # noqa: E402

INPUT_LENGTH = 512
"""Longer inputs are truncated."""


def write_examples(name: str, flags: argparse.Namespace) -> None:
    """Writes DATA/NAME.npz: a task's training split as ids, the end of sequence included.

    `train_ids` uint16 [sum of lengths], one example after the other; `train_offsets` int64 [N + 1];
    `train_targets` uint8 [N], class numbers. `label_ids` and `label_offsets` hold the labels of
    the classes in the same form.

    Args:
        name: a task of `real_batches.TASKS`.

    Raises:
        SystemExit: the tokenizer's ids need more than 16 bits.
    """
    task = make_task(name, flags.data_dir)
    tokenizer = load_tokenizer(flags.tokenizer)
    inputs = load_examples(task, flags.tokenizer, INPUT_LENGTH).inputs
    labels = list(task.labels)
    label_rows = tokenize_texts(labels, tokenizer, TARGET_LENGTH)
    if max(inputs.ids.max(), label_rows.ids.max()) > np.iinfo(np.uint16).max:
        raise SystemExit(f"{flags.tokenizer}: ids above {np.iinfo(np.uint16).max} do not fit")
    classes = [labels.index(example.targets) for example in task.load("train")]
    np.savez_compressed(
        flags.data / f"{name}.npz",
        train_ids=inputs.ids.astype(np.uint16),
        train_offsets=inputs.offsets,
        train_targets=np.array(classes, np.uint8),
        label_ids=label_rows.ids.astype(np.uint16),
        label_offsets=label_rows.offsets,
    )


def write_family(flags: argparse.Namespace) -> None:
    """Writes DATA/family: the data of the family's pre-training, see `family.py`.

    Raises:
        SystemExit: no --corpus_dir.
    """
    if flags.corpus_dir is None:
        raise SystemExit("family needs --corpus_dir, the running text of runs/pretrain_family.gin")
    write_from_gin(
        flags.data / "family", Path(flags.data_dir), flags.corpus_dir.absolute(), tokens=12_000_000
    )


FILES: dict[str, Callable[[argparse.Namespace], None]] = {
    "sst2": functools.partial(write_examples, "sst2"),
    "imdb": functools.partial(write_examples, "imdb"),
    "family": write_family,
}
"""Name on the command line -> what writes it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one of {', '.join(FILES)}")
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--corpus_dir", type=Path, help="the running text, for `family`")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="output folder")
    parser.add_argument(
        "--tokenizer",
        default="package:nano",
        help="for example T5's SentencePiece model (default: %(default)s)",
    )
    flags = parser.parse_args()
    if unknown := set(flags.names) - set(FILES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(FILES)}")
    flags.data.mkdir(parents=True, exist_ok=True)
    for name in flags.names:
        FILES[name](flags)
    for file in sorted(path for path in flags.data.rglob("*") if path.is_file()):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
