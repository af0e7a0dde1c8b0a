"""`plan`: says whether a run fits slices of devices, what a step costs there, and what is best."""

from __future__ import annotations

import ast
import dataclasses
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ptjax.backbones.load import Backbone, check_numerics
from ptjax.backbones.open import open_backbone, would_download
from ptjax.errors import InputError, check_arguments, check_at_least
from ptjax.files import PathLike, gin_configs
from ptjax.models.config import Dtype, Remat, T5Config
from ptjax.models.quantized import Quantization
from ptjax.planning.compiler import Compiler, check_compiler
from ptjax.planning.estimate import Report, count
from ptjax.planning.search import search as search_configurations
from ptjax.planning.show import make_console, show_run, show_slice
from ptjax.planning.slices import Slice, default_cache, find_slices
from ptjax.planning.workload import ParallelConfig, PlannedBackbone, StepSpec, resolve
from ptjax.settings import RunSettings
from ptjax.sharding.attention import Attention


class Planning(TypedDict, total=False):
    """How a slice is planned for.

    Attributes:
        quick: count only: seconds, no compiler, no verdict; default: False.
        search: whether to try other configurations than the run's own; default: True.
        exact: for TPUs, compile with the full effort of a real run; default: False.
        timeout_seconds: the limit for one compilation; default: 900.
        cache_dir: the folder that caches results; None or '' caches none; default:
            `default_cache`.
    """

    quick: bool
    search: bool
    exact: bool
    timeout_seconds: int
    cache_dir: PathLike | None


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """The result of `plan` for a run. As text, it is what `python -m ptjax.plan` prints.

    Attributes:
        spec: the train step that was planned.
        slices: the report for each slice by its name; see `plan_slice`.
    """

    spec: StepSpec
    slices: dict[str, Report]

    def __str__(self) -> str:
        text = io.StringIO()
        console = make_console(text)
        for i, report in enumerate(self.slices.values()):
            if i == 0:
                show_run(console, self.spec, counted(report))
            show_slice(console, report)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    __repr__ = __str__


def plan(
    backbone: Backbone | T5Config | PathLike,
    slices: str | Iterable[str],
    settings: RunSettings | None = None,
    *,
    members: int | None = None,
    mesh: str = "auto",
    fsdp: bool = False,
    quantize: Quantization | None = None,
    attention: Attention = "auto",
    scan_layers: bool | None = None,
    remat: Remat | None = None,
    dtype: Dtype | None = None,
    **planning: Unpack[Planning],
) -> Plan:
    """Says whether a run fits slices of TPUs or GPUs, what a step costs there, and what is best.

    As `python -m ptjax.plan`: no weights, no data and no such device are needed. By default the
    train step is compiled for the slice, in a process of its own; this one is left as it is.

    Examples:
        >>> print(plan("t5_1_1_xxl", "v5e-8", quick=True))  # doctest: +SKIP

    Args:
        backbone: a loaded backbone, a `T5Config`, the path of a checkpoint (only its headers are
            read), or the name of a model whose sizes ptjax has, such as "t5_1_1_xxl".
        slices: "v5e-8", "v4-16", "h100x8", ...; several with commas, or a list.
        settings: of the run; default: `RunSettings()`.
        members: the number of prompts that a sweep trains; default: an ordinary run.
        mesh, fsdp, quantize, attention: as for `load_backbone`; the run's own configuration.
        scan_layers, remat: as in `T5Config`; default: those of the network.
        dtype: as for `load_backbone`; default: that of a `T5Config`, else bfloat16, which is the
            default on TPUs and GPUs.
        planning: quick (count only: seconds, without compiler and verdict), search (False compiles
            the run's own configuration alone), exact (for TPUs: the full effort of a real run),
            timeout_seconds (of one compilation, 900) and cache_dir (of results; None caches none).

    Raises:
        InputError: nothing gives the network's sizes, a slice is unknown, its compiler is not
            installed, or the settings contradict each other.
    """
    check_arguments("plan", planning, Planning.__optional_keys__)
    settings = RunSettings() if settings is None else settings
    check_numerics(dtype or "bfloat16", quantize, attention)
    config = find_config(backbone, dtype)
    given = {"scan_layers": scan_layers, "remat": remat}
    changes = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, **changes)
    parallel = ParallelConfig(
        mesh, fsdp, config.scan_layers, config.remat, quantize, attention=attention
    )
    spec = make_spec(config, settings, parallel, members)
    chosen = find_slices([slices] if isinstance(slices, str) else slices)
    check_planning(chosen, **planning)
    return Plan(spec, {x.name: plan_slice(spec, parallel, x, **planning) for x in chosen})


