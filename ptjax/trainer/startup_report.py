"""Logs sizes and the learning rate before the first step, and warns of likely mistakes."""

from __future__ import annotations

import re

from absl import logging

from ptjax.backbones.load import Backbone
from ptjax.errors import gin_flag
from ptjax.methods.base import Method
from ptjax.training import freeze as freezing
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Tree


def report_sizes(
    method: Method, backbone: Backbone, trainable: Tree, opt_state: Tree, frozen: Tree
) -> None:
    """Logs the backbone's name and the sizes of the run.

    These are the numbers of trainable and frozen parameters, and the megabytes of the frozen
    variables, of the optimizer's state, and of a checkpoint.

    Args:
        trainable, opt_state: in a sweep, those of all members together.
    """
    (trained, trained_bytes), (kept, kept_bytes) = (
        freezing.sizes(trainable),
        freezing.sizes(frozen),
    )
    _, optimizer_bytes = freezing.sizes(opt_state)
    logging.info("backbone %s, %s", backbone.name, backbone.fingerprint[:19])
    logging.info(
        "%s: %s trainable parameters (%.4f%%), %s frozen (%s)",
        method.name,
        f"{trained:,}",
        100 * trained / (trained + kept),
        f"{kept:,}",
        _megabytes(kept_bytes),
    )
    logging.info(
        "optimizer state %s, a checkpoint about %s",
        _megabytes(optimizer_bytes),
        _megabytes(trained_bytes + optimizer_bytes),
    )


def report_steps(train_steps: int, backbone: Backbone) -> None:
    """Warns if `train_steps` seems to include the steps of the backbone's T5X checkpoint.

    T5X counts on from the step of the checkpoint, ptjax counts from 0. The checkpoint's step is
    read from the backbone's name, such as `checkpoint_1100000`.
    """
    checkpoint = re.search(r"checkpoint_(\d+)/*$", backbone.name)
    before = int(checkpoint[1]) if checkpoint else 0
    # A checkpoint of a few steps and a long run do not suggest it.
    if train_steps / 10 < before < train_steps:
        logging.warning(
            "TRAIN_STEPS = %s are steps of this run. T5X starts to count at the checkpoint's %s, "
            "and would train for %s: set %s if you mean that",
            f"{train_steps:,}",
            f"{before:,}",
            f"{train_steps - before:,}",
            gin_flag("TRAIN_STEPS", train_steps - before),
        )


def report_rate(trainable: Tree, optimizer: Adafactor, rms: float) -> None:
    """Logs the learning rate at step 0; warns if it is too high for a prompt.

    Args:
        rms: the RMS of the backbone's embedding, which is the scale of a prompt's entries.
    """
    rate = optimizer.rate_number(0, rms)
    if optimizer.multiply_by_parameter_scale:
        logging.info("learning rate %.4g: %.2g%% of each array's own RMS a step", rate, 100 * rate)
        return
    logging.info(
        "learning rate %.4g: %.2g%% of the embedding's RMS (%.3g) a step",
        rate,
        100 * rate / rms,
        rms,
    )
    if "prompt" in trainable and rate > 0.1 * rms:
        logging.warning(
            "one step may move a prompt entry by %.0f%% of the embedding's RMS; 1-3%% learns "
            "best: set %s %s (Adafactor.learning_rate_scale and learning_rate)",
            100 * rate / rms,
            gin_flag("LEARNING_RATE_SCALE", "embedding_rms"),
            gin_flag("LEARNING_RATE", 0.03),
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
