"""The members of a run before its first step: what trains, on which batches, exported where."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from ptjax import __version__
from ptjax.backbone import Backbone, load_backbone, save_backbone
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.exports import Exports, read_model
from ptjax.interop import prompt_header
from ptjax.interop.prompt_file import load_prompt, save_prompt
from ptjax.members import Member
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.model_dir import BEST, PROMPT_SUFFIX, ModelDir
from ptjax.models.prompt import ClassLabels, SampledVocabulary, Surroundings
from ptjax.models.prompted import with_prompt
from ptjax.scale import processes, sharding
from ptjax.settings import RunSettings
from ptjax.startup_report import report_rate
from ptjax.sweep import MemberOverrides
from ptjax.task_data import TaskData, load_task_data, make_train_batches
from ptjax.training import freeze as freezing
from ptjax.training.optimizer import embedding_rms
from ptjax.trees import Tree


@dataclasses.dataclass(frozen=True)
class MemberSetup:
    """A member as it starts.

    `variables` has its initial prompt, `trainable` and `frozen` are its halves, by `freeze`.
    `rms` is the embedding's, to which learning rates may be relative.
    """

    member: Member
    data: TaskData
    seed: int
    variables: Tree
    freeze: freezing.Freeze
    trainable: Tree
    frozen: Tree
    rms: float


def set_up_members(
    backbone: Backbone,
    task: Task,
    model_dir: epath.Path,
    settings: RunSettings,
    members: Mapping[str, MemberOverrides],
) -> list[MemberSetup]:
    """The members in their order; those of one task share what was read of it.

    Args:
        members: by name; "" is an ordinary run's only one.
    """
    rms = embedding_rms(backbone.embedding)
    read: list[TaskData] = []
    setups = []
    for name, overrides in members.items():
        learnt = overrides.task or task
        # By value: gin makes a new task of every reference to one.
        data = next((one for one in read if one.task == learnt), None)
        if data is None:
            data = load_task_data(learnt, backbone, settings)
            read.append(data)
        own = overrides.apply(settings)
        setups.append(_set_up(data, backbone, model_dir, own, rms, name))
    return setups


def _set_up(
    data: TaskData,
    backbone: Backbone,
    model_dir: epath.Path,
    settings: RunSettings,
    rms: float,
    name: str,
) -> MemberSetup:
    """The member `name`, whose settings these are, with its prompt and its batches."""
    method, variables = settings.method, backbone.variables
    if isinstance(method, PromptTuning):
        variables = with_prompt(variables, _initial_prompt(method, data, settings.seed, name))
    freeze = freezing.make_freeze(variables, freezing.METHODS[method.name])
    trainable, frozen = freezing.split(variables, freeze)
    optimizer, split = settings.optimizer, settings.evaluation.split
    report_rate(method, optimizer, rms)
    member = Member(
        make_train_batches(data, settings, settings.seed),
        _make_exports(data, model_dir, settings, name),
        rate_at=lambda step: float(optimizer.rate_at(step, rms)),
        evaluate=lambda own: data.evaluator(freezing.combine(own, frozen), split),
        metric=data.evaluator.metric,
        name=name,
    )
    return MemberSetup(member, data, settings.seed, variables, freeze, trainable, frozen, rms)


def _initial_prompt(method: PromptTuning, data: TaskData, seed: int, name: str) -> jax.Array:
    """P [P, D], float32, replicated on the backbone's mesh."""
    backbone, labels = data.evaluator.backbone, data.task.labels
    initializer, length = method.initializer, method.length
    if initializer is None:
        initializer = ClassLabels() if labels else SampledVocabulary()
    surroundings = Surroundings(
        embedding=backbone.embedding,
        tokenizer=backbone.tokenizer,
        labels=labels,
        texts=lambda: (example.inputs for example in data.train),
    )
    # Its own stream: the same seed drives dropout through the train state's key.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    prompt = processes.on_host(initializer(key, length, surroundings)).astype(np.float32)
    if prompt.shape != (length, backbone.config.emb_dim):
        raise InputError(
            f"the initial prompt{f' of {name}' if name else ''} has shape {prompt.shape}, the run "
            f"wants ({length}, {backbone.config.emb_dim}); change PROMPT_LENGTH or the initialiser"
        )
    return jax.device_put(prompt, sharding.replicated(backbone.mesh))


def _metadata(task: Task, backbone: Backbone, settings: RunSettings) -> dict[str, Any]:
    """What an exported prompt says of itself."""
    tokenizer, lengths = backbone.tokenizer, settings.batching.lengths
    return {
        "ptjax_version": __version__,
        "backbone_name": backbone.name,
        **backbone.fingerprints.as_metadata(),
        "tokenizer_fingerprint": tokenizer.fingerprint if tokenizer else None,
        **prompt_header.special_ids(backbone.config.special_ids),
        "task": task.describe(),
        "input_length": lengths["inputs"],
        "target_length": lengths["targets"],
        "seed": settings.seed,
        "sees_input": settings.attends_to_input,
    }


def _make_exports(
    data: TaskData, model_dir: epath.Path, settings: RunSettings, name: str
) -> Exports:
    backbone = data.evaluator.backbone
    metadata = _metadata(data.task, backbone, settings)

    def write_prompt(path: epath.Path, trainable: Tree, more: dict[str, Any]) -> None:
        if processes.first():
            save_prompt(path, np.asarray(trainable["prompt"]["prompt"]), metadata | more)

    def write_model(path: epath.Path, trainable: Tree, more: dict[str, Any]) -> None:
        # float32: the tuned weights as they are, whatever the backbone's activations.
        params, tokenizer = trainable["params"], backbone.tokenizer
        kept = {"tokenizer": tokenizer, "dtype": "float32", "family": backbone.family}
        save_backbone(path, backbone.config, params, **kept)

    if isinstance(settings.method, ModelTuning):
        return Exports(ModelDir(model_dir).models, "", write_model, read_model)
    return Exports(
        ModelDir(model_dir).prompts(name),
        PROMPT_SUFFIX,
        write_prompt,
        lambda path: load_prompt(path).metadata,
    )


def load_best(setup: MemberSetup, settings: RunSettings) -> Tree:
    """Variables with a member's best export, read back from its file."""
    path, backbone = setup.member.exports.path(BEST), setup.data.evaluator.backbone
    if isinstance(settings.method, ModelTuning):
        config = backbone.config
        return load_backbone(
            path,
            dtype=config.dtype,
            mesh=backbone.mesh,
            fsdp=backbone.fsdp,
            scan_layers=config.scan_layers,
            family=backbone.family,
        ).variables
    return with_prompt(backbone.variables, load_prompt(path).prompt)
