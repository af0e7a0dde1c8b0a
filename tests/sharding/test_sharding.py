"""The sharding table: complete, without conflicts, and without effect on the numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from conftest import tune
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from ptjax.backbones.load import load_backbone
from ptjax.errors import InputError
from ptjax.methods.model_tuning import ModelTuning
from ptjax.models.config import T5Config
from ptjax.models.prompted import make_apply_fn
from ptjax.models.stacking import split_path, stack_paths
from ptjax.models.t5 import parameter_shapes
from ptjax.planning.hlo import collectives
from ptjax.settings import TrainSchedule
from ptjax.sharding.arrays import (
    _layer_writer,
    batch_sharding,
    check_batch_size,
    gather_layer,
    put_batch,
    reduction_groups,
    replicated,
    rows_axes,
    rows_divisor,
    stack_layers,
)
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.rules import (
    RULES,
    bytes_per_device,
    check_rules,
    sharding_of,
    shardings_of,
    spec_of,
)
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor
from ptjax.training.step import init_train_state, make_sweep_step, make_train_step
from ptjax.trees import flatten_paths, unflatten_paths

# The widths of XXL and 11B, of whose layers one is like the other.
CONFIGS = {
    "t5_1_1_xxl": T5Config(32128, 4096, 64, 2, 2, 64, 10240),
    "t5_1_0_11b": T5Config(32128, 1024, 128, 2, 2, 128, 65536, ("relu",), True),
}
KERNEL = "params/encoder/layers_0/attention/query/kernel"


@functools.cache
def variables_of(name: str, scan_layers: bool = False) -> dict:
    """The other sizes are held by test_model_configs.py."""
    config = dataclasses.replace(CONFIGS[name], scan_layers=scan_layers)
    prompt = jax.ShapeDtypeStruct((100, config.emb_dim), "float32")
    return {"params": parameter_shapes(config), "prompt": {"prompt": prompt}}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_paths(variables_of(name)).items()}


def tree(**shapes: tuple[int, ...]) -> dict:
    """Variables {"params": {name: a leaf of that shape}}."""
    return {"params": {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}}


# The table


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_holds_for_both_kinds_of_t5(name):
    check_rules(variables_of(name))
    check_rules({"params": variables_of(name)["params"]})
    for path in shapes_of(name):
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in RULES) == 1, path


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("params/a", P())], "no row for variable 'params/ab'"),
        ([("params/.*", P()), ("params/c", P())], "row 'params/c' matches no variable"),
        ([("params/.*", P()), ("params/a", P())], "row 'params/a' is never reached"),
        ([("params/.*", P()), ("params/a", P("model"))], "row 'params/a' is never reached"),
        (
            [("params/a", P()), ("params/ab", P()), ("params/ab?", P())],
            "row 'params/ab\\?' is never reached",
        ),
        (
            [("params/a.*", P("model")), ("params/.*b", P())],
            "rows 'params/a.*' .* and 'params/.*b' .* conflict about variable 'params/ab'",
        ),
        ([("params/.*", P("model", None, None))], "gives variable 'params/a' 3 axes, but it has 2"),
        ([("params/.*", P("modle"))], "row 'params/.*' names the unknown axis 'modle'"),
        ([("params/.*", P("fsdp", "data"))], "row 'params/.*' names an axis twice"),
        ([("params/.*", P()), ("parms/.*", P())], "row 'parms/.*' is for an unknown collection"),
    ],
)
def test_a_table_with_a_mistake(rules, message):
    three = tree(a=(4, 4), ab=(4, 4), b=(4, 4)) if "conflict" in message else None
    with pytest.raises(InputError, match=message):
        check_rules(three or tree(a=(4, 4), ab=(4, 4)), rules)


def test_an_exception_stands_before_its_rule_and_agreeing_rows_may_overlap():
    exception = [("params/a", P("model")), ("params/.*", P()), ("prompt/.*", P())]
    check_rules(tree(a=(4,), b=(4,)), exception)
    assert spec_of("params/a", 1, rules=exception) == P("model")
    assert spec_of("params/b", 1, rules=exception) == P()
    check_rules(tree(a=(4,), ab=(4,), b=(4,)), [("params/a.*", P()), ("params/.*b", P())])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_device_of_a_mesh_holds_its_part_of_a_large_model(name, fsdp):
    """Everything but norms is divided over the model axis, the layers' kernels over data too."""
    mesh = make_mesh(4)
    params = {"params": variables_of(name, scan_layers=fsdp)["params"]}
    where = flatten_paths(shardings_of(params, mesh, fsdp=fsdp))
    held = 0
    for path, leaf in flatten_paths(params).items():
        part = math.prod(where[path].shard_shape(leaf.shape))
        held += part
        of_layer = "/layers/" in path and path.endswith("kernel")
        parts = 1 if path.endswith("scale") else 8 if of_layer else 4
        assert part * parts == math.prod(leaf.shape), path
    sizes = {"data": 2, "model": 4}
    assert bytes_per_device(params, sizes, fsdp=fsdp) == 4 * held
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert held < 1.001 * whole / 4


