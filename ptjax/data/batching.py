"""How examples become batches: the setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ptjax.data.pipeline import Bucket
from ptjax.errors import InputError, check_at_least

FEATURE_LENGTHS: Mapping[str, int] = MappingProxyType({"inputs": 512, "targets": 16})
"""Tokens of the inputs and targets, EOS included, where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples become batches.

    Attributes:
        batch_size: examples a step.
        microbatches: parts of a batch that are computed one after the other.
        feature_lengths: T5X's {"inputs": T, "targets": L}, EOS included; longer ones are cut,
            counted and reported. What it leaves out is as in `FEATURE_LENGTHS`.
        buckets: batch shapes (T, L); None takes input lengths that double from 32.
        pack: short examples share rows instead; a batch holds as many examples as before.
        row_length: T of such rows, with the prompt's places where it attends to its input; None
            chooses.
    """

    batch_size: int = 32
    microbatches: int = 1
    feature_lengths: Mapping[str, int] | None = None
    buckets: Sequence[Bucket] | None = None
    pack: bool = False
    row_length: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, BATCH_SIZE=self.batch_size, MICROBATCHES=self.microbatches)
        check_at_least(1, "Batching", row_length=self.row_length)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"BATCH_SIZE = {self.batch_size} is no multiple of {self.microbatches} MICROBATCHES"
            )
        if unknown := sorted(set(self.feature_lengths or {}) - set(FEATURE_LENGTHS)):
            raise InputError(f"TASK_FEATURE_LENGTHS has {unknown[0]!r}, not 'inputs' or 'targets'")

    @property
    def lengths(self) -> dict[str, int]:
        """{"inputs": T, "targets": L}."""
        return {**FEATURE_LENGTHS, **(self.feature_lengths or {})}

    def identity(self) -> dict[str, Any]:
        """Lengths that are left out and lengths that are given alike are the same setting."""
        return {"feature_lengths": self.lengths}
