"""Pre-trains a member of the family on this machine, both stages, and packs its weights.

    python models/train.py SIZE --work_dir=DIR --data_dir=DATA --corpus_dir=CORPUS

The same command resumes an interrupted run. It writes each finished stage to
models/ptjax_models/SIZE-STAGE (bfloat16, with losses.json) and skips stages that are there already.
The second stage starts from the first one's folder. On a GPU machine without a network, use
benchmarks/on_gpu/run.sh pretrain.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ptjax_models import SIZES, STAGES

WEIGHTS = Path(__file__).resolve().parent / "ptjax_models"


def pretrain(flags: argparse.Namespace, stage: str, start: Path | None) -> Path:
    """Runs a stage with `python -m ptjax.pretrain`, or resumes it; returns its MODEL_DIR."""
    model_dir = flags.work_dir / f"{flags.size}-{stage}"
    settings = {
        "MODEL_DIR": model_dir,
        "DATA_DIR": flags.data_dir,
        "CORPUS_DIR": flags.corpus_dir,
    }
    if start is not None:
        settings["INITIAL_CHECKPOINT_PATH"] = start
    words = ["-m", "ptjax.pretrain", f"--gin_file={STAGES[stage]}"]
    if start is None:
        words.append(f"--gin_file=models/ptjax_{flags.size}.gin")
    words += [f"--gin.{name}={str(path.absolute())!r}" for name, path in settings.items()]
    print(shlex.join(["python", *words]), flush=True)
    environment = os.environ
    if flags.one_thread:
        environment = environment | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    done = subprocess.run([sys.executable, *words], env=environment)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return model_dir


def pack(model_dir: Path, target: Path) -> None:
    """Writes the weights of a finished stage in bfloat16, and its training losses."""
    from ptjax import load_backbone, save_backbone
    from ptjax.model_dir import ModelDir

    backbone = load_backbone(ModelDir(model_dir).best_model, dtype="float32")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_backbone(
        partial, backbone.config, backbone.variables["params"], tokenizer=backbone.tokenizer
    )
    rows = [json.loads(line) for line in ModelDir(model_dir).metrics.read_text().splitlines()]
    losses = {row["step"]: round(row["train/loss"], 4) for row in rows if "train/loss" in row}
    (partial / "losses.json").write_text(json.dumps(losses) + "\n")
    partial.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--work_dir", type=Path, required=True, help="holds the MODEL_DIRs")
    parser.add_argument("--data_dir", type=Path, required=True, help="IMDb, QQP, RTE and CB")
    parser.add_argument("--corpus_dir", type=Path, required=True, help="the running text")
    parser.add_argument("--one_thread", action="store_true", help="use one compute thread")
    flags = parser.parse_args()
    start = None
    for stage in STAGES:
        target = WEIGHTS / f"{flags.size}-{stage}"
        if not target.exists():
            pack(pretrain(flags, stage, start), target)
        start = target


if __name__ == "__main__":
    main()
