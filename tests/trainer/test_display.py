"""The lines of a run where there is no terminal, and its TensorBoard."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from etils import epath

import ptjax
from ptjax.trainer.display import Display


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


def test_a_run_does_not_import_torch(tmp_path):
    """Which tensorboardX would for a type; afterwards torch can be imported as ever."""
    (tmp_path / "torch.py").write_text("imported = True\n")
    code = (
        "import sys\n"
        "from etils import epath\n"
        "from ptjax.trainer.display import Display\n"
        "Display(steps=4).on_start(epath.Path('run'), 0)\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert torch.imported\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(ptjax.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "run" / "tensorboard").iterdir())
