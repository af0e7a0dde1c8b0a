"""What tests share: eight virtual CPU devices, a compile cache, a tiny model, the fixtures."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported anywhere: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tiny models are compiled for far longer than they run: a third of the time without LLVM's
# optimisations, and again a third without the fusion emitters, which are a flag before jax 0.11
# and the only way since. Some tests start a command with XLA_FLAGS of its own, compiled as for
# users: test_kill, test_wheel, test_pages, test_tpu_scripts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_force_host_platform_device_count=8",
        # An unknown flag ends the process.
        *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
    ]
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import dataclasses
import functools
import importlib
import io
import json
import logging
import signal
import sys
from collections.abc import Callable, Container, Iterator
from typing import Any

import gin
import hypothesis
import jax
import numpy as np
import pytest
import shape_checks  # noqa: F401
from absl import logging as absl_logging
from markers import missing
from t5_ids import T5_IDS, with_lengths
from tiny import save_tiny, tiny_config, tiny_params

from ptjax.data.batch import Batch, make_batch
from ptjax.inference import prompts
from ptjax.models.config import T5Config
from ptjax.models.prompted import PromptedT5
from ptjax.trainer.callbacks import Callback

# A busy machine may take longer over an example than hypothesis expects.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

FIXTURES = Path(__file__).parent / "fixtures"
PATIENCE = 900
"""Seconds to wait for another process: only one that hangs takes so long on a busy machine."""


LONGEST_FIRST = (
    "test_wheel",
    "test_multiprocess",
    "test_compiling",
    "test_pages",
    "test_plan",
    "test_planning",
    "test_sweep",
    "test_kill",
    "test_loop",
    "test_feature_table",
    "test_attention",
    "test_reparameterized",
    "test_sharding",
    "test_pretraining",
    "test_mixed_batches",
    "test_quickstart",
)
"""Files of more than a minute of CPU each when nothing is in the compile cache."""


def pytest_configure(config: pytest.Config) -> None:
    # A test run that was killed may leave half a file in the compile cache; jax compiles again.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one at the end would leave all processes but one without work."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_report_header(config: pytest.Config) -> str:
    """Selection is by marker, never by skip; what it leaves out is said here."""
    lacks = "; ".join(f"{marker} (needs {what})" for marker, what in missing().items())
    chosen = config.option.markexpr or "everything"
    return f"selected: {chosen}. Not possible on this machine: {lacks or 'nothing'}"


MOST_MAPS = 20_000
"""Memory maps of a process. XLA keeps some for every compiled program, and at Linux's limit of
65,530 its compiler crashes."""


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Drops the compiled programs after a file of tests when there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A random T5 1.1 with a prompt [5, 16]; H * K is not D, and nothing is read from a file."""

    config: T5Config
    params: dict[str, Any]
    prompt: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "prompt": {"prompt": self.prompt}}

    def apply_fn(self, **changes: Any) -> Callable[..., Any]:
        """`PromptedT5.apply` for this config with `changes`."""
        return PromptedT5(dataclasses.replace(self.config, **changes)).apply

    def jitted(self, **changes: Any) -> Callable[..., Any]:
        """The same for rows that end in zeros, compiled once: eager calls take seconds."""
        return _jitted(dataclasses.replace(self.config, **changes))


@functools.cache
def _jitted(config: T5Config) -> Callable[..., Any]:
    return jax.jit(with_lengths(PromptedT5(config).apply), static_argnames=("method", "train"))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    config = tiny_config(num_heads=4, num_encoder_layers=2, num_decoder_layers=2)
    prompt = jax.random.normal(jax.random.key(1), (5, config.emb_dim))
    return Tiny(config, tiny_params(config, seed=1), prompt)


@pytest.fixture(scope="session")
def tiny_batch() -> Batch:
    """Eight examples of unequal lengths, padded to T = 12, L = 6; ids from 1 to 63."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(2, 64, n) for n in (12, 7, 1, 9, 12, 3, 5, 10)]
    targets = [rng.integers(2, 64, n) for n in (6, 2, 4, 1, 3, 6, 5, 2)]
    return make_batch(inputs, targets, input_length=12, target_length=6, ids=T5_IDS)


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a run, without what another run of the same cannot share."""
    return {name: value for name, value in results.items() if name not in ("seconds", "costs")}


def outcome(directory: Any) -> dict[str, Any]:
    """Everything that an interrupted run has to share with an uninterrupted one: all but times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((directory / "report.json").read_text())
    return {
        "prompts": {p.name: p.read_bytes() for p in (directory / "prompts").iterdir()},
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        "results": without_seconds(json.loads((directory / "results.json").read_text())),
        "report": report | {"results": without_seconds(report["results"])},
        "checkpoints": sorted(p.name for p in (directory / "checkpoints").iterdir()),
    }


@pytest.fixture
def own_process(monkeypatch, tmp_path):
    """Commands own their process: what they set up is undone here. In a folder of its own."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    monkeypatch.setattr(prompts, "WARNED", set())
    monkeypatch.chdir(tmp_path)
    before = absl_logging.get_verbosity()
    gin.clear_config()
    yield
    absl_logging.set_verbosity(before)
    gin.clear_config()