def test_where_each_kind_of_array_lives():
    mesh = make_mesh(2)

    def specs(path, *shape):
        both = [sharding_of(path, shape, mesh, fsdp=fsdp) for fsdp in (False, True)]
        assert all(where.mesh == mesh for where in both)
        return tuple(where.spec for where in both)

    layer = "params/encoder/layers"
    column = P(None, None, "model"), P(None, "data", "model")
    row = P(None, "model", None), P(None, "model", "data")
    for name in ("attention/query", "attention/key", "attention/value", "mlp/wi", "mlp/wi_1"):
        assert specs(f"{layer}/{name}/kernel", 3, 8, 16) == column
    cross = "params/decoder/layers/encoder_decoder_attention/key/kernel"
    assert specs(cross, 3, 8, 16) == column
    assert specs(f"{layer}/attention/out/kernel", 3, 16, 8) == row
    assert specs(f"{layer}/mlp/wo/kernel", 3, 16, 8) == row
    assert specs(f"{layer}/pre_mlp_layer_norm/scale", 3, 8) == (P(), P())
    # What is not stacked lies alike with FSDP and without.
    assert specs("params/encoder/layers_3/mlp/wi/kernel", 8, 16) == (P(None, "model"),) * 2
    assert specs("params/token_embedder/embedding", 64, 8) == (P("model", None),) * 2
    assert specs("params/decoder/logits_dense/kernel", 8, 64) == (P(None, "model"),) * 2
    assert specs("params/encoder/relpos_bias/rel_embedding", 4, 32) == (P("model", None),) * 2
    assert specs("prompt/prompt", 100, 8) == (P(), P())


def test_stacked_layers_have_a_leading_axis_that_is_never_divided():
    mesh = make_mesh((2, 2, 2))
    kernel = "params/decoder/layers/mlp/wo/kernel"
    where = sharding_of(kernel, (3, 16, 8), mesh, fsdp=True)
    assert where.spec == P(None, "model", "data")
    assert where.shard_shape((3, 16, 8)) == (3, 8, 4)
    scale = "params/decoder/layers/pre_mlp_layer_norm/scale"
    assert sharding_of(scale, (3, 8), mesh).is_fully_replicated
    # One layer on its own has no such axis, and neither has what stands beside the layers.
    assert spec_of("params/decoder/layers_0/mlp/wo/kernel", 2) == P("model", None)
    stacked = {"encoder": {"layers": {"mlp": {"wo": {"kernel": np.zeros((3, 16, 8))}}}}}
    rules = [(r"params/.*/wo/kernel", P("model", "fsdp"))]
    found = shardings_of({"params": stacked}, mesh, rules=rules)
    assert flatten_paths(found)["params/encoder/layers/mlp/wo/kernel"].spec == P(
        None, "model", None
    )
    with pytest.raises(InputError, match="3 axes, but it has 2"):
        spec_of(kernel, 2)


