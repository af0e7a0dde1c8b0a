"""LoRA and IA3 adapters of Hugging Face PEFT for a T5: reads and writes their directories.

PEFT computes what ptjax computes: W x + (lora_alpha / r) B A x, and products with vectors. Its
`torch.nn.Linear` has weights [out, in], so its A [r, in] and B [out, r] are transposed here. An
adapter that holds or does anything else is refused.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from etils import epath

from ptjax.errors import InputError, check_path
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.interop import peft, prompt_header, safetensors_file
from ptjax.interop.lazy_array import LazyArray
from ptjax.interop.peft_prefix import load_peft_prefix
from ptjax.models.stacking import split_path
from ptjax.models.t5_family import T5_FAMILY

ADAPTERS, PREFIX = ("LORA", "IA3"), "PREFIX_TUNING"
_PREFIX = "base_model.model."
_A, _B, _SCALE = "lora_A.weight", "lora_B.weight", "ia3_l"
# The entries of PEFT's config that do not change what the trained adapter computes, or that are
# read below. Any other entry with a value is refused: it may be of a variant of LoRA.
_HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "target_modules", "exclude_modules", "eva_config"),
    *("layers_pattern", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *(
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "feedforward_modules",
        "init_ia3_weights",
    ),
}
_VARIANTS = {
    "use_dora": "DoRA scales the whole kernel",
    "bias": "it trained biases too, which a T5 does not have",
    "lora_bias": "it trained biases too, which a T5 does not have",
    "modules_to_save": "parts of the backbone were trained with it",
    "layers_to_transform": "it changes some of the layers only",
    "rank_pattern": "its ranks differ from module to module",
    "alpha_pattern": "its alphas differ from module to module",
}
# Others change the backbone's kernels too, before the adapter is trained.
_STARTS = (None, True, False, "gaussian", "eva")


def is_peft_adapter(path: PathLike) -> bool:
    """Whether `path` is a directory that PEFT wrote for LoRA, IA3 or a prefix."""
    return peft.is_peft(path) and peft.method_of(path) in (*ADAPTERS, PREFIX)


def load_peft_adapter(directory: PathLike) -> peft.PeftAdapter:
    """Reads a LoRA or IA3 adapter or a prefix (`peft_prefix`) for a T5 from a PEFT directory.

    With `use_rslora`, PEFT scales by lora_alpha / sqrt(r): `alpha` is that times r.

    Raises:
        InputError: a file is missing or damaged or has another format; the adapter is of another
            method, another network or a variant of LoRA; or its tensors do not fit its config.
    """
    directory = epath.Path(directory)
    if peft.method_of(directory) == PREFIX:
        return load_peft_prefix(directory)
    file, weights = directory / peft.CONFIG, directory / peft.WEIGHTS
    config = peft.read_config(file)
    _check(config, file)
    if not weights.exists():
        raise InputError(
            f"{directory}: {peft.WEIGHTS} is missing; load the adapter with PEFT and save it again"
        )
    tensors, header = safetensors_file.open_safetensors(weights)
    lora = config["peft_type"] == "LORA"
    arrays = _lora_arrays(tensors, config, file, weights) if lora else _ia3_arrays(tensors, weights)
    if not arrays:
        raise InputError(f"{weights}: the file is empty")
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{weights}: the array of {path} is not finite")
    metadata = peft.read_metadata(config, header)
    prompt_header.check_types(metadata, os.fspath(weights))
    if lora:
        rank = peft.size_of(config, "r", 8, file)
        alpha = _number(config, "lora_alpha", 8, file)
        fields: JsonObject = {
            "rank": rank,
            "alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
            "dropout": _number(config, "lora_dropout", 0.0, file),
            "targets": _our_targets(_modules(arrays, "a")),
        }
        return peft.PeftAdapter("lora", fields, _in("lora", arrays), metadata)
    fields = {side: _our_targets(_modules(arrays, side)) for side in ("outputs", "inputs")}
    return peft.PeftAdapter("ia3", fields, _in("ia3", arrays), metadata)


def export_peft_lora(
    directory: PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    base_model: str | None = None,
    revision: str | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Writes a LoRA adapter as a directory that `peft.PeftModel.from_pretrained` loads.

    Args:
        arrays: as in `PeftAdapter.arrays`.
        rank, alpha, dropout: the fields of `ptjax.LoRA`.
        base_model, revision, metadata: as for `peft.export_peft`.
    """
    check_path("the path of the PEFT directory", directory)
    bare = _bare(arrays)
    config = {
        **_common("LORA", base_model, revision),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "r": rank,
        "target_modules": _their_targets(_modules(bare, "a")),
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for path, array in bare.items():
        module, _, name = path.rpartition("/")
        tensors[f"{_PREFIX}{_their_module(module)}.{_A if name == 'a' else _B}"] = array.T
    peft.write_directory(directory, config, dict(sorted(tensors.items())), metadata)


def export_peft_ia3(
    directory: PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Writes an IA3 adapter as such a directory.

    Args:
        arrays: as in `PeftAdapter.arrays`.
        base_model, revision, metadata: as for `peft.export_peft`.

    Raises:
        InputError: the outputs and the inputs of one linear map are scaled, which PEFT cannot do.
    """
    check_path("the path of the PEFT directory", directory)
    bare = _bare(arrays)
    outputs, inputs = (_modules(bare, side) for side in ("outputs", "inputs"))
    if both := sorted(set(outputs) & set(inputs)):
        raise InputError(
            "PEFT scales either the outputs or the inputs of a linear map, and this IA3 both of "
            f"{both[0]}; --to=safetensors keeps both"
        )
    # PEFT takes these for the ends of names, without a dot before them: "o" would also be "wo".
    feed_forward = _their_targets(inputs, never="o")
    config = {
        **_common("IA3", base_model, revision),
        "feedforward_modules": feed_forward,
        "init_ia3_weights": True,
        "target_modules": [*_their_targets(outputs), *feed_forward],
    }
    tensors = {}
    for path, array in bare.items():
        module, _, side = path.rpartition("/")
        shape = (-1, 1) if side == "outputs" else (1, -1)
        tensors[f"{_PREFIX}{_their_module(module)}.{_SCALE}"] = array.reshape(shape)
    peft.write_directory(directory, config, dict(sorted(tensors.items())), metadata)


def _in(collection: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{collection}/{path}": arrays[path] for path in sorted(arrays)}


def _bare(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 arrays by path without the collection; inverse of `_in`."""
    return {path.partition("/")[2]: np.asarray(x, np.float32) for path, x in arrays.items()}


def _common(method: str, base_model: str | None, revision: str | None) -> JsonObject:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": method,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
    }


def _check(config: Metadata, file: epath.Path) -> None:
    """InputError unless the config is that of plain LoRA or IA3 for an encoder-decoder."""
    if config.get("peft_type") not in ADAPTERS:
        raise InputError(
            f"{file}: peft_type is {config.get('peft_type')!r}; ptjax reads LORA, IA3 and "
            "PREFIX_TUNING as adapters, and PROMPT_TUNING and P_TUNING as prompts (--prompt)"
        )
    if config.get("task_type") not in (None, "SEQ_2_SEQ_LM"):
        raise InputError(
            f"{file}: task_type is {config['task_type']}; ptjax reads adapters of a T5 "
            "(SEQ_2_SEQ_LM) only"
        )
    if (start := config.get("init_lora_weights")) not in _STARTS:
        raise InputError(
            f"{file}: init_lora_weights is {start!r}, which changes the backbone's kernels too; in "
            "PEFT, save it with path_initial_model_for_weight_conversion to get plain LoRA"
        )
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, "none", {}, [], ""):
            why = _VARIANTS.get(key, "ptjax does not know it, and it may change the adapter")
            raise InputError(f"{file}: {key} is {value!r}: {why}; ptjax reads plain LoRA and IA3")


