"""The family's pre-training data as arrays, for a machine without gin and without the corpus.

`write_from_gin` evaluates gin_configs/runs/{pretrain,adapt}_family.gin. `read` restores the same
batches of the tasks. The running text may be shortened, and all stages read it in the order of the
first one's seed. The folder holds ids.npz.xz, the running text and every phrasing of the tasks as
uint16 (the phrasings are nearly alike, so they compress well), and family.json, all settings.
"""

from __future__ import annotations

import dataclasses
import io
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ptjax_models import SIZES, STAGES

from ptjax.data import denoising, mixture
from ptjax.data.pipeline import MixtureBatches, TrainBatches
from ptjax.data.preprocess import TokenizedExamples, TokenRows
from ptjax.data.tokenizer import Tokenizer, load_tokenizer
from ptjax.models.config import T5Config
from ptjax.training.optimizer import Adafactor

TOKENIZER = "package:nano"
# The dictionary of xz's presets is too small to reach back from one phrasing to the one before.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": 256 << 20}]


class Stage(NamedTuple):
    """The data and settings of a stage, which trains on batches 0 ... `steps` - 1."""

    batches: MixtureBatches
    optimizer: Adafactor
    steps: int
    seed: int


class Family(NamedTuple):
    """The result of `read`: configs by size, stages by name, and the tokenizer."""

    sizes: Mapping[str, T5Config]
    stages: Mapping[str, Stage]
    tokenizer: Tokenizer


class Settings(NamedTuple):
    """Settings of a stage, as gin passes them to `ptjax.pretrain`."""

    components: Sequence[mixture.MixtureComponent]
    optimizer: Adafactor
    steps: int
    seed: int


