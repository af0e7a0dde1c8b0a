"""The family's pre-training data as arrays: reading restores the batches that were written."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import time
import types
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from ptjax.backbones.load import load_backbone
from ptjax.data import mixture
from ptjax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_gpu(monkeypatch) -> tuple[ModuleType, ModuleType]:
    """The modules `family` and `pretrain` of benchmarks/on_gpu."""
    for folder in ("benchmarks", "benchmarks/on_gpu", "models"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("family"), importlib.import_module("pretrain")


def test_batches_come_back_as_they_went_in(on_gpu, tmp_path, monkeypatch):
    family, pretrain = on_gpu
    given = {}
    monkeypatch.setattr(pretrain, "write", lambda folder, text, stages, sizes, tokens: given.update(
        text=text, stages=stages, sizes=sizes, tokens=tokens))  # fmt: skip
    pretrain.write_toy(tmp_path)
    family.write(tmp_path / "family", **given)
    read = family.read(tmp_path / "family")
    assert read.sizes == given["sizes"]
    tokenizer, ids = load_tokenizer(family.TOKENIZER), read.sizes["toy"].special_ids
    for name, settings in given["stages"].items():
        stream = given["text"].tokenize(tokenizer, 0)  # the first stage's seed, for all
        made = mixture.make_batches(settings.components, stream, tokenizer, settings.seed, ids)
        expected = mixture.mix(settings.components, made, settings.seed)
        stage = read.stages[name]
        assert (stage.steps, stage.seed) == (settings.steps, settings.seed)
        assert stage.batches.shapes == expected.shapes
        for number in range(40):
            jax.tree.map(
                np.testing.assert_array_equal,
                stage.batches.batch(number),
                expected.batch(number),
            )
        rates = [[float(x.rate_at(n, 1.0)) for n in range(4)] for x in (stage, settings)
                 for x in [x.optimizer]]  # fmt: skip
        np.testing.assert_allclose(rates[0], rates[1], rtol=1e-7)


def test_the_gin_files_give_one_mixture_to_all_sizes_and_stages(on_gpu, tmp_path, monkeypatch):
    family, _ = on_gpu
    given = {}
    monkeypatch.setattr(family, "write", lambda folder, text, stages, sizes, tokens: given.update(
        text=text, stages=stages, sizes=sizes))  # fmt: skip
    family.write_from_gin(tmp_path, tmp_path / "data", tmp_path / "corpus", tokens=1)
    assert list(given["sizes"]) == ["pico", "nano", "micro", "mini"]
    vocabularies = {config.vocab_size for config in given["sizes"].values()}
    assert vocabularies == {load_tokenizer(family.TOKENIZER).vocab_size}
    span, lm = given["stages"].values()
    assert [type(part).__name__ for part in (span.components[0], lm.components[0])] == [
        "SpanCorruption", "PrefixLM"]  # fmt: skip
    assert (
        span.components[1:] == lm.components[1:]
        and span.components[0].rate == lm.components[0].rate
    )
    assert span.seed != lm.seed  # other batches of the same tasks
    # No validation or test split, and no data set that the models are evaluated on.
    read = set(itertools.chain(*(part.task.splits.values() for part in span.components[1:])))
    assert read == {
        "imdb/train.jsonl.xz",
        "qqp/train.tsv",
        "super_glue/RTE/train.jsonl",
        "super_glue/CB/train.jsonl",
    }
    assert all(set(part.task.splits) == {"train"} for part in span.components[1:])


@pytest.mark.slow
def test_a_stage_that_the_clock_stops_resumes_and_the_next_starts_from_it(
    on_gpu, tmp_path, monkeypatch
):
    family, pretrain = on_gpu
    monkeypatch.setattr(pretrain, "LOSS_PERIOD", 2)
    pretrain.write_toy(tmp_path / "family")
    read, weights = family.read(tmp_path / "family"), tmp_path / "weights"

    def run(stage: str, deadline: float) -> dict:
        record = types.SimpleNamespace(deadline=deadline)
        return pretrain.run_stage(read, "toy", stage, weights, record)

    def embedding(name: str) -> np.ndarray:
        params = load_backbone(weights / name).variables["params"]
        return np.asarray(params["token_embedder"]["embedding"])

    with pytest.raises(TimeoutError, match="step 2 of 4; the same command goes on from there"):
        run("span", -math.inf)
    assert [path.name for path in weights.iterdir()] == ["toy-span.unfinished"]
    assert run("span", math.inf)["from_step"] == 2
    assert [path.name for path in weights.iterdir()] == ["toy-span"]
    losses = json.loads((weights / "toy-span" / "losses.json").read_text())
    assert list(losses) == ["2", "4"]
    before = embedding("toy-span")
    starts = []
    train = pretrain.train
    monkeypatch.setattr(pretrain, "train", lambda config, params, *rest: (
        starts.append(np.asarray(params["token_embedder"]["embedding"])),
        train(config, params, *rest))[1])  # fmt: skip
    run("lm", math.inf)
    np.testing.assert_array_equal(starts[0], before)
    assert np.abs(embedding("toy-lm") - before).max() > 0
    assert {path.name for path in weights.iterdir()} == {"toy-span", "toy-lm"}


def test_what_the_package_has_is_whole_small_and_of_its_size(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "models"))
    package = importlib.import_module("ptjax_models")
    folders = [path for path in (ROOT / "models" / "ptjax_models").iterdir() if path.is_dir()]
    stages = {f"{size}-{stage}" for size in package.SIZES for stage in package.STAGES}
    found = {folder.name for folder in folders if folder.name != "__pycache__"}
    assert {"pico-span", "pico-lm"} <= found <= stages
    sizes = [path.stat().st_size for folder in folders for path in folder.iterdir()]
    assert max(sizes) < 16e6 and sum(sizes) < 45e6
    rows = (ROOT / "docs" / "models.md").read_text()
    for name in found:
        backbone = load_backbone(f"ptjax-{name}")
        count = sum(leaf.size for leaf in jax.tree.leaves(backbone.variables["params"]))
        assert re.search(rf"`ptjax_{name.split('-')[0]}` .* {count:,} \|", rows)
        assert backbone.tokenizer.fingerprint == load_tokenizer("package:nano").fingerprint
        file = ROOT / "models" / "ptjax_models" / name / "losses.json"
        losses = list(json.loads(file.read_text()).values())
        assert len(losses) == {"span": 72, "lm": 8}[name.split("-")[1]]
        assert max(losses) < math.log(8192)  # of a guess


@pytest.mark.slow
def test_an_interrupted_stage_resumes_exactly(on_gpu, tmp_path, monkeypatch):
    """Interrupted halfway, it ends with the same weights and losses as without a stop."""
    family, pretrain = on_gpu
    pretrain.write_toy(tmp_path)
    toy = family.read(tmp_path)
    monkeypatch.setattr(pretrain, "LOSS_PERIOD", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(weights: Path, *, seconds: float) -> None:
        record = types.SimpleNamespace(deadline=time.monotonic() + seconds)
        pretrain.run_stage(toy, "toy", "span", weights, record)

    run(whole, seconds=1000)
    with pytest.raises(TimeoutError, match="step 2 of 4"):
        run(parts, seconds=0)
    run(parts, seconds=0)
    for file in ("model.safetensors", "losses.json"):
        assert (parts / "toy-span" / file).read_bytes() == (whole / "toy-span" / file).read_bytes()
    assert [path.name for path in parts.iterdir()] == ["toy-span"]
