"""Which settings make another run: each one changed between two starts, refused or accepted."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import inspect
import json
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from conftest import tune
from tiny import tiny_config

from ptjax.backbones.load import Backbone
from ptjax.data import mixture
from ptjax.data.batching import Batching
from ptjax.data.hard_prompt import HardPrompt
from ptjax.data.mixture import PrefixLM, SpanCorruption, TaskComponent, TextFiles, TokenFile
from ptjax.data.sources import read_records
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.interop.prompt_file import load_prompt, save_prompt
from ptjax.methods import from_file, initializers, nearest_prompt
from ptjax.methods.from_file import FromFile
from ptjax.methods.initializers import (
    ClassLabels,
    FrequentWords,
    FromText,
    SampledVocabulary,
    Uniform,
)
from ptjax.methods.model_tuning import ModelTuning
from ptjax.methods.nearest_prompt import NearestPrompt
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.config import T5Config
from ptjax.settings import Evaluation, RunSettings, TrainSchedule
from ptjax.sharding.meshes import make_mesh
from ptjax.trainer import tune as tuning
from ptjax.trainer.checkpoints import SUMS
from ptjax.trainer.config_file import ConfigFile
from ptjax.trainer.identity import FREE, check_same, describe, make_identity
from ptjax.trainer.pretrain import pretrain
from ptjax.trainer.sweep import MemberOverrides
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

WORDS = Task(
    name="words",
    inputs="{text}",
    splits={"train": "train.jsonl"},
    label="label",
    verbalizer={"0": "no", "1": "yes"},
    answers="answers",
)
OPEN = Task(name="open", inputs="{text}", targets="{label}", metrics="exact_match")


def prepare(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield fields


def rising(step: Any) -> Any:
    return 0.01 * step


# "function.argument" or "Class.field" -> another value than the one in the fixture `start`, or None
# where the fixture makes it. A setting in neither table fails the first test.
DECIDES: dict[str, Any] = {
    "tune.task": OPEN,
    "tune.backbone": None,
    "tune.settings": RunSettings(seed=1),
    "tune.members": {"a": MemberOverrides(seed=1)},
    "RunSettings.method": ModelTuning(),
    "RunSettings.optimizer": Adafactor(0.03),
    "RunSettings.loss": Loss(per_token=True),
    "RunSettings.batching": Batching(batch_size=16),
    "RunSettings.evaluation": Evaluation(examples=4),
    "RunSettings.seed": 1,
    "PromptTuning.length": 5,
    "PromptTuning.initializer": Uniform(),
    "PromptTuning.attends_to_input": False,
    "Batching.batch_size": 16,
    "Batching.microbatches": 2,
    "Batching.feature_lengths": {"inputs": 32, "targets": 4},
    "Batching.buckets": [(32, 4)],
    "Batching.pack": True,
    "Batching.row_length": 256,
    "Uniform.scale": 0.25,
    "SampledVocabulary.population": 100,
    "SampledVocabulary.special_tokens": 2,
    "ClassLabels.labels": ("bad", "good"),
    "ClassLabels.rest": Uniform(),
    "FromText.text": "another",
    "FromText.rest": Uniform(),
    "NearestPrompt.by": "per_token",
    "NearestPrompt.top_k": 2,
    "FrequentWords.minimum_letters": 4,
    "FrequentWords.rest": Uniform(),
    "Adafactor.learning_rate": 0.03,
    "Adafactor.learning_rate_scale": "embedding_rms",
    "Adafactor.weight_decay": 0.0,
    "Adafactor.step_offset": 1_100_000,
    "Adafactor.min_dim_size_to_factor": 16,
    "Adafactor.multiply_by_parameter_scale": True,
    "Adafactor.decay_rate": 0.9,
    "Adafactor.clipping_threshold": 2.0,
    "Loss.z_loss": 0.0,
    "Loss.label_smoothing": 0.1,
    "Loss.per_token": True,
    "Loss.class_weights": "balanced",
    "Evaluation.split": "test",
    "Evaluation.examples": 4,
    "Evaluation.predict": "decode",
    "Evaluation.hard_prompts": {"plain": HardPrompt("Good?")},
    "HardPrompt.text": "Bad?",
    "HardPrompt.shots": 2,
    "HardPrompt.separator": "\n",
    "MemberOverrides.seed": 2,
    "MemberOverrides.learning_rate": 0.03,
    "MemberOverrides.initializer": Uniform(),
    "MemberOverrides.task": OPEN,
    "Task.name": "words2",
    "Task.inputs": "text: {text}",
    "Task.label": "class",
    "Task.verbalizer": {"1": "yes", "0": "no"},  # the order is that of the labels
    "Task.targets": "{label}s",
    "Task.metrics": "f1",
    "Task.format": "csv",
    "Task.columns": ("text", "label"),
    "Task.quoting": True,
    "Task.encoding": "latin-1",
    "Task.on_bad_record": "skip",
    "Task.preprocess": prepare,
    "Task.train_preprocess": prepare,
    "Task.answers": "others",
    "Task.group": "group",
    "Task.held_out": 8,
    "Task.sentinels": True,
    "Task.positive_label": "yes",
    "Backbone.config": None,
    "Backbone.tokenizer": None,
    "Backbone.fingerprint": "sha256:other",
    "Backbone.quantize": "int8",
    "T5Config.vocab_size": 64,
    "T5Config.emb_dim": 8,
    "T5Config.num_heads": 1,
    "T5Config.num_encoder_layers": 2,
    "T5Config.num_decoder_layers": 2,
    "T5Config.head_dim": 4,
    "T5Config.mlp_dim": 8,
    "T5Config.mlp_activations": ("relu",),
    "T5Config.logits_via_embedding": True,
    "T5Config.dropout_rate": 0.0,
    "T5Config.relpos_buckets": 16,
    "T5Config.relpos_max_distance": 64,
    "T5Config.layer_norm_epsilon": 1e-5,
    "T5Config.dtype": "bfloat16",
    "T5Config.relpos_per_layer": True,
    "T5Config.pad_id": 3,
    "T5Config.eos_ids": (1, 2),
    "T5Config.decoder_start_id": 5,
    "T5Config.forced_bos_id": 5,
    "pretrain.components": [PrefixLM(1.0)],
    "pretrain.text": TextFiles({"a.txt": "text"}),
    "pretrain.start": None,
    "pretrain.tokenizer": None,
    "pretrain.optimizer": Adafactor(0.03),
    "pretrain.loss": Loss(),
    "pretrain.microbatches": 2,
    "pretrain.seed": 1,
    "TextFiles.preprocess": prepare,
    "SpanCorruption.rate": 0.5,
    "SpanCorruption.batch_size": 32,
    "SpanCorruption.input_length": 64,
    "SpanCorruption.noise_density": 0.2,
    "SpanCorruption.mean_span": 2.0,
    "PrefixLM.rate": 0.5,
    "PrefixLM.batch_size": 32,
    "PrefixLM.input_length": 32,
    "PrefixLM.target_length": 16,
    "TaskComponent.rate": 0.5,
    "TaskComponent.task": OPEN,
    "TaskComponent.phrasings": [("{text}?", None)],
    "TaskComponent.batch_size": 32,
    "TaskComponent.input_length": 64,
    "TaskComponent.target_length": 8,
    "TaskComponent.buckets": [(32, 4)],
}
MAY_CHANGE: dict[str, Any] = {
    "tune.model_dir": "/moved",
    "tune.steps": 5,
    "tune.callbacks": [ConfigFile("# a comment")],
    "RunSettings.schedule": TrainSchedule(train_steps=5),
    "tune.dry_run": True,
    "TrainSchedule.train_steps": 5,
    "TrainSchedule.eval_period": 5,
    "TrainSchedule.log_period": 5,
    "TrainSchedule.patience": 5,
    "TrainSchedule.keep": 5,
    "Evaluation.batch_size": 5,
    "Task.splits": {"train": "moved/train.jsonl.gz"},
    "Task.data_dir": "/moved",
    "Backbone.variables": {},
    "Backbone.apply_fn": print,
    "Backbone.name": "/moved",
    "Backbone.fingerprint_v1": "sha256:other",
    "Backbone.mesh": None,
    "Backbone.fsdp": True,
    "Backbone.attention": "fused",
    "Backbone.arguments": {"path": "/moved"},
    "Backbone.assumed": ("dropout_rate",),
    "Backbone.family": "another",
    "T5Config.scan_layers": True,
    "T5Config.remat": "full",
    "FromFile.path": "a copy",
    "NearestPrompt.sources": "a copy",
    "NearestPrompt.target": "a copy",
    "pretrain.model_dir": "/moved",
    "pretrain.schedule": TrainSchedule(train_steps=5),
    "pretrain.callbacks": [ConfigFile("# a comment")],
    "pretrain.dry_run": True,
    "TextFiles.files": {"moved.txt": "text"},
    "TextFiles.data_dir": "/moved",
    "TextFiles.take_every": {"moved.txt": 2},
    "TokenFile.path": "moved.npy",
}
UNCHANGED: Any = object()
FUNCTIONS = {"tune": tuning.tune, "pretrain": pretrain}


def classes_of(*hints: Any) -> set[type]:
    """The dataclasses in annotations and in those of their fields; of a protocol, all of ours."""
    found: set[type] = set()
    waiting = list(hints)
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        if getattr(hint, "_is_protocol", False):
            waiting += implementations(hint)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            found.add(hint)
            waiting += typing.get_type_hints(hint).values()
    return found


def implementations(protocol: Any) -> list[type]:
    """The dataclasses of our modules that have the protocol's method."""
    method = {"Initializer": "__call__", "MixtureComponent": "make"}.get(protocol.__name__)
    signature = inspect.signature(getattr(protocol, method)) if method else None
    return [
        kind
        for module in (initializers, from_file, nearest_prompt, mixture)
        for kind in vars(module).values()
        if method and dataclasses.is_dataclass(kind) and method in vars(kind)
        and list(inspect.signature(vars(kind)[method]).parameters) == list(signature.parameters)
    ]  # fmt: skip