def write(
    folder: Path,
    text: mixture.TextFiles,
    stages: Mapping[str, Settings],
    sizes: Mapping[str, T5Config],
    *,
    tokens: int,
) -> None:
    """Writes the folder.

    Args:
        stages: all with the same number of components, and the same tasks in the same places.
        tokens: how many tokens of the running text to keep; a stage that needs more starts over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, *_ = stages.values()
    tokenizer, ids = load_tokenizer(TOKENIZER), next(iter(sizes.values())).special_ids
    stream = text.tokenize(tokenizer, first.seed)[:tokens]
    components = mixture.make_batches(first.components, stream, tokenizer, first.seed, ids)
    arrays = {"text": stream.astype(np.uint16)} | {
        f"{part}.{number}.{name}.{kind}": array.astype(np.uint16)
        for part, made in enumerate(components)
        for number, batches in enumerate(made)
        if isinstance(batches.source, TokenizedExamples)
        for name in ("inputs", "targets")
        for rows in [getattr(batches.source, name)]
        for kind, array in (("ids", rows.ids), ("lengths", rows.lengths))
    }
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    compressed = lzma.compress(packed.getbuffer(), lzma.FORMAT_XZ, filters=XZ)
    (folder / "ids.npz.xz").write_bytes(compressed)
    about = {
        "sizes": {size: dataclasses.asdict(config) for size, config in sizes.items()},
        "stages": {
            name: _describe_stage(stage, components, first.seed) for name, stage in stages.items()
        },
    }
    (folder / "family.json").write_text(json.dumps(about))


def write_from_gin(folder: Path, data_dir: Path, corpus_dir: Path, *, tokens: int) -> None:
    """Writes the family of the gin files; the paths are their DATA_DIR and CORPUS_DIR."""
    # Nothing is trained here, so any backbone will do as the start of a stage.
    macros = {"DATA_DIR": str(data_dir), "CORPUS_DIR": str(corpus_dir), "MODEL_DIR": str(folder)}
    macros["INITIAL_CHECKPOINT_PATH"] = "ptjax-nano"
    stages = {stage: _bound(macros, name) for stage, name in STAGES.items()}
    sizes = {
        size: _bound(macros, STAGES["span"], f"models/ptjax_{size}.gin")["start"] for size in SIZES
    }
    assert stages["span"]["tokenizer"] == TOKENIZER
    settings = {
        stage: Settings(
            one["components"], one["optimizer"], one["schedule"].train_steps, one["seed"]
        )
        for stage, one in stages.items()
    }
    write(folder, stages["span"]["text"], settings, sizes, tokens=tokens)


def _bound(macros: Mapping[str, str], *gin_files: str) -> dict[str, Any]:
    """The arguments that the gin files bind for `ptjax.pretrain`."""
    import gin  # here, because the machine that reads does not have it

    from ptjax import cli
    from ptjax.trainer import pretrain

    words = [f"--gin_file={file}" for file in gin_files]
    cli.load_gin(cli.parse(cli.make_parser("prepare", ""), words), defaults=macros)
    return gin.get_bindings(pretrain.pretrain)


def _describe_stage(
    stage: Settings, components: Sequence[Sequence[TrainBatches]], first_seed: int
) -> dict[str, Any]:
    """A stage for JSON. `components` are those of the first stage, made with `first_seed`."""
    found = []
    for number, (part, made) in enumerate(zip(stage.components, components, strict=True)):
        fields = dataclasses.asdict(part)  # type: ignore[call-overload]  # all are dataclasses
        rate, size = fields.pop("rate"), fields.pop("batch_size")
        for index, batches in enumerate(made):
            seed = batches.seed + stage.seed - first_seed
            about = {"rate": rate / len(made), "batch_size": size, "seed": seed}
            if isinstance(batches.source, TokenizedExamples):
                about |= {"examples": f"{number}.{index}", "buckets": batches.buckets}
            else:
                about |= {"objective": type(part).__name__, "settings": fields}
            found.append(about)
    rates = [float(stage.optimizer.rate_at(step, 1.0)) for step in range(stage.steps)]
    rest = dataclasses.asdict(dataclasses.replace(stage.optimizer, learning_rate=0.0))
    return {
        "steps": stage.steps,
        "seed": stage.seed,
        "optimizer": rest | {"learning_rate": rates},
        "components": found,
    }


def read(folder: Path) -> Family:
    """Reads what `write` wrote."""
    about = json.loads((folder / "family.json").read_text())
    with np.load(io.BytesIO(lzma.decompress((folder / "ids.npz.xz").read_bytes()))) as file:
        arrays = dict(file)
    sizes = {
        size: T5Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        for size, fields in about["sizes"].items()
    }
    ids = next(iter(sizes.values())).special_ids
    stream, tokenizer = arrays["text"], load_tokenizer(TOKENIZER)

    def rows(name: str) -> TokenRows:
        offsets = np.append(0, np.cumsum(arrays[f"{name}.lengths"], dtype=np.int64))
        return TokenRows(arrays[f"{name}.ids"], offsets, truncated=0)

    def component(one: Mapping[str, Any]) -> TrainBatches:
        common = {"batch_size": one["batch_size"], "seed": one["seed"], "ids": ids}
        if name := one.get("examples"):
            examples = TokenizedExamples(rows(f"{name}.inputs"), rows(f"{name}.targets"))
            return TrainBatches(examples, buckets=list(map(tuple, one["buckets"])), **common)
        objective = getattr(denoising, f"{one['objective']}Source")
        source = objective(stream, tokenizer, seed=one["seed"], **one["settings"])
        bucket = int(source.input_lengths[0]), int(source.target_lengths[0])
        return TrainBatches(source, buckets=[bucket], **common)

    def stage(one: Mapping[str, Any]) -> Stage:
        components = [component(each) for each in one["components"]]
        rates = jnp.asarray(one["optimizer"].pop("learning_rate"), jnp.float32)
        optimizer = Adafactor(**one["optimizer"], learning_rate=lambda step: rates[step])
        mixed = [each["rate"] for each in one["components"]]
        batches = MixtureBatches(components, mixed, one["seed"])
        return Stage(batches, optimizer, one["steps"], one["seed"])

    return Family(sizes, {name: stage(one) for name, one in about["stages"].items()}, tokenizer)
