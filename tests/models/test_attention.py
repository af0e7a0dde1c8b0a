"""The fused attentions compute what plain attention does, forward and backward.

They run in Pallas's interpreter; `tests/planning/test_compiling.py` compiles them for devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5_ids import T5_IDS
from tiny import tiny_config, tiny_params

from ptjax.data.batch import make_batch, make_packed_batch
from ptjax.errors import InputError
from ptjax.models.attention import Mask, Source, plain_attention
from ptjax.models.fused_attention import vmem_bytes
from ptjax.models.prompted import make_apply_fn
from ptjax.planning.flops import count_flops
from ptjax.sharding.arrays import GROUPS
from ptjax.sharding.attention import FusedAttention, GpuAttention, choose_attention
from ptjax.sharding.meshes import make_mesh
from ptjax.training.loss import Loss
from ptjax.training.step import batch_loss

KINDS = {"tpu": FusedAttention, "gpu": lambda mesh: GpuAttention(mesh, "xla")}
ONE = make_mesh((1, 1), jax.devices()[:1])
FUSED = FusedAttention(ONE)
TOLERANCE = 1e-6
"""float32 sums in another order, relative to the largest entry."""


def draw(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def row_mask(rng: np.random.Generator, rows: int, queries: int, keys: int, packed: bool) -> Mask:
    if not packed:
        lengths = rng.integers(1, keys + 1, (rows, 1))
        return Mask(jnp.asarray(np.arange(keys) < lengths, jnp.int32))
    ids = np.sort(rng.integers(0, 4, (2, rows, max(queries, keys))))[..., ::-1].astype(np.int32)
    return Mask(jnp.asarray(ids[0, :, :keys]), jnp.asarray(ids[1, :, :queries]))


# rows, queries, keys, heads, head width, prompt; packed, dropout, bias
CASES = {
    "two heads of 64": ((2, 192, 192, 4, 64, 0), False, False, True),
    "odd lengths, one head of 128": ((3, 77, 77, 2, 128, 0), False, True, True),
    "packed": ((2, 150, 150, 2, 64, 0), True, True, True),
    "a shared prompt": ((2, 61, 61, 2, 64, 20), False, True, True),
    "a shared prompt, packed": ((2, 140, 140, 2, 64, 7), True, False, True),
    "cross-attention": ((2, 9, 130, 2, 64, 5), False, True, False),
    "packed cross-attention": ((2, 40, 130, 2, 64, 0), True, False, False),
    "three heads, one row": ((1, 33, 33, 3, 64, 0), False, False, True),
}


def inputs(case: str) -> tuple[jax.Array, tuple[Source, ...]]:
    (rows, queries, keys, heads, width, prompt), packed, dropout, bias = CASES[case]
    rng = np.random.default_rng(0)

    def keep(keys: int) -> jax.Array | None:
        kept = rng.random((rows, heads, 1, keys)) > 0.3
        return jnp.asarray(kept / 0.7, jnp.float32) if dropout else None

    own = [draw(rng, rows, keys, heads, width) for _ in range(2)]
    relative = draw(rng, 1, heads, queries, keys) if bias else None
    sources = [Source(*own, relative, row_mask(rng, rows, queries, keys, packed), keep(keys))]
    if prompt:
        shared = [draw(rng, prompt, heads, width) for _ in range(2)]
        before = draw(rng, rows if packed else 1, heads, queries, prompt) if bias else None
        sources.append(Source(*shared, before, keep=keep(prompt)))
    return draw(rng, rows, queries, heads, width) / 16, tuple(sources)


def assert_close(found: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    def compare(x: jax.Array, y: jax.Array) -> None:
        assert x.dtype == y.dtype
        scale = float(jnp.abs(y).max()) or 1.0
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=tolerance)

    jax.tree.map(compare, found, wanted)


def with_gradients(attend: Any, queries: jax.Array, sources: tuple[Source, ...]) -> Any:
    """The output, and the gradients of queries, keys and values."""
    direction = draw(np.random.default_rng(1), *queries.shape)

    @jax.jit
    def run(queries: jax.Array, pairs: Any) -> Any:
        def loss(queries: jax.Array, pairs: Any) -> Any:
            changed = (
                source._replace(keys=keys, values=values)
                for source, (keys, values) in zip(sources, pairs, strict=True)
            )
            out = attend(queries, tuple(changed))
            return (out * direction).sum(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(queries, pairs)

    (_, out), gradients = run(queries, [source[:2] for source in sources])
    return out, gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_attention(case: str, kind: str) -> None:
    queries, sources = inputs(case)
    found = with_gradients(KINDS[kind](ONE), queries, sources)
    assert_close(found, with_gradients(plain_attention, queries, sources))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["a shared prompt, packed", "odd lengths, one head of 128"])
def test_on_a_mesh(case: str, kind: str) -> None:
    """Rows and heads are divided; the gradients of what rows share are summed over devices."""
    queries, sources = inputs(case)
    rows = len(queries)
    fused = KINDS[kind](make_mesh((rows, 2), jax.devices()[: 2 * rows]))
    found = with_gradients(fused, queries, sources)
    assert_close(found, with_gradients(plain_attention, queries, sources))
    # A batch that does not divide is computed whole on every device.
    fused = KINDS[kind](make_mesh((4, 2), jax.devices()))
    assert_close(fused(queries, sources), plain_attention(queries, sources))


def with_row_groups(
    attend: Any, queries: jax.Array, own: Source, prompts: Any, axis_name: str | None = GROUPS
) -> Any:
    """Output and gradients of groups of rows, each with a prompt of its own, under `vmap`."""

    def group(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: Mask, prompt: Any):
        def loss(prompt: Any) -> Any:
            row = own._replace(keys=keys, values=values, mask=mask)
            out = attend(queries, (row, Source(*prompt)))
            return (out**2).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(prompt)

    groups = len(prompts[0])

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(groups, -1, *x.shape[1:])

    arguments = jax.tree.map(split, (queries, own.keys, own.values, own.mask))
    (_, out), gradients = jax.jit(jax.vmap(group, axis_name=axis_name))(*arguments, prompts)
    return out, gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis_name", [GROUPS, None], ids=["a group a device", "members"])
def test_under_vmap(axis_name: str | None, kind: str) -> None:
    """A step's groups stay where they are: nothing is gathered. A sweep's members are any vmap."""
    rng = np.random.default_rng(0)
    own = Source(*(draw(rng, 16, 30, 2, 64) for _ in range(2)), draw(rng, 1, 2, 30, 30))
    own = own._replace(mask=row_mask(rng, 16, 30, 30, packed=False))
    prompts = tuple(draw(rng, 4, 5, 2, 64) for _ in range(2))
    arguments = draw(rng, 16, 30, 2, 64) / 16, own, prompts
    # As many members as devices are not taken for groups: the rows of each are divided.
    fused = KINDS[kind](make_mesh((4, 1), jax.devices()[:4]))
    found = with_row_groups(fused, *arguments, axis_name)
    assert_close(found, with_row_groups(plain_attention, *arguments, axis_name))
    text = str(jax.make_jaxpr(lambda *x: with_row_groups(fused, *x, axis_name))(*arguments))
    assert ("psum" in text) == (axis_name is None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_visible_keys_attends_to_all(kind: str) -> None:
    """As in plain attention: the mask adds the same to every logit."""
    queries, (own,) = inputs("two heads of 64")
    own = own._replace(mask=Mask(own.mask.ids * jnp.array([[0], [1]])))
    found = with_gradients(KINDS[kind](ONE), queries, (own,))
    wanted = with_gradients(plain_attention, queries, (own,))
    # Logits near -1e10 are rounded to multiples of 1024, so that every weight is 1 / k exactly.
    assert_close(found, wanted)
    assert jnp.abs(found[1][1][0][1][0]).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keys_beside_bfloat16_queries(kind: str) -> None:
    """A prefix: its gradient is the float32 sum of the rows' gradients."""
    queries, sources = inputs("a shared prompt")
    own, shared = sources
    keys, values, bias = (x.astype("bfloat16") for x in own[:3])
    low = own._replace(keys=keys, values=values, bias=bias)
    shared = shared._replace(bias=shared.bias.astype("bfloat16"))
    arguments = queries.astype("bfloat16"), (low, shared)
    out, (_, (of_own, of_shared)) = with_gradients(KINDS[kind](ONE), *arguments)
    wanted, (_, (of_own_wanted, of_shared_wanted)) = with_gradients(plain_attention, *arguments)
    exact, (_, (_, of_shared_exact)) = with_gradients(plain_attention, queries, sources)
    assert (out.dtype, of_own[0].dtype, of_shared[0].dtype) == (
        wanted.dtype,
        of_own_wanted[0].dtype,
        of_shared_wanted[0].dtype,
    )
    # Nearer to float32, since the softmax is.
    assert jnp.abs(out - exact).max() < jnp.abs(wanted - exact).max()
    for found, plain, want in zip(of_shared, of_shared_wanted, of_shared_exact, strict=True):
        error = jnp.linalg.norm(found - want) / jnp.linalg.norm(want)
        assert error < 0.01 and error < 1.2 * jnp.linalg.norm(plain - want) / jnp.linalg.norm(want)