def test_case_4_1_every_setting_is_classified():
    named = {f"{f}.{name}" for f, function in FUNCTIONS.items()
             for name in inspect.signature(function).parameters}  # fmt: skip
    hints = [
        hint
        for function in FUNCTIONS.values()
        for name, hint in typing.get_type_hints(function).items()
        if name != "return"
    ]
    classes = classes_of(*hints)
    assert {
        MemberOverrides,
        T5Config,
        FromFile,
        FrequentWords,
        TaskComponent,
        Adafactor,
        Task,
    } <= classes
    named |= {f"{kind.__name__}.{x.name}" for kind in classes for x in dataclasses.fields(kind)}
    assert named == DECIDES.keys() | MAY_CHANGE.keys()
    assert not DECIDES.keys() & MAY_CHANGE.keys()
    # The list names nothing that is gone, and says why.
    assert FREE.keys() <= MAY_CHANGE.keys() and all(FREE.values())


@pytest.fixture(scope="module")
def saved_prompt(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "p.safetensors"
    save_prompt(path, np.ones((4, 16), np.float32), {})
    return path


@pytest.fixture
def start(backbone: Backbone, saved_prompt: Path) -> Callable[[str, Any], dict[str, Any]]:
    """`start(setting, value)` is the identity of a run with one setting changed."""
    shutil.copyfile(saved_prompt, saved_prompt.with_name("copy.safetensors"))
    sources = saved_prompt.with_name("sources")
    for seed in (1, 2):
        prompt = np.random.default_rng(seed).random((4, 16))
        save_prompt(sources / f"{seed}.safetensors", prompt, {})
    shutil.copytree(sources, sources.with_name("copies"), dirs_exist_ok=True)
    tokenizer = load_tokenizer("byt5")

    def run(**parts: Any) -> dict[str, Any]:
        return {"settings": RunSettings(**parts)}

    def compared_with(hard_prompt: HardPrompt) -> Evaluation:
        return Evaluation(hard_prompts={"plain": hard_prompt})

    part = functools.partial(TaskComponent, 1.0)
    # Where an object of each class stands.
    objects: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
        "RunSettings": (RunSettings(), lambda x: {"settings": x}),
        "TrainSchedule": (TrainSchedule(), lambda x: run(schedule=x)),
        "PromptTuning": (PromptTuning(), lambda x: run(method=x)),
        "Batching": (Batching(), lambda x: run(batching=x)),
        "Adafactor": (Adafactor(), lambda x: run(optimizer=x)),
        "Loss": (Loss(), lambda x: run(loss=x)),
        "Evaluation": (Evaluation(), lambda x: run(evaluation=x)),
        "HardPrompt": (HardPrompt("Good?"), lambda x: run(evaluation=compared_with(x))),
        "MemberOverrides": (MemberOverrides(seed=1), lambda x: {"members": {"a": x}}),
        "Task": (WORDS, lambda x: {"task": x}),
        "Backbone": (backbone, lambda x: {"backbone": x}),
        "T5Config": (
            backbone.config,
            lambda x: {"backbone": dataclasses.replace(backbone, config=x)},
        ),
        "FromFile": (
            FromFile(str(saved_prompt)),
            lambda x: run(method=PromptTuning(initializer=x)),
        ),
        "NearestPrompt": (
            NearestPrompt(sources, saved_prompt),
            lambda x: run(method=PromptTuning(initializer=x)),
        ),
        "FromText": (FromText("a text"), lambda x: run(method=PromptTuning(initializer=x))),
        "TextFiles": (TextFiles({"a.txt": "text"}), lambda x: {"text": x}),
        "TokenFile": (TokenFile("a.npy"), lambda x: {"text": x}),
        "TaskComponent": (part(WORDS, [("{text}", None)]), lambda x: {"components": [x]}),
        "PrefixLM": (PrefixLM(1.0), lambda x: {"components": [x]}),
        "SpanCorruption": (SpanCorruption(1.0), lambda x: {"components": [x]}),
    }
    objects |= {
        kind.__name__: (kind(), lambda x: run(method=PromptTuning(initializer=x)))
        for kind in (Uniform, SampledVocabulary, ClassLabels, FrequentWords)
    }
    given = {"model_dir": "/run", "task": WORDS, "backbone": backbone}
    special = {
        "FromFile.path": str(saved_prompt.with_name("copy.safetensors")),
        "NearestPrompt.sources": sources.with_name("copies"),
        "NearestPrompt.target": str(saved_prompt.with_name("copy.safetensors")),
        "Backbone.tokenizer": tokenizer,
        "Backbone.config": dataclasses.replace(backbone.config, dropout_rate=0.5),
        "Backbone.mesh": make_mesh(devices=jax.devices()[:2]),
        "tune.backbone": dataclasses.replace(backbone, fingerprint="sha256:other"),
        "pretrain.tokenizer": tokenizer,
        "pretrain.start": tiny_config(),
    }

    def identity(setting: str, value: Any = UNCHANGED) -> dict[str, Any]:
        owner, name = setting.split(".")
        if value is not UNCHANGED:
            value = special.get(setting, value)
        changes: dict[str, Any]
        if owner in FUNCTIONS:
            changes = {} if value is UNCHANGED else {name: value}
        else:
            made, place = objects[owner]
            made = OPEN if setting == "Task.targets" else made
            changes = place(made if value is UNCHANGED else with_(made, name, value))
        of_pretrain = owner == "pretrain" or {"text", "components"} & set(changes)
        function = pretrain if of_pretrain else tuning.tune
        signature = inspect.signature(function).parameters
        arguments = {n: p.default for n, p in signature.items()}
        arguments |= (
            {"model_dir": "/run", "components": [], "start": backbone} if of_pretrain else given
        )
        arguments |= changes
        return make_identity(function, {n: arguments[n] for n in signature}, {})

    return identity


