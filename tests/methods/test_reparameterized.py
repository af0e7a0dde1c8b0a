"""Methods that compute a prompt from what they train: formulas, first values, runs, exports."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_settings, stopped_by_sigterm, without_seconds

import ptjax
from ptjax.errors import InputError
from ptjax.methods.base import InitContext, Method
from ptjax.methods.initializers import Uniform
from ptjax.methods.multitask import MultitaskPromptTuning
from ptjax.methods.p_tuning import PTuning
from ptjax.methods.prompt_method import PromptMethod
from ptjax.methods.residual import ResidualPromptTuning
from ptjax.model_dir import ModelDir
from ptjax.training.optimizer import Adafactor, embedding_rms

KEY = jax.random.key(0)
METHODS = {
    "residual": ResidualPromptTuning(3, bottleneck=4),
    "residual, a network a row": ResidualPromptTuning(3, bottleneck=4, shared=False),
    "p_tuning": PTuning(3, hidden=5),
    "p_tuning, lstm": PTuning(3, "lstm", hidden=5),
    "multitask": MultitaskPromptTuning(3, rank=2),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def context(backbone) -> InitContext:
    return InitContext(backbone.embedding, backbone.tokenizer, None, list, backbone.config)


def own(method: PromptMethod, context: InitContext) -> Any:
    return method.init(KEY, context)[method.collection]


@EACH
def test_a_method_makes_the_shapes_that_a_plan_counts(method, context) -> None:
    made = method.init(KEY, context)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
    assert shapes == method.variable_shapes(context.config)
    assert (method.exports, method.supports_rows, method.supports_sweep) == ("prompt", True, True)
    blind = dataclasses.replace(method, attends_to_input=False)
    assert (method.extra_positions(), blind.extra_positions()) == (3, 0)
    assert (method.describe(), blind.describe()) == ({"sees_input": True}, {"sees_input": False})


@EACH
def test_the_network_reads_the_prompt_that_the_export_holds(
    method, context, backbone, tmp_path
) -> None:
    """Exactly; and with the file's prompt in the variables, no other is computed."""
    made = method.init(KEY, context)
    path = tmp_path / "prompt.safetensors"
    method.save(path, made, {"step": 2}, backbone)
    assert method.read_metadata(path) == {"step": 2}
    loaded = method.load(path, backbone)
    assert jax.tree.map(np.shape, loaded) == {"prompt": {"prompt": (3, 16)}}
    np.testing.assert_array_equal(loaded["prompt"]["prompt"], method.matrix(own(method, context)))
    seen = method.wrap(lambda variables, *_, **__: variables)
    assert seen(loaded) is loaded
    np.testing.assert_array_equal(seen(made)["prompt"]["prompt"], loaded["prompt"]["prompt"])


def settings_of(method: Method) -> ptjax.RunSettings:
    """Those of a run of three steps, evaluated once."""
    schedule = ptjax.TrainSchedule(train_steps=3, eval_period=3, log_period=1)
    optimizer = Adafactor(0.05, multiply_by_parameter_scale=True)
    return make_settings(method=method, schedule=schedule, optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        METHODS["residual"],
        METHODS["p_tuning, lstm"],
        ptjax.PerLayerPrompts(3),
        ptjax.IA3(),
        ptjax.BitFit(),
        ptjax.ModelTuning(),
    ],
    ids=lambda method: method.name,
)
def test_a_run_resumes_bitwise_with_its_network(method, backbone, task, tmp_path) -> None:
    """A run that a signal stopped, and one that nothing stopped."""

    def train(name: str, callbacks: Any = ()) -> Any:
        settings = settings_of(method)
        return ptjax.tune(backbone, task, tmp_path / name, settings, callbacks=callbacks)

    whole = train("whole")
    assert stopped_by_sigterm(2, functools.partial(train, "stopped")) == 143
    stopped = train("stopped")
    assert stopped.finished
    assert without_seconds(stopped.results) == without_seconds(whole.results)
    folders = [Path(ModelDir(x.model_dir).exports(method.exports)) for x in (stopped, whole)]
    exports = [
        {str(file.relative_to(x)): file.read_bytes() for file in x.rglob("*") if file.is_file()}
        for x in folders
    ]
    assert {entry.stem for entry in folders[0].iterdir()} == {"3", "best"}
    assert exports[0] == exports[1]
    trained = method.variable_shapes(backbone.config) or backbone.variables["params"]
    sizes = [x.size for x in jax.tree.leaves(trained)]
    assert whole.results["trainable_parameters"] == sum(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "p_tuning", "multitask"])
