"""Soft prompt tuning of frozen T5 models in JAX.

Names are resolved on first use: importing ptjax imports neither JAX nor anything heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ptjax.backbone import Backbone, load_backbone, save_backbone
    from ptjax.data.tasks import Task
    from ptjax.errors import InputError
    from ptjax.inference import forward, generate, loss_and_prompt_gradient
    from ptjax.interop.prompt_file import load_prompt, load_prompts, save_prompt
    from ptjax.models.module_family import flax_module
    from ptjax.prompting import make_bank
    from ptjax.tuning import tune

_HOMES = {
    "Backbone": "ptjax.backbone",
    "InputError": "ptjax.errors",
    "Task": "ptjax.data.tasks",
    "flax_module": "ptjax.models.module_family",
    "forward": "ptjax.inference",
    "generate": "ptjax.inference",
    "load_backbone": "ptjax.backbone",
    "load_prompt": "ptjax.interop.prompt_file",
    "load_prompts": "ptjax.interop.prompt_file",
    "loss_and_prompt_gradient": "ptjax.inference",
    "make_bank": "ptjax.prompting",
    "save_backbone": "ptjax.backbone",
    "save_prompt": "ptjax.interop.prompt_file",
    "tune": "ptjax.tuning",
}

__all__ = [
    "Backbone",
    "InputError",
    "Task",
    "flax_module",
    "forward",
    "generate",
    "load_backbone",
    "load_prompt",
    "load_prompts",
    "loss_and_prompt_gradient",
    "make_bank",
    "save_backbone",
    "save_prompt",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
