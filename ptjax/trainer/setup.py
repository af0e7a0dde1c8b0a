"""Sets up the members of a run: the variables, training batches and exports of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import jax
from etils import epath

from ptjax import __version__
from ptjax.backbones.load import Backbone
from ptjax.data.tasks import Task
from ptjax.files import JsonObject
from ptjax.interop import prompt_header
from ptjax.methods.base import InitContext, Method
from ptjax.model_dir import BEST, ModelDir, suffix_of
from ptjax.settings import RunSettings
from ptjax.sharding import processes
from ptjax.sharding.arrays import replicated
from ptjax.trainer.exports import Exports
from ptjax.trainer.identity import describe
from ptjax.trainer.members import Member
from ptjax.trainer.startup_report import report_rate
from ptjax.trainer.sweep import MemberOverrides
from ptjax.trainer.task_data import TaskData, load_task_data, make_train_batches
from ptjax.training import freeze as freezing
from ptjax.training.optimizer import embedding_rms
from ptjax.trees import Tree


@dataclasses.dataclass(frozen=True)
class MemberSetup:
    """A member of a run, with everything that it needs before its first step.

    Attributes:
        seed: the member's own seed.
        variables: the backbone's variables and those that the method adds, such as a prompt.
        trainable, frozen: the two parts of `variables` according to `freeze`.
        rms: the RMS of the backbone's embedding, to which learning rates may be relative.
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
    """Loads the data and makes the initial variables of each member, in the given order.

    Members with equal tasks share one `TaskData`.

    Args:
        task: the task of members that do not override it.
        members: the overrides of each member by name; an ordinary run has one member, named "".

    Raises:
        InputError: the backbone has no tokenizer, or the data or settings cannot be used.
    """
    rms = embedding_rms(backbone.embedding)
    loaded: list[TaskData] = []
    setups = []
    for name, overrides in members.items():
        member_task = overrides.task or task
        data = next((data for data in loaded if _is_same(data.task, member_task)), None)
        if data is None:
            data = load_task_data(member_task, backbone, settings)
            loaded.append(data)
        setups.append(_set_up(data, backbone, model_dir, overrides.apply(settings), rms, name))
    return setups


def _is_same(task: Task, other: Task) -> bool:
    """Whether two tasks are equal; gin makes a new object of every reference to a task.

    Their descriptions too, in which the labels are in order: equal dicts may differ in that.
    """
    if task != other:
        return False
    first, second = (json.dumps(describe(each, whole=True)) for each in (task, other))
    return first == second


def _set_up(
    data: TaskData,
    backbone: Backbone,
    model_dir: epath.Path,
    settings: RunSettings,
    rms: float,
    name: str,
) -> MemberSetup:
    """Sets up the member `name`; `settings` are its own."""
    method = settings.method
    variables = backbone.variables | _init(method, data, settings.seed, name)
    freeze = freezing.make_freeze(variables, method.freeze_rules())
    trainable, frozen = freezing.split(variables, freeze)
    optimizer, split = settings.optimizer, settings.evaluation.split
    report_rate(trainable, optimizer, rms)
    member = Member(
        make_train_batches(data, settings, settings.seed),
        _make_exports(data, model_dir, settings, name),
        rate_at=lambda step: optimizer.rate_number(step, rms),
        evaluate=lambda trainable: data.evaluator(freezing.combine(trainable, frozen), split),
        metric=data.evaluator.metric,
        name=name,
    )
    return MemberSetup(member, data, settings.seed, variables, freeze, trainable, frozen, rms)


def _init(method: Method, data: TaskData, seed: int, name: str) -> Tree:
    """The method's own variables at step 0, replicated on the backbone's mesh."""
    backbone = data.evaluator.backbone
    context = InitContext(
        embedding=backbone.embedding,
        tokenizer=backbone.tokenizer,
        labels=data.task.labels,
        texts=lambda: (example.inputs for example in data.train),
        config=backbone.config,
        member=name,
        backbone=backbone,
    )
    # A stream of its own: the same seed drives dropout through the train state's key.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    variables = jax.tree.map(processes.on_host, method.init(key, context))
    return jax.device_put(variables, replicated(backbone.mesh))


def _metadata(task: Task, backbone: Backbone, settings: RunSettings) -> JsonObject:
    """The metadata of every export of a member."""
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
        **settings.method.describe(),
    }


def _make_exports(
    data: TaskData, model_dir: epath.Path, settings: RunSettings, name: str
) -> Exports:
    backbone, method = data.evaluator.backbone, settings.method
    metadata = _metadata(data.task, backbone, settings)

    def write(path: epath.Path, trainable: Tree, of_step: JsonObject) -> None:
        method.save(path, trainable, metadata | of_step, backbone)

    directory = ModelDir(model_dir).exports(method.exports, name)
    return Exports(directory, suffix_of(method.exports), write, method.read_metadata)


def load_best(setup: MemberSetup, settings: RunSettings) -> Tree:
    """Loads the best export of a member from its file, and adds it to the backbone's variables.

    Returns all variables of the network. Those in the export replace the backbone's own.
    """
    path, backbone = setup.member.exports.path(BEST), setup.data.evaluator.backbone
    return backbone.variables | settings.method.load(path, backbone)
