"""No memory for a batch: XLA's own error becomes a line, and the batch that it names fits."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import pytest
from conftest import make_settings
from tiny import save_tiny, tiny_config, tiny_params

import ptjax
from ptjax.backbones.load import load_backbone
from ptjax.data.byte_tokenizer import ByteTokenizer
from ptjax.data.pipeline import Shape
from ptjax.errors import InputError
from ptjax.sharding.devices import GIB
from ptjax.trainer import make_step, memory, setup

HEADS = 2**17
"""The logits of attention have four bytes for each head and pair of positions of a row."""


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A backbone whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    return load_backbone(save_tiny(folder, tiny_config(384), tokenizer=ByteTokenizer()))


def letters(inputs: str) -> ptjax.Task:
    records = [{"text": "x", "label": label} for label in ("a", "b")]
    return ptjax.Task.from_records(records, records, inputs=inputs, label="label")


@pytest.mark.slow
def test_a_step_without_memory_names_a_batch_that_fits(of_bytes, tmp_path) -> None:
    """A row needs a few GiB, all of them more than the 2^47 bytes that a process can address."""
    rows, length = 207_127, 32  # a prime: all rows together or one at a time
    assert rows * HEADS * (length + 4) ** 2 * 4 >= 2**47
    config = tiny_config(384, num_heads=HEADS, head_dim=1)
    params = {"params": tiny_params(config)}
    backbone = dataclasses.replace(
        of_bytes, config=config, variables=params, apply_fn=of_bytes.family.build(config)
    )
    settings = make_settings(batch_size=rows, feature_lengths={"inputs": length, "targets": 2})
    with pytest.raises(InputError) as raised:
        ptjax.tune(backbone, letters("{text}" + "x" * (length - 2)), tmp_path, settings)
    found = re.fullmatch(
        rf"no memory for a batch of {rows}x32\+2 tokens \(the step needs (.*?) of (.*?) GiB\); set "
        rf"Batching.microbatches to {rows}, which computes the same batch in parts and needs (.*?) "
        rf"of \S+ GiB \(--gin.MICROBATCHES={rows}\), or batch_size to 1 \(--gin.BATCH_SIZE=1\)",
        str(raised.value),
    )
    assert found, raised.value
    needed, available, less = map(float, found.groups())
    assert needed > 2**47 / GIB
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    assert available == pytest.approx(machine, rel=0.01)  # three digits
    assert HEADS * (length + 4) ** 2 * 4 / GIB < less <= 0.9 * available
    cause = raised.value.__cause__
    assert isinstance(cause, jax.errors.JaxRuntimeError) and "ut of memory" in str(cause)


def lowering(backbone: Any, tmp_path: Any, settings: ptjax.RunSettings) -> memory.Lower:
    """What `tune` passes for a run of one short text."""
    overrides = {"": ptjax.MemberOverrides()}
    setups = setup.set_up_members(backbone, letters("{text}"), tmp_path, settings, overrides)
    state, _ = make_step.make_step(backbone, setups, settings, sweep=False)
    return make_step.lowering(backbone, setups, state, sweep=False)


def test_an_evaluation_without_memory_is_not_blamed_on_the_batch(of_bytes, tmp_path) -> None:
    lengths = {"inputs": 16, "targets": 2}
    settings = make_settings(batch_size=8, microbatches=4, feature_lengths=lengths)
    lower = lowering(of_bytes, tmp_path, settings)
    message = memory.advise(settings, Shape(8, 16, 2), lower, of_bytes.mesh)
    assert message.startswith("no memory for an evaluation: the step itself fits (")
    assert message.endswith("; lower Evaluation.batch_size (16)")


def test_other_errors_of_xla_keep_their_message(of_bytes) -> None:
    settings = make_settings()
    never: Any = None
    explained = memory.explain_no_memory(settings, [Shape(8, 32, 4)], never, of_bytes.mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: no"), explained:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no")


def test_a_compiler_that_has_no_memory_rules_a_batch_out(of_bytes, tmp_path) -> None:
    """As the compiler of TPUs does; this one is given a device without memory for more rows."""
    settings = make_settings(batch_size=8, feature_lengths={"inputs": 16, "targets": 2})
    lower = lowering(of_bytes, tmp_path, settings)

    def lower_or_fail(settings: ptjax.RunSettings, shape: Shape) -> jax.stages.Lowered:
        if shape.rows // settings.batching.microbatches > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        return lower(settings, shape)

    message = memory.advise(settings, Shape(8, 16, 2), lower_or_fail, of_bytes.mesh)
    assert "set Batching.microbatches to 4" in message and "or batch_size to 2" in message


def test_packed_rows_are_divided_as_the_run_would(of_bytes) -> None:
    settings = make_settings(batch_size=6, pack=True)
    shapes = []

    def refuse(settings: ptjax.RunSettings, shape: Shape) -> jax.stages.Lowered:
        shapes.append((settings.batching.microbatches, shape.rows))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")

    message = memory.advise(settings, Shape(4, 64, 8, True), refuse, of_bytes.mesh)
    assert shapes == [(1, 4), (2, 4), (6, 6)]
    assert "no smaller batch fits" in message