def with_(made: Any, field: str, value: Any) -> Any:
    """A copy with another value, also where a class checks or changes what it is given."""
    copy = object.__new__(type(made))
    for name in (x.name for x in dataclasses.fields(made)):
        object.__setattr__(copy, name, value if name == field else getattr(made, name))
    return copy


@pytest.mark.parametrize("setting", DECIDES)
def test_case_4_1_a_setting_that_decides_is_refused_by_name(start, setting):
    first = json.loads(json.dumps(start(setting, UNCHANGED)))
    check_same(first, start(setting, UNCHANGED), "/run")
    with pytest.raises(InputError, match=r"^/run holds a run with .* choose another MODEL_DIR or re"
                       "store that setting$") as refused:  # fmt: skip
        check_same(first, start(setting, DECIDES[setting]), "/run")
    # Of two objects of one class, the field that differs is named.
    changed = DECIDES[setting]
    inside = dataclasses.is_dataclass(changed) or setting in (
        "tune.backbone",
        "Backbone.config",
    )
    assert inside or setting.split(".")[1] in str(refused.value)


@pytest.mark.parametrize("setting", MAY_CHANGE)
def test_case_4_1_a_setting_that_is_free_is_accepted(start, setting):
    first = json.loads(json.dumps(start(setting, UNCHANGED)))
    check_same(first, start(setting, MAY_CHANGE[setting]), "/run")


