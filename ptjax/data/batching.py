"""The settings that determine how examples are batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ptjax.data.pipeline import Bucket
from ptjax.errors import InputError, check_at_least
from ptjax.files import JsonObject

FEATURE_LENGTHS: Mapping[str, int] = MappingProxyType({"inputs": 512, "targets": 16})
"""Default lengths of inputs and targets in tokens, EOS included."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples are batched.

    Attributes:
        batch_size: examples per step.
        microbatches: number of parts of a batch that are computed one after another.
        feature_lengths: T5X's {"inputs": T, "targets": L}, EOS included; longer texts are
            truncated, counted and reported. A missing length is taken from `FEATURE_LENGTHS`.
        buckets: batch shapes (T, L); None uses input lengths that double from 32.
        pack: put several short examples into a row; the number of examples per batch is the same.
        row_length: T of packed rows, including the prompt's positions if it attends to its input;
            None chooses it automatically.
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
                f"BATCH_SIZE ({self.batch_size}) must be divisible by MICROBATCHES "
                f"({self.microbatches})"
            )
        if unknown := sorted(set(self.feature_lengths or {}) - set(FEATURE_LENGTHS)):
            raise InputError(f"TASK_FEATURE_LENGTHS has {unknown[0]!r}, not 'inputs' or 'targets'")

    @property
    def lengths(self) -> dict[str, int]:
        """The feature lengths, {"inputs": T, "targets": L}, with the defaults filled in."""
        return {**FEATURE_LENGTHS, **(self.feature_lengths or {})}

    def identity(self) -> JsonObject:
        """Returns the field values that identify a run, where they differ from the fields' own.

        Default lengths and the same lengths given explicitly count as the same setting.
        """
        return {"feature_lengths": self.lengths}