@pytest.fixture
def call(monkeypatch, capsys):
    """`call("infer", "--flag", stdin=b"...")` -> (exit code, stdout, stderr), in this process."""

    def run(command: str, *arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"ptjax.{command}", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(f"ptjax.{command}").main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run


class At(Callback):
    """Calls `function` in every step of `steps`, after it was given to the devices."""

    def __init__(self, steps: Container[int], function: Callable[[int], Any]) -> None:
        self.steps, self.function = steps, function

    def on_step(self, step: int) -> None:
        if step in self.steps:
            self.function(step)


def stopped_by_sigterm(step: int, train: Callable[[list[Callback]], Any]) -> Any:
    """The exit code of `train(callbacks)`, which gets a SIGTERM in step `step`."""
    kill = At({step}, lambda step: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        train([kill])
    return stopped.value.code


def load_expected(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The recorded arrays of a fixture, "short/logits" as ["short"]["logits"]."""
    file = "oracle.npz" if name == "prompt_oracle" else "expected.npz"
    expected: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FIXTURES / name / file) as arrays:
        for key in arrays.files:
            group, _, leaf = key.rpartition("/")
            expected.setdefault(group, {})[leaf] = arrays[key]
    return expected


@pytest.fixture(scope="session")
def oracle() -> dict[str, dict[str, np.ndarray]]:
    """What google-research/prompt-tuning computed on the weights of t5_1_1_tiny_legacy."""
    return load_expected("prompt_oracle")


@pytest.fixture(scope="session")
def t5_1_1() -> Any:
    """The backbone of t5_1_1_tiny_legacy, float32."""
    from ptjax.backbones.load import load_backbone

    return load_backbone(FIXTURES / "t5_1_1_tiny_legacy", dtype="float32")


@pytest.fixture(scope="session")
def t5_1_0() -> Any:
    """The backbone of t5_1_0_tiny_legacy, float32."""
    from ptjax.backbones.load import load_backbone

    return load_backbone(FIXTURES / "t5_1_0_tiny_legacy", dtype="float32")


WORDS = {
    "positive": ["lovely", "great", "warm", "bright"],
    "negative": ["awful", "dull", "cold", "broken"],
}


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random T5 1.1 of width 16 with the shipped vocabulary."""
    from ptjax.backbones.load import load_backbone
    from ptjax.data.tokenizer import load_tokenizer

    directory, tokenizer = tmp_path_factory.mktemp("backbone"), load_tokenizer("package:nano")
    return load_backbone(save_tiny(directory, tiny_config(8192), tokenizer=tokenizer))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """48 training, 16 validation and 16 test sentences whose words tell the label."""
    from ptjax.data.tasks import Task

    directory = tmp_path_factory.mktemp("task")
    rng = np.random.default_rng(0)
    for split, count in {"train": 48, "validation": 16, "test": 16}.items():
        rows = []
        for i in range(count):
            label = ("positive", "negative")[i % 2]
            words = rng.choice(WORDS[label], rng.integers(1, 40))
            rows.append(json.dumps({"text": " ".join(words), "label": label}))
        (directory / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return Task(
        name="words",
        data_dir=str(directory),
        splits={s: f"{s}.jsonl" for s in ("train", "validation", "test")},
        inputs="text: {text}",
        label="label",
        verbalizer={"positive": "positive", "negative": "negative"},
    )


def make_settings(**changes: Any) -> Any:
    """The settings of a short run of which every batch has one shape, with `changes`.

    They are fields of `RunSettings`, or of its method or its batching by their own names.
    """
    from ptjax.data.batching import Batching
    from ptjax.methods.prompt_tuning import PromptTuning
    from ptjax.settings import Evaluation, RunSettings, TrainSchedule
    from ptjax.training.optimizer import Adafactor

    parts: dict[str, Any] = {
        "method": PromptTuning(length=4),
        "optimizer": Adafactor(learning_rate=0.05, learning_rate_scale="embedding_rms"),
        "schedule": TrainSchedule(train_steps=12, eval_period=3, log_period=2, keep=2),
        "batching": Batching(batch_size=8, feature_lengths={"inputs": 32, "targets": 4}),
        "evaluation": Evaluation(batch_size=16),
        "seed": 3,
    }
    parts |= {name: changes.pop(name) for name in list(changes) if name in parts}
    for part in ("method", "batching"):
        fields = {field.name for field in dataclasses.fields(parts[part])}
        of_part = {name: changes.pop(name) for name in list(changes) if name in fields}
        parts[part] = dataclasses.replace(parts[part], **of_part)
    assert not changes, f"no such setting: {', '.join(changes)}"
    return RunSettings(**parts)


def tune(
    directory: Path,
    task: Any,
    backbone: Any,
    *,
    members: Any = None,
    callbacks: Any = (),
    dry_run: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """The results of such a run of the random backbone on the words."""
    from ptjax.trainer import tune

    settings = make_settings(**changes)
    how = {"members": members, "callbacks": callbacks, "dry_run": dry_run}
    return tune.tune(backbone, task, directory, settings, **how).results
