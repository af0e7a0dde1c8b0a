"""`pretrain`: trains all weights on plain text and supervised text-to-text tasks.

From scratch it makes a new backbone; from a checkpoint it does the prompt tuning paper's LM
adaptation.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from ptjax.backbones.damage import check_weights
from ptjax.backbones.load import Backbone
from ptjax.backbones.save import save_backbone
from ptjax.data import mixture
from ptjax.data.mixture import MixtureComponent, TextFiles, TokenFile
from ptjax.data.pipeline import TrainBatches
from ptjax.data.preprocess import TokenizedExamples
from ptjax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from ptjax.data.vocabularies import missing_tokenizer
from ptjax.errors import InputError, check_path, gin_flag
from ptjax.files import JsonObject, PathLike
from ptjax.interop.special_ids import check_end_of_sequence
from ptjax.methods.model_tuning import ModelTuning
from ptjax.model_dir import ModelDir
from ptjax.models.config import T5Config
from ptjax.models.t5 import init_params
from ptjax.models.t5_family import T5_FAMILY
from ptjax.settings import TrainSchedule
from ptjax.sharding.arrays import check_batch_size, replicate_key
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.rules import shardings_of
from ptjax.trainer import lock
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.exports import Exports
from ptjax.trainer.identity import digest_array, digest_texts, make_identity
from ptjax.trainer.loop import TrainingLoop
from ptjax.trainer.members import Member
from ptjax.trainer.startup_report import report_steps
from ptjax.training import freeze as freezing
from ptjax.training.compile import StepConfig, batch_shapes
from ptjax.training.dependence import check_used
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.trees import Tree


def pretrain(
    start: T5Config | Backbone,
    components: Sequence[MixtureComponent],
    model_dir: PathLike,
    *,
    text: TextFiles | TokenFile | None = None,
    tokenizer: PathLike | None = None,
    optimizer: Adafactor = Adafactor(learning_rate=0.01, multiply_by_parameter_scale=True),
    loss: Loss = Loss(per_token=True),
    schedule: TrainSchedule = TrainSchedule(),
    microbatches: int = 1,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    dry_run: bool = False,
) -> None:
    """Trains all weights of a T5. `MODEL_DIR/models/best` is the newest export (Hugging Face).

    Args:
        start: a backbone to continue from, or the config of a new model (needs `tokenizer`).
        components: the mixture; each batch comes from one of them.
        model_dir: MODEL_DIR, the folder of the run; a second call with it resumes the run.
        text: plain, unlabelled text, for components that need it (such as `SpanCorruption`).
        tokenizer: the path of a tokenizer; default: the backbone's own.
        callbacks, dry_run: as for `ptjax.tune`.

    Raises:
        InputError: the tokenizer or a needed `text` is missing, or `loss` weighs classes.
        InputError, TrainingError, SystemExit: as for `ptjax.tune`.
    """
    given = dict(locals())
    _check(model_dir, loss)
    if isinstance(start, Backbone):
        report_steps(schedule.train_steps, start)
        if not isinstance(start.config, T5Config):
            raise InputError(f"pretrain supports only ptjax's own T5, not {start.family.title}")
        _check_float32(start)
        model, mesh = start.config, start.mesh
        params, apply_fn = start.variables["params"], start.apply_fn
    else:
        model, mesh = start, make_mesh()
        params, apply_fn = _init_on_mesh(model, seed, mesh), T5_FAMILY.build(model)
    for component in components:
        check_batch_size(component.batch_size, mesh, microbatches)
    resolved = _tokenizer(start, tokenizer)
    check_vocabulary(resolved, model.vocab_size)
    check_end_of_sequence(resolved, model)
    stream = None if text is None else text.tokenize(resolved, seed)
    of_components = mixture.make_batches(components, stream, resolved, seed, model.special_ids)
    batches = mixture.mix(components, of_components, seed)
    trainable = {"params": params}
    method = ModelTuning()
    freeze = freezing.make_freeze(trainable, method.freeze_rules())
    step_config = StepConfig(optimizer, loss, microbatches)
    init, step = step_config.make(apply_fn, freeze, mesh, small=False)
    check_used(apply_fn, loss, trainable, {}, batch_shapes(min(batches.shapes), mesh))
    state = jax.jit(init)(trainable, replicate_key(jax.random.key(seed), mesh))
    logging.info("pre-training %s parameters", f"{freezing.sizes(trainable)[0]:,}")

    def write(path: epath.Path, trainable: Tree, metadata: JsonObject) -> None:
        save_backbone(path, model, trainable["params"], tokenizer=resolved, dtype="float32")

    directory = epath.Path(model_dir).expanduser()
    member = Member(
        batches,
        Exports(ModelDir(directory).models, "", write, method.read_metadata),
        rate_at=lambda step: optimizer.rate_number(step, 1.0),
    )
    data = _describe(stream, of_components)
    identity = make_identity(pretrain, given | {"tokenizer": resolved}, data)
    with lock.hold(directory, needed=not dry_run) as run_lock:
        run = TrainingLoop(
            directory,
            schedule,
            [member],
            identity=identity,
            callbacks=callbacks,
            lock=run_lock,
            check_weights=lambda: check_weights(params, getattr(start, "name", "the start")),
        )
        run.fit(state, {}, step, mesh, dry_run=dry_run)


def _check(model_dir: PathLike, loss: Loss) -> None:
    check_path("MODEL_DIR", model_dir)
    if loss.class_weights is not None:
        raise InputError("pretrain: Loss.class_weights is for tasks with labels; leave it out")


def _check_float32(backbone: Backbone) -> None:
    if any(leaf.dtype != np.float32 for leaf in jax.tree.leaves(backbone.variables["params"])):
        needed = gin_flag("ptjax.load_backbone.dtype", "float32")
        raise InputError(f"pretrain updates float32 weights: set {needed}")


def _tokenizer(start: T5Config | Backbone, path: PathLike | None) -> Tokenizer:
    """The tokenizer at `path`, else the backbone's own."""
    if path is not None:
        return load_tokenizer(path)
    if not isinstance(start, Backbone):
        raise InputError("pretrain needs a tokenizer: set pretrain.tokenizer")
    if start.tokenizer is None:
        raise missing_tokenizer(start.name, start.config.vocab_size)
    return start.tokenizer


def _init_on_mesh(model: T5Config, seed: int, mesh: Mesh) -> Tree:
    def init(key: jax.Array) -> Tree:
        return init_params(model, key)

    shardings = shardings_of({"params": T5_FAMILY.parameter_shapes(model)}, mesh)["params"]
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def _describe(
    stream: np.ndarray | None, of_components: Sequence[Sequence[TrainBatches]]
) -> JsonObject:
    """Digests and counts of the data, for the run's identity."""
    data: JsonObject = {}
    if stream is not None:
        data["the running text"] = {"the hash": digest_array(stream)}
    for component, phrasings in enumerate(of_components):
        for phrasing, batches in enumerate(phrasings):
            if isinstance(source := batches.source, TokenizedExamples):
                arrays = [
                    x for rows in (source.inputs, source.targets) for x in (rows.ids, rows.offsets)
                ]
                data[f"component {component}, phrasing {phrasing}"] = {
                    "the number of examples": len(source),
                    "the hash": digest_texts(map(digest_array, arrays)),
                }
    return data