def _lora_arrays(
    tensors: Mapping[str, LazyArray], config: Metadata, file: epath.Path, weights: epath.Path
) -> dict[str, np.ndarray]:
    """Arrays [in, r] and [r, out] by path, "encoder/layers_0/attention/query/a"."""
    rank, arrays = peft.size_of(config, "r", 8, file), {}
    for name, tensor in tensors.items():
        module, ending = _our_module(name, (_A, _B), weights)
        axis = 0 if ending == _A else 1
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            raise InputError(
                f"{weights}: {name} has shape {list(tensor.shape)}, but {peft.CONFIG} says r {rank}"
            )
        arrays[f"{module}/{'ba'[ending == _A]}"] = tensor.read_all().astype(np.float32).T
    for path in arrays:
        other = path[:-1] + {"a": "b", "b": "a"}[path[-1]]
        if other not in arrays:
            raise InputError(f"{weights}: it has {path}, but not {other}; the file is incomplete")
    return arrays


def _ia3_arrays(tensors: Mapping[str, LazyArray], weights: epath.Path) -> dict[str, np.ndarray]:
    """Vectors by path, "encoder/layers_0/mlp/wo/inputs"."""
    arrays = {}
    for name, tensor in tensors.items():
        module, _ = _our_module(name, (_SCALE,), weights)
        if len(tensor.shape) != 2 or sorted(tensor.shape)[0] != 1 or max(tensor.shape) == 1:
            raise InputError(
                f"{weights}: {name} has shape {list(tensor.shape)}; a vector of IA3 has [n, 1] or "
                "[1, n]"
            )
        side = "outputs" if tensor.shape[1] == 1 else "inputs"
        arrays[f"{module}/{side}"] = tensor.read_all().astype(np.float32).reshape(-1)
    return arrays


