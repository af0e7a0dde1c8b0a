"""Members of a run without a model: a step adds one to two numbers, and exports are JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from t5_ids import T5_IDS

from ptjax import files
from ptjax.data.batch import Batch, make_batch
from ptjax.data.pipeline import Shape
from ptjax.errors import InputError
from ptjax.files import PathLike
from ptjax.settings import TrainSchedule
from ptjax.sharding.meshes import make_mesh
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.exports import Exports
from ptjax.trainer.lock import hold
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.members import Member, Members
from ptjax.training.step import Metrics, TrainState
from ptjax.trees import Tree

IDENTITY = {"settings": {"is": "plain_run"}, "data": {}}


class TwoRows:
    """Batch `number`: two examples, whose inputs are a token `2 + number` each."""

    def __init__(self) -> None:
        self.shapes, self.ids = [Shape(2, 1, 1)], T5_IDS

    def batch(self, number: int) -> Batch:
        rows = [[2 + number], [2 + number]]
        return make_batch(rows, [[1], [1]], input_length=1, target_length=1, ids=T5_IDS)


def plain_exports(directory: epath.Path) -> Exports:
    """Exports as JSON: the metadata, and the prompt as "prompt"."""

    def write(path: epath.Path, trainable: Tree, metadata: dict[str, Any]) -> None:
        prompt = np.asarray(trainable["prompt"]).tolist()
        files.write_bytes(path, json.dumps({"prompt": prompt, **metadata}).encode())

    def read(path: epath.Path) -> dict[str, Any]:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        return files.read_object(path)

    return Exports(directory, ".json", write, read)


def plain_member(
    directory: PathLike,
    name: str = "",
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
    rate: float = 0.5,
) -> Member:
    """A member whose learning rate is `rate` plus the step; its metric is "score"."""
    metric = None if evaluate is None else "score"
    exports = plain_exports(epath.Path(directory) / "exports" / name)
    return Member(TwoRows(), exports, lambda step: rate + step, evaluate, metric, name)


def plain_state(members: int | None = None) -> TrainState:
    """The first state: [2] zeros, or [members, 2]."""
    shape = (2,) if members is None else (members, 2)
    prompt = jnp.zeros(shape) + (0 if members is None else jnp.arange(members)[:, None] * 100)
    key = jax.random.key(0)
    if members is not None:
        key = jax.random.split(key, members)
    return TrainState(jnp.zeros(shape[:-1], jnp.int32), {"prompt": prompt}, (), key)


def add_one(
    state: TrainState, frozen: Tree, batch: dict[str, jax.Array], *sweep: jax.Array
) -> tuple[TrainState, Metrics]:
    """The loss is the input's token; the gradient's norm is 10 times that."""
    tokens = batch["encoder_input_tokens"].astype(jnp.float32)
    loss = tokens.mean(axis=(-2, -1))
    moved = jnp.where(sweep[0][:, None], 1.0, 0.0) if sweep else 1.0
    trainable = {"prompt": state.trainable["prompt"] + moved}
    new = TrainState(state.step + 1, trainable, state.opt_state, state.key)
    return new, {"loss": loss, "gradient_norm": 10 * loss}


def plain_run(
    directory: PathLike,
    members: list[Member],
    schedule: TrainSchedule,
    callbacks: Sequence[Callback] = (),
) -> TrainingLoop:
    """A run of `members` in `directory`, trained to its end under the folder's lock."""
    folder = epath.Path(directory)
    with hold(folder) as held:
        run = TrainingLoop(
            folder, schedule, members, identity=IDENTITY, callbacks=callbacks, lock=held
        )
        state = plain_state(len(members) if run.members.is_sweep else None)
        run.fit(state, {}, add_one, make_mesh(devices=jax.devices()[:1]))
    return run


def rows_of(directory: PathLike) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    text = (epath.Path(directory) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def several(directory: PathLike, *names: str) -> Members:
    """The members of a sweep before its first step."""
    return Members([plain_member(directory, name) for name in names])