def find_config(backbone: Backbone | T5Config | PathLike, dtype: Dtype | None) -> T5Config:
    """Returns the config of the network to plan for; arguments as for `plan`.

    Raises:
        InputError: the network is not a T5, or the path holds none or would be downloaded.
    """
    if isinstance(backbone, T5Config):
        return backbone if dtype is None else dataclasses.replace(backbone, dtype=dtype)
    if isinstance(backbone, Backbone):
        if not isinstance(backbone.config, T5Config):
            raise InputError(f"{backbone.name} is not a T5, and only a T5 can be planned")
        return dataclasses.replace(backbone.config, dtype=dtype or "bfloat16")
    if not isinstance(backbone, str | os.PathLike):
        given = type(backbone).__name__
        raise InputError(f"which T5? Give a backbone, a T5Config, a path or a name, not a {given}")
    path = os.fspath(backbone)
    if (sizes := model_sizes(path)) is not None:
        return T5Config(**sizes, dtype=dtype or "bfloat16")
    return read_config(path, dtype or "bfloat16")


def read_config(path: str, dtype: str, **overrides: Any) -> T5Config:
    """Reads the config of a checkpoint from its headers.

    Args:
        overrides: as for `load_backbone`.

    Raises:
        InputError: the path holds no backbone, or planning would have to download it.
    """
    if would_download(path):
        names = ", ".join(sorted(file.stem for file in gin_configs().glob("models/t5_1_1_*.gin")))
        raise InputError(
            f"{path} is not on this machine, and planning downloads no weights; add its "
            "sizes instead (--gin_file=models/t5_1_1_xxl.gin or the like; in Python a T5Config or "
            f"one of {names}, ...)"
        )
    return open_backbone(path, dtype=dtype, **overrides).config


_SIZE = re.compile(r"^ptjax\.T5Config\.(\w+) = (.+)$", re.MULTILINE)


def model_sizes(name: str) -> dict[str, Any] | None:
    """Returns the fields of `T5Config` in ptjax's gin file `models/NAME.gin`; None without one."""
    file = gin_configs() / f"models/{name}.gin"
    if not re.fullmatch(r"\w+", name) or not file.exists():
        return None
    return {field: ast.literal_eval(value) for field, value in _SIZE.findall(file.read_text())}


def make_spec(
    config: T5Config, settings: RunSettings, parallel: ParallelConfig, members: int | None
) -> StepSpec:
    """Describes the train step of a run, and checks that its method suits the network.

    Raises:
        InputError: the settings contradict each other.
    """
    check_at_least(1, members=members)
    spec = StepSpec.from_settings(config, settings, members)
    settings.method.check(PlannedBackbone(config, parallel.quantize), settings.batching)
    return spec


def check_planning(slices: Iterable[Slice], **planning: Unpack[Planning]) -> None:
    """Raises InputError for a bad setting, or if the compiler of a slice is needed and missing."""
    check_at_least(1, timeout_seconds=planning.get("timeout_seconds"))
    if not planning.get("quick"):
        for slice_ in slices:
            check_compiler(slice_)


def plan_slice(
    spec: StepSpec, parallel: ParallelConfig, slice_: Slice, **planning: Unpack[Planning]
) -> Report:
    """Makes the plan for one slice; unless it is quick, it compiles the step.

    Args:
        spec: the result of `make_spec`.
        parallel: the run's own configuration.

    Returns:
        "slice": the name of the slice; "own": the report for the run's own configuration; "tried":
        the reports for other configurations that were compiled; "best": the report for the best
        configuration that fits, or None; "searched": whether other configurations were tried.
    """
    quick = planning.get("quick", False)
    searched = planning.get("search", True) and not quick
    plan: Report = {"slice": slice_.name, "own": {}, "searched": searched, "tried": []}
    plan["best"] = None
    cache = planning.get("cache_dir", default_cache())
    compiler = Compiler(
        spec,
        slice_,
        exact=planning.get("exact", False),
        timeout=planning.get("timeout_seconds", 900),
        cache=Path(cache).expanduser() if cache else None,
    )
    try:
        parallel = resolve(spec, parallel, slice_)
    except InputError as error:
        plan["own"] = {"verdict": "refused", "reason": str(error)}
    else:
        plan["own"] = count(spec, parallel, slice_) if quick else compiler(parallel)
    if not searched:
        return plan
    tried, best = search_configurations(
        spec, slice_, parallel.quantize, compiler, parallel.attention
    )
    return plan | {"tried": tried, "best": best}


def counted(plan: Report) -> Report | None:
    """Returns a report in a slice's plan that has counts of parameters and FLOPs, if any."""
    reports = (plan["own"], *plan["tried"])
    return next((report for report in reports if "flops" in report), None)
