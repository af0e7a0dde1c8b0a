"""Draws the loss curves of all trained stages: models/losses.svg.

python models/plot_losses.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from ptjax_models import SIZES, STAGES

HERE = Path(__file__).resolve().parent
WINDOW = 5
"""Values in the moving average. Each is a mean of 100 steps, whose mix of parts varies."""


def main() -> None:
    figure, axes = pyplot.subplots(1, len(STAGES), figsize=(9, 3.2), layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        for number, size in enumerate(SIZES):
            file = HERE / "ptjax_models" / f"{size}-{stage}" / "losses.json"
            if file.exists():
                losses = {int(step): loss for step, loss in json.loads(file.read_text()).items()}
                smooth = np.convolve(list(losses.values()), np.ones(WINDOW) / WINDOW, "valid")
                steps = list(losses)[WINDOW - 1 :]
                axis.plot(steps, smooth, color=f"C{number}", label=f"ptjax-{size}")
        axis.set(title=stage, xlabel="step", ylabel="loss of a target token")
        axis.legend()
    pyplot.rcParams["svg.hashsalt"] = "ptjax"  # the same losses give the same file
    figure.savefig(HERE / "losses.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