def test_the_members_of_a_sweep_have_networks_of_their_own(name, backbone, task, tmp_path) -> None:
    """Each prompt is that of a run of its own; rows of one batch may take either."""
    settings = settings_of(METHODS[name])
    members = ptjax.sweep(seeds=(3, 4))
    run = ptjax.tune(backbone, task, tmp_path / "sweep", settings, members=members)
    best = ModelDir(run.model_dir).best_prompt
    prompts = {name: ptjax.load_prompt(best(name)) for name in members}
    alone = ptjax.tune(backbone, task, tmp_path / "alone", settings).prompt
    assert alone is not None
    # Adafactor amplifies the rounding of sums in another order.
    np.testing.assert_allclose(prompts["seed3"].prompt, alone.prompt, atol=1e-2)
    assert np.abs(prompts["seed4"].prompt - alone.prompt).max() > 0.1
    texts = ["text: lovely great", "text: awful"]
    bank = ptjax.make_bank(prompts)
    mixed = ptjax.generate(backbone, texts, bank, prompt_ids=[0, 1], max_new_tokens=3)
    own = [ptjax.generate(backbone, texts, x, max_new_tokens=3) for x in prompts.values()]
    assert mixed == [own[0][0], own[1][1]]


@pytest.mark.parametrize("shared", [True, False])
def test_the_residual_network_is_the_papers(context, shared) -> None:
    """P + LayerNorm(relu(P A + a) B + b), row by row, in numpy."""
    method = ResidualPromptTuning(3, Uniform(), bottleneck=4, shared=shared)
    keys = iter(jax.random.split(KEY, 7))
    made = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), own(method, context))
    x = {name: np.asarray(array, np.float64) for name, array in made.items()}
    for row, result in enumerate(np.asarray(method.matrix(made))):
        w = x if shared else {name: array[row] for name, array in x.items()}
        hidden = np.maximum(x["prompt"][row] @ w["down"] + w["down_bias"], 0)
        out = hidden @ w["up"] + w["up_bias"]
        out = (out - out.mean()) / np.sqrt(out.var() + 1e-5)
        expected = x["prompt"][row] + out * w["norm_scale"] + w["norm_bias"]
        # To the rounding of float32 sums over 16 entries.
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_a_residual_prompt_starts_near_the_initialisers(context) -> None:
    """A tenth of the embedding's RMS away from it, whatever that RMS is."""
    for scale in (1.0, 20.0):
        scaled = dataclasses.replace(context, embedding=scale * context.embedding)
        made = own(ResidualPromptTuning(8), scaled)
        away = np.asarray(ResidualPromptTuning(8).matrix(made) - made["prompt"])
        rms = np.sqrt(np.square(away).mean())
        # The layer norm's epsilon takes a little off.
        assert rms == pytest.approx(0.1 * embedding_rms(scaled.embedding), rel=0.01)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_starts_at_the_embeddings_rms(context, encoder) -> None:
    method = PTuning(8, encoder)
    for scale in (1.0, 20.0):
        scaled = dataclasses.replace(context, embedding=scale * context.embedding)
        prompt = np.asarray(method.matrix(own(method, scaled)))
        rms = np.sqrt(np.square(prompt).mean())
        assert rms == pytest.approx(embedding_rms(scaled.embedding), rel=1e-5)


def test_the_lstm_reads_the_rows_in_both_directions(context) -> None:
    """A change of the middle row reaches rows on both sides; without a direction, one side."""
    method = PTuning(3, "lstm", hidden=5, lstm_layers=1)
    made = own(method, context)
    changed = made | {"embedding": made["embedding"].at[1].add(1.0)}

    def moved(weights: Any) -> list[bool]:
        embeddings = (made["embedding"], changed["embedding"])
        first, second = (method.matrix(weights | {"embedding": x}) for x in embeddings)
        return [bool(np.abs(row).max() > 0) for row in np.asarray(first - second)]

    assert moved(made) == [True, True, True]
    dead = jax.tree.map(jnp.zeros_like, made["lstm_0"]["forward"])
    assert moved(made | {"lstm_0": made["lstm_0"] | {"forward": dead}}) == [True, True, False]
    dead = jax.tree.map(jnp.zeros_like, made["lstm_0"]["backward"])
    assert moved(made | {"lstm_0": made["lstm_0"] | {"backward": dead}}) == [False, True, True]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ResidualPromptTuning(0), r"^PROMPT_LENGTH must be >= 1, got 0$"),
        (lambda: ResidualPromptTuning(bottleneck=0), r"^ResidualPromptTuning\.bottleneck must be"),
        (lambda: PTuning(-1), r"^PROMPT_LENGTH must be >= 1, got -1$"),
        (lambda: PTuning(hidden=0), r"^PTuning\.hidden must be >= 1"),
        (lambda: PTuning(lstm_layers=0), r"^PTuning\.lstm_layers must be >= 1"),
        (lambda: PTuning(encoder="LSTM"), r"^PTuning\.encoder must be one of 'mlp', 'lstm', got"),
    ],
)
def test_sizes_that_are_none_are_refused(make, said) -> None:
    with pytest.raises(InputError, match=said):
        make()