MESSAGES = {
    "Adafactor.learning_rate": "Adafactor.learning_rate = 0.3, now 0.03",
    "Batching.pack": "Batching.pack = False, now True",
    "Batching.microbatches": "Batching.microbatches = 1, now 2",
    "RunSettings.method": "RunSettings.method = PromptTuning(length=100, initializer=None, "
    "attends_to_input=True), now ModelTuning()",
    "Backbone.quantize": "load_backbone.quantize = None, now 'int8'",
    "T5Config.dropout_rate": "load_backbone.dropout_rate = 0.1, now 0.0",
    "PromptTuning.initializer": "PromptTuning.initializer = None, now Uniform(scale=0.5)",
    "MemberOverrides.learning_rate": "MemberOverrides.learning_rate (of tune.members['a']) = None, "
    "now 0.03",
    "Task.verbalizer": "the order of Task.verbalizer = ['0', '1'], now ['1', '0']",
    "tune.members": "tune.members = None, now {'a': ",
    "PrefixLM.rate": "PrefixLM.rate (of pretrain.components[0]) = 1.0, now 0.5",
}


@pytest.mark.parametrize("setting", MESSAGES)
def test_case_4_1_the_refusal_has_both_values(start, setting):
    with pytest.raises(InputError) as refused:
        check_same(start(setting, UNCHANGED), start(setting, DECIDES[setting]), "/run")
    assert str(refused.value).startswith(f"/run holds a run with {MESSAGES[setting]}")


