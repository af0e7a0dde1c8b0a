"""Prefix tuning: what it trains and starts from, its runs and its files."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stopped_by_sigterm, tune, without_seconds
from tiny import tiny_config

import ptjax
from ptjax.errors import InputError
from ptjax.interop.prompt_file import save_prompt
from ptjax.methods.base import InitContext, run_with
from ptjax.methods.prefix_tuning import PrefixTuning
from ptjax.models.module_family import ModuleConfig
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.planning.workload import PlannedBackbone
from ptjax.sharding.meshes import check_mesh, make_mesh
from ptjax.training.freeze import make_freeze
from ptjax.trees import flatten_paths

KEY = jax.random.key(0)
SCHEDULE = ptjax.TrainSchedule(train_steps=4, eval_period=2, log_period=1)
RATE = ptjax.Adafactor(0.03, multiply_by_parameter_scale=True)


@pytest.fixture
def context(backbone) -> InitContext:
    made = InitContext(backbone.embedding, backbone.tokenizer, None, list, backbone.config)
    return dataclasses.replace(made, backbone=backbone)


def test_its_parts_and_the_exact_number_of_parameters() -> None:
    config = tiny_config(num_encoder_layers=3, num_decoder_layers=2)
    paths = flatten_paths(PrefixTuning(5).variable_shapes(config))
    kinds = ("key", "value")
    assert set(paths) == {f"prefix/{p}/{k}" for p in ("encoder", "decoder", "cross") for k in kinds}
    assert paths["prefix/encoder/key"].shape == (3, 5, 2, 8)
    assert paths["prefix/cross/value"].shape == (2, 5, 2, 8)
    # 2 P J (L_enc + 2 L_dec)
    assert sum(x.size for x in paths.values()) == 2 * 5 * 16 * (3 + 2 * 2)
    decoder = flatten_paths(PrefixTuning(5, encoder=False, cross=False).variable_shapes(config))
    assert set(decoder) == {"prefix/decoder/key", "prefix/decoder/value"}
    mlp = flatten_paths(PrefixTuning(5, reparameterization=7).variable_shapes(config))
    assert mlp["prefix/encoder/out_kernel"].shape == (7, 2, 3, 2, 8)
    assert mlp["prefix/encoder/embedding"].shape == (5, 16)
    with pytest.raises(InputError, match="PrefixTuning needs ptjax's own T5"):
        PrefixTuning().variable_shapes(ModuleConfig(64, 16))


def test_only_the_prefix_trains() -> None:
    variables = {"params": {"w": 0}, "prefix": {"encoder": {"key": 0}}}
    assert make_freeze(variables, PrefixTuning().freeze_rules()) == {
        "params": {"w": True},
        "prefix": {"encoder": {"key": False}},
    }
    assert PrefixTuning().extra_positions() == 0


def test_it_starts_as_a_prompt_that_does_not_see_its_input(context, tmp_path) -> None:
    """Equal to the bit, in encoder and cross-attention; here the prompt is one from a file."""
    prompt = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    file = tmp_path / "prompt.safetensors"
    save_prompt(file, prompt, {})
    method = PrefixTuning(3, decoder=False, initializer=ptjax.FromFile(str(file)))
    prefix = method.init(KEY, context)
    backbone, shapes = context.backbone, method.variable_shapes(context.config)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), prefix) == shapes
    tokens = jnp.array([[5, 6, 7], [8, 1, 0]])
    run = jax.jit(
        lambda apply_fn, v: apply_fn(v, tokens, tokens, encoder_lengths=jnp.array([3, 2])),
        static_argnums=0,
    )
    params = {"params": backbone.variables["params"]}
    want = run(make_apply_fn(backbone.config, False), with_prompt(params, prompt))
    got = run(run_with(method, backbone), params | prefix)
    # The compiler computes the prompt's states along with the rest, or before.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    plain = run(run_with(method, backbone), params)
    assert np.abs(plain - want).max() > 0.01


def test_labels_or_common_tokens_are_the_default_as_for_a_prompt(context) -> None:
    labelled = dataclasses.replace(context, labels=("good", "bad"))
    made = PrefixTuning(4).init(KEY, labelled)
    chosen = PrefixTuning(4, initializer=ptjax.ClassLabels()).init(KEY, labelled)
    jax.tree.map(np.testing.assert_array_equal, made, chosen)


def test_random_starts_need_no_backbone(context) -> None:
    context = dataclasses.replace(context, backbone=None)
    drawn = PrefixTuning(50, initializer="random").init(KEY, context)["prefix"]
    for array in jax.tree.leaves(drawn):
        assert array.dtype == np.float32 and abs(array.std() - 1) < 0.1
    mlp = PrefixTuning(50, reparameterization=8)
    made = mlp.init(KEY, context)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
    assert shapes == mlp.variable_shapes(context.config)
    # What the MLP computes is of the scale of the keys and values that a network computes.
    for array in jax.tree.leaves(mlp.to_file_variables(made)):
        assert array.shape == (1, 50, 2, 8) and 0.1 < np.asarray(array).std() < 2
    with pytest.raises(InputError, match="give InitContext a backbone, or set initializer='random"):
        PrefixTuning(4).init(KEY, context)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 0}, "^PROMPT_LENGTH must be >= 1, got 0$"),
        ({"reparameterization": 0}, "PrefixTuning.reparameterization must be >= 1, got 0"),
        (
            {"encoder": False, "decoder": False, "cross": False},
            "encoder, decoder and cross = False: set one of them to True",
        ),
        (
            {"reparameterization": 8, "initializer": ptjax.Uniform()},
            "remove the initializer or the reparameterization",
        ),
        ({"initializer": "randm"}, "initializer = 'randm': give a prompt initialiser, such as"),
    ],
)
def test_settings_that_fit_nothing_are_refused(fields, message) -> None:
    with pytest.raises(InputError, match=message):
        PrefixTuning(**fields)


def test_networks_that_cannot_carry_it_are_refused(tmp_path) -> None:
    planned = PlannedBackbone(ModuleConfig(64, 16))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"PrefixTuning needs ptjax's own T5.*use PromptTuning"):
        PrefixTuning().check(planned, ptjax.Batching())
    PrefixTuning().check(PlannedBackbone(tiny_config()), ptjax.Batching(pack=True))
    # A mesh that does not divide the heads divides no T5; the prefix never gets there.
    with pytest.raises(InputError, match="num_heads = 3 is not a multiple of 2, the model axis"):
        check_mesh(tiny_config(num_heads=3), make_mesh(2))


MLP = PrefixTuning(3, reparameterization=4)


def logits_of(backbone, method, variables):
    tokens = jnp.array([[5, 6, 7], [8, 1, 0]])
    run = jax.jit(run_with(method, backbone))
    params = {"params": backbone.variables["params"]}
    return run(params | variables, tokens, tokens, encoder_lengths=jnp.array([3, 2]))


def test_an_export_is_what_the_mlp_computes(context, tmp_path) -> None:
    backbone, path = context.backbone, tmp_path / "best.safetensors"
    trained = MLP.init(KEY, context)
    MLP.save(path, trained, {"step": 3, **MLP.describe()}, backbone)
    adapter = ptjax.load_adapter(path)
    assert adapter.method == MLP.exported() == PrefixTuning(3)
    assert adapter.metadata["method"] == {
        "name": "prefix_tuning",
        **{"length": 3, "encoder": True, "decoder": True, "cross": True},
    }
    assert {name: array.shape for name, array in adapter.arrays.items()} == {
        f"prefix/{part}/{kind}": (1, 3, 2, 8)
        for part in ("encoder", "decoder", "cross")
        for kind in ("key", "value")
    }
    loaded = MLP.load(path, backbone)
    got = logits_of(backbone, MLP.exported(), loaded)
    # Rounding: the compiler multiplies the MLP's matrices along with the rest, or before.
    np.testing.assert_allclose(got, logits_of(backbone, MLP, trained), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"holds PrefixTuning\(length=3.*not PrefixTuning\(length"):
        PrefixTuning(4).load(path, backbone)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, backbone, task):
    """A run of four steps that was never interrupted."""
    model_dir = tmp_path_factory.mktemp("whole")
    results = tune(model_dir, task, backbone, method=MLP, optimizer=RATE, schedule=SCHEDULE)
    return ptjax.Run(model_dir, results)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_bit(whole, backbone, task, tmp_path) -> None:
    """The MLP is in the checkpoints, though not in the exports."""

    def train(callbacks=()):
        settings = {"method": MLP, "optimizer": RATE, "schedule": SCHEDULE}
        return tune(tmp_path, task, backbone, callbacks=callbacks, **settings)

    assert stopped_by_sigterm(3, train) == 143
    results = train()
    assert without_seconds(results) == without_seconds(whole.results)
    exports = sorted(whole.model_dir.glob("adapters/*"))
    assert len(exports) == 3
    for export in exports:
        assert export.read_bytes() == (tmp_path / "adapters" / export.name).read_bytes()


@pytest.mark.slow
def test_a_run_trains_every_part_and_its_adapter_predicts(whole, backbone, context) -> None:
    assert whole.results["trainable_parameters"] == 3 * (3 * 16 + 16 * 4 + 4 + 4 * 32 + 32)
    method = whole.adapter.method
    start = flatten_paths(MLP.to_file_variables(MLP.init(KEY, context)))
    assert set(whole.adapter.arrays) == set(start)
    texts = ["a good film", "a dull film"]
    tuned = ptjax.predict(backbone, texts, whole.adapter)
    plain = ptjax.predict(backbone, texts)
    assert all(a.score != b.score for a, b in zip(tuned, plain, strict=True))
    assert method.describe() == {"method": whole.adapter.metadata["method"]}
    with pytest.raises(InputError, match="prompt_ids choose prompts; prefix_tuning changes"):
        ptjax.predict(backbone, texts, whole.adapter, prompt_ids=[0, 0])
    with pytest.raises(InputError, match="prefix_tuning changes the network for all rows"):
        ptjax.make_bank({"a": whole.adapter})


@pytest.mark.slow
def test_members_of_a_sweep_train_as_they_do_alone(backbone, task, tmp_path) -> None:
    settings = {"method": PrefixTuning(3), "optimizer": RATE, "schedule": SCHEDULE}
    members = ptjax.sweep(seeds=(3, 4), learning_rates=(0.03,))
    results = tune(tmp_path / "both", task, backbone, members=members, **settings)
    assert set(results["members"]) == {"seed3_rate0.03", "seed4_rate0.03"}
    tune(tmp_path / "one", task, backbone, seed=4, **settings)
    both, one = (
        ptjax.load_adapter(tmp_path / path / "4.safetensors").arrays
        for path in ("both/adapters/seed4_rate0.03", "one/adapters")
    )
    for path, array in both.items():
        # The compiler sums in another order; a step moves an entry by up to 0.03.
        np.testing.assert_allclose(array, one[path], rtol=0, atol=1e-5)
