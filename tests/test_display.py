"""The lines of a run where there is no terminal, and its TensorBoard."""

import logging

from etils import epath

from ptjax.display import Display


def test_a_line_shows_what_was_just_measured_and_nothing_older(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    display = Display(steps=4)
    display.on_start(epath.Path(tmp_path), 0)
    display.on_log(1, {"train/loss": 2.5, "train/gradient_norm": 7.0})
    display.on_evaluation(2, {"validation/loss": 0.25, "time/evaluation_seconds": 3.0})
    display.on_end(2)
    # Checkpoints of other tests may still be finishing, and say so.
    said = [message for message in caplog.messages if message.startswith("step ")]
    assert said == ["step 1/4  loss 2.5", "step 2/4  validation loss 0.25"]
    assert list((tmp_path / "tensorboard").iterdir())