def test_case_4_1_a_new_setting_counts_from_the_day_it_exists(start):
    @dataclasses.dataclass(frozen=True)
    class Loss:
        z_loss: float = 1e-4
        new: int = 0

    assert describe(Loss())["new"] == 0
    with pytest.raises(InputError, match=r"Loss\.new = 0, now 1"):
        check_same(
            start("RunSettings.loss", Loss()),
            start("RunSettings.loss", Loss(new=1)),
            "/run",
        )


def test_case_4_1_objects_are_told_by_what_they_are_never_by_their_address(saved_prompt):
    class Own:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def __call__(self, key: Any, length: int, context: Any) -> Any: ...

    def make(scale: float) -> Callable[..., Any]:
        return lambda key, length, context: scale

    for value in (Own(1.0), make(1.0), functools.partial(prepare, fields={}), prepare, print, Own,
                  Own(1.0).__call__):  # fmt: skip
        assert "0x" not in json.dumps(describe(value)), value
    assert describe(Own(1.0)) == describe(Own(1.0)) != describe(Own(2.0))
    assert describe(make(1.0)) == describe(make(1.0)) != describe(make(2.0))
    assert describe(prepare) == f"{__name__}.prepare"
    # A file initialiser is the prompt in the file, whatever it is called.
    before = describe(FromFile(str(saved_prompt)))
    save_prompt(saved_prompt, np.zeros((4, 16), np.float32), {})
    after = describe(FromFile(str(saved_prompt)))
    save_prompt(saved_prompt, np.ones((4, 16), np.float32), {})
    assert before != after and describe(FromFile(str(saved_prompt))) == before


