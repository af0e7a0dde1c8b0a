"""The config.gin of somebody else's MODEL_DIR: ptjax's own names and literals, nothing else."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import gin
import numpy as np
import pytest

from ptjax import cli
from ptjax.cli import gin_files, trust
from ptjax.data.catalogue import CATALOGUE
from ptjax.interop.prompt_file import save_prompt

pytestmark = pytest.mark.usefixtures("own_process")
HEADER = "from __gin__ import dynamic_registration\n"
TASK = """
import ptjax
ptjax.Task.name = 'mood'
ptjax.Task.inputs = 'mood: {text}'
ptjax.Task.label = 'label'
ptjax.Task.verbalizer = {'0': 'good', '1': 'bad'}
"""


@pytest.fixture
def model_dir(backbone) -> Path:
    """A MODEL_DIR as one downloads it; its prompt knows no task."""
    folder = Path("downloaded")
    (folder / "prompts").mkdir(parents=True)
    metadata = {"backbone_name": backbone.name, "backbone_fingerprint": backbone.fingerprint}
    prompt = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    save_prompt(folder / "prompts" / "best.safetensors", prompt, metadata)
    return folder


@pytest.fixture
def evil(monkeypatch) -> Iterator[Path]:
    """A harmless module `evil` that leaves a file behind when it is imported or called."""
    Path("evil.py").write_text(
        "import pathlib\npathlib.Path('flag').touch()\n"
        "def run(*_, **__):\n    pathlib.Path('flag').touch()\n    return 'x'\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield Path("flag")
    sys.modules.pop("evil", None)


LINES = {
    "import evil": "it imports evil, ",
    "import evil as ptjax": "it imports evil, ",
    "from evil import run": "it imports evil.run, ",
    "include 'evil.gin'": "it includes 'evil.gin', ",
    "import os": "it imports os, ",
    "import __gin__.evil": "it imports __gin__.evil, ",
    "A = @os.system()": "it refers to os.system, ",
    # What ptjax imports itself is as near as its name.
    "import ptjax\nA = [{'x': @ptjax.importlib.import_module()}]": "it refers to "
    "ptjax.importlib.import_module, ",
    "import ptjax\nptjax.save_prompt.prompt = 'x'": "it sets ptjax.save_prompt.prompt, ",
    "import ptjax\nptjax.save_prompt:\n  path = 'flag'": "it sets ptjax.save_prompt, ",
    "import ptjax as mine\nA = @mine.save_backbone": "it refers to mine.save_backbone, ",
    "import ptjax\nA = @ptjax.preprocessors.super_glue.re.compile()": "it refers to "
    "ptjax.preprocessors.super_glue.re.compile, ",
    # It may be set, and is in every run's file; a reference would start a run.
    "import ptjax\nptjax.tune.steps = 1\nA = @x/ptjax.tune()": "it refers to ptjax.tune, ",
    "import optax\nA = @optax.adam()": "it refers to optax.adam, ",
    "A = @gin.singleton()": "it refers to gin.singleton, ",
}


@pytest.mark.parametrize("command", ["infer", "evaluate", "export"])
@pytest.mark.parametrize("line", ["import evil", "A = @os.system()"])
def test_case_5_1_a_downloaded_config_runs_nothing(call, model_dir, evil, command, line):
    (model_dir / "config.gin").write_text(f"{HEADER}{line}\n")
    flags = {"infer": ["x"], "evaluate": [], "export": ["--to=npy", "--output=p.npy"]}
    code, out, err = call(command, f"--model_dir={model_dir}", *flags[command])
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith(f"error: {model_dir}/config.gin:2: {LINES[line]}")
    assert "--trust_config" in err and not evil.exists()


@pytest.mark.parametrize("line", LINES)
def test_case_5_1_every_way_to_name_code_is_refused(call, model_dir, evil, line):
    Path("evil.gin").write_text("import evil\n")
    (model_dir / "config.gin").write_text(f"{HEADER}{line}\n")
    code, _, err = call("infer", f"--model_dir={model_dir}", "x")
    assert code == 2 and err.startswith(f"error: {model_dir}/config.gin:"), err
    assert LINES[line] in err and err.count("\n") == 1
    assert not evil.exists()


def test_case_5_1_a_broken_file_runs_nothing_before_its_mistake(call, model_dir, evil):
    (model_dir / "config.gin").write_text(f"{HEADER}import evil\nA = (\n")
    code, _, err = call("infer", f"--model_dir={model_dir}", "x")
    assert code == 2 and err.count("\n") == 1 and not evil.exists(), err
    (model_dir / "config.gin").write_bytes(b"import evil\nA = '\xff'\n")
    code, _, err = call("infer", f"--model_dir={model_dir}", "x")
    assert code == 2 and err.count("\n") == 1 and not evil.exists(), err


def test_case_5_1_trust_config_runs_a_module_of_the_users_own(call, model_dir, evil):
    Path("evil.py").write_text(
        Path("evil.py").read_text() + "def shout(fields):\n    yield {'text': fields['text'] + '!'}"
    )
    config = f"{HEADER}import evil{TASK}ptjax.Task.preprocess = @evil.shout\n"
    (model_dir / "config.gin").write_text(config)
    code, _, err = call("infer", f"--model_dir={model_dir}", "x")
    assert code == 2 and "imports evil" in err and not evil.exists()
    code, out, err = call("infer", f"--model_dir={model_dir}", "x", "--trust_config")
    assert code == 0 and '"inputs": "mood: x!"' in out and evil.exists(), err


def test_case_5_1_a_file_of_gin_file_is_the_users_own_choice(call, model_dir, evil):
    Path("mine.gin").write_text(f"{HEADER}import evil{TASK}")
    code, out, err = call("infer", f"--model_dir={model_dir}", "--gin_file=mine.gin", "x")
    assert code == 0 and "mood: x" in out and evil.exists(), err


def test_case_5_1_what_our_own_runs_write_is_read():
    """Every gin file of ptjax's, as a run of it writes it."""
    bound = set()
    for file in sorted(Path(gin_files.gin_configs()).rglob("*.gin")):
        flags = [f"--gin_file={file}", "--gin.RunSettings.optimizer=@ptjax.Adafactor()"]
        flags.append("--gin.Adafactor.learning_rate=@optax.linear_schedule()")
        open_macros = "CORPUS_DIR CORPUS_FILES DATA_DIR INITIAL_CHECKPOINT_PATH"
        open_macros += " MODEL_DIR PROMPT_FILE PROMPT_TEXT SOURCE_PROMPTS TARGET_PROMPT"
        arguments = cli.parse(cli.make_parser("x", ""), flags)
        cli.load_gin(arguments, defaults=dict.fromkeys(open_macros.split(), ""))
        Path("config.gin").write_text(cli.config_text())
        with open("config.gin") as stream:
            trust.check(stream, "config.gin")
        bound |= {selector for _, selector in gin.config._CONFIG}
    assert {"ptjax.tune", "ptjax.TaskComponent", "ptjax.sweep"} <= bound


