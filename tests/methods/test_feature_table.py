"""docs/method_features.md: its cells are tests, and those of which no other file holds the test."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tune
from tiny import save_tiny, tiny_config

import ptjax
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.inference.model import bind
from ptjax.inference.prompts import open_prompt
from ptjax.methods.adapter import ADAPTERS, Adapter, AdapterMethod, to_paths
from ptjax.trainer.sweep import check_members

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "method_features.md").read_text()
LEGEND = dict(re.findall(r"^- (\w+): `([\w/.]+::\w+)`$", PAGE, re.M))
TABLE = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
METHODS = {
    "bitfit": ptjax.BitFit(),
    "ia3": ptjax.IA3(),
    "lora": ptjax.LoRA(rank=2),
    "per_layer_prompts": ptjax.PerLayerPrompts(2, initializer=ptjax.Uniform(1.0)),
    "prefix_tuning": ptjax.PrefixTuning(2, initializer="random"),
}
EVERY = (
    *METHODS.values(),
    ptjax.PromptTuning(3),
    ptjax.ResidualPromptTuning(3, bottleneck=4),
    ptjax.PTuning(3, hidden=5),
    ptjax.MultitaskPromptTuning(3, rank=2),
    ptjax.ModelTuning(),
)
STEMS = {
    "PromptTuning": "prompt",
    "ResidualPromptTuning": "residual",
    "PTuning": "ptun",
    "MultitaskPromptTuning": "multitask",
    "PerLayerPrompts": "perlayer",
    "PrefixTuning": "prefix",
    "LoRA": "lora",
    "IA3": "ia3",
    "BitFit": "bitfit|lntuning",  # PEFT's name
    "ModelTuning": "modeltun",
}
"""A pattern of any spelling of a method, in small letters, without spaces and underscores."""


def test_a_row_for_every_method_and_a_test_for_every_cell() -> None:
    public = [getattr(ptjax, name) for name in ptjax.__all__]
    methods = {x.__name__ for x in public if ptjax.Method in getattr(x, "__mro__", ())}
    assert {row[0].strip(" `") for row in TABLE} == methods - {"Method"}
    used = {key for row in TABLE for cell in row[1:] for key in re.findall(r"[A-Z]\d+", cell)}
    assert used == set(LEGEND) and all(re.search(r"[A-Z]\d", x) for row in TABLE for x in row[1:])


def test_the_tests_are_there_and_refusals_are_asserted() -> None:
    refused = {key for row in TABLE for key in re.findall(r"\*\*refused\*\* (\w+)", "|".join(row))}
    for key, name in LEGEND.items():
        file, _, test = name.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        [found] = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == test]
        assert key not in refused or "pytest.raises(InputError" in ast.unparse(found), name


@functools.cache
def mentions(name: str) -> str:
    """A test's parameters if they choose methods, else its source with the helpers it uses."""
    file, _, test = name.partition("::")
    function = getattr(importlib.import_module(Path(file).stem), test)
    marks = getattr(function, "pytestmark", [])
    values = plain(repr([mark.args[1] for mark in marks if mark.name == "parametrize"]))
    if any(re.search(stem, values) for stem in STEMS.values()):
        return values
    nodes = {}
    for path in (ROOT / "tests" / "conftest.py", ROOT / file):
        for node in ast.parse(path.read_text("utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            nodes |= {getattr(x, "name", getattr(x, "id", "")): node for x in targets}
    used, names = set(), [test]
    while names:
        if (node := nodes.get(names.pop())) is not None and node not in used:
            used.add(node)
            names += [getattr(x, "id", getattr(x, "arg", "")) for x in ast.walk(node)]
    return plain(" ".join(map(ast.unparse, used)))


def plain(text: str) -> str:
    return re.sub("[ _]", "", text).lower()


def test_a_cell_s_tests_have_its_method(monkeypatch) -> None:
    """Those in italics show something else, from which the feature follows."""
    for folder in {(ROOT / name).parent for name in LEGEND.values()}:
        monkeypatch.syspath_prepend(folder)
    assert set(STEMS) == {row[0].strip(" `") for row in TABLE}
    for method, *cells in TABLE:
        for key in re.findall(r"[A-Z]\d+", re.sub(r"\*[A-Z]\d+\*", "", " ".join(cells))):
            assert re.search(STEMS[method.strip(" `")], mentions(LEGEND[key])), (method, key)


def test_every_adapter_is_here() -> None:
    assert set(METHODS) == set(ADAPTERS)
    assert all(METHODS[name].name == name for name in METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(8192, num_encoder_layers=2)
    return save_tiny(
        tmp_path_factory.mktemp("backbone"), config, tokenizer=load_tokenizer("package:nano")
    )


@pytest.fixture(scope="module")
def int8(folder):
    return ptjax.load_backbone(folder, quantize="int8")


def adapter_of(method: AdapterMethod, backbone) -> Adapter:
    """Random arrays around the first ones, as after some steps."""
    context = ptjax.InitContext(
        backbone.embedding, backbone.tokenizer, None, list, backbone.config, backbone=backbone
    )
    rng, made = np.random.default_rng(0), to_paths(method.init(jax.random.key(0), context))
    arrays = {k: x + rng.normal(0, 0.3, x.shape).astype("f4") for k, x in made.items()}
    return Adapter(method, arrays, {"backbone_name": backbone.name})


def logits_and_gradients(backbone, adapter: Adapter, tokens) -> dict[str, np.ndarray]:
    """The logits, and the gradients of their mean square by the arrays of the file."""
    model, name = bind(backbone, open_prompt(backbone, adapter)), adapter.method.collection

    @jax.jit
    def run(variables, tokens, lengths):
        def loss(own):
            tuned = {**variables, name: own}
            logits = model.apply_fn(tuned, tokens, tokens[:, :3], encoder_lengths=lengths)
            return jnp.square(logits).mean(), logits

        return jax.grad(loss, has_aux=True)(variables[name])

    gradients, logits = run(model.variables, tokens, np.arange(8) % 5 + 1)
    return to_paths({name: gradients}) | {"logits": np.asarray(logits)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitfit", "per_layer_prompts", "prefix_tuning"])
def test_a_mesh_and_int8_change_nothing(name, folder, int8) -> None:
    how = {"mesh": "4x2", "fsdp": True, "quantize": "int8", "scan_layers": True, "remat": "full"}
    tokens = np.arange(8 * 5).reshape(8, 5) % 40 + 4
    adapter = adapter_of(METHODS[name], int8)
    expected = logits_and_gradients(int8, adapter, tokens)
    found = logits_and_gradients(ptjax.load_backbone(folder, **how), adapter, tokens)
    assert set(found) == set(expected) == {*adapter.arrays, "logits"}
    for path, array in expected.items():
        assert np.abs(array).max() > 0, path
        # To float32 rounding: devices and scans sum in another order.
        atol = 1e-4 * np.abs(array).max()
        np.testing.assert_allclose(found[path], array, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", ["bitfit", "per_layer_prompts"])
def test_it_decodes_as_it_is_taught(name, int8) -> None:
    """Target by target through the cache, and all at once."""
    model = bind(int8, open_prompt(int8, adapter_of(METHODS[name], int8)))

    @jax.jit
    def both(variables, tokens):
        run = functools.partial(model.apply_fn, variables)
        encoded = run(tokens, encoder_lengths=jnp.array([3]), method="encode")
        cache, steps = run(encoded, 4, method="init_cache"), []
        for i in range(4):
            logits, cache = run(tokens[:, i : i + 1], cache, i, encoded, method="decode_step")
            steps.append(logits[:, 0])
        return jnp.stack(steps, axis=1), run(encoded, tokens, method="decode")

    steps, whole = both(model.variables, jnp.arange(4, 8)[None])
    np.testing.assert_allclose(steps, whole, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_an_export_predicts_and_is_evaluated_as_in_its_run(
    method, backbone, task, tmp_path
) -> None:
    """From its file: the score, and the label of every example with its probability."""
    schedule = ptjax.TrainSchedule(train_steps=2, eval_period=2, log_period=2)
    lengths = {"inputs": 512, "targets": 16}  # those of a backbone without a prompt
    settings = {"method": method, "schedule": schedule, "feature_lengths": lengths}
    run = ptjax.Run(tmp_path / "run", tune(tmp_path / "run", task, backbone, **settings))
    tuned = run.adapter if run.prompt is None else run.prompt
    network = backbone
    if tuned is None:
        network = ptjax.load_backbone(tmp_path / "run" / "models" / "best", dtype="float32")
    scores = ptjax.evaluate(network, task, tuned, report=tmp_path / "again")
    assert scores["value"] == run.results["value"]
    recorded, again = (
        json.loads((tmp_path / name / "report.json").read_text())["members"][""]
        for name in ("run", "again")
    )
    assert again == recorded
    texts = [example.fields["text"] for example in task.load("test")]
    predictions = ptjax.predict(network, texts, tuned, task=task)
    assert [prediction.text for prediction in predictions] == recorded["predictions"]
    shares = [max(prediction.probabilities.values()) for prediction in predictions]
    # Batches of another shape: the compiler sums in another order.
    np.testing.assert_allclose(shares, recorded["confidences"], rtol=0, atol=1e-4)
    untuned = ptjax.predict(backbone, texts, task=task)
    assert all(a.score != b.score for a, b in zip(predictions, untuned, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_not_mixed_in_a_batch(name, int8) -> None:
    adapter = Adapter(METHODS[name], {}, {})
    with pytest.raises(InputError, match=f"{name} changes the network for all rows of a batch"):
        ptjax.make_bank({"a": adapter})


@pytest.mark.parametrize("method", [ptjax.PerLayerPrompts(), ptjax.ModelTuning()])
def test_a_method_without_sweeps_is_refused_by_name(method) -> None:
    with pytest.raises(InputError, match=f"^{type(method).__name__} does not support sweeps"):
        check_members(ptjax.sweep(seeds=(1, 2)), ptjax.RunSettings(method=method))


@pytest.mark.parametrize("name", ["per_layer_prompts"])
def test_what_peft_cannot_run_is_refused_by_name(name, int8, tmp_path) -> None:
    adapter = adapter_of(METHODS[name], int8)
    with pytest.raises(InputError, match=f"PEFT cannot run {name} as ptjax does"):
        ptjax.export(adapter, tmp_path / "peft", to="peft", backbone=int8)
    assert not (tmp_path / "peft").exists()


def test_model_tuning_has_no_prompt(tmp_path) -> None:
    (tmp_path / "models" / "best").mkdir(parents=True)
    for use in (ptjax.make_bank, lambda one: ptjax.export(one["a"], tmp_path / "x", to="peft")):
        with pytest.raises(InputError, match="the run tuned the whole model, and has no prompt"):
            use({"a": tmp_path})
