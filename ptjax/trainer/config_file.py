"""Writes the settings of a run to `MODEL_DIR/config.gin`."""

from __future__ import annotations

from etils import epath

from ptjax import files
from ptjax.model_dir import ModelDir
from ptjax.sharding import processes
from ptjax.trainer.callbacks import Callback


class ConfigFile(Callback):
    """Writes `MODEL_DIR/config.gin` when a run starts.

    Args:
        text: the content: gin's config in a command, `gin_text.describe_call` in Python.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Writes config.gin on the first process; a resumed run replaces its earlier file.

        Args:
            model_dir: the run's folder.
            step: unused.
        """
        if processes.first():
            files.write_bytes(ModelDir(model_dir).config, self.text.encode())