@functools.cache
def _rules() -> dict[str, str]:
    """PEFT's name of each linear map -> ptjax's, with `{i}` for the number of the layer."""
    return {
        rule.theirs.removesuffix(".weight"): rule.ours.removesuffix("/kernel")
        for rule in T5_FAMILY.tensor_names({})
        if rule.ours.endswith("/kernel")
    }


def _our_module(name: str, endings: Iterable[str], weights: epath.Path) -> tuple[str, str]:
    """(the module's path in ptjax, which of `endings`) of one of PEFT's tensors."""
    for ending in endings:
        if not (name.startswith(_PREFIX) and name.endswith(f".{ending}")):
            continue
        module = name.removeprefix(_PREFIX).removesuffix(f".{ending}")
        # As many digits as a layer's number may have: a longer one belongs to no network.
        number = re.search(r"\.block\.(0|[1-9]\d{0,4})\.", module)
        general = module.replace(number[0], ".block.{i}.", 1) if number else module
        if general in _rules():
            return _rules()[general].format(i=number and number[1]), ending
    raise InputError(
        f"{weights}: the tensor {name} belongs to no linear map of a T5; if it is an embedding, "
        "save the adapter again with save_embedding_layers=False"
    )


def _their_module(module: str) -> str:
    """PEFT's name of the linear map "encoder/layers_0/attention/query"."""
    general, layer = _general(module)
    return {ours: theirs for theirs, ours in _rules().items()}[general].format(i=layer)


def _general(module: str) -> tuple[str, int | None]:
    """("encoder/layers_{i}/attention/query", 0), or a path without `{i}` and None."""
    stacked, layer = split_path(f"{module}/")
    return stacked.rstrip("/").replace("/layers/", "/layers_{i}/"), layer


def _modules(paths: Iterable[str], name: str) -> list[str]:
    """The modules that have an array `name`, from the arrays' paths."""
    return [path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == name]


def _our_targets(modules: Iterable[str]) -> list[str]:
    """The targets that choose these modules in all layers: "query", or longer paths."""
    chosen = {_general(module)[0] for module in modules}
    short, rest = _named_alike(chosen, _rules().values(), "/")
    return [*short, *(path.replace("layers_{i}", "layers") for path in rest)]


def _their_targets(modules: Iterable[str], never: str = "") -> list[str]:
    """The same for PEFT: "q", or whole names. The short name `never` is not used."""
    names = [_their_module(module) for module in modules]
    generals = {re.sub(r"\.block\.\d+\.", ".block.{i}.", name) for name in names}
    short, _ = _named_alike(generals, _rules(), ".")
    short = [name for name in short if name != never]
    return [*short, *(name for name in names if name.rpartition(".")[2] not in short)]


def _named_alike(
    chosen: Collection[str], known: Iterable[str], separator: str
) -> tuple[list[str], list[str]]:
    """(the last names of which all `known` paths are chosen, the other chosen paths)."""
    by_name: dict[str, list[str]] = {}
    for path in known:
        by_name.setdefault(path.rpartition(separator)[2], []).append(path)
    short = sorted(name for name, paths in by_name.items() if set(paths) <= set(chosen))
    return short, sorted(path for path in chosen if path.rpartition(separator)[2] not in short)


def _number(config: Metadata, key: str, default: float, file: epath.Path) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{file}: {key} must be a number, got {value!r}")
    return float(value)