def test_case_4_1_a_schedule_is_its_values(start):
    def warmup(steps: int) -> Adafactor:
        return Adafactor(optax.warmup_exponential_decay_schedule(0.0, 0.3, steps, 1000, 0.5))

    one, other = (
        start("RunSettings.optimizer", warmup(100)),
        start("RunSettings.optimizer", warmup(101)),
    )
    check_same(one, start("RunSettings.optimizer", warmup(100)), "/run")
    with pytest.raises(InputError, match=r"learning_rate at step 1 = 0\.00\d+, now 0\.00297\d*;"):
        check_same(one, other, "/run")
    assert describe(Adafactor(rising))["learning_rate"]["step 8"] == pytest.approx(0.08)
    infinite = describe(Adafactor(lambda step: jax.numpy.where(step < 4, 0.1, np.inf)))
    assert json.loads(json.dumps(infinite))["learning_rate"]["step 4"] == "inf"


def test_case_4_1_numbers_are_the_same_in_either_spelling(start):
    check_same(start("Loss.z_loss", 1), start("Loss.z_loss", 1.0), "/run")
    with pytest.raises(InputError, match=r"Batching\.pack = False, now 0;"):
        check_same(start("Batching.pack", False), start("Batching.pack", 0), "/run")


def test_case_4_1_a_long_value_is_cut_around_the_difference(start):
    long = "x" * 500
    with pytest.raises(InputError) as refused:
        check_same(start("HardPrompt.text", long + "a"), start("HardPrompt.text", long + "b"), "/r")
    message = str(refused.value)
    assert len(message) < 350 and "xa'" in message and "xb'" in message


def test_case_4_1_a_run_of_the_other_command_is_named(start):
    runs = {"tune": start("RunSettings.seed"), "pretrain": start("pretrain.seed")}
    for saved, now, was, is_ in (
        ("pretrain", "tune", "pretrain", "train"), ("tune", "pretrain", "train", "pretrain"),
    ):  # fmt: skip
        with pytest.raises(InputError) as refused:
            check_same(runs[saved], runs[now], "/run")
        assert str(refused.value) == (
            f"/run holds a run of python -m ptjax.{was}, not of python -m ptjax.{is_}; choose "
            "another MODEL_DIR"
        )


def test_case_4_1_a_split_more_or_less_is_named(start):
    one = start("RunSettings.seed")
    both = one | {"data": {"split 'test' of task words": {"the hash": "sha256:a"}}}
    with pytest.raises(InputError, match="also read split 'test' of task words, which this one do"):
        check_same(both, one, "/run")
    with pytest.raises(InputError, match="a run without split 'test' of task words, which this"):
        check_same(one, both, "/run")


def test_case_4_1_the_source_is_its_bytes(tmp_path):
    text = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "all.jsonl").write_bytes(text)
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(text))
    for number, line in enumerate(text.splitlines(keepends=True)):
        (tmp_path / f"part-{number}.jsonl").write_bytes(line)
    expected = f"sha256:{hashlib.sha256(text).hexdigest()}"
    for name in ("all.jsonl", "all.jsonl.gz", "part-*.jsonl"):
        assert read_records(tmp_path / name).digest == expected
    task = Task(name="a", inputs="{text}", targets="{text}", metrics="exact_match", held_out=1,
                data_dir=str(tmp_path), splits={"train": "all.jsonl"})  # fmt: skip
    assert task.load("train", limit=1).digest == task.load("validation").digest == expected


# Real runs


