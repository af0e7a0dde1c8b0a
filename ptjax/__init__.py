"""Soft prompt tuning of frozen T5 models in JAX.

Names are resolved on first use, so `import ptjax` is fast and does not import JAX. Gin files use
the same names after `import ptjax`: `ptjax.RunSettings.seed = 3`, `@ptjax.Task()`.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone, load_backbone
    from ptjax.backbones.save import save_backbone
    from ptjax.data import catalogue as preprocessors
    from ptjax.data.batching import Batching
    from ptjax.data.hard_prompt import HardPrompt
    from ptjax.data.mixture import (
        MixtureComponent,
        PrefixLM,
        SpanCorruption,
        TaskComponent,
        TextFiles,
        TokenFile,
    )
    from ptjax.data.tasks import Task
    from ptjax.data.tokenizer import load_tokenizer
    from ptjax.errors import InputError
    from ptjax.evaluation.evaluate import evaluate
    from ptjax.inference.bank import make_bank
    from ptjax.inference.export_prompt import export
    from ptjax.inference.forward import forward, loss_and_prompt_gradient
    from ptjax.inference.generate import generate
    from ptjax.inference.infer import infer, predict
    from ptjax.inference.predict import Prediction
    from ptjax.interop.multitask import MultitaskPrompts, load_multitask
    from ptjax.interop.prompt_file import load_prompt, load_prompts, save_prompt
    from ptjax.methods.adapter import Adapter, load_adapter
    from ptjax.methods.base import InitContext, Method
    from ptjax.methods.bitfit import BitFit
    from ptjax.methods.from_file import FromFile
    from ptjax.methods.ia3 import IA3
    from ptjax.methods.initializers import (
        ClassLabels,
        FrequentWords,
        FromText,
        SampledVocabulary,
        Uniform,
    )
    from ptjax.methods.lora import LoRA
    from ptjax.methods.model_tuning import ModelTuning
    from ptjax.methods.multitask import MultitaskPromptTuning
    from ptjax.methods.nearest_prompt import NearestPrompt, prompt_similarity
    from ptjax.methods.p_tuning import PTuning
    from ptjax.methods.per_layer import PerLayerPrompts
    from ptjax.methods.prefix_tuning import PrefixTuning
    from ptjax.methods.prompt_tuning import PromptTuning
    from ptjax.methods.residual import ResidualPromptTuning
    from ptjax.models.config import T5Config
    from ptjax.models.module_family import flax_module
    from ptjax.planning.plan import plan
    from ptjax.reports.report import Comparison, Report
    from ptjax.settings import Evaluation, RunSettings, TrainSchedule
    from ptjax.trainer.callbacks import Callback
    from ptjax.trainer.pretrain import pretrain
    from ptjax.trainer.suggest import suggest_settings
    from ptjax.trainer.sweep import MemberOverrides, sweep
    from ptjax.trainer.trackers import MlflowTracker, WandbTracker
    from ptjax.trainer.tune import Run, tune
    from ptjax.training.loss import Loss
    from ptjax.training.optimizer import Adafactor

_HOMES = {
    "Adafactor": "ptjax.training.optimizer",
    "Adapter": "ptjax.methods.adapter",
    "Backbone": "ptjax.backbones.load",
    "Batching": "ptjax.data.batching",
    "BitFit": "ptjax.methods.bitfit",
    "Callback": "ptjax.trainer.callbacks",
    "ClassLabels": "ptjax.methods.initializers",
    "Comparison": "ptjax.reports.report",
    "Evaluation": "ptjax.settings",
    "FrequentWords": "ptjax.methods.initializers",
    "FromFile": "ptjax.methods.from_file",
    "FromText": "ptjax.methods.initializers",
    "HardPrompt": "ptjax.data.hard_prompt",
    "IA3": "ptjax.methods.ia3",
    "InitContext": "ptjax.methods.base",
    "InputError": "ptjax.errors",
    "LoRA": "ptjax.methods.lora",
    "Loss": "ptjax.training.loss",
    "MemberOverrides": "ptjax.trainer.sweep",
    "Method": "ptjax.methods.base",
    "MixtureComponent": "ptjax.data.mixture",
    "MlflowTracker": "ptjax.trainer.trackers",
    "ModelTuning": "ptjax.methods.model_tuning",
    "MultitaskPromptTuning": "ptjax.methods.multitask",
    "MultitaskPrompts": "ptjax.interop.multitask",
    "NearestPrompt": "ptjax.methods.nearest_prompt",
    "PTuning": "ptjax.methods.p_tuning",
    "PerLayerPrompts": "ptjax.methods.per_layer",
    "Prediction": "ptjax.inference.predict",
    "PrefixLM": "ptjax.data.mixture",
    "PrefixTuning": "ptjax.methods.prefix_tuning",
    "PromptTuning": "ptjax.methods.prompt_tuning",
    "Report": "ptjax.reports.report",
    "ResidualPromptTuning": "ptjax.methods.residual",
    "Run": "ptjax.trainer.tune",
    "RunSettings": "ptjax.settings",
    "SampledVocabulary": "ptjax.methods.initializers",
    "SpanCorruption": "ptjax.data.mixture",
    "T5Config": "ptjax.models.config",
    "Task": "ptjax.data.tasks",
    "TaskComponent": "ptjax.data.mixture",
    "TextFiles": "ptjax.data.mixture",
    "TokenFile": "ptjax.data.mixture",
    "TrainSchedule": "ptjax.settings",
    "Uniform": "ptjax.methods.initializers",
    "WandbTracker": "ptjax.trainer.trackers",
    "evaluate": "ptjax.evaluation.evaluate",
    "export": "ptjax.inference.export_prompt",
    "flax_module": "ptjax.models.module_family",
    "forward": "ptjax.inference.forward",
    "generate": "ptjax.inference.generate",
    "infer": "ptjax.inference.infer",
    "load_adapter": "ptjax.methods.adapter",
    "load_backbone": "ptjax.backbones.load",
    "load_multitask": "ptjax.interop.multitask",
    "load_prompt": "ptjax.interop.prompt_file",
    "load_prompts": "ptjax.interop.prompt_file",
    "load_tokenizer": "ptjax.data.tokenizer",
    "loss_and_prompt_gradient": "ptjax.inference.forward",
    "make_bank": "ptjax.inference.bank",
    "plan": "ptjax.planning.plan",
    "predict": "ptjax.inference.infer",
    "pretrain": "ptjax.trainer.pretrain",
    "prompt_similarity": "ptjax.methods.nearest_prompt",
    "save_backbone": "ptjax.backbones.save",
    "save_prompt": "ptjax.interop.prompt_file",
    "suggest_settings": "ptjax.trainer.suggest",
    "sweep": "ptjax.trainer.sweep",
    "tune": "ptjax.trainer.tune",
}
_MODULES = {"preprocessors": "ptjax.data.catalogue"}

__all__ = [
    "IA3",
    "Adafactor",
    "Adapter",
    "Backbone",
    "Batching",
    "BitFit",
    "Callback",
    "ClassLabels",
    "Comparison",
    "Evaluation",
    "FrequentWords",
    "FromFile",
    "FromText",
    "HardPrompt",
    "InitContext",
    "InputError",
    "LoRA",
    "Loss",
    "MemberOverrides",
    "Method",
    "MixtureComponent",
    "MlflowTracker",
    "ModelTuning",
    "MultitaskPromptTuning",
    "MultitaskPrompts",
    "NearestPrompt",
    "PTuning",
    "PerLayerPrompts",
    "Prediction",
    "PrefixLM",
    "PrefixTuning",
    "PromptTuning",
    "Report",
    "ResidualPromptTuning",
    "Run",
    "RunSettings",
    "SampledVocabulary",
    "SpanCorruption",
    "T5Config",
    "Task",
    "TaskComponent",
    "TextFiles",
    "TokenFile",
    "TrainSchedule",
    "Uniform",
    "WandbTracker",
    "evaluate",
    "export",
    "flax_module",
    "forward",
    "generate",
    "infer",
    "load_adapter",
    "load_backbone",
    "load_multitask",
    "load_prompt",
    "load_prompts",
    "load_tokenizer",
    "loss_and_prompt_gradient",
    "make_bank",
    "plan",
    "predict",
    "preprocessors",
    "pretrain",
    "prompt_similarity",
    "save_backbone",
    "save_prompt",
    "suggest_settings",
    "sweep",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _MODULES:
        raise AttributeError(f"module 'ptjax' has no attribute {name!r}")
    importlib.import_module("ptjax.messages").show()
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])


class _Package(types.ModuleType):
    """Keeps `ptjax.pretrain` the function after the module `ptjax.pretrain` is imported.

    Importing a submodule binds it as an attribute of its package, which would hide the public name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
