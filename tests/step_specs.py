"""Runs to plan and to compile for."""

from __future__ import annotations

import dataclasses
from typing import Any

from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.models.config import T5Config
from ptjax.planning.slices import parse_slice
from ptjax.planning.workload import StepSpec
from ptjax.settings import RunSettings
from ptjax.training.compile import StepConfig
from ptjax.training.loss import Loss
from ptjax.training.optimizer import Adafactor

STEP_CONFIG = StepConfig(Adafactor(), Loss())
SIZES = {
    "small": T5Config(32128, 512, 6, 8, 8, 64, 1024, dtype="bfloat16"),
    "xl": T5Config(32128, 2048, 32, 24, 24, 64, 5120, dtype="bfloat16"),
    "xxl": T5Config(32128, 4096, 64, 24, 24, 64, 10240, dtype="bfloat16"),
}
XXL = StepSpec.from_settings(SIZES["xxl"], RunSettings())
# Every kind of weight, in T5's own widths of heads: with 32 and 84 positions, which no T5 has,
# libtpu 0.0.42.1 crashes when it compiles for tpu7x.
TOY = StepSpec(
    T5Config(512, 256, 8, 2, 2, 64, 512, dtype="bfloat16"),
    STEP_CONFIG,
    PromptTuning(length=20),
    batch_size=16,
    inputs=108,
    targets=16,
)
V5E = parse_slice("v5e-8")


def changed(spec: StepSpec, **step_config: object) -> StepSpec:
    return dataclasses.replace(
        spec, step_config=dataclasses.replace(spec.step_config, **step_config)
    )


def blind(spec: StepSpec) -> StepSpec:
    """With a prompt of the same length that does not see its input."""
    method: Any = spec.method
    return dataclasses.replace(spec, method=PromptTuning(method.length, attends_to_input=False))
