"""Sends a run's metrics to Weights & Biases or MLflow; each is a `Callback` for `ptjax.tune`.

Making a tracker contacts nobody and imports nothing: the config.gin of a downloaded run may name
one, and commands that only read such a run must not connect to anything. `on_start`, which only
`tune` and `pretrain` call, does.
"""

from __future__ import annotations

import abc
import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, ClassVar

from absl import logging
from etils import epath

from ptjax import __version__, files
from ptjax.errors import InputError, one_line
from ptjax.files import JsonObject
from ptjax.model_dir import ModelDir
from ptjax.sharding import processes
from ptjax.trainer.callbacks import Callback

_VALIDATION = "validation/"
_BEST = "best/"
_MLFLOW_BATCH = 100
"""MLflow takes at most 100 parameters or tags, and 1,000 metrics, in one call."""
_MLFLOW_LONGEST = 5000
"""MLflow takes parameters of up to 6,000 characters, and tags of up to 5,000 or 8,000."""


class Tracker(Callback):
    """The base class of trackers: what is sent, when, and what happens if that fails.

    Only the first process sends anything: the settings in config.gin, the rows of `metrics.jsonl`,
    and with each evaluation the best validation scores so far, as "best/...". A resumed run
    continues the run of the tracker, whose id is in `MODEL_DIR/trackers.json`; a run that starts
    at step 0 starts a new one.

    A tracker that cannot start ends the run before its first step. After that, the first failure
    is logged, and the run continues without the tracker.

    Attributes:
        package: the name of the Python package, which is also the name of ptjax's extra.
    """

    package: ClassVar[str]

    def __init__(self) -> None:
        """Raises InputError if the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        # A folder of that name in the current folder is found too, but has no origin.
        if spec is None or spec.origin is None:
            raise InputError(
                f"{type(self).__name__} needs {self.package}; pip install 'ptjax[{self.package}]'"
            )
        self._active = False
        self._best: dict[str, float] = {}

    @abc.abstractmethod
    def open(self, model_dir: epath.Path, settings: JsonObject, run_id: str | None) -> str | None:
        """Opens the tracker's run; called on the first process only.

        Args:
            settings: the run's settings: maps the names of classes and functions to arguments.
            run_id: the id of the tracker's run to continue; None: start a new one.

        Returns:
            the id of the tracker's run; None: a resumed run must not continue it.
        """

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""

    @abc.abstractmethod
    def close(self, error: BaseException | None) -> None:
        """Closes the tracker's run; `error` is the exception that ends the run, if any."""

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        """Opens the tracker's run, with the settings, and records its id in `model_dir`."""
        if not processes.first():
            return
        path = ModelDir(model_dir).trackers
        ids = files.read_object(path) if step and path.exists() else {}
        known = ids.get(self.package)
        settings = read_settings(ModelDir(model_dir).config)
        settings |= {"model_dir": os.fspath(model_dir), "ptjax": __version__}
        try:
            run_id = self.open(model_dir, settings, known if isinstance(known, str) else None)
        except Exception as error:
            raise InputError(
                f"{type(self).__name__} cannot start: {one_line(error)}; run without it"
                + (f", or delete {path} for a new run of {self.package}" if known else "")
            ) from error
        self._active = True
        self._best = _best_scores(ModelDir(model_dir).metrics, step)
        if run_id is not None:
            files.write_bytes(path, json.dumps(ids | {self.package: run_id}).encode())

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a row."""
        self._attempt(self.log, step, metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a row, and the best scores so far."""
        _update_best(self._best, metrics)
        self._attempt(self.log, step, {**metrics, **self._best})

    def on_end(self, step: int) -> None:
        """Closes the tracker's run: finished, or failed if an exception ends the run."""
        del step
        self._attempt(self.close, sys.exc_info()[1])
        self._active = False

    def _attempt(self, function: Callable[..., None], *arguments: object) -> None:
        """Calls a function of the tracker's, unless one has failed before."""
        if not self._active:
            return
        try:
            function(*arguments)
        except Exception as error:
            self._active = False
            logging.warning(
                "%s failed and is off from here on (%s); the run continues, and metrics.jsonl has "
                "every row",
                type(self).__name__,
                one_line(error),
            )