def test_a_trained_bias_has_its_gradient() -> None:
    queries, sources = inputs("three heads, one row")

    def loss(bias: jax.Array, attend: Any) -> jax.Array:
        return (attend(queries, (sources[0]._replace(bias=bias),)) ** 2).sum()

    gradient = jax.grad(loss)(sources[0].bias, FUSED)
    assert_close(gradient, jax.grad(loss)(sources[0].bias, plain_attention))
    assert jnp.abs(gradient).max() > 0


def test_where_plain_attention_is_used() -> None:
    """One query, a mask that no ids describe, and rows that do not fit the TPU's memory."""
    queries, sources = inputs("two heads of 64")
    seen = sources[0]._replace(mask=Mask(seen=jnp.tri(192, dtype=bool)[None]))

    def kernels(queries: jax.Array, sources: tuple[Source, ...]) -> int:
        return str(jax.make_jaxpr(FUSED)(queries, sources)).count("pallas_call")

    assert kernels(queries, sources) == 1
    assert kernels(queries, (seen,)) == 0
    prompt = Source(*(x[0, :1] for x in sources[0][:2]))
    assert kernels(queries, (*sources, prompt)) == 0
    one = sources[0]._replace(bias=sources[0].bias[:, :, :1])
    assert kernels(queries[:, :1], (one,)) == 0
    long = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 4, 2048, 2048), jnp.bfloat16)
    assert str(jax.make_jaxpr(FUSED)(long, (Source(long, long, bias),))).count("pallas_call") == 0
    assert vmem_bytes(612, [612], 32, 64, 2) < vmem_bytes(612, [612, 100], 32, 64, 2)