def test_case_5_1_the_list_is_whole_and_true():
    for table in (trust.MADE, trust.BOUND):
        for module, names in table.items():
            for name in names:
                holder = functools.reduce(
                    getattr, module.split(".")[1:], importlib.import_module(module.split(".")[0])
                )
                assert callable(getattr(holder, name)), (module, name)
    listed = {f"{module}.{name}" for module, names in trust.MADE.items() for name in names}
    assert set(CATALOGUE) <= listed
    # Classes of settings that a run can be given in Python can be written down as well.
    for module in (
        "settings",
        "data.hard_prompt",
        "data.batching",
        "data.mixture",
        "methods.base",
        "methods.initializers",
        "methods.model_tuning",
        "methods.multitask",
        "methods.nearest_prompt",
        "methods.p_tuning",
        "methods.per_layer",
        "methods.prompt_tuning",
        "methods.residual",
        "training.loss",
    ):
        home = importlib.import_module(f"ptjax.{module}")
        for name, value in vars(home).items():
            settings = inspect.isclass(value) and value.__module__ == home.__name__
            if settings and hasattr(value, "__dataclass_fields__") and not name.startswith("_"):
                told = f"ptjax.{name}" in listed or name in INTERNAL
                assert told, f"{module}.{name}: list it in trust.MADE, or here as internal"


INTERNAL = {"InitContext"}
"""Classes that a run makes itself."""


def test_a_downloaded_config_may_name_a_tracker_and_starts_none(call, model_dir, monkeypatch):
    """As the config.gin of a tracked run does; a package that is imported could phone home."""
    for package in ("wandb", "mlflow"):
        Path(package).mkdir()
        Path(package, "__init__.py").write_text("raise ConnectionError('phones home')")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    config = f"{HEADER}{TASK}ptjax.tune.callbacks = [@ptjax.WandbTracker(), @ptjax.MlflowTracker()]"
    (model_dir / "config.gin").write_text(config)
    code, out, err = call("infer", f"--model_dir={model_dir}", "x")
    assert code == 0 and '"inputs": "mood: x"' in out, err
    more = "\nptjax.Task.metrics = @ptjax.WandbTracker()\nptjax.WandbTracker.mode = 'online'"
    (model_dir / "config.gin").write_text(config + more)
    code, _, err = call("infer", f"--model_dir={model_dir}", "x")
    assert code == 2 and "phones home" not in err