def test_layers_are_stacked_in_place_one_at_a_time():
    """`jax.live_arrays` when a layer is asked for: the stack, and the layer before."""
    mesh = make_mesh((2, 4))
    rows = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4)
    layer = [NamedSharding(mesh, P("model", None)), NamedSharding(mesh, P())]
    elsewhere = sum(x.nbytes for x in jax.live_arrays())
    held = []

    def layers():
        for row in rows:
            held.append(sum(x.nbytes for x in jax.live_arrays()) - elsewhere)
            yield {"kernel": jax.device_put(row, layer[0]), "scale": jax.device_put(row, layer[1])}

    stacked = stack_layers(layers(), 3)
    for name, spec in {"kernel": P(None, "model", None), "scale": P()}.items():
        np.testing.assert_array_equal(stacked[name], rows)
        assert stacked[name].sharding == NamedSharding(mesh, spec)
    assert held == [0] + [2 * (rows.nbytes + rows[0].nbytes)] * 2
    kernel = stacked["kernel"]
    writing = _layer_writer(kernel.sharding).lower(kernel, rows[0], 0).compile()
    assert writing.memory_analysis().alias_size_in_bytes == rows.nbytes // 4  # of a device


@pytest.mark.parametrize(
    "path", ["params/encoder/adapter/kernel", "prompts/prompt", "params/encoder/wo/kernel/extra"]
)
def test_a_variable_without_a_row_is_an_error(path):
    with pytest.raises(InputError, match=f"no row for variable '{path}'"):
        sharding_of(path, (4, 4), make_mesh())


def test_what_an_axis_does_not_divide_is_an_error():
    mesh = make_mesh(4)
    assert sharding_of(KERNEL, (8, 384), mesh).shard_shape((8, 384)) == (8, 96)
    with pytest.raises(InputError, match=r"\[8, 7\]: 7 is not a multiple of 4, the mesh's model"):
        sharding_of(KERNEL, (8, 7), mesh)
    stacked = split_path(KERNEL)[0]
    with pytest.raises(InputError, match=r"\[3, 7, 8\]: 7 is not a multiple of 2, the mesh's data"):
        sharding_of(stacked, (3, 7, 8), mesh, fsdp=True)


# T5X's table: `standard_logical_axis_rules` of t5x/partitioning.py, by (activation_partitioning_
# dims, parameter_partitioning_dims), as far as parameters have these axes; in this order.
FIRST = [("vocab", "model"), ("embed", None), ("mlp", "model"), ("heads", "model")]
OTHERS = [("vocab", "model"), ("mlp", "model"), ("heads", "model"), ("joined_kv", "model")]
LOGICAL = {
    (1, 1): [*FIRST, ("joined_kv", "model")],
    (2, 1): [*OTHERS, ("embed", "model")],
    (1, 2): [*OTHERS, ("embed", "data")],
    (2, 2): [*OTHERS, ("embed", "model"), ("embed", "data")],
}
# `param_with_axes` of t5x/examples/t5/layers.py, by the rows of our table.
NAMED = {
    r"params/token_embedder/embedding": ("vocab", "embed"),
    r"params/.*/(query|key|value)/kernel": ("embed", "joined_kv"),
    r"params/.*/out/kernel": ("joined_kv", "embed"),
    r"params/.*/(wi|wi_0|wi_1)/kernel": ("embed", "mlp"),
    r"params/.*/wo/kernel": ("mlp", "embed"),
    r"params/.*/logits_dense/kernel": ("embed", "vocab"),
    r"params/.*/rel_embedding": ("heads", "relpos_buckets"),
    r"params/.*/scale": ("embed",),
}


def t5x_spec(names: tuple[str, ...], rules: list[tuple[str, str | None]]) -> P:
    """Rules in their order, each to the first axis of its name while the mesh axis is free."""
    found: dict[str, str | None] = {}
    for name, axis in rules:
        free = axis is None or axis not in found.values()
        if name in names and name not in found and free:
            found[name] = axis
    return P(*(found.get(name) for name in names))


