"""The names of T5X and google-research/prompt-tuning, and ptjax's names for them.

docs/from_prompt_tuning.md shows the same tables; a test keeps them equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ptjax.errors import InputError

SETTINGS: Sequence[tuple[str, str]] = (
    (
        "`MODEL_DIR`, `INITIAL_CHECKPOINT_PATH`, `BATCH_SIZE`, `EVAL_PERIOD`, `DROPOUT_RATE`, "
        "`Z_LOSS`, `LABEL_SMOOTHING`, `RANDOM_SEED`, `PROMPT_LENGTH`",
        "the same names and meanings",
    ),
    (
        "`TRAIN_STEPS` (absolute: 1,150,000 is 50,000 steps of tuning)",
        "steps of this run: `TRAIN_STEPS = 50000`",
    ),
    ("`TRAIN_STEPS_RELATIVE`", "`TRAIN_STEPS`"),
    ("`TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 8}`", "the same"),
    (
        "`MIXTURE_OR_TASK_NAME`, `MIXTURE_OR_TASK_MODULE`",
        "a task's gin file, `tasks/*.gin`, which declares `ptjax.Task`",
    ),
    (
        "`USE_CACHED_TASKS`, `JSON_WRITE_N_RESULTS`, `USE_HARDWARE_RNG`, "
        "`EVALUATOR_USE_MEMORY_CACHE`",
        "nothing; leave it out",
    ),
    ("`EVAL_STEPS`, `EVALUATOR_NUM_EXAMPLES`", "`EVAL_EXAMPLES`, a number of examples"),
    ("gin order models, prompts, sizes, decoding, runs", "any order"),
    (
        "`MODEL`, `ARCHITECTURE`, `NUM_LAYERS`, `NUM_HEADS`, `HEAD_DIM`, `EMBED_DIM`, `MLP_DIM`, "
        "`NUM_EMBEDDINGS`",
        "nothing; sizes are read from the checkpoint",
    ),
    ("`VOCABULARY`", "`TOKENIZER`, or `--tokenizer=PATH`"),
    (
        "`OPTIMIZER`",
        "`ptjax.RunSettings.optimizer = @ptjax.Adafactor()`, its rate in `LEARNING_RATE`",
    ),
    ("the restored step 1,100,000 in Adafactor's decay", "`STEP_OFFSET = 1100000`"),
    ("`PROMPT_REGEX`, `MultiOptimizer`", "`ptjax.RunSettings.method = @ptjax.PromptTuning()`"),
    (
        "`LOSS_NORMALIZING_FACTOR = None`",
        "the same loss; `ptjax.Loss.per_token = True` divides by the target tokens",
    ),
    ("`PROMPT`", "`ptjax.PromptTuning.initializer`, a file of `prompts/`"),
    (
        "`prompts/from_class_labels.gin`, `CLASS_LABELS`",
        "`prompts/class_labels.gin`, `CLASS_LABELS`: the default for a closed label set",
    ),
    ("`prompts/from_sampled_vocab.gin`", "`prompts/sampled_vocabulary.gin`"),
    ("`prompts/from_file.gin`, `PROMPT_FILE`", "`prompts/file.gin`, `PROMPT_FILE`"),
    ("`EMBEDDING_FILE`", "nothing; the embedding of the backbone is used"),
    ("`prompts/from_embedded_string`", "`prompts/text.gin`, `PROMPT_TEXT`"),
    ("uniform [0, 0.5)", "`prompts/uniform.gin`: [-0.5, 0.5), as the paper says"),
    (
        "`numpy_checkpoints/checkpoint_N/encoder.prompt.prompt.prompt`",
        "`prompts/N.safetensors`; `python -m ptjax.export PROMPT --to=npy --output=prompt.npy` "
        "writes the numpy file",
    ),
    (
        "`partitioning.PjitPartitioner.num_partitions = 2`",
        "`MESH = '4x2'` on 8 devices (data x model); `'auto'` takes what fits",
    ),
    (
        "`model_parallel_submesh`",
        "`MESH`; which chips are neighbours is found from the machine",
    ),
    (
        "`partitioning.standard_logical_axis_rules.parameter_partitioning_dims = 2`",
        "`FSDP = True`",
    ),
    (
        "`activation_partitioning_dims = 2`, `additional_rules`",
        "see [sharding.md](sharding.md)",
    ),
    (
        "`runs/prompt_finetune.gin`",
        "`python -m ptjax.train`, with `--gin_file=runs/prompt_tune.gin`",
    ),
    ("`runs/prompt_eval.gin`, `EVAL_OUTPUT_DIR`", "`python -m ptjax.evaluate --model_dir=DIR`"),
    (
        "`runs/prompt_infer.gin`, `INFER_OUTPUT_DIR`",
        "`python -m ptjax.infer --model_dir=DIR --input=FILE --output=FILE`",
    ),
    ("`CHECKPOINT_PATH`", "`--backbone=PATH`, and the prompt is `--prompt=PATH`"),
    ("`utils.DatasetConfig.batch_size`", "`BATCH_SIZE`"),
    ("`utils.DatasetConfig.task_feature_lengths`", "`TASK_FEATURE_LENGTHS`"),
    (
        "`utils.DatasetConfig.mixture_or_task_name`",
        "a task's gin file, `tasks/*.gin`",
    ),
    ("`utils.DatasetConfig.pack`", "`PACK`"),
    ("`utils.DatasetConfig.seed`", "`RANDOM_SEED`"),
    ("`utils.RestoreCheckpointConfig.path`", "`INITIAL_CHECKPOINT_PATH`"),
    ("`utils.SaveCheckpointConfig.period`", "`EVAL_PERIOD`; it saves when it evaluates"),
    ("`utils.SaveCheckpointConfig.keep`", "`ptjax.TrainSchedule.keep`"),
    (
        "`utils.create_learning_rate_scheduler.base_learning_rate`",
        "`LEARNING_RATE`",
    ),
    (
        "`utils.create_learning_rate_scheduler`",
        "a schedule of optax: `ptjax.Adafactor.learning_rate = @optax.NAME()`",
    ),
    ("`trainer.Trainer.num_microbatches`", "`MICROBATCHES`"),
    ("`train_script.train.total_steps`", "`TRAIN_STEPS`"),
    ("`train_script.train.eval_period`", "`EVAL_PERIOD`"),
    ("`train_script.train.eval_steps`", "`EVAL_EXAMPLES`, a number of examples"),
    ("`train_script.train.random_seed`", "`RANDOM_SEED`"),
)
"""Rows (T5X's setting, ptjax's equivalent), as docs/from_prompt_tuning.md shows them."""

FLAGS: Sequence[tuple[str, str]] = (
    ("`--gin_file`, `--gin_bindings`, `--gin_search_paths`, `--gin.NAME=VALUE`", "the same"),
    ("`--tfds_data_dir=DIR`", "accepted: `DATA_DIR` of tasks that read TFDS"),
    ("`--alsologtostderr`, `--logtostderr`", "accepted: logs go to stderr anyway"),
    ("`--dry_run`", "the same flag of `train`"),
    (
        "`--run_mode`",
        "nothing; the mode is the command: `python -m ptjax.train`, `evaluate` or `infer`",
    ),
    ("`--seqio_additional_cache_dirs`", "nothing; ptjax caches no tasks, leave it out"),
    (
        "`--multiprocess_gpu`",
        "nothing; Slurm and Open MPI are recognised, else `--coordinator_address`",
    ),
    ("`--coordinator_address`", "the same"),
    ("`--process_count`", "`--num_processes`"),
    ("`--process_index`", "`--process_id`"),
    ("`--initialization_timeout`", "`--initialization_timeout_seconds`"),
)
"""Rows (T5X's flag, ptjax's equivalent)."""

ACCEPTED: Mapping[str, Sequence[object]] = {
    "USE_CACHED_TASKS": (False,),
    "USE_HARDWARE_RNG": (False,),
    "JSON_WRITE_N_RESULTS": (None,),
    "LOSS_NORMALIZING_FACTOR": (None,),
    "PROMPT_REGEX": (".*/prompt/.*", [".*/prompt/.*"], (".*/prompt/.*",)),
}
"""T5X's macros -> the values that describe what ptjax does anyway."""

