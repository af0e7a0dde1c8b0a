"""The part `parity` of `run.sh`: ptjax on the GPU against ptjax on the same machine's CPU.

    benchmarks/on_gpu/run.sh parity

Runs ptjax-nano in all `WAYS` and the fixtures of tests/ in the first two. Compares logits, loss,
the prompt's gradient dP, texts (greedy and beam search) and ranked labels. A row has the largest
difference of a logit in standard deviations of the logits, the relative difference of the loss, the
norm of dP's difference over the norm of dP, and how many texts and labels differ.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# isort: split
from record import Record, add_flags  # first: it looks at the clock

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from subjects import (
    FLOAT32,
    PACKED_UNSEEING,
    QUANTIZED_SCANNED,
    TARGET_LENGTH,
    WAYS,
    Subject,
    Way,
    fixtures,
    load,
    make_subject_batch,
    nano_subject,
    random_subject,
)
from tokens import IdsAsText, make_inputs, make_rows

from ptjax.backbones.load import Backbone
from ptjax.data.batch import pad
from ptjax.inference.generate import Decoding, decode_tokens, generate_tokens
from ptjax.inference.labels import Labels, predict_labels
from ptjax.inference.model import Model
from ptjax.models.prompted import with_prompt
from ptjax.models.quantized import Quantized
from ptjax.sharding.arrays import replicated
from ptjax.sharding.meshes import make_mesh
from ptjax.training.loss import Loss

BEAMS = 4
SECONDS = 15  # that a row needs, nearly all of them to compile for both devices

# Tolerances. The two devices sum in different orders.
#
# float32, all products with `highest`: the rounding error of a logit is about 2^-24 of the terms
# that it sums, over a handful of layers. On a CPU, running the network operation by operation
# instead of compiled as a whole moves a logit by 4e-6 standard deviations (dP: 2e-6). A GPU has its
# own exponentials and square roots too; 1e-4 is also the tests' bound against T5X and transformers.
EXACT = {"logits": 1e-4, "loss": 3e-5, "dP": 2e-4}
# bfloat16: the GPU's distance from float32 may be twice that of the CPU's bfloat16, since the
# largest of some thousand rounding errors is a random number. The loss is a single number whose
# error on the CPU may be 0 by luck, so 2^-7 is always allowed, twice bfloat16's rounding error.
# float32 with JAX's default precision, TF32 on a GPU: its products keep ten bits of the mantissa.
# bfloat16 keeps seven and also rounds everything in between, so the CPU's bfloat16 is a bound as it
# is, without a factor.
BFLOAT16_FACTOR, TF32_FACTOR = 2.0, 1.0
LEAST = {"logits": 0.0, "loss": 2.0**-7, "dP": 0.0}
# Texts: none may differ in float32. In lower precision near-ties go either way, about as often as
# between bfloat16 and float32 on the CPU (a quarter of ptjax-nano's texts). A fifth of 32 texts
# more is about twice the standard deviation of the difference between two such counts.
LUCK = 0.2
# int8 kernels: a GPU's float32 division may be off by two units in the last place, so a value
# halfway between two integers may round to either.
INT8_STEPS = 1


class Devices(NamedTuple):
    """The devices to compare; in a rehearsal both are CPU devices."""

    gpu: jax.Device
    cpu: jax.Device


@dataclasses.dataclass(frozen=True)
class Answers:
    """The results of one device.

    Attributes:
        logits: float32 [target tokens, V].
        gradient: dP, [P, D].
        repeats: whether running the same program again gave bitwise the same.
        texts: "greedy", "beams" or "labels" -> one answer for each input; empty if not requested.
    """

    logits: np.ndarray
    loss: float
    gradient: np.ndarray
    repeats: bool
    texts: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


def move(backbone: Backbone, device: jax.Device, dtype: str) -> Backbone:
    """The same weights on another device, to compute in `dtype`."""
    mesh = make_mesh(devices=[device])
    values = jax.tree.map(
        # The scales of int8 kernels stay float32 whatever `dtype` is.
        lambda x: x if isinstance(x, Quantized) else x.astype(dtype),
        jax.device_get(backbone.variables),
        is_leaf=lambda x: isinstance(x, Quantized),
    )
    return dataclasses.replace(
        backbone,
        config=dataclasses.replace(backbone.config, dtype=dtype),
        variables=jax.device_put(values, replicated(mesh)),
        mesh=mesh,
    )


def answer(backbone: Backbone, subject: Subject, way: Way, *, generated: bool) -> Answers:
    """Runs `subject` through `backbone`, on the backbone's own device.

    Args:
        generated: whether to generate texts and rank labels too.
    """
    [device] = backbone.mesh.devices.flat
    with contextlib.ExitStack() as settings:  # both apply to this thread alone
        # Arrays that are on no device yet go to the backbone's.
        settings.enter_context(jax.default_device(device))
        if way.precision is not None:
            settings.enter_context(jax.default_matmul_precision(way.precision))
        apply_fn = backbone.make_apply_fn(way.attends_to_input)
        prompt = jax.device_put(subject.prompt, replicated(backbone.mesh))
        batch = make_subject_batch(subject, way, backbone)
        compute = functools.partial(_learn, apply_fn, backbone.variables, prompt, batch)
        first, again = jax.device_get([compute(), compute()])
        (loss, logits), gradient = first
        repeats = all(jax.tree.leaves(jax.tree.map(np.array_equal, first, again)))
        real = batch["decoder_loss_weights"] > 0
        said = Answers(logits[real], float(loss), gradient, repeats)
        if not generated:
            return said
        return dataclasses.replace(said, texts=generate(backbone, subject, apply_fn, prompt))


@functools.partial(jax.jit, static_argnames="apply_fn")
def _learn(apply_fn: Callable[..., Any], variables: Any, prompt: Any, batch: Any) -> Any:
    """((loss, logits [B, L, V]), dP [P, D]); no dropout."""

    def loss(prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = apply_fn(
            with_prompt(variables, prompt),
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch.get("encoder_segment_ids"),
            batch.get("decoder_segment_ids"),
            encoder_lengths=batch.get("encoder_lengths"),
        )
        weights = batch["decoder_loss_weights"]
        return Loss()(logits, batch["decoder_target_tokens"], weights), jnp.float32(logits)

    return jax.value_and_grad(loss, has_aux=True)(prompt)


def generate(
    backbone: Backbone, subject: Subject, apply_fn: Callable[..., Any], prompt: jax.Array
) -> dict[str, Sequence[Any]]:
    """`Answers.texts`: greedy, by beam search, and the indices of the likeliest labels."""
    config = backbone.config
    variables = with_prompt(backbone.variables, prompt)
    model = Model(apply_fn, variables, backbone.mesh, config.special_ids, IdsAsText())
    source, size = make_inputs(subject.inputs), len(subject.inputs)
    texts = {}
    for name, beams in (("greedy", 1), ("beams", BEAMS)):
        how = Decoding(num_beams=beams)
        tokens, _ = generate_tokens(model, source, size, max_new_tokens=TARGET_LENGTH, how=how)
        texts[name] = decode_tokens(model, tokens)
    rows = make_rows(subject.labels)
    tokens = pad(subject.labels, int(rows.lengths.max()), config.pad_id)
    chosen, _ = predict_labels(model, source, [Labels(tokens, rows.lengths)], size)
    return texts | {"labels": chosen.tolist()}


def differences(found: Answers, expected: Answers) -> dict[str, float]:
    """How far apart two devices or two precisions are; NaN counts as infinitely far."""
    apart = {
        "logits": np.abs(found.logits - expected.logits).max() / expected.logits.std(),
        "loss": abs(found.loss / expected.loss - 1),
        "dP": np.linalg.norm(found.gradient - expected.gradient)
        / np.linalg.norm(expected.gradient),
    }
    return {name: float(np.nan_to_num(value, nan=np.inf)) for name, value in apart.items()}


def count_others(found: Answers, expected: Answers) -> dict[str, int]:
    """How many texts and labels differ; empty if none were generated."""
    return {
        name: sum(a != b for a, b in zip(said, expected.texts[name], strict=True))
        for name, said in found.texts.items()
    }


def judge(way: Way, found: Answers, exact: Answers, bfloat16: Answers) -> dict[str, Any]:
    """A row: `found` of the GPU, against `exact` (float32) and `bfloat16` of the CPU."""
    apart, others = differences(found, exact), count_others(found, exact)
    row: dict[str, Any] = apart | others
    limits, most = EXACT, dict.fromkeys(others, 0)
    if way.rounds:
        of_cpu = differences(bfloat16, exact)
        factor = TF32_FACTOR if way.dtype == FLOAT32 else BFLOAT16_FACTOR
        limits = {name: max(factor * value, LEAST[name]) for name, value in of_cpu.items()}
        most = {
            name: number + math.ceil(LUCK * len(found.texts[name]))
            for name, number in count_others(bfloat16, exact).items()
        }
    if way.dtype != FLOAT32:
        same = differences(found, bfloat16) | count_others(found, bfloat16)
        row = same | {f"{name}_float32": value for name, value in row.items()}
    row |= {f"{name}_limit": value for name, value in (limits | most).items()}
    met = all(apart[x] <= limits[x] for x in limits) and all(others[x] <= most[x] for x in most)
    return row | {"repeats": found.repeats, "met": met}


def compare_kernels(found: Backbone, expected: Backbone) -> dict[str, Any]:
    """int8 kernels quantised on two devices: share of values that differ, largest difference."""
    ours, theirs = (
        [x for x in jax.tree.leaves(jax.device_get(b.variables)) if x.dtype == np.int8]
        for b in (found, expected)
    )
    steps = [np.abs(np.int16(a) - np.int16(b)).ravel() for a, b in zip(ours, theirs, strict=True)]
    apart = np.concatenate(steps)
    return {"int8_differ": float((apart > 0).mean()), "int8_steps": int(apart.max())}


@functools.cache
def reference(subject: Subject, way: Way, dtype: str, devices: Devices, generated: bool) -> Answers:
    """The CPU's answers with the GPU's weights, computed in `dtype`."""
    backbone = move(load(subject.path, way, devices.gpu), devices.cpu, dtype)
    return answer(backbone, subject, way, generated=generated)


def compare(subject: Subject, way: Way, devices: Devices, *, generated: bool) -> dict[str, Any]:
    """The row of a subject, run in a given way."""
    ours = load(subject.path, way, devices.gpu)
    # XLA releases the GIL while it compiles, so both devices compile at the same time.
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        pending = other.submit(answer, ours, subject, way, generated=generated)
        # A CPU always multiplies in full precision; ways that differ only in it share a reference.
        of_cpu = dataclasses.replace(way, name="", precision=None)
        exact = reference(subject, of_cpu, FLOAT32, devices, generated)
        bfloat16 = exact
        if way.rounds:
            bfloat16 = reference(subject, of_cpu, "bfloat16", devices, generated)
        row = judge(way, pending.result(), exact, bfloat16)
    theirs = load(subject.path, way if way.quantize else WAYS[0], devices.cpu)
    # A prompt tuned on one device must be accepted on the other.
    row["fingerprint"] = ours.fingerprint == theirs.fingerprint
    row["met"] &= row["fingerprint"]
    if way.quantize:
        row |= compare_kernels(ours, theirs)
        row["met"] &= row["int8_steps"] <= INT8_STEPS
    return row


def find_devices() -> Devices:
    """The GPU and the CPU of this machine, or two CPU devices.

    Raises:
        SystemExit: JAX_PLATFORMS leaves out the CPU.
    """
    try:
        return Devices(jax.devices()[0], jax.devices("cpu")[-1])
    except RuntimeError as error:
        raise SystemExit(f"parity needs the CPU too: JAX_PLATFORMS=cuda,cpu ({error})") from error


def measure(record: Record, devices: Devices, rehearse: bool) -> None:
    """Measures all rows, the more important ones first."""
    count = 4 if rehearse else 32
    needs = 0 if rehearse else SECONDS

    def run(subject: Subject, way: Way, generated: bool) -> None:
        find = functools.partial(compare, subject, way, devices, generated=generated)
        record.measure(f"{subject.name}, {way.name}", find, needs=needs)

    (name, path), *others = fixtures().items()
    tiny = random_subject(name, path, devices.cpu, count)
    if rehearse:
        # Together these cover every setting; each takes seconds to compile.
        for way in WAYS[0], QUANTIZED_SCANNED, PACKED_UNSEEING:
            run(tiny, way, generated=way is WAYS[0])
        return
    nano = nano_subject(devices.cpu, count)
    for way in WAYS:
        run(nano, way, generated=way.generates)
    small = [tiny, *(random_subject(*other, devices.cpu, count) for other in others)]
    for subject in small:
        run(subject, WAYS[0], generated=True)
    for subject in small:
        run(subject, WAYS[1], generated=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    flags = parser.parse_args()
    # By default JAX allocates three quarters of the memory at its start; nothing here needs that.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if flags.rehearse:
        # Two devices, so that an array on the wrong one fails here as it would with a GPU.
        jax.config.update("jax_num_cpu_devices", 2)
    with Record.open("parity", flags) as record:
        measure(record, find_devices(), flags.rehearse)


if __name__ == "__main__":
    main()
