"""ptjax on the GPU against ptjax on the CPU of the same machine, in one process.

    benchmarks/on_gpu/run.sh parity

The fixtures of tests/ and ptjax-nano, in every way in which a backbone is run: logits, loss, the
prompt's gradient dP, texts (greedy and of a beam search) and ranked labels. A row has the largest
difference of a logit in standard deviations of the logits, the relative difference of the loss, the
norm of dP's difference over that of dP, and how many texts differ.
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

from ptjax.answering import Labels, predict_labels, predict_texts
from ptjax.backbone import Backbone
from ptjax.data.batch import pad
from ptjax.models.layers import Quantized
from ptjax.models.prompted import with_prompt
from ptjax.scale.sharding import make_mesh, replicated
from ptjax.training.loss import Loss

BEAMS = 4
SECONDS = 15  # that a row may take: compiling for both devices is nearly all of it

# Tolerances. On both devices every sum runs in an order of its own.
#
# float32, all products with `highest`: a logit's rounding is some 2^-24 of the terms that it sums,
# over a handful of layers. On a CPU the same network, computed operation by operation instead of
# compiled as a whole, is 4e-6 standard deviations away (dP: 2e-6). A GPU adds its own exponentials
# and square roots; 1e-4 is also the bound that the tests have against T5X and transformers.
EXACT = {"logits": 1e-4, "loss": 3e-5, "dP": 2e-4}
# bfloat16: the GPU has to be as near to float32 as the CPU's bfloat16 is, within a factor of two,
# since the largest of some thousand rounding errors is a random figure. The loss is one number, and
# its error on the CPU may be 0 by luck: two units in bfloat16's last place are allowed in any case.
# float32 with JAX's default precision, which is TF32 on a GPU: its products see ten bits of the
# mantissa where bfloat16 keeps seven and rounds everything between as well, so the CPU's bfloat16
# is a limit, and no factor is needed.
BFLOAT16_FACTOR, TF32_FACTOR = 2.0, 1.0
LEAST = {"logits": 0.0, "loss": 2.0**-7, "dP": 0.0}
# Texts: none may differ in float32. Where less is kept, near-ties are decided either way, as often
# as between bfloat16 and float32 on the CPU (a quarter of ptjax-nano's); with 32 texts a fifth more
# is about twice the standard deviation of the difference between two such counts.
LUCK = 0.2
# Kernels in int8: a GPU divides float32 with an error of up to two units in the last place, so a
# value just between two integers may go to either.
INT8_STEPS = 1


class Devices(NamedTuple):
    """What is compared; both are of the CPU in a rehearsal."""

    gpu: jax.Device
    cpu: jax.Device


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one device says.

    Attributes:
        logits: float32 [targets' tokens, V].
        repeats: whether the same program gave bitwise the same again.
        texts: by how they were found, "greedy", "beams" or "labels"; empty if nothing was asked.
    """

    logits: np.ndarray
    loss: float
    gradient: np.ndarray
    repeats: bool
    texts: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