@pytest.fixture(scope="module")
def finished(backbone: Backbone, task: Task, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of two steps, over."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, tune(directory, task, backbone, **SHORT)


SHORT: dict[str, Any] = {
    "schedule": TrainSchedule(train_steps=2, eval_period=1, log_period=1),
    "callbacks": [ConfigFile("RunSettings.seed = 3\n")],
    "evaluation": Evaluation(hard_prompts={"asked": HardPrompt("Good?")}),
}


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below it: when it was written, and its bytes."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def recorded(directory: Path) -> Path:
    """The identity in the newest checkpoint."""
    newest = max((directory / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return newest / "identity" / "data.json"


def record(directory: Path, identity: dict[str, Any]) -> None:
    """Writes another identity, as a version would that keeps no checksums."""
    recorded(directory).write_text(json.dumps(identity))
    progress = recorded(directory).parents[1] / "progress" / "data.json"
    kept = {k: v for k, v in json.loads(progress.read_text()).items() if k != SUMS}
    progress.write_text(json.dumps(kept))


def test_case_4_1_a_finished_run_stays_as_it_is(finished, backbone, task, caplog):
    directory, results = finished
    before = files(directory)
    with pytest.raises(InputError, match=r"Adafactor\.learning_rate = 0\.05, now 0\.3; choose an"):
        faster = Adafactor(0.3, learning_rate_scale="embedding_rms")
        new = {"callbacks": [ConfigFile("# new")], "optimizer": faster}
        tune(directory, task, backbone, **SHORT | new)
    other = Evaluation(hard_prompts={"asked": HardPrompt("Bad?")})
    with pytest.raises(InputError, match=r"HardPrompt\.text .*= 'Good\?', now 'Bad\?'"):
        tune(directory, task, backbone, **SHORT | {"evaluation": other})
    changed = Path(task.data_dir) / "changed"
    shutil.copytree(task.data_dir, changed, dirs_exist_ok=True)
    text = (changed / "train.jsonl").read_text()
    (changed / "train.jsonl").write_text(text.replace("lovely", "awful", 1))
    other = dataclasses.replace(task, data_dir=str(changed))
    with pytest.raises(InputError, match=r"other data: the hash of split 'train' of task words = "
                       r"sha256:\w{12}, now sha256:\w{12}; choose another"):  # fmt: skip
        tune(directory, other, backbone, **SHORT)
    assert files(directory) == before
    with caplog.at_level("INFO", logger="absl"):
        assert (
            tune(directory, task, backbone, **SHORT | {"callbacks": [ConfigFile("# the same")]})
            == results
        )
    assert f"{directory}: the run has finished, at step 2" in caplog.text
    assert files(directory) == before


def test_case_4_2_fewer_steps_than_the_checkpoint_has(finished, backbone, task):
    with pytest.raises(InputError) as refused:
        tune(finished[0], task, backbone, **SHORT | {"schedule": TrainSchedule(train_steps=1)})
    assert str(refused.value) == (
        f"TRAIN_STEPS = 1, but {finished[0]} holds a checkpoint of step 2; set "
        "--gin.TRAIN_STEPS=2 or more, or choose another MODEL_DIR"
    )


def test_case_4_14_resuming_elsewhere_under_other_versions_is_said(
    finished, backbone, task, tmp_path, caplog
):
    """With the data, the backbone and MODEL_DIR under other paths, and for longer."""
    directory, data = tmp_path / "moved", tmp_path / "data"
    shutil.copytree(finished[0], directory)
    shutil.copytree(task.data_dir, data)
    zipped = gzip.compress((data / "train.jsonl").read_bytes())
    (data / "train.jsonl.gz").write_bytes(zipped)
    splits = {**task.splits, "train": "train.jsonl.gz"}
    identity = json.loads(recorded(directory).read_text())
    assert identity["versions"]["jax"] == jax.__version__
    identity["versions"] |= {"jax": "0.9.0", "Python": "3.10.0"}  # too old to be the installed ones
    record(directory, identity)
    changes: dict[str, Any] = {
        "schedule": TrainSchedule(train_steps=3, eval_period=3, log_period=3, patience=9, keep=1),
        "evaluation": dataclasses.replace(SHORT["evaluation"], batch_size=8),
        "callbacks": [ConfigFile("# longer")],
    }
    moved = dataclasses.replace(task, data_dir=str(data), splits=splits)
    with caplog.at_level("INFO", logger="absl"):
        results = tune(
            directory, moved, dataclasses.replace(backbone, name="/moved"), **SHORT | changes
        )
    said = [record.getMessage() for record in caplog.records]
    [line] = [text for text in said if text.startswith("resuming under other versions: ")]
    assert f"jax {jax.__version__} (was 0.9.0)" in line and "(was 3.10.0)" in line
    assert "optax" not in line
    assert f"resuming from step 2 of {directory}" in said
    assert results["trained_steps"] == 3
    assert (directory / "config.gin").read_text() == "# longer"
    assert json.loads(recorded(directory).read_text())["versions"]["jax"] == jax.__version__


def test_case_4_1_a_run_of_the_version_before_is_refused_and_its_prompt_used(
    finished, backbone, task, tmp_path, call, own_process
):
    shutil.copytree(finished[0], tmp_path / "old")
    # What version 0.1.0 wrote at first.
    old = {"backbone_fingerprint": backbone.fingerprint, "task": task.describe(), "seed": 3,
           "input_length": 64, "target_length": 4, "method": "prompt_tuning", "batch_size": 8,
           "microbatches": 1, "pack": False, "quantize": None, "prompt_length": 4,
           "sees_input": True, "tokenizer_fingerprint": None}  # fmt: skip
    record(tmp_path / "old", old)
    with pytest.raises(InputError, match=r"old holds a run of another ptjax \(an older version\), "
                       r"whose checkpoints record .* Its prompts can be used"):  # fmt: skip
        tune(tmp_path / "old", task, backbone, **SHORT)
    best = tmp_path / "old" / "prompts" / "best.safetensors"
    code, _, err = call("export", best, "--to=npy", "--output=best.npy")
    assert code == 0, err
    np.testing.assert_array_equal(np.load("best.npy"), load_prompt(best).prompt)
    code, out, err = call("inspect", tmp_path / "old" / "checkpoints" / "2", "--json")
    assert code == 0 and json.loads(out)["run"] == old, err


@pytest.mark.parametrize(
    ("name", "steps", "warned"),
    [
        ("gs://bucket/t5_1_1_lm100k_base/checkpoint_1100000", 1_150_000, "would train for 50,000"),
        ("/t5/checkpoint_1000000/", 1_000_001, "set --gin.TRAIN_STEPS=1 if"),
        ("/t5/checkpoint_1100000", 30_000, None),
        ("/t5/checkpoint_100", 30_000, None),
        ("google/t5-v1_1-base", 1_150_000, None),
    ],
)
def test_case_4_7_steps_that_t5x_counts_from_the_checkpoint(
    backbone, task, tmp_path, caplog, name, steps, warned
):
    of_t5x = dataclasses.replace(backbone, name=name)
    schedule = TrainSchedule(train_steps=steps)
    with caplog.at_level("INFO", logger="absl"), pytest.raises(InputError, match="initial prompt"):
        # Far enough to be said; a prompt of another length ends it before anything is compiled.
        tune(tmp_path, task, of_t5x, schedule=schedule, initializer=Wrong())
    said = [r.getMessage() for r in caplog.records if "T5X starts to count" in r.getMessage()]
    assert len(said) == (warned is not None)
    assert warned is None or warned in said[0]


@dataclasses.dataclass(frozen=True)
class Wrong:
    def __call__(self, key: Any, length: int, context: Any) -> Any:
        return jax.numpy.zeros((1, 1))


@pytest.mark.parametrize(
    ("binding", "named"),
    [
        ("LEARNING_RATE=1e999", "command line: LEARNING_RATE = inf: inf is not a finite number"),
        ("LEARNING_RATE=inf", "LEARNING_RATE = inf: inf is not a finite number"),
        ("LEARNING_RATE=-NaN", "LEARNING_RATE = -NaN: -NaN is not a finite number"),
        ("ptjax.Loss.z_loss=1e999", "command line: ptjax.Loss.z_loss = inf: inf is not"),
        (
            "TASK_FEATURE_LENGTHS={'inputs': [(1, -1e999)]}",
            "command line: TASK_FEATURE_LENGTHS = {'inputs': [(1, -inf)]}: -inf is not a finite",
        ),
    ],
)
def test_case_4_15_inf_and_nan_are_refused_by_name(call, own_process, binding, named):
    code, out, err = call("train", "--gin_file=quickstart.gin", f"--gin.{binding}", "--dry_run")
    assert (code, out) == (2, "") and named in err.splitlines()[-1], err


def test_case_4_15_in_a_file_its_line_is_named(call, own_process):
    Path("mine.gin").write_text("include 'quickstart.gin'\n\nLEARNING_RATE = 1e400\n")
    code, _, err = call("train", "--gin_file=mine.gin", "--dry_run")
    assert code == 2 and "mine.gin:3: LEARNING_RATE = inf: inf is not a finite number" in err
