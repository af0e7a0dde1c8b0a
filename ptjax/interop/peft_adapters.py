"""LoRA, IA3 and LN_TUNING adapters of Hugging Face PEFT for a T5: reads and writes their files.

PEFT computes what ptjax computes: W x + (lora_alpha / r) B A x, products with vectors, and norms
with trained copies of their scales, which is BitFit. Its `torch.nn.Linear` has weights [out, in],
so its A [r, in] and B [out, r] are transposed here. An adapter that holds or does anything else is
refused.
"""

from __future__ import annotations

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
from ptjax.interop.peft_names import ROOT, general_name, module_names, our_module, their_module
from ptjax.interop.peft_prefix import load_peft_prefix

_METHODS = {"LORA": "lora", "IA3": "ia3", "LN_TUNING": "bitfit"}
_PREFIX_TUNING = "PREFIX_TUNING"
_A, _B, _SCALE, _NORM = "lora_A.weight", "lora_B.weight", "ia3_l", "ln_tuning_layers.weight"
# The ends of the names of all norms of a T5; PEFT's default for it.
_NORMS = ("final_layer_norm", "layer_norm")
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
    """Whether `path` is a directory that PEFT wrote for LoRA, IA3, norms or a prefix."""
    return peft.is_peft(path) and peft.method_of(path) in (*_METHODS, _PREFIX_TUNING)


def load_peft_adapter(directory: PathLike) -> peft.PeftAdapter:
    """Reads a LoRA, IA3 or LN_TUNING adapter or a prefix (`peft_prefix`) for a T5 from a directory.

    With `use_rslora`, PEFT scales by lora_alpha / sqrt(r): `alpha` is that times r.

    Raises:
        InputError: a file is missing or damaged or has another format; the adapter is of another
            method, another network or a variant of LoRA; its tensors do not fit its config; or
            only some of the norms were trained.
    """
    directory = epath.Path(directory)
    if peft.method_of(directory) == _PREFIX_TUNING:
        return load_peft_prefix(directory)
    weights, config = directory / peft.WEIGHTS, peft.read_config(directory / peft.CONFIG)
    _check(config, directory / peft.CONFIG)
    if not weights.exists():
        raise InputError(
            f"{directory}: {peft.WEIGHTS} is missing; load the adapter with PEFT and save it again"
        )
    tensors, header = safetensors_file.open_safetensors(weights)
    if not tensors:
        raise InputError(f"{weights}: the file is empty")
    method = _METHODS[config["peft_type"]]
    read = {"lora": _read_lora, "ia3": _read_ia3, "bitfit": _read_norms}[method]
    fields, arrays = read(tensors, config, directory)
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{weights}: the array of {path} is not finite")
    metadata = peft.read_metadata(config, header)
    prompt_header.check_types(metadata, os.fspath(weights))
    return peft.PeftAdapter(method, fields, _in(method, arrays), metadata)


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
        "fan_in_fan_out": False,
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
        ending = _A if name == "a" else _B
        tensors[f"{ROOT}{their_module(module, 'kernel')}.{ending}"] = array.T
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
        "fan_in_fan_out": False,
        "feedforward_modules": feed_forward,
        "init_ia3_weights": True,
        "target_modules": [*_their_targets(outputs), *feed_forward],
    }
    tensors = {}
    for path, array in bare.items():
        module, _, side = path.rpartition("/")
        shape = (-1, 1) if side == "outputs" else (1, -1)
        tensors[f"{ROOT}{their_module(module, 'kernel')}.{_SCALE}"] = array.reshape(shape)
    peft.write_directory(directory, config, dict(sorted(tensors.items())), metadata)