class WandbTracker(Tracker):
    """Sends a run to Weights & Biases; needs `pip install 'ptjax[wandb]'`.

    If the caller has called `wandb.init` (as in a sweep of wandb's), that run is used and left
    open. Log in with `wandb login` or WANDB_API_KEY; settings are stored in config.gin, so do not
    pass a key here.

    Args:
        project: the project of Weights & Biases; None: as in the environment.
        init: other arguments of `wandb.init`, such as `entity`, `name`, `tags` and `mode`.
    """

    package = "wandb"

    def __init__(self, project: str | None = None, **init: object) -> None:
        super().__init__()
        self._init = {"project": project, **init}
        self._run: Any = None
        self._owned = False

    def open(self, model_dir: epath.Path, settings: JsonObject, run_id: str | None) -> str | None:
        """Calls `wandb.init`, with the files of wandb in MODEL_DIR if that is a local folder."""
        wandb = importlib.import_module("wandb")
        self._owned = wandb.run is None
        if not self._owned:
            self._run = wandb.run
            self._run.config.update(settings, allow_val_change=True)
            return None
        given: dict[str, Any] = {"name": model_dir.name, "id": run_id, "resume": "allow"}
        if "://" not in os.fspath(model_dir):
            given["dir"] = os.fspath(model_dir)
        self._run = wandb.init(**(given | self._init))
        self._run.config.update(settings, allow_val_change=True)  # a resumed run may be longer
        return self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics; wandb drops steps that it already has, as after a resume."""
        self._run.log(dict(metrics), step=step)

    def close(self, error: BaseException | None) -> None:
        """Finishes the run, unless it is the caller's."""
        if self._owned:
            self._run.finish(exit_code=0 if error is None else 1)