def whole(spec: P, rank: int) -> tuple:
    """A spec to its full length."""
    return (*spec, *[None] * (rank - len(spec)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dims", LOGICAL)
def test_t5x_s_rules_are_a_table_of_ours(name, dims):
    """Row by row, and variable by variable; the shipped one is (1, 1), with FSDP (1, 2)."""
    params = {"params": variables_of(name)["params"]}
    used = {p: t5x_spec(names, LOGICAL[dims]) for p, names in NAMED.items()}
    shapes = flatten_paths(params)
    rows = [row for row in used.items() if any(re.fullmatch(row[0], path) for path in shapes)]
    check_rules(params, rows)
    for path, leaf in shapes.items():
        [wanted] = [spec for pattern, spec in rows if re.fullmatch(pattern, path)]
        rank = len(leaf.shape)
        assert whole(spec_of(path, rank, rules=rows), rank) == whole(wanted, rank)
        if dims[0] == 1:
            name, layer = split_path(path)
            front = [] if layer is None else [None]
            ours = spec_of(name, rank + len(front), fsdp=dims[1] == 2)
            # The one difference: outside of the layers' kernels T5X divides D over data as well.
            kept = [
                None if axis == "data" and rank < 2 + (layer is None) else axis for axis in wanted
            ]
            assert whole(ours, rank + len(front)) == whole(P(*front, *kept), rank + len(front)), (
                path
            )


def test_t5x_s_rules_as_its_documentation_gives_them():
    kernel, scale = ("embed", "mlp"), ("embed",)
    assert [t5x_spec(kernel, LOGICAL[dims]) for dims in LOGICAL] == [
        *(P(None, "model"), P(None, "model"), P("data", "model"), P("data", "model"))
    ]
    assert [t5x_spec(scale, LOGICAL[dims]) for dims in LOGICAL] == [
        *(P(None), P("model"), P("data"), P("model"))
    ]


# Meshes; by name in test_meshes.py


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (1, {"data": 8, "model": 1}),
        (2, {"data": 4, "model": 2}),
        (8, {"data": 1, "model": 8}),
        ((2, 4), {"data": 2, "model": 4}),
        ((2, 2, 2), {"replica": 2, "data": 2, "model": 2}),
        ((1, 8, 1), {"replica": 1, "data": 8, "model": 1}),
    ],
)
def test_all_devices_are_on_the_mesh(shape, sizes):
    mesh = make_mesh(shape)
    assert dict(mesh.shape) == sizes
    assert list(mesh.devices.flat) == jax.devices()
    assert rows_divisor(mesh) == 8 // sizes["model"]


def test_a_mesh_of_some_devices():
    mesh = make_mesh(2, jax.devices()[:6])
    assert mesh.devices.shape == (3, 2)
    assert set(mesh.devices.flat) == set(jax.devices()[:6])


@pytest.mark.parametrize("model", [3, 0, -2, 16])
def test_devices_that_cannot_be_divided_so(model):
    message = f"8 devices cannot be divided into a model axis of {model}"
    with pytest.raises(InputError, match=message):
        make_mesh(model)


@pytest.mark.parametrize("shape", [(8,), (4, 1), (2, 2, 2, 1), (0, 8), (-1, -8)])
def test_a_shape_that_is_no_mesh_of_these_devices(shape):
    with pytest.raises(InputError, match="and there are 8; it is data x model, or replica x data"):
        make_mesh(shape)


def test_a_batch_goes_over_replica_and_data():
    rows = np.arange(48).reshape(8, 6)
    for shape, part in {(4, 2): (2, 6), (2, 2, 2): (2, 6), (2, 4, 1): (1, 6)}.items():
        mesh = make_mesh(shape)
        placed = put_batch({"encoder_input_tokens": rows, "active": rows[0]}, mesh)
        tokens = placed["encoder_input_tokens"]
        np.testing.assert_array_equal(tokens, rows)
        assert {shard.data.shape for shard in tokens.addressable_shards} == {part}
        assert placed["active"].is_fully_replicated
        # That of a bank has its members in front.
        assert batch_sharding(mesh, 3).shard_shape((5, 8, 6)) == (5, *part)


def test_batch_sizes_that_the_mesh_does_not_divide():
    mesh = make_mesh((2, 2, 2))
    check_batch_size(8, mesh)
    check_batch_size(8, mesh, microbatches=2)
    message = "batch size 6 is not a multiple of the 4 devices on the mesh's replica x data axis; "
    with pytest.raises(InputError, match=message + "choose 4 or 8, or another MESH"):
        check_batch_size(6, mesh)
    with pytest.raises(InputError, match=r"batch size 4, in 2 microbatches, .*; choose 8, or"):
        check_batch_size(4, mesh, microbatches=2)