def export_peft_norms(
    directory: PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Writes the scales of all norms as such a directory, of PEFT's method LN_TUNING.

    Args:
        arrays: as in `PeftAdapter.arrays`.
        base_model, revision, metadata: as for `peft.export_peft`.
    """
    check_path("the path of the PEFT directory", directory)
    # PEFT has no default for umT5.
    config = {**_common("LN_TUNING", base_model, revision), "target_modules": list(_NORMS)}
    tensors = {
        f"{ROOT}{their_module(path.removesuffix('/scale'), 'scale')}.{_NORM}": array
        for path, array in _bare(arrays).items()
    }
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
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": method,
        "revision": revision,
        "task_type": "SEQ_2_SEQ_LM",
    }


def _check(config: Metadata, file: epath.Path) -> None:
    """InputError unless the config is that of a plain adapter for an encoder-decoder."""
    method = config.get("peft_type")
    if str(method) not in _METHODS:
        raise InputError(
            f"{file}: peft_type is {method!r}; ptjax reads LORA, IA3, LN_TUNING and PREFIX_TUNING "
            "as adapters, and PROMPT_TUNING and P_TUNING as prompts (--prompt)"
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
            raise InputError(f"{file}: {key} is {value!r}: {why}; ptjax reads plain {method}")


def _read_lora(
    tensors: Mapping[str, LazyArray], config: Metadata, directory: epath.Path
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Fields, and arrays [in, r] and [r, out] by path, "encoder/layers_0/attention/query/a"."""
    file, weights = directory / peft.CONFIG, directory / peft.WEIGHTS
    rank, arrays = peft.size_of(config, "r", 8, file), {}
    for name, tensor in tensors.items():
        module, ending = our_module(name, "kernel", (_A, _B), weights)
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
    alpha = _number(config, "lora_alpha", 8, file)
    fields: JsonObject = {
        "rank": rank,
        "alpha": alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
        "dropout": _number(config, "lora_dropout", 0.0, file),
        "targets": _our_targets(_modules(arrays, "a")),
    }
    return fields, arrays


def _read_ia3(
    tensors: Mapping[str, LazyArray], config: Metadata, directory: epath.Path
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Fields, and vectors by path, "encoder/layers_0/mlp/wo/inputs"."""
    weights, arrays = directory / peft.WEIGHTS, {}
    for name, tensor in tensors.items():
        module, _ = our_module(name, "kernel", (_SCALE,), weights)
        if len(tensor.shape) != 2 or sorted(tensor.shape)[0] != 1 or max(tensor.shape) == 1:
            raise InputError(
                f"{weights}: {name} has shape {list(tensor.shape)}; a vector of IA3 has [n, 1] or "
                "[1, n]"
            )
        side = "outputs" if tensor.shape[1] == 1 else "inputs"
        arrays[f"{module}/{side}"] = tensor.read_all().astype(np.float32).reshape(-1)
    return {side: _our_targets(_modules(arrays, side)) for side in ("outputs", "inputs")}, arrays


def _read_norms(
    tensors: Mapping[str, LazyArray], config: Metadata, directory: epath.Path
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """No fields, and scales [D] by path, "encoder/layers_0/pre_mlp_layer_norm/scale"."""
    weights, arrays = directory / peft.WEIGHTS, {}
    depth = {"encoder": 1, "decoder": 1}  # of the network that the file is for, at least
    for name, tensor in tensors.items():
        module, _ = our_module(name, "scale", (_NORM,), weights)
        if len(tensor.shape) != 1:
            raise InputError(f"{weights}: {name} has shape {list(tensor.shape)}; a scale has [n]")
        arrays[f"{module}/scale"] = tensor.read_all().astype(np.float32)
        stack, layer = module.partition("/")[0], general_name(module)[1]
        depth[stack] = max(depth[stack], 1 + (layer or 0))
    for theirs, ours in module_names("scale").items():
        for layer in range(depth[ours.partition("/")[0]]):
            if f"{ours.format(i=layer)}/scale" not in arrays:
                raise InputError(
                    f"{weights}: {theirs.format(i=layer)} is missing, so only some of the layer "
                    "norms were trained; ptjax reads LN_TUNING of all of them, PEFT's default"
                )
    return {}, arrays


def _modules(paths: Iterable[str], name: str) -> list[str]:
    """The modules that have an array `name`, from the arrays' paths."""
    return [path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == name]


def _our_targets(modules: Iterable[str]) -> list[str]:
    """The targets that choose these modules in all layers: "query", or longer paths."""
    chosen = {general_name(module)[0] for module in modules}
    short, rest = _named_alike(chosen, module_names("kernel").values(), "/")
    return [*short, *(path.replace("layers_{i}", "layers") for path in rest)]


def _their_targets(modules: Iterable[str], never: str = "") -> list[str]:
    """The same for PEFT: "q", or whole names. The short name `never` is not used."""
    names = [their_module(module, "kernel") for module in modules]
    generals = {re.sub(r"\.block\.\d+\.", ".block.{i}.", name) for name in names}
    short, _ = _named_alike(generals, module_names("kernel"), ".")
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