class MlflowTracker(Tracker):
    """Sends a run to MLflow; needs `pip install 'ptjax[mlflow]'`.

    Give user and password as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: settings are
    stored in config.gin.

    Args:
        experiment: the name of the experiment, which is created if it does not exist.
        tracking_uri: the server or store; None: MLFLOW_TRACKING_URI, or MLflow's default.
        run_name: the name of the run; None: that of MODEL_DIR.
    """

    package = "mlflow"

    def __init__(
        self,
        experiment: str = "ptjax",
        tracking_uri: str | None = None,
        run_name: str | None = None,
    ) -> None:
        super().__init__()
        self._experiment, self._uri, self._name = experiment, tracking_uri, run_name
        self._client: Any = None
        self._run_id, self._continues = "", False
        self._sent: dict[str, int] = {}
        self._pending: list[Any] = []

    def open(self, model_dir: epath.Path, settings: JsonObject, run_id: str | None) -> str:
        """Creates or continues a run; settings that were changed on resuming become tags."""
        tracking = importlib.import_module("mlflow.tracking")
        try:
            self._client = client = tracking.MlflowClient(self._uri)
        except Exception as error:
            if any(metadata.distributions(name="mlflow")):
                raise
            raise InputError(
                'mlflow-skinny knows servers alone: give tracking_uri="http://HOST:5000", or pip '
                f"install mlflow ({one_line(error)})"
            ) from error
        self._sent, self._continues, self._pending = {}, run_id is not None, []
        if run_id is None:
            experiment = client.get_experiment_by_name(self._experiment)
            number = experiment.experiment_id if experiment else None
            number = number or client.create_experiment(self._experiment)
            run_id = client.create_run(number, run_name=self._name or model_dir.name).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
        assert run_id is not None
        self._run_id = run_id
        old, new = client.get_run(run_id).data.params, _flat(settings)
        # Parameters of MLflow cannot be changed.
        changed = {name: value for name, value in new.items() if old.get(name, value) != value}
        self._send("tags", [_entity("RunTag", *item) for item in changed.items()])
        self._send("params", [_entity("Param", *x) for x in new.items() if x[0] not in old])
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics, except steps that MLflow already has, as after a resume.

        A thread of MLflow sends them, so that a slow server does not slow down the run.
        """
        new, now = [], int(time.time() * 1000)
        for name, value in metrics.items():
            name = re.sub(r"[^\w\-. /]", "_", name)
            if self._continues and name not in self._sent:
                history = self._client.get_metric_history(self._run_id, name)
                self._sent[name] = max((point.step for point in history), default=-1)
            if step > self._sent.get(name, -1):
                new.append(_entity("Metric", name, value, now, step))
        self._pending += self._send("metrics", new, synchronous=False)

    def _send(self, kind: str, entities: list[object], *, synchronous: bool = True) -> list[Any]:
        parts = [
            entities[start : start + _MLFLOW_BATCH]
            for start in range(0, len(entities), _MLFLOW_BATCH)
        ]
        send = functools.partial(self._client.log_batch, self._run_id, synchronous=synchronous)
        return [send(**{kind: part}) for part in parts]

    def close(self, error: BaseException | None) -> None:
        """Waits until all is sent, and sets the run's status: FINISHED, FAILED, or KILLED.

        KILLED is a run that was stopped by a signal. If the server does not answer, the wait is
        that of MLflow's retries, minutes by default (MLFLOW_HTTP_REQUEST_MAX_RETRIES).
        """
        for operation in self._pending:
            operation.wait()
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        self._client.set_terminated(self._run_id, status)


def read_settings(path: epath.Path) -> JsonObject:
    """Reads the settings in a run's config.gin, without gin: nothing is imported or called.

    Returns:
        maps "RunSettings" and the like to {argument: value}. Macros are replaced by their values;
        references (`@ptjax.Task()`) and what is not a literal stay text. Settings of trackers are
        left out. Empty without the file.
    """
    text = path.read_text() if path.exists() else ""
    statements = re.findall(r"^([\w./]+) =\s(.*?)\n(?=\S|\Z|\n)", text + "\n", re.DOTALL | re.M)
    macros = {name: value for name, value in statements if "." not in name}
    settings: JsonObject = {}
    for name, value in statements:
        owner, _, argument = name.replace("ptjax.", "").rpartition(".")
        if owner and not owner.endswith("Tracker") and (owner, argument) != ("tune", "callbacks"):
            value = macros.get(value.strip().removeprefix("%"), value)
            settings.setdefault(owner, {})[argument] = _literal(value)
    return settings


def _literal(text: str) -> object:
    text = text.lstrip("\\\n ").strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _flat(settings: JsonObject) -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}, with values cut to MLflow's limit."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        inside = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name}.{key}": str(item) for key, item in inside}
        if not isinstance(value, dict):
            flat[name] = str(value)
    return {name: value[:_MLFLOW_LONGEST] for name, value in flat.items()}


def _entity(kind: str, *arguments: object) -> object:
    return getattr(importlib.import_module("mlflow.entities"), kind)(*arguments)


def _best_scores(path: epath.Path, step: int) -> dict[str, float]:
    """The best scores up to `step` in a run's metrics.jsonl; the run may write later rows again."""
    best: dict[str, float] = {}
    if step and path.exists():
        for line in path.read_text().splitlines():
            row = files.parse_json(line.encode())
            if isinstance(row, dict) and row.get("step", step + 1) <= step:
                _update_best(best, row)
    return best


def _update_best(best: dict[str, float], metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if name.startswith(_VALIDATION):
            key = _BEST + name.removeprefix(_VALIDATION)
            best[key] = max(value, best.get(key, value))
