"""Flags and gin files: help, one line for every mistake, exit codes, logging, config.gin."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gin
import pytest
from absl import logging as absl_logging

import ptjax
from ptjax import cli, messages
from ptjax.cli import gin_files, logs
from ptjax.cli.gin_mistakes import PUBLIC_NAMES
from ptjax.errors import InputError, TrainingError
from ptjax.trainer import tune

COMMANDS = ("train", "evaluate", "infer", "inspect", "export", "pretrain")
ON_SEVERAL_PROCESSES = ("train", "evaluate", "infer", "pretrain")
pytestmark = pytest.mark.usefixtures("own_process")
HEADER = "from __gin__ import dynamic_registration\nimport ptjax\n"


@pytest.fixture
def fails(call):
    """The error line of a command that ends with exit code 2, and with nothing else to say."""

    def run(*arguments: str, command: str = "train") -> str:
        code, out, err = call(command, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(call, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    shared = {"--gin_file", "--gin_search_paths", "--gin_bindings", "--gin.NAME=VALUE"}
    own = {
        "train": {"--dry_run"},
        "pretrain": {"--dry_run"},
        "evaluate": {"--model_dir", "--prompt", "--backbone", "--split", "--output"},
        "infer": {"--model_dir", "--prompt", "--backbone", "--allow_mismatch", "--input"}
        | {"--format", "--raw", "--output", "--decode", "--num_beams", "--temperature"}
        | {"--top_p", "--max_new_tokens", "--seed", "--batch_size"},
        "inspect": {"PATH", "--backbone", "--tokens", "--json"},
        "export": {"PROMPT", "--to", "--output", "--model_dir", "--backbone", "--force"},
    }
    several = {"--coordinator_address", "--num_processes", "--process_id"}
    several |= {"--heartbeat_timeout_seconds", "--initialization_timeout_seconds"}
    assert all((flag in out) == (command in ON_SEVERAL_PROCESSES) for flag in several)
    assert {flag for flag in shared | own[command] if flag not in out} == set()
    assert "exit codes: 0 finished, 1 failed, 2 bad input" in out
    assert ("143" in out) == (command in ("train", "pretrain"))
    assert max(map(len, out.splitlines())) <= 100


def test_help_waits_for_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        "try: runpy.run_module(f'ptjax.{name}', run_name='__main__')\n"
        "except SystemExit as e: code = e.code\n"
    )
    script = f"for name in {(*COMMANDS, 'convert', 'launch', 'plan')}:\n" + "".join(
        f"  {line}\n" for line in code.splitlines()
    )
    script += "print([m for m in ('jax', 'numpy', 'orbax') if m in sys.modules], code)"
    done = _python("-c", script)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_infer_imports_nothing_that_only_training_needs():
    """Its gin file names the trainer."""
    heavy = ("optax", "orbax", "grain", "httpx", "jax.experimental.pallas", "scipy", "transformers")
    done = _python(
        "-c",
        "import contextlib, runpy, sys\n"
        "sys.argv = ['x', '--gin_file=quickstart.gin', '--prompt=none', 'a fine film']\n"
        "with contextlib.suppress(SystemExit):\n"
        "  runpy.run_module('ptjax.infer', run_name='__main__')\n"
        f"print([m for m in {heavy} if m in sys.modules], 'ptjax.trainer.tune' in sys.modules)",
    )
    assert done.stdout.splitlines()[1:] == ["[] True"], done.stderr


def test_a_command_runs_as_a_module_and_shadows_nothing():
    """`python -m ptjax.inspect` beside the standard library's `inspect`."""
    done = _python("-m", "ptjax.inspect", "--nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(ptjax.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_unknown_flags(fails):
    assert fails("--gin_fil=x") == ("unknown flag --gin_fil; did you mean --gin_file? (see --help)")
    assert fails("more") == "unknown argument more (see --help)"
    assert fails("--gin.TRAIN_STEPS").startswith("--gin.TRAIN_STEPS needs a value")
    assert "--to" in fails("x", "--to=onnx", "--output=y", command="export")
    assert "give either texts or --input" in fails("--prompt=p", command="infer")


MISTAKES = {
    "ptjax.Task.nam = 'x'": "bad.gin:3: ptjax.Task has no parameter nam; did you mean name?",
    "ptjax.Tusk.name = 'x'": "bad.gin:3: ptjax has no Tusk; did you mean Task?",
    "ptjax.Task.name = @ptjax.Tosk()": "bad.gin:3: ptjax has no Tosk; did you mean Task?",
    "ptjex.Task.name = 'x'": "bad.gin:3: ptjex is not imported here; did you mean ptjax?",
    "import optix": "bad.gin:3: module optix not found",
    # Once there were files that named modules.
    "from ptjax import tuning\ntuning.tune.seed = 3": f"bad.gin:3: {PUBLIC_NAMES}",
    "import ptjax.data.tasks": f"bad.gin:3: {PUBLIC_NAMES}",
    "tuning.tune.seed = 3": f"bad.gin:3: tuning is not imported here; {PUBLIC_NAMES}",
    "include 'tasks/sst.gin'": "bad.gin:3: no gin file tasks/sst.gin (looked in the current folder,"
    f" {gin_files.gin_configs()}); did you mean tasks/sst2.gin?",
    "ptjax.Task.name = 'x": "bad.gin:3: gin cannot parse this; check for a missing quote or bracket"
    ", and that every string has quotes",
    "ptjax.Task.name = x": "bad.gin:3: gin cannot parse this; check for a missing quote or bracket"
    ", and that every string has quotes",
    "ptjax.Task.splits = {'train':": "bad.gin: gin cannot parse this; check for a missing quote "
    "or bracket, and that every string has quotes",
    "TRAIN_STEPS = 3": "bad.gin:3: the macro TRAIN_STEPS is set but nothing uses it; remove it",
    "include 'bad.gin'": "bad.gin:3: it includes itself; remove one of the includes",
    f"ptjax.Task.splits = {'[' * 2000}{']' * 2000}": "bad.gin:3: a value is nested deeper than 100 "
    "levels",
    "# a comment: ((((\nptjax.Task.splits = {'a': [\n" + "(" * 99 + "')'": "bad.gin:5: a value is "
    "nested deeper than 100 levels",
    "ptjax.Task = 3": "bad.gin:3: this names a function; a binding sets one of its arguments, "
    "module.name.argument",
    "ptjax.Task.name = %A\nA = %B\nB = %A": "a macro refers to itself (A = %B and B = %A); give "
    "it a value",
    "ptjax.Task.name = %NAME": "bad.gin:3: the macro NAME (Task.name) has no value; set it with "
    "--gin.NAME=VALUE",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_a_gin_file_is_one_line_with_its_place(fails, line):
    Path("bad.gin").write_text(f"{HEADER}{line}\n")
    assert fails("--gin_file=bad.gin") == MISTAKES[line]


def test_a_mistake_in_an_included_file_names_that_file(fails):
    Path("inner.gin").write_text(f"{HEADER}\nptjax.Task.nam = 'x'\n")
    Path("outer.gin").write_text("include 'inner.gin'\n")
    assert fails("--gin_file=outer.gin").startswith("inner.gin:4: ptjax.Task has no parameter nam")


def test_mistakes_on_the_command_line(fails):
    quick = "--gin_file=quickstart.gin"
    assert fails("--gin_file=quickstar.gin").endswith("did you mean quickstart.gin?")
    assert fails(quick, "--gin.TRAIN_STEP=5") == (
        "the macro TRAIN_STEP is set but nothing uses it; did you mean TRAIN_STEPS?"
    )
    assert fails(quick, "--gin.MODEL_DIR=/tmp/x") == (
        "command line, MODEL_DIR = /tmp/x: a string needs its own quotes: "
        "--gin.MODEL_DIR=\"'/tmp/x'\""
    )
    assert fails(quick, f"--gin.TRAIN_STEPS={'[' * 2000}{']' * 2000}") == (
        "command line, TRAIN_STEPS: a value is nested deeper than 100 levels"
    )
    assert fails(quick, "--gin.RunSettings.sed=5") == (
        "command line, RunSettings.sed = 5: ptjax.RunSettings has no parameter sed; did you mean "
        "seed?"
    )
    for old in ("tuning.tune.seed", "loop.Pace.keep", "Pace.keep", "a/tasks.Task.name"):
        head = old.rpartition("/")[2].partition(".")[0]
        assert fails(quick, f"--gin.{old}=5") == (
            f"command line, {old} = 5: {head} is not imported here; {PUBLIC_NAMES}"
        )
    assert fails(quick, "--gin.tune.setings=5").endswith(
        "tune has no parameter setings; did you mean settings?"
    )
    assert fails(quick, "--gin_bindings=ptjax.tume.task = 5").endswith(
        "ptjax has no tume; did you mean tune?"
    )


def test_required_bindings_are_missed_before_anything_is_loaded(fails):
    assert fails().startswith("ptjax.tune needs `backbone`, which nothing sets")
    settings = ("--gin.MODEL_DIR='m'", "--gin.INITIAL_CHECKPOINT_PATH='/nowhere'")
    missing = fails("--gin_file=runs/prompt_tune.gin", *settings)
    assert missing.startswith("ptjax.Task needs `name`, which nothing sets")
    schedule = "--gin.LEARNING_RATE=@optax.linear_schedule()"
    missing = fails("--gin_file=quickstart.gin", schedule)
    assert ".linear_schedule needs `init_value`, which nothing sets" in missing


def test_required_bindings_count_within_their_scope(fails):
    lines = """
    include 'models/ptjax_nano.gin'
    ptjax.pretrain.model_dir = 'm'
    ptjax.pretrain.start = @ptjax.T5Config()
    ptjax.pretrain.tokenizer = 'ptjax-nano'
    ptjax.pretrain.components = [@a/ptjax.TaskComponent()]
    a/ptjax.TaskComponent.task = @ptjax.Task()
    a/ptjax.TaskComponent.rate = 1.0
    a/ptjax.TaskComponent.phrasings = []
    a/ptjax.Task.name = 'a'
    b/ptjax.Task.inputs = '{x}'
    """
    Path("bad.gin").write_text(HEADER + textwrap.dedent(lines))
    said = fails("--gin_file=bad.gin", command="pretrain")
    assert said.startswith("a/ptjax.Task needs `inputs`, which nothing sets")


def test_an_input_error_inside_gin_keeps_its_first_line_only(fails):
    quick = "--gin_file=quickstart.gin"
    assert fails(quick, "--gin.ptjax.Task.metrics=('accurracy',)") == (
        "task tickets: no metric is called 'accurracy'; did you mean accuracy?"
    )


def _load(*arguments: str, **settings) -> None:
    cli.load_gin(cli.parse(cli.make_parser("x", ""), arguments), **settings)


def test_bindings_reach_what_no_gin_file_has_named():
    _load("--gin_file=quickstart.gin", "--gin.PromptTuning.initializer=@ptjax.Uniform()")
    _load("--gin_file=quickstart.gin", "--gin.Uniform.scale=0.25",
          "--gin_bindings=ptjax.PromptTuning.initializer = @ptjax.Uniform()")  # fmt: skip
    assert cli.settings("ptjax.PromptTuning", "initializer")["initializer"].scale == 0.25


def test_a_folder_of_runs_hides_no_gin_file():
    """What `python -m ptjax.train` finds the second time, when runs/quickstart is there."""
    Path("runs/quickstart").mkdir(parents=True)
    environment = {"PYTHONPATH": str(Path(ptjax.__file__).parents[1])}
    command = "from ptjax import cli; cli.load_gin(cli.parse(cli.make_parser('x', '')))"
    done = subprocess.run(
        [sys.executable, "-c", command, "--gin_file=quickstart.gin"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_later_files_and_bindings_win_and_search_paths_are_searched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "short.gin").write_text("TRAIN_STEPS = 7\nEVAL_PERIOD = 7\n")
    _load("--gin_search_paths=mine", "--gin_file=quickstart.gin", "--gin_file=short.gin",
          "--gin.EVAL_PERIOD=3")  # fmt: skip
    assert (cli.macro("TRAIN_STEPS"), cli.macro("EVAL_PERIOD"), cli.macro("NO")) == (7, 3, None)


METHODS = ("bitfit", "ia3", "lora", "multitask", "p_tune", "per_layer", "prefix_tune", "residual")


@pytest.mark.parametrize("name", [*METHODS, "model_tune"])
def test_a_method_s_file_keeps_its_settings_beside_others(name):
    """Also where another file includes the same runs/prompt_tune.gin behind it."""
    of_run = ("LEARNING_RATE", "LEARNING_RATE_SCALE", "PACK", "TRAIN_STEPS")

    def load(*files: str) -> tuple:
        _load(*(f"--gin_file={file}" for file in files), "--gin.MODEL_DIR='x'",
              "--gin.INITIAL_CHECKPOINT_PATH='ptjax-nano'")  # fmt: skip
        method = cli.settings("ptjax.RunSettings", "method")["method"]
        return type(method), *(cli.macro(macro) for macro in of_run)

    method, rate, scale, *_ = load("tasks/tickets.gin", f"runs/{name}.gin", "runs/sweep.gin")
    assert method is not ptjax.PromptTuning
    assert load("runs/sweep.gin", f"runs/{name}.gin", "tasks/tickets.gin") == (
        *(method, rate, scale),
        *(True, 30000),
    )
    expected = (0.03, "embedding_rms") if name == "per_layer" else (rate, scale)
    assert load("quickstart.gin", f"runs/{name}.gin", "runs/sweep.gin") == (
        *(method, *expected),
        *(True, 200),
    )
    if name != "per_layer":  # whose gin file has the paper's rate, for T5
        [optimizer] = cli.settings("ptjax.RunSettings", "optimizer").values()
        assert method().suggested_optimizer() == optimizer
    # A file that the user names is read again, and overrides.
    assert load("quickstart.gin", f"runs/{name}.gin", "runs/prompt_tune.gin") == (
        *(ptjax.PromptTuning, 0.3, "absolute"),
        *(False, 30000),
    )


def test_model_dir_may_be_open_where_nothing_trains():
    Path("part.gin").write_text("include 'tasks/sentiment.gin'\ninclude 'runs/prompt_tune.gin'\n")
    flags = ("--gin_file=part.gin", "--gin.INITIAL_CHECKPOINT_PATH='ptjax-nano'")
    with pytest.raises(InputError, match="the macro MODEL_DIR"):
        _load(*flags)
    _load(*flags, defaults={"MODEL_DIR": None})
    _load(*flags, macros={"MODEL_DIR": "/m"})
    assert cli.settings("ptjax.tune", "model_dir") == {"model_dir": "/m"}


def test_config_text_reads_back_equal_without_the_files_it_came_from(monkeypatch):
    Path("order.gin").write_text(
        f"{HEADER}ptjax.Task.verbalizer = {{'z': 'last', 'b': 'middle', 'a': 'first'}}\n"
    )
    _load("--gin_file=quickstart.gin", "--gin_file=order.gin",
          "--gin.ptjax.PromptTuning.initializer=@ptjax.Uniform()")  # fmt: skip
    text = cli.config_text()
    assert "include" not in text
    Path("order.gin").unlink()
    Path("config.gin").write_text(text)
    monkeypatch.setattr(gin_files, "gin_configs", lambda: Path("gone"))
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    _load("--gin_file=config.gin")
    assert cli.config_text() == text
    task = cli.settings("ptjax.tune", "task")["task"]
    assert task.labels == ("last", "middle", "first")
    assert cli.bound(tune.tune) is not tune.tune


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("bad\n  In call to configurable 'x'"), 2, "error: bad\n"),
        (TrainingError("not finite\nmore"), 1, "failed: not finite\n"),
        (PermissionError(13, "no", "f"), 1, "failed: [Errno 13] no: 'f'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
        (None, 0, ""),
    ],
)
def test_exit_codes(capsys, error, code, said):
    def body():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(body)
    assert (stopped.value.code, capsys.readouterr().err) == (code, said)


def test_sigterm_outside_of_the_loop_exits_with_its_code(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert (stopped.value.code, capsys.readouterr().err) == (143, "terminated\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bug_keeps_its_traceback():
    def body():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(body)


def test_log_lines_are_plain_and_only_ours(capsys, tmp_path):
    logs.prepare()
    logs.prepare()  # a second time adds nothing
    records = [
        (messages.PACKAGE + "/tuning.py", "absl", logging.INFO, "we start"),
        (messages.PACKAGE + "/tuning.py", "absl", logging.WARNING, "we wonder"),
        ("/x/orbax/checkpoint.py", "absl", logging.INFO, "orbax info"),
        ("/x/orbax/checkpoint.py", "absl", logging.WARNING, "orbax warns"),
        ("/x/orbax/checkpoint.py", "absl", logging.ERROR, "orbax fails"),
        ("/x/jax/xla_bridge.py", "jax._src.xla_bridge", logging.WARNING, "no GPU"),
        ("/x/site-packages/gin/resource_reader.py", "root", logging.ERROR, "Path not found"),
    ]
    for path, name, level, message in records:
        logger = logging.getLogger() if name == "root" else logging.getLogger(name)
        logger.handle(logger.makeRecord(name, level, path, 1, message, (), None))
    # What Orbax fails at it raises too, and one line says that.
    shown = ["we start", "warning: we wonder", "warning: no GPU"]
    assert capsys.readouterr().err.splitlines() == shown


def test_log_lines_of_the_library_are_shown(capsys, monkeypatch):
    """absl's own level is WARNING until somebody says otherwise."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logs.prepare()
    from ptjax.data import preprocess

    source = "from absl import logging\nlogging.info('%d examples', 3)"
    exec(compile(source, preprocess.__file__, "exec"), {})
    assert capsys.readouterr().err == "3 examples\n"


def test_train_prints_its_results_and_how_to_try_them():
    train = importlib.import_module("ptjax.train")
    results = json.loads(
        '{"task": "t", "metric": "accuracy", "split": "test", "majority": 0.5,'
        '"hard_prompts": {"named": 0.6}, "before": 0.51, "step": 20, "value": 0.9,'
        '"trainable_parameters": 2560, "frozen_parameters": 2754816}'
    )
    text = train.summary(results, "runs/x")
    rows = dict(line.strip().rsplit("  ", 1) for line in text.splitlines() if line[-4:-3] == ".")
    assert len({line.rindex(" ") for line in text.splitlines() if line[-4:-3] == "."}) == 1
    rows = {name.strip(): value for name, value in rows.items()}
    assert rows["tuned (step 20)"] == "0.900" and rows["hard prompt: named"] == "0.600"
    assert "2,560 trained, 2,754,816 frozen" in text
    assert "python -m ptjax.infer --model_dir=runs/x 'a text of your own'" in text


WRONG = {
    "BATCH_SIZE = 'x'": "BATCH_SIZE = 'x': ptjax.Batching.batch_size takes a whole number",
    "TRAIN_STEPS = 2.5": "TRAIN_STEPS = 2.5: ptjax.TrainSchedule.train_steps takes a whole number",
    "PROMPT_LENGTH = True": "PROMPT_LENGTH = True: ptjax.PromptTuning.length takes a whole number",
    "LEARNING_RATE = 'a'": "LEARNING_RATE = 'a': ptjax.Adafactor.learning_rate takes a number "
    "or a function such as @module.name",
    "LEARNING_RATE_SCALE = 'rms'": "LEARNING_RATE_SCALE = 'rms': "
    "ptjax.Adafactor.learning_rate_scale takes one of 'absolute', 'embedding_rms'",
    "TASK_FEATURE_LENGTHS = {'inputs': 'a'}": "TASK_FEATURE_LENGTHS = {'inputs': 'a'}: "
    "ptjax.Batching.feature_lengths takes a dict {a text in quotes: a whole number} or None",
    "REMAT = 'x'": "REMAT = 'x': ptjax.load_backbone.remat takes one of 'none', 'dots', "
    "'attention', 'full'",
    "SCAN_LAYERS = 1": "SCAN_LAYERS = 1: ptjax.load_backbone.scan_layers takes True or False",
    "ptjax.load_backbone.dtype = 'float16'": "ptjax.load_backbone.dtype = 'float16': it "
    "takes one of 'float32', 'bfloat16' or None",
    "ptjax.Task.format = 'json'": "ptjax.Task.format = 'json': it takes one of 'jsonl', 'csv', "
    "'tsv', 'text', 'parquet' or None",
    "ptjax.Task.on_bad_record = 'skp'": "ptjax.Task.on_bad_record = 'skp': it takes one of 'error',"
    " 'skip'",
    "ptjax.Task.columns = 'text'": "ptjax.Task.columns = 'text': it takes a list [a text in quotes,"
    " ...] or None",
    "ptjax.Task.quoting = 'no'": "ptjax.Task.quoting = 'no': it takes True or False or None",
    "ptjax.tune.task = 'sst2'": "ptjax.tune.task = 'sst2': it takes a reference such as "
    "@ptjax.Task()",
    "ptjax.RunSettings.schedule = @ptjax.TrainSchedule": "ptjax.RunSettings.schedule = "
    "@ptjax.TrainSchedule: it takes a reference such as @ptjax.TrainSchedule()",
    "ptjax.RunSettings.loss = @ptjax.TrainSchedule()": "ptjax.RunSettings.loss = "
    "@ptjax.TrainSchedule(): it takes a reference such as @ptjax.Loss()",
    "ptjax.PromptTuning.initializer = 'uniform'": "ptjax.PromptTuning.initializer = "
    "'uniform': it takes a reference such as @ptjax.NAME() or None",
    "ptjax.Batching.buckets = [32]": "ptjax.Batching.buckets = [32]: it takes a list [(a whole "
    "number, a whole number), ...] or None",
    "ptjax.Task.preprocess = 'f'": "ptjax.Task.preprocess = 'f': it takes a function such as "
    "@module.name or None",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_value_of_the_wrong_type_is_one_line_with_its_place(fails, line):
    assert fails("--gin_file=quickstart.gin", f"--gin_bindings={line}") == (
        f"command line: {WRONG[line]}"
    )
    Path("bad.gin").write_text(f"{HEADER}include 'quickstart.gin'\n{line}\n")
    assert fails("--gin_file=bad.gin") == f"bad.gin:4: {WRONG[line]}"


def test_a_file_that_is_not_read_again_is_not_blamed_and_has_one_spelling(fails, tmp_path):
    """Both include runs/prompt_tune.gin, whose LEARNING_RATE is right."""
    Path("base.gin").write_text("A = 1\n")
    Path("one.gin").write_text(f"{HEADER}include 'base.gin'\ninclude 'runs/lora.gin'\nA = 2\n")
    Path("two.gin").write_text(f"include './base.gin'\ninclude '{tmp_path / 'base.gin'}'\n")
    with pytest.raises(InputError, match=r"^two\.gin:3: the macro A|^the macro A|base\.gin:1: "):
        _load("--gin_file=one.gin", "--gin_file=two.gin")
    assert cli.macro("A") == 2
    Path("one.gin").write_text(f"{HEADER}include 'runs/lora.gin'\nLEARNING_RATE = 'x'\n")
    files = ("tasks/tickets.gin", "one.gin", "runs/sweep.gin")
    said = fails(*(f"--gin_file={file}" for file in files), "--gin.MODEL_DIR='x'",
                 "--gin.INITIAL_CHECKPOINT_PATH='ptjax-nano'")  # fmt: skip
    assert said.startswith("one.gin:4: "), said


RANGES = {
    "EVAL_PERIOD=0": "TrainSchedule.eval_period must be >= 1, got 0",
    "ptjax.TrainSchedule.patience=0": "TrainSchedule.patience must be >= 1, got 0",
    "PROMPT_LENGTH=-1": "PROMPT_LENGTH must be >= 1, got -1",
    "BATCH_SIZE=0": "BATCH_SIZE must be >= 1, got 0",
    "MICROBATCHES=0": "MICROBATCHES must be >= 1, got 0",
    "MICROBATCHES=5": "BATCH_SIZE (32) must be divisible by MICROBATCHES (5)",
    "RANDOM_SEED=-1": "RANDOM_SEED must be >= 0, got -1",
    "EVAL_EXAMPLES=0": "EVAL_EXAMPLES must be >= 1, got 0",
    "ptjax.Evaluation.batch_size=0": "Evaluation.batch_size must be >= 1, got 0",
    "instruction/ptjax.HardPrompt.shots=-1": "HardPrompt.shots must be >= 0, got -1",
    "LEARNING_RATE=-0.3": "Adafactor.learning_rate must be >= 0, got -0.3",
    "STEP_OFFSET=-1": "Adafactor.step_offset must be >= 0, got -1",
    "Z_LOSS=-1": "Loss.z_loss must be >= 0, got -1",
    "LABEL_SMOOTHING=1.0": "Loss.label_smoothing must be >= 0 and < 1, got 1.0",
    "DROPOUT_RATE=2": "T5Config.dropout_rate must be >= 0 and < 1, got 2",
    "TASK_FEATURE_LENGTHS={'input': 64}": "TASK_FEATURE_LENGTHS has 'input', not 'inputs' or "
    "'targets'",
    # Not after thousands of steps, when the first evaluation comes.
    "ptjax.Evaluation.split='dev'": "task tickets: no split 'dev' (splits: train, "
    "validation, test)",
}


@pytest.mark.parametrize("binding", RANGES)
def test_a_value_out_of_range_is_one_line(call, binding):
    code, out, err = call("train", "--gin_file=quickstart.gin", "--dry_run", f"--gin.{binding}")
    assert (code, out) == (2, ""), err
    assert err.splitlines()[-1] == f"error: {RANGES[binding]}"


def test_a_macro_counts_as_used_where_another_file_binds_its_argument_anew(fails):
    Path("mine.gin").write_text(
        "from __gin__ import dynamic_registration\nimport optax\n"
        "import ptjax\ninclude 'quickstart.gin'\n"
        "ptjax.Adafactor.learning_rate = @optax.linear_schedule()\n"
        "optax.linear_schedule.init_value = 0.3\noptax.linear_schedule.end_value = 0.1\n"
        "optax.linear_schedule.transition_steps = 10\n"
    )
    _load("--gin_file=mine.gin")
    Path("config.gin").write_text(cli.config_text())
    _load("--gin_file=config.gin")
    # On the command line it would be lost without a word.
    assert fails("--gin_file=mine.gin", "--gin.LEARNING_RATE=0.1").startswith(
        "the macro LEARNING_RATE is set but nothing uses it"
    )
