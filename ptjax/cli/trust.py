"""Checks an untrusted config.gin: it may contain only ptjax's own settings and literals.

A gin file is a program: its imports are executed, and `@name()` calls name. That is fine for the
user's own files, but not for the config.gin of a MODEL_DIR that came from elsewhere. This module
parses it first, without importing or calling anything, and rejects it unless every name is on the
lists below.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

from gin import config_parser

from ptjax.data.catalogue import CATALOGUE
from ptjax.errors import InputError

MADE: Mapping[str, tuple[str, ...]] = {
    "ptjax": (
        "Adafactor",
        "Batching",
        "BitFit",
        "ClassLabels",
        "Evaluation",
        "FrequentWords",
        "FromFile",
        "FromText",
        "HardPrompt",
        "IA3",
        "LoRA",
        "Loss",
        "MemberOverrides",
        "ModelTuning",
        "MultitaskPromptTuning",
        "NearestPrompt",
        "PTuning",
        "PerLayerPrompts",
        "PrefixLM",
        "PrefixTuning",
        "PromptTuning",
        "ResidualPromptTuning",
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
        "load_backbone",
        "load_tokenizer",
        "sweep",
        # They contact a server when a run starts, not when they are made.
        "MlflowTracker",
        "WandbTracker",
    ),
    "ptjax.preprocessors": tuple(name.rpartition(".")[2] for name in CATALOGUE),
    # Learning rate schedules: pure functions of numbers.
    "optax": (
        "constant_schedule",
        "cosine_decay_schedule",
        "cosine_onecycle_schedule",
        "exponential_decay",
        "join_schedules",
        "linear_onecycle_schedule",
        "linear_schedule",
        "piecewise_constant_schedule",
        "piecewise_interpolate_schedule",
        "polynomial_schedule",
        "warmup_constant_schedule",
        "warmup_cosine_decay_schedule",
        "warmup_exponential_decay_schedule",
    ),
}
"""The names in each module that may be bound and referenced: what they call at most reads files."""

BOUND: Mapping[str, tuple[str, ...]] = {
    "ptjax": ("pretrain", "tune"),
}
"""The names in each module that may be bound but not referenced: a reference could run them."""

_MACRO = ("gin.macro", "macro", "")
"""Selectors of a macro binding, `NAME = value`."""


class _Reference(NamedTuple):
    """A name after `@`, without its scopes."""

    name: str


class _Names(config_parser.ParserDelegate):
    """Parses references without resolving them."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        del evaluate
        return _Reference(scoped_configurable_name.rpartition("/")[2])

    def macro(self, macro_name: str) -> None:
        del macro_name


def check(stream: IO[str], path: str) -> None:
    """Rejects a gin file that names anything except ptjax's own settings; runs nothing in it.

    Args:
        stream: the open file.
        path: its path, for the message.

    Raises:
        InputError: it imports, includes, binds or refers to something else.
        SyntaxError, tokenize.TokenError: gin cannot parse the file.
    """
    imported: dict[str, str] = {}
    for statement in config_parser.ConfigParser(stream, _Names()):
        problem = _problem(statement, imported)
        if problem:
            raise InputError(
                f"{path}:{statement.location.line_num}: it {problem}, which is not ptjax's own, "
                "and such a file can run any code; if you trust whoever wrote it, add "
                "--trust_config"
            )


def _problem(statement: object, imported: dict[str, str]) -> str | None:
    """Why a statement is rejected, or None. An import is added to `imported`."""
    if isinstance(statement, config_parser.IncludeStatement):
        return f"includes {statement.filename!r}"
    if isinstance(statement, config_parser.ImportStatement):
        module, package = statement.module, statement.module.split(".")[0]
        # `import a.b` binds the name `a`, all other forms bind the module itself.
        whole = statement.is_from or statement.alias
        imported[statement.bound_name()] = module if whole else package
        of_gin = statement.is_from and module == "__gin__.dynamic_registration"
        allowed = of_gin or package == "ptjax" or module == "optax"
        return None if allowed else f"imports {module}"
    if isinstance(statement, config_parser.BindingStatement) and (
        statement.selector not in _MACRO and statement.arg_name
    ):
        if not _is_allowed(statement.selector, imported, bound=True):
            return f"sets {statement.selector}.{statement.arg_name}"
    elif isinstance(statement, config_parser.BlockDeclaration) and not _is_allowed(
        statement.selector, imported, bound=True
    ):
        return f"sets {statement.selector}"
    for reference in _references(getattr(statement, "value", None)):
        if not _is_allowed(reference.name, imported):
            return f"refers to {reference.name}"
    return None


def _references(value: object) -> Iterator[_Reference]:
    if isinstance(value, _Reference):
        yield value
    elif isinstance(value, dict):
        for item in itertools.chain(value.keys(), value.values()):
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _is_allowed(selector: str, imported: Mapping[str, str], *, bound: bool = False) -> bool:
    """Whether a selector, resolved through the file's imports, is on the lists."""
    head, *rest = selector.split(".")
    module, _, name = ".".join([imported.get(head, ""), *rest]).rpartition(".")
    return name in MADE.get(module, ()) or (bound and name in BOUND.get(module, ()))
