"""The inputs of `parity.py`: backbones, their examples, and the ways to run them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokens import random_rows

from ptjax.backbones.load import Backbone, load_backbone
from ptjax.data.batch import Batch, make_batch, make_packed_batch
from ptjax.data.preprocess import tokenize_texts
from ptjax.sharding.meshes import make_mesh

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SENTENCES = ROOT / "ptjax" / "assets" / "sentiment" / "test.jsonl"
FLOAT32 = "float32"
PROMPT = 8  # rows
TARGET_LENGTH = 12  # also the length to generate


@dataclasses.dataclass(frozen=True)
class Way:
    """How a backbone is run.

    Attributes:
        precision: `jax_default_matmul_precision`; None is JAX's default.
        generates: whether to compare texts and labels too, which takes most of a row's time.
    """

    name: str
    dtype: str = FLOAT32
    precision: str | None = "highest"
    quantize: Any = None
    scan_layers: bool = False
    packed: bool = False
    attends_to_input: bool = True
    generates: bool = False

    @property
    def rounds(self) -> bool:
        """Whether a GPU computes anything in less than float32."""
        return self.dtype != FLOAT32 or self.precision != "highest"


BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "precision": None}
PACKED_UNSEEING = Way("packed, not seeing its input", packed=True, attends_to_input=False)
QUANTIZED_SCANNED = Way(
    "int8, scanned, bfloat16", quantize="int8", scan_layers=True, generates=True, **BFLOAT16
)
WAYS = (
    Way("float32", generates=True),
    Way("bfloat16", generates=True, **BFLOAT16),
    Way("float32, default precision", precision=None, generates=True),
    Way("int8", quantize="int8"),
    Way("scanned", scan_layers=True),
    Way("packed", packed=True),
    Way("not seeing its input", attends_to_input=False, generates=True),
    PACKED_UNSEEING,
    QUANTIZED_SCANNED,
    Way("packed, not seeing its input, bfloat16", packed=True, attends_to_input=False, **BFLOAT16),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A backbone and its examples.

    Attributes:
        inputs, targets, labels: rows of ids of any length.
        prompt: float32 [P, D].
    """

    name: str
    path: str
    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    labels: list[np.ndarray]
    prompt: np.ndarray


def load(path: str, way: Way, device: jax.Device) -> Backbone:
    """The backbone with its weights stored as `way` says; cached."""
    return _load(path, device, way.dtype, way.quantize, way.scan_layers)


@functools.cache
def _load(path: str, device: jax.Device, dtype: str, quantize: Any, scan: bool) -> Backbone:
    mesh = make_mesh(devices=[device])
    return load_backbone(path, dtype=dtype, mesh=mesh, quantize=quantize, scan_layers=scan)


def fixtures() -> dict[str, str]:
    """Name -> path of the backbones in tests/fixtures."""
    torch = {f"torch_parity/{n}": n for n in ("t5_1_0", "t5_1_1", "byt5_shaped")}
    names = ("t5_1_1_tiny_legacy", "t5_1_0_tiny_legacy", "t5_1_1_tiny_orbax", *torch)
    return {name: str(FIXTURES / name) for name in names}


def draw_prompt(backbone: Backbone) -> np.ndarray:
    """A prompt of random rows of the embedding: float32 [P, D]."""
    table = np.asarray(backbone.variables["params"]["token_embedder"]["embedding"], np.float32)
    return table[np.random.default_rng(0).integers(0, len(table), PROMPT)]


def random_subject(name: str, path: str, device: jax.Device, count: int) -> Subject:
    """Random ids. Rows of up to 150 reach the logarithmic relative-position buckets."""
    backbone = load(path, WAYS[0], device)
    ids = 3, backbone.config.vocab_size
    return Subject(
        name,
        path,
        random_rows(1, count, 150, ids),
        random_rows(2, count, TARGET_LENGTH, ids),
        random_rows(3, 3, 4, ids),
        draw_prompt(backbone),
    )


def nano_subject(device: jax.Device, count: int) -> Subject:
    """ptjax-nano with sentences of the shipped task; the target of each is the next one."""
    backbone = load("ptjax-nano", WAYS[0], device)
    assert backbone.tokenizer is not None
    lines = SENTENCES.read_text().splitlines()[: count + 1]
    texts = [json.loads(line)["text"] for line in lines]
    long, short = (tokenize_texts(texts, backbone.tokenizer, n) for n in (96, TARGET_LENGTH))
    labels = tokenize_texts(["positive", "negative"], backbone.tokenizer, 4)
    return Subject(
        "ptjax-nano",
        "ptjax-nano",
        [long[i] for i in range(count)],
        [short[i + 1] for i in range(count)],
        [labels[i] for i in range(2)],
        draw_prompt(backbone),
    )


def make_subject_batch(subject: Subject, way: Way, backbone: Backbone) -> Batch:
    """All examples in one batch: one to a row, or packed four to a row."""
    ids = backbone.config.special_ids
    if not way.packed:
        return make_batch(
            subject.inputs,
            subject.targets,
            input_length=max(map(len, subject.inputs)),
            target_length=TARGET_LENGTH,
            ids=ids,
        )
    rows, slots = np.arange(len(subject.inputs)) // 4, PROMPT if way.attends_to_input else 0
    return make_packed_batch(
        subject.inputs,
        subject.targets,
        rows,
        row_count=int(rows[-1]) + 1,
        input_length=int(np.bincount(rows, [slots + len(x) for x in subject.inputs]).max()),
        target_length=int(np.bincount(rows, [len(x) for x in subject.targets]).max()),
        ids=ids,
        prompt_slots=slots,
    )