# Numbers and traffic

CASES = {
    "8x1": ((8, 1), {}),
    "4x2": ((4, 2), {}),
    "2x4": ((2, 4), {}),
    "2x2x2": ((2, 2, 2), {}),
    "8x1, fsdp": ((8, 1), {"fsdp": True}),
    "4x2, fsdp": ((4, 2), {"fsdp": True}),
    "4x2, microbatches": ((4, 2), {"microbatches": 2}),
    "4x2, a prompt that sees no input": ((4, 2), {"attends_to_input": False}),
    "2x2x2, all of it": ((2, 2, 2), {"fsdp": True, "microbatches": 2, "attends_to_input": False}),
}
SGD = optax.sgd(1.0)


def run_step(tiny, batch, mesh, *, fsdp=False, microbatches=1, attends_to_input=True, members=None):
    """(the compiled step, its frozen weights, the state after it, its metrics) without dropout."""
    gather = gather_layer(mesh) if fsdp else None
    # One layer each compiles fast, and has every kind of weight; a scan over one is unrolled.
    count = 2 if fsdp else 1
    layers = {"num_encoder_layers": count, "num_decoder_layers": count, "dropout_rate": 0.0}
    config = T5Config(**(vars(tiny.config) | layers))
    shapes = flatten_paths(parameter_shapes(config))
    kept = {path: x for path, x in flatten_paths(tiny.params).items() if path in shapes}
    if fsdp:
        kept = stack_paths(kept, jax.numpy.stack)
        config = dataclasses.replace(config, scan_layers=True)
    params = {"params": unflatten_paths(kept)}
    frozen = jax.device_put(params, shardings_of(params, mesh, fsdp=fsdp))
    prompt = {"prompt": {"prompt": tiny.prompt}}
    groups = reduction_groups(mesh, microbatches=microbatches, attends_to_input=attends_to_input)
    parts = {"microbatches": microbatches, "groups": groups}
    apply = make_apply_fn(config, attends_to_input, gather)
    state = init_train_state(jax.tree.map(np.array, prompt), SGD, jax.random.key(0))
    step = make_train_step(apply, SGD, Loss(), **parts)
    if members:
        state = jax.tree.map(lambda x: jax.numpy.stack([x] * members), state)
        step = make_sweep_step(apply, optax.sgd, Loss(), **parts)
        batch = {name: np.stack([x] * members) for name, x in batch.items()}
    state = jax.device_put(state, replicated(mesh))
    inputs = [put_batch(batch, mesh)]
    if members:  # all are active, with a learning rate of 1
        settings = np.ones(members, bool), np.ones(members, np.float32)
        inputs += jax.device_put(settings, replicated(mesh))
    places = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    compiled = jitted.lower(state, frozen, *inputs).compile()
    return compiled, frozen, *compiled(state, frozen, *inputs)


@pytest.fixture(scope="module")
def one_device(tiny, tiny_batch):
    """`one_device(attends_to_input, fsdp)` -> (loss, gradient of the prompt), cached."""

    def alone(attends_to_input, fsdp):
        mesh = make_mesh(devices=jax.devices()[:1])
        *_, state, metrics = run_step(
            tiny, tiny_batch, mesh, attends_to_input=attends_to_input, fsdp=fsdp
        )
        return metrics["loss"], np.asarray(tiny.prompt - state.trainable["prompt"]["prompt"])

    return functools.cache(alone)