def examples() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    lengths = (12, 7, 1, 9, 12, 3, 5, 10)
    return [rng.integers(2, 64, n) for n in lengths], [rng.integers(2, 64, 9) for _ in lengths]


SCAN = {"scan_layers": True, "num_encoder_layers": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "biases of each layer": {"relpos_per_layer": True, "num_encoder_layers": 2},
    "scan, full": SCAN | {"remat": "full"},
    "scan, dots, 2 x 2 devices": SCAN | {"remat": "dots", "mesh": (2, 2)},
    "packed": {"packed": True},
    "blind, packed": SCAN | {"packed": True, "blind": True},
    "blind, packed, on a GPU": {"packed": True, "blind": True, "kind": "gpu", "head_dim": 16},
}
NETWORK_TOLERANCE = 3e-6
"""On the prompt's gradient. Plain attention's own is 1.1e-6 from that of float64, the fused one's
0.7e-6."""


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * ("packed" in x)) for x in NETWORKS]
)
def test_in_the_network(name: str) -> None:
    """The loss with dropout, and the prompt's gradient."""
    changes = dict(NETWORKS[name])
    kind = changes.pop("kind", "tpu")
    packed, blind = changes.pop("packed", False), changes.pop("blind", False)
    shape = changes.pop("mesh", (1, 1))
    config = tiny_config(**changes)
    params = tiny_params(config)
    prompt = jax.random.normal(jax.random.key(1), (5, config.emb_dim))
    lengths = {"input_length": 40 if packed else 12, "target_length": 24 if packed else 9}
    if packed:
        batch = make_packed_batch(
            *examples(),
            np.arange(8) // 2,
            row_count=4,
            **lengths,
            ids=T5_IDS,
            prompt_slots=0 if blind else 5,
        )
    else:
        batch = make_batch(*examples(), **lengths, ids=T5_IDS)

    batch = jax.tree.map(jnp.asarray, batch)

    def run(attend: Any) -> Any:
        apply_fn = make_apply_fn(config, not blind, attend=attend)

        @jax.jit
        @jax.value_and_grad
        def loss(prompt: jax.Array) -> jax.Array:
            variables = {"params": params, "prompt": {"prompt": prompt}}
            return batch_loss(apply_fn, Loss(), variables, batch, jax.random.key(2))

        return loss(prompt)

    fused = KINDS[kind](make_mesh(shape, jax.devices()[: shape[0] * shape[1]]))
    assert_close(run(fused), run(plain_attention), NETWORK_TOLERANCE)


def test_flops_of_the_kernels() -> None:
    """Two products forward; five backward, which needs nothing of the forward pass."""
    queries, sources = inputs("two heads of 64")
    product = 2 * 2 * 4 * 192 * 192 * 64
    mesh = make_mesh((2, 2), jax.devices()[:4])
    for attend in (FUSED, FusedAttention(mesh)):

        def loss(queries: jax.Array, own: Any, attend: Any = attend) -> jax.Array:
            keys, values = own
            return attend(queries, (sources[0]._replace(keys=keys, values=values),)).sum()

        assert count_flops(loss, queries, sources[0][:2]) == 2 * product
        assert count_flops(jax.grad(loss, (0, 1)), queries, sources[0][:2]) == 5 * product


def test_what_auto_chooses() -> None:
    kinds = {kind: choose_attention("auto", kind) for kind in ("TPU v3", "TPU v4", "TPU7x", "cpu")}
    assert list(kinds.values()) == ["plain", "fused", "fused", "plain"]
    assert choose_attention("plain", "TPU v4") == "plain"
    with pytest.raises(InputError, match="needs a TPU from v4 on, not TPU v2"):
        choose_attention("fused", "TPU v2")


def test_dataclass_is_hashable() -> None:
    """So that equal meshes find `make_apply_fn`'s function again."""
    mesh = make_mesh((2, 1), jax.devices()[:2])
    assert FusedAttention(mesh) == FusedAttention(make_mesh((2, 1), jax.devices()[:2]))
    assert hash(FusedAttention(mesh)) == hash(dataclasses.replace(FusedAttention(mesh)))
