"""`pretrain`: model tuning on running text and supervised text-to-text tasks.

From scratch it makes a backbone; from a checkpoint it is the paper's LM adaptation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from ptjax import lock
from ptjax.backbone import Backbone, save_backbone
from ptjax.damage import check_weights
from ptjax.data import mixture
from ptjax.data.mixture import Part, Text, TokenFile
from ptjax.data.pipeline import TrainBatches
from ptjax.data.preprocess import TokenizedExamples
from ptjax.data.tokenizer import check_vocabulary, load_tokenizer
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, check_path, gin_flag
from ptjax.exports import Exports, read_model
from ptjax.identity import digest_array, digest_texts, make_identity
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.loop import Pace, Run
from ptjax.members import Member
from ptjax.models.config import T5Config
from ptjax.models.t5 import init_params
from ptjax.models.t5_family import T5_FAMILY
from ptjax.preparation import report_steps
from ptjax.scale import sharding
from ptjax.scale.compiled import Recipe
from ptjax.training import freeze as freezing
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor


def pretrain(
    model_dir: str | os.PathLike[str],
    parts: Sequence[Part],
    *,
    text: Text | TokenFile | None = None,
    model: T5Config | None = None,
    backbone: Backbone | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    optimizer: Adafactor = Adafactor(learning_rate=0.01, multiply_by_parameter_scale=True),
    loss: Loss = Loss(per_token=True),
    pace: Pace = Pace(),
    microbatches: int = 1,
    seed: int = 0,
    config: str = "",
    dry_run: bool = False,
) -> None:
    """Trains all weights; `MODEL_DIR/models/best` is the newest, in Hugging Face's layout.

    Args:
        model: sizes, to start from scratch; needs `tokenizer`.
        backbone: what to go on from instead.
        parts: the mixture; each batch comes from one part.

    Raises:
        InputError: neither or both of `model` and `backbone`, or parts without what they need.
    """
    given = dict(locals())
    check_path("MODEL_DIR", model_dir)
    if backbone is not None and model is None:
        report_steps(pace.train_steps, backbone)
        if not isinstance(backbone.config, T5Config):
            raise InputError(f"pretrain trains ptjax's own T5 alone, not {backbone.family.title}")
        model, mesh, found = backbone.config, backbone.mesh, backbone.tokenizer
        params, apply_fn = backbone.variables["params"], backbone.apply_fn
        if any(leaf.dtype != np.float32 for leaf in jax.tree.leaves(params)):
            raise InputError(
                "pretrain updates float32 weights: set "
                + gin_flag("backbone.load_backbone.dtype", "float32")
            )
    elif model is not None and backbone is None:
        mesh, found = sharding.make_mesh(), None
        params, apply_fn = _init_on_mesh(model, seed, mesh), T5_FAMILY.build(model)
    else:
        raise InputError("pretrain starts either from sizes (pretrain.model) or from a backbone")
    for part in parts:
        sharding.check_batch_size(part.batch_size, mesh, microbatches)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    if found is None:
        if backbone is None:
            raise InputError("pretrain needs a tokenizer: set pretrain.tokenizer")
        raise missing_tokenizer(backbone.name, model.vocab_size)
    check_vocabulary(found, model.vocab_size)
    check_end_of_sequence(found, model)
    stream = None if text is None else text.tokenize(found, seed)
    components = mixture.make_components(parts, stream, found, seed, model.special_ids)
    batches = mixture.mix(parts, components, seed)
    trainable = {"params": params}
    freeze = freezing.make_freeze(trainable, freezing.METHODS["model_tuning"])
    recipe = Recipe("model_tuning", optimizer, loss, microbatches)
    init, step = recipe.compose(apply_fn, freeze, mesh)
    state = jax.jit(init)(trainable, sharding.replicate_key(jax.random.key(seed), mesh))
    logging.info("pre-training %s parameters", f"{freezing.sizes(trainable)[0]:,}")

    def write(path: epath.Path, trainable: Any, metadata: dict[str, Any]) -> None:
        save_backbone(path, model, trainable["params"], tokenizer=found, dtype="float32")

    directory = epath.Path(model_dir).expanduser()
    member = Member(
        batches,
        Exports(directory / "models", "", write, read_model),
        rate_at=lambda step: float(optimizer.rate_at(step, 1.0)),
    )
    identity = make_identity(pretrain, given | {"tokenizer": found}, _describe(stream, components))
    with lock.hold(directory, needed=not dry_run) as held:
        run = Run(
            directory,
            pace,
            [member],
            identity=identity,
            config=config,
            lock=held,
            check_weights=lambda: check_weights(params, backbone.name if backbone else "the start"),
        )
        run.fit(state, {}, step, mesh, dry_run=dry_run)


def _init_on_mesh(model: T5Config, seed: int, mesh: Any) -> Any:
    def init(key: jax.Array) -> Any:
        return init_params(model, key)

    where = sharding.shardings_of({"params": T5_FAMILY.parameter_shapes(model)}, mesh)["params"]
    return jax.jit(init, out_shardings=where)(jax.random.key(seed))


def _describe(
    stream: np.ndarray | None, components: Sequence[Sequence[TrainBatches]]
) -> dict[str, Any]:
    """What was read from files, for the run's identity."""
    data: dict[str, Any] = {}
    if stream is not None:
        data["the running text"] = {"the hash": digest_array(stream)}
    for part, made in enumerate(components):
        for phrasing, batches in enumerate(made):
            if isinstance(source := batches.source, TokenizedExamples):
                arrays = [
                    x for rows in (source.inputs, source.targets) for x in (rows.ids, rows.offsets)
                ]
                data[f"part {part}, phrasing {phrasing}"] = {
                    "the number of examples": len(source),
                    "the hash": digest_texts(map(digest_array, arrays)),
                }
    return data