_IMPORT = re.compile(
    r"^\s*(?:import|from)\s+"
    r"(__main__|t5x|seqio|flaxformer|prompt_tuning|t5(?=[.\s])|mesh_tensorflow)\b",
    re.MULTILINE,
)
MODULES = (
    "train_script", "eval_script", "infer_script", "interactive_script", "utils", "train_utils",
    "trainer", "partitioning", "models", "network", "adafactor", "seqio", "mixtures", "checkpoints",
    "optimizers", "prompts", "multi_optimizer", "t5_architecture",
)  # fmt: skip
"""The names under which T5X's gin files import modules."""

_BLOCK = re.compile(r"^([\w./]+):\s*\n((?:[ \t]+\S.*\n|[ \t]*\n)+)", re.MULTILINE)
_SAME = ("the same", "the same names and meanings")
_CODE = re.compile(r"`([^`]+)`")


def markdown(rows: Sequence[tuple[str, str]]) -> str:
    """Formats (T5X's name, ptjax's equivalent) rows as a Markdown table.

    The columns are headed "there" and "here".
    """
    lines = ["| there | here |", "|---|---|", *(f"| {there} | {here} |" for there, here in rows)]
    return "\n".join(lines) + "\n"


def _named(rows: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(name in T5X, ptjax's equivalent as plain text); arguments as "Class.argument"."""
    for there, here in rows:
        plain = re.sub(r"\[[^]]*\]\(([^)]*)\)", r"docs/\1", here).replace("`", "")
        for code in _CODE.findall(there):
            name = code.split("=")[0].strip()
            yield (name if "/" in name else ".".join(name.split(".")[-2:])), plain


def advice(name: str) -> str | None:
    """ptjax's equivalent of a setting or gin file of T5X, as the end of a message.

    None for names that are not T5X's, or that ptjax has too.
    """
    for there, here in _named(SETTINGS):
        if here in _SAME or re.search(rf"\b{re.escape(there)}\b", here):
            continue  # ptjax has the same name
        if name == there or name.endswith((f"/{there}", f".{there}")):
            return here
    if name.startswith(("t5x/", "prompt_tuning/", "flaxformer/")):
        return "its own files, see docs/from_prompt_tuning.md"
    return None


def replacement_message(name: str, here: str) -> str:
    """Makes the message for a name that only T5X has.

    Args:
        name: T5X's name.
        here: the result of `advice` or `flag_advice`.
    """
    return f"{name} is T5X's; ptjax has instead: {here}"


def task_file(name: str, files: Iterable[str]) -> str | None:
    """Chooses the gin file for the task that T5X calls `name` ('super_glue_boolq_v102'), or None.

    Args:
        files: the paths of ptjax's gin files.
    """
    stems = {file.rpartition("/")[2].removesuffix(".gin"): file for file in files}
    matching = [stem for stem in stems if f"_{stem}_" in f"_{name.lower()}_"]
    return stems[max(matching, key=len)] if matching else None


def flag_advice(flag: str) -> str | None:
    """ptjax's equivalent of a flag of T5X ("--process_count"), as the end of a message; or None."""
    return dict(_named(FLAGS)).get(flag)


def _flat_block(block: re.Match[str]) -> str:
    """A block, "a.B:" with indented lines "c = 1", as lines "a.B.c = 1"."""
    return re.sub(r"(?m)^[ \t]+(?=\w+ *=)", f"{block[1]}.", block[2])


def check_gin_file(text: str, path: str) -> None:
    """Raises InputError if a gin file imports T5X, seqio or the like.

    The message lists ptjax's names for the settings in it.

    Args:
        text: the content of the file.
        path: its path, for the message.
    """
    match = _IMPORT.search(text)
    if match is None:
        return
    line = text.count("\n", 0, match.start(1)) + 1
    here: dict[str, list[str]] = {}
    code = _BLOCK.sub(_flat_block, re.sub(r"#.*", "", text) + "\n")
    for name, instead in _named(SETTINGS):
        if re.search(rf"(?<![\w%]){re.escape(name)}(?!\w)", code):
            here.setdefault(instead, []).append(name)
    names = "; ".join(f"{', '.join(there)}: {instead}" for instead, there in here.items())
    raise InputError(
        f"{path}:{line}: this is T5X's gin file (it imports {match[1]}), and ptjax has its own: "
        "--gin_file=tasks/NAME.gin --gin_file=runs/prompt_tune.gin"
        + (f". Instead of what it binds ptjax has: {names}" if names else "")
        + " (docs/from_prompt_tuning.md)"
    )