def move(backbone: Backbone, device: jax.Device, dtype: str) -> Backbone:
    """The very same weights on another device, computed with in `dtype`."""
    mesh = make_mesh(devices=[device])
    values = jax.tree.map(
        # The scales of int8 kernels are float32, whatever they are computed with.
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
    """What `backbone` says, on the device where it lives, to all that `subject` asks.

    Args:
        generated: texts and labels too.
    """
    [device] = backbone.mesh.devices.flat
    with contextlib.ExitStack() as settings:  # both are of this thread alone
        # What is on no device yet goes where the backbone is.
        settings.enter_context(jax.default_device(device))
        if way.precision is not None:
            settings.enter_context(jax.default_matmul_precision(way.precision))
        apply_fn = backbone.make_apply_fn(way.sees_input)
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
    """`Answers.texts`: greedy, of a beam search, and the numbers of the likeliest labels."""
    config = backbone.config
    variables = with_prompt(backbone.variables, prompt)
    # One bucket: a single shape to compile.
    source, size = make_inputs(subject.inputs), len(subject.inputs)
    shared = {"ids": config.special_ids}
    bucket = [(int(source.input_lengths.max()), 0)]
    texts = {
        name: predict_texts(
            apply_fn,
            variables,
            source,
            IdsAsText(),
            bucket,
            size,
            max_length=TARGET_LENGTH,
            num_beams=beams,
            **shared,
        )[0]
        for name, beams in (("greedy", 1), ("beams", BEAMS))
    }
    rows = make_rows(subject.labels)
    tokens = pad(subject.labels, int(rows.lengths.max()), config.pad_id)
    labels = Labels(tokens, rows.lengths)
    chosen, _ = predict_labels(apply_fn, variables, source, labels, bucket, size, **shared)
    return texts | {"labels": chosen.tolist()}


def differences(found: Answers, expected: Answers) -> dict[str, float]:
    """How far two devices, or two precisions, are apart; a NaN is as far as can be."""
    apart = {
        "logits": np.abs(found.logits - expected.logits).max() / expected.logits.std(),
        "loss": abs(found.loss / expected.loss - 1),
        "dP": np.linalg.norm(found.gradient - expected.gradient)
        / np.linalg.norm(expected.gradient),
    }
    return {name: float(np.nan_to_num(value, nan=np.inf)) for name, value in apart.items()}


def count_others(found: Answers, expected: Answers) -> dict[str, int]:
    """How many texts and labels are not the same; nothing where none were generated."""
    return {
        name: sum(a != b for a, b in zip(said, expected.texts[name], strict=True))
        for name, said in found.texts.items()
    }


def judge(way: Way, found: Answers, exact: Answers, bfloat16: Answers) -> dict[str, Any]:
    """A row; `found` is the GPU's, `exact` and `bfloat16` are the CPU's in those precisions."""
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
    """Int8 kernels that two devices made of the same weights: the share that differs, how far."""
    ours, theirs = (
        [x for x in jax.tree.leaves(jax.device_get(b.variables)) if x.dtype == np.int8]
        for b in (found, expected)
    )
    steps = [np.abs(np.int16(a) - np.int16(b)).ravel() for a, b in zip(ours, theirs, strict=True)]
    apart = np.concatenate(steps)
    return {"int8_differ": float((apart > 0).mean()), "int8_steps": int(apart.max())}


@functools.cache
def reference(subject: Subject, way: Way, dtype: str, devices: Devices, generated: bool) -> Answers:
    """The CPU's answers, with the weights that the GPU has, computed in `dtype`."""
    backbone = move(load(subject.path, way, devices.gpu), devices.cpu, dtype)
    return answer(backbone, subject, way, generated=generated)


def compare(subject: Subject, way: Way, devices: Devices, *, generated: bool) -> dict[str, Any]:
    """The row of a subject that is run in a way."""
    ours = load(subject.path, way, devices.gpu)
    # XLA compiles without Python's lock: for both devices at the same time.
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        pending = other.submit(answer, ours, subject, way, generated=generated)
        # A CPU's products are in full precision in any case: ways that differ in it share these.
        of_cpu = dataclasses.replace(way, name="", precision=None)
        exact = reference(subject, of_cpu, FLOAT32, devices, generated)
        bfloat16 = exact
        if way.rounds:
            bfloat16 = reference(subject, of_cpu, "bfloat16", devices, generated)
        row = judge(way, pending.result(), exact, bfloat16)
    theirs = load(subject.path, way if way.quantize else WAYS[0], devices.cpu)
    # A prompt that is tuned on one device has to be taken on the other.
    row["fingerprint"] = ours.fingerprint == theirs.fingerprint
    row["met"] &= row["fingerprint"]
    if way.quantize:
        row |= compare_kernels(ours, theirs)
        row["met"] &= row["int8_steps"] <= INT8_STEPS
    return row


def find_devices() -> Devices:
    """The GPU and the CPU beside it, or two devices of the CPU.

    Raises:
        SystemExit: JAX was told to leave the CPU out.
    """
    try:
        return Devices(jax.devices()[0], jax.devices("cpu")[-1])
    except RuntimeError as error:
        raise SystemExit(f"parity needs the CPU too: JAX_PLATFORMS=cuda,cpu ({error})") from error


def measure(record: Record, devices: Devices, rehearse: bool) -> None:
    """All rows, the more important ones first."""
    count = 4 if rehearse else 32
    needs = 0 if rehearse else SECONDS

    def run(subject: Subject, way: Way, generated: bool) -> None:
        find = functools.partial(compare, subject, way, devices, generated=generated)
        record.measure(f"{subject.name}, {way.name}", find, needs=needs)

    (name, path), *others = fixtures().items()
    tiny = random_subject(name, path, devices.cpu, count)
    if rehearse:
        # Between them these do all that any way does; each takes seconds to compile.
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
    # By default JAX takes three quarters of the memory as soon as it starts; nothing here needs it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if flags.rehearse:
        # Two devices, so that an array on the wrong one is an error here as it is on a GPU.
        jax.config.update("jax_num_cpu_devices", 2)
    with Record.open("parity", flags) as record:
        measure(record, find_devices(), flags.rehearse)


if __name__ == "__main__":
    main()
