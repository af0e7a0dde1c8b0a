"""Model tuning: all weights of the backbone train."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class ModelTuning:
    """All weights train, in float32; there is no prompt."""

    name: ClassVar[str] = "model_tuning"