FAST = ("4x2", "8x1, fsdp", "4x2, microbatches")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_a_mesh_changes_no_number_and_reduces_one_array(tiny, tiny_batch, one_device, case):
    """Sums are taken in another order: 1e-5 of the largest entry is some hundred roundings."""
    shape, settings = CASES[case]
    mesh = make_mesh(shape)
    compiled, frozen, state, metrics = run_step(tiny, tiny_batch, mesh, **settings)
    fsdp = settings.get("fsdp", False)
    loss, gradient = one_device(settings.get("attends_to_input", True), fsdp)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    ours = np.asarray(tiny.prompt - state.trainable["prompt"]["prompt"])
    np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())
    assert state.trainable["prompt"]["prompt"].is_fully_replicated

    rows = rows_axes(mesh)
    found = [one for one in collectives(compiled, mesh) if set(one.axes) & set(rows)]
    reduced = [one for one in found if one.kind == "all-reduce" and one.shape]
    # All rows' devices at once, in float32, when the loop over microbatches is over.
    assert [(r.dtype, r.shape, r.axes, r.in_loop) for r in reduced] == [
        ("f32", tiny.prompt.shape, tuple(a for a in rows if mesh.shape[a] > 1), False)
    ]
    others = {one.kind for one in found} - {"all-reduce"}
    assert others == ({"all-gather"} if fsdp else set())
    if fsdp:  # nothing but the weights of a layer, when the scan comes to it
        gathered = [one for one in found if one.kind == "all-gather"]
        layers = [x for x in jax.tree.leaves(frozen) if x.ndim == 3]
        assert {one.shape[-2:] for one in gathered} == {shard_shape(x, mesh)[1:] for x in layers}
        assert all(math.prod(one.shape[:-2]) == 1 for one in gathered)
        assert all(one.axes == ("data",) and one.in_loop for one in gathered)


def shard_shape(array, mesh):
    """What a device holds of a weight that is gathered over data, but not over model."""
    spec = [None if axis == "data" else axis for axis in array.sharding.spec]
    return jax.sharding.NamedSharding(mesh, P(*spec)).shard_shape(array.shape)


def test_every_device_holds_its_part_and_no_more(tiny, tiny_batch):
    mesh = make_mesh((2, 2, 2))
    stacked = stack_paths(flatten_paths(tiny.params), jax.numpy.stack)
    params = {"params": unflatten_paths(stacked)}
    where = shardings_of(params, mesh, fsdp=True)
    placed = jax.device_put(params, where)
    held = dict.fromkeys(jax.devices(), 0)
    for path, array in flatten_paths(placed).items():
        kernel = "/layers/" in path and path.endswith("kernel")
        parts = 1 if path.endswith("scale") else 4 if kernel else 2
        for shard in array.addressable_shards:
            assert shard.data.size * parts == array.size, path
            held[shard.device] += shard.data.nbytes
    wanted = bytes_per_device(params, dict(mesh.shape), fsdp=True)
    assert set(held.values()) == {wanted}


@pytest.mark.slow
def test_a_bank_reduces_the_gradients_of_its_prompts_at_once(tiny, tiny_batch):
    mesh = make_mesh((4, 2))
    compiled, *_ = run_step(
        tiny, tiny_batch, mesh, microbatches=2, attends_to_input=False, members=3
    )
    found = [one for one in collectives(compiled, mesh) if one.axes != ("model",)]
    assert [one[:3] for one in found if one.shape != (3,)] == [
        ("all-reduce", "f32", (3, *tiny.prompt.shape))
    ]
    assert not any(one.in_loop for one in found)


@pytest.mark.slow
def test_fsdp_tunes_a_model_as_one_device(backbone, task, tmp_path):
    """Gradients of divided weights, added in another order.

    A step moves an entry by 1e-3 of its array's RMS. 1e-5 of the RMS after three steps is a
    hundredth of one.
    """
    tuned = []
    for where in ({}, {"mesh": "4x2", "fsdp": True}):
        placed = load_backbone(backbone.name, dtype="float32", scan_layers=True, **where)
        directory = tmp_path / str(len(where))
        tune(
            directory,
            task,
            placed,
            method=ModelTuning(),
            optimizer=Adafactor(learning_rate=1e-3, multiply_by_parameter_scale=True),
            schedule=TrainSchedule(train_steps=3, eval_period=3, log_period=1),
        )
        tuned.append(load_file(directory / "models" / "best" / "model.safetensors"))
    before = load_file(Path(backbone.name) / "model.safetensors")
    for name, wanted in tuned[0].items():
        scale = np.sqrt(np.mean(np.square(before[name])))
        assert np.abs(wanted - before[name]).max() > 1e-4 * scale
        np.testing.assert_allclose(tuned[1][name], wanted, rtol=0, atol=1e-5 * scale, err_msg=name)
