"""Methods whose export is an adapter file, and adapters that are loaded from such files."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ptjax.errors import InputError, check_path, missing, near
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import Method
from ptjax.model_dir import ExportKind, ModelDir
from ptjax.models.family import Config
from ptjax.models.stacking import UnstackedView, stack_paths
from ptjax.sharding import processes
from ptjax.sharding.arrays import replicated
from ptjax.trees import Tree, Variables, flatten_paths, unflatten_paths

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone

ADAPTERS: dict[str, tuple[str, str]] = {
    "bitfit": ("ptjax.methods.bitfit", "BitFit"),
    "ia3": ("ptjax.methods.ia3", "IA3"),
    "lora": ("ptjax.methods.lora", "LoRA"),
    "prefix_tuning": ("ptjax.methods.prefix_tuning", "PrefixTuning"),
    "per_layer_prompts": ("ptjax.methods.per_layer", "PerLayerPrompts"),
}
"""The names of the methods of adapter files -> the module and the name of the class.

A file names its method; nothing outside of this table is imported for a file.
"""


class PeftOrigin(TypedDict):
    """What PEFT's files record of where an adapter is from; see `interop.peft.export_peft`.

    PEFT ignores the metadata, which `load_adapter` finds again.
    """

    base_model: str | None
    revision: str | None
    metadata: Metadata


class AdapterMethod(Method):
    """A method that trains variables of its own collection, and exports them as an adapter file.

    It needs what `Method` needs up to `freeze_rules`. Its fields must be JSON values, or
    `to_file_fields` must leave out those that are not.
    """

    exports: ClassVar[ExportKind] = "adapter"

    def to_file_fields(self) -> Metadata:
        """Returns the fields with which the tuned network runs, as JSON values.

        The class is made again with them. By default they are all fields.
        """
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    def to_file_variables(self, trainable: Variables) -> Variables:
        """Returns the variables that an export holds; by default the trained ones."""
        return trainable

    def exported(self) -> AdapterMethod:
        """Returns the method as a file's variables run it; by default `self`.

        It differs if training needs more variables than the tuned network, as with a
        reparameterisation.
        """
        return self

    def export_peft(
        self, folder: epath.Path, arrays: Mapping[str, np.ndarray], **origin: Unpack[PeftOrigin]
    ) -> None:
        """Writes PEFT's files for arrays as in `Adapter.arrays`; by default refuses.

        Raises:
            InputError: PEFT cannot run this method on a T5 as ptjax does.
        """
        raise InputError(f"PEFT cannot run {self.name} as ptjax does; --to=safetensors can")

    def merge(self, params: Tree, variables: Variables) -> Tree:
        """Returns a backbone's parameters with the method's effect in them; by default refuses.

        Args:
            params, variables: as the network takes them.

        Raises:
            InputError: no parameters of the backbone have this effect, or they are int8.
        """
        raise InputError(f"{self.name} cannot be merged into a backbone's weights")

    def describe(self) -> Metadata:
        return {"method": {"name": self.name, **self.exported().to_file_fields()}}

    # Files are imported late: settings and plans do not need them.

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        from ptjax.interop.adapter_file import save_adapter

        variables = jax.tree.map(processes.on_host, self.to_file_variables(trainable))
        if processes.first():
            # The entry "method" of `describe` may be missing from metadata of the caller's own.
            save_adapter(path, to_paths(variables), {**metadata, **self.describe()})

    def read_metadata(self, path: PathLike) -> JsonObject:
        from ptjax.interop.adapter_file import read_adapter

        return read_adapter(path)[1]

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        adapter = load_adapter(path)
        if adapter.method != self.exported():
            raise InputError(f"{path} holds {adapter.method}, not {self.exported()}")
        return place(adapter, backbone)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """What a method other than prompt tuning has trained, with the metadata in its file.

    Attributes:
        method: how the network runs with the arrays.
        arrays: float32 arrays by path; the layers of a stack have T5X's names.
        metadata: the file's header.
        source: the absolute path of its file; None if it was made otherwise.
        variables: the arrays as a backbone's network takes them, on its mesh, once `open_prompt`
            has checked them against it.
    """

    method: AdapterMethod
    arrays: Mapping[str, np.ndarray]
    metadata: JsonObject
    source: str | None = None
    variables: Variables | None = None

    def __repr__(self) -> str:
        """Its method, size, task and backbone."""
        task, name = self.metadata.get("task"), self.metadata.get("backbone_name")
        of = f", task {task.get('name')}" if isinstance(task, dict) else ""
        on = f", tuned on {name}" if name else ""
        count = sum(array.size for array in self.arrays.values())
        return f"<Adapter {self.method.name} of {count:,} parameters{of}{on}>"

    @property
    def attends_to_input(self) -> bool:
        """As `Method.attends_to_input`."""
        return self.method.attends_to_input

    def save(self, path: PathLike) -> None:
        """Writes the adapter to one file, whose name ends in .safetensors.

        Raises:
            InputError: the path cannot be written or has another suffix.
        """
        from ptjax.interop.adapter_file import save_adapter
        from ptjax.output import check_place

        check_path("the path of the adapter", path)
        check_place(path, "path")
        target = epath.Path(path).expanduser()
        if target.suffix != ".safetensors":
            raise InputError(f"{path}: an adapter is one file; end its name with .safetensors")
        save_adapter(target, self.arrays, self.metadata)


def load_adapter(path: PathLike) -> Adapter:
    """Loads an adapter from its file, the best one of a run from its MODEL_DIR, or PEFT's folder.

    Of PEFT's adapters, LoRA, IA3, LN_TUNING (as `ptjax.BitFit`) and prefixes for a T5 are read
    (`interop.peft_adapters`).

    Raises:
        InputError: the path is missing, damaged, or holds something else, such as a prompt; or the
            file is of a method that this version does not know.
    """
    from ptjax.interop.adapter_file import METHOD, read_adapter
    from ptjax.interop.peft import is_peft
    from ptjax.interop.peft_adapters import load_peft_adapter

    check_path("the path of the adapter", path)
    file = epath.Path(path).expanduser()
    if not file.exists():
        raise missing("adapter", file)
    if is_peft(file):
        read = load_peft_adapter(file)
        described = {"name": read.method, **read.fields}
        method, metadata = _make_method(described, os.fspath(file)), read.metadata
        return Adapter(method, read.arrays, {**metadata, METHOD: described}, _absolute(file))
    if file.is_dir():
        run, best = ModelDir(file), ModelDir(file).best_adapter()
        if names := run.members("adapter"):
            raise InputError(
                f"{file}: the run is a sweep of {', '.join(names)}; name the adapter of one, such "
                f"as {run.best_adapter(names[0])}"
            )
        if not best.exists():
            raise InputError(f"{file}: no adapter in this folder ({best} is missing)")
        file = best
    arrays, metadata = read_adapter(file)
    method = _make_method(metadata[METHOD], os.fspath(file))
    return Adapter(method, arrays, metadata, _absolute(file))


def holds_adapter(path: PathLike) -> bool:
    """Whether `load_adapter`, not `load_prompt`, is for this path; False if it does not exist."""
    from ptjax.interop.adapter_file import is_adapter
    from ptjax.interop.peft_adapters import is_peft_adapter

    check_path("the path of the prompt or adapter", path)
    file = epath.Path(path).expanduser()
    if not file.is_dir():
        return file.exists() and is_adapter(file)
    run = ModelDir(file)
    return is_peft_adapter(file) or run.best_adapter().exists() or bool(run.members("adapter"))


def _absolute(file: epath.Path) -> str:
    return os.fspath(file) if "://" in os.fspath(file) else os.path.abspath(file)


def _make_method(described: Metadata, where: str) -> AdapterMethod:
    """The method that a file's header describes."""
    name, fields = str(described.get("name")), {k: v for k, v in described.items() if k != "name"}
    if name not in ADAPTERS:
        raise InputError(
            f"{where}: the file is of the method {name!r}, which this ptjax does not know"
            f"{near(name, ADAPTERS)}; update ptjax"
        )
    module, kind = ADAPTERS[name]
    made = getattr(importlib.import_module(module), kind)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    known = {field.name for field in dataclasses.fields(made)}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"{where}: {kind} has no field {unknown[0]!r} in this ptjax; update it")
    try:
        return made(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: the fields of {kind} in the header are damaged") from error


def place(adapter: Adapter, backbone: Backbone) -> Variables:
    """Returns an adapter's variables as the backbone's network takes them, on its mesh.

    Raises:
        InputError: the network cannot run the method, or an array has another shape than it needs.
    """
    config = backbone.config
    if getattr(config, "scan_layers", False):
        config = dataclasses.replace(config, scan_layers=False)  # as the file has them
    expected = flatten_paths(adapter.method.variable_shapes(config))
    for path in sorted(expected.keys() | adapter.arrays.keys()):
        needed, array = expected.get(path), adapter.arrays.get(path)
        if needed is None or array is None or needed.shape != array.shape:
            shapes = [None if x is None else list(x.shape) for x in (array, needed)]
            raise InputError(
                f"{adapter.source or 'the adapter'} ({adapter.method.name}) does not fit "
                f"{backbone.name}: {path} has shape {shapes[0]}, the network needs {shapes[1]}"
            )
    variables = from_paths(adapter.arrays, backbone.config)
    return jax.device_put(variables, replicated(backbone.mesh))


def to_paths(variables: Variables) -> dict[str, np.ndarray]:
    """Returns arrays by path, those of stacked layers one by one. Inverse of `from_paths`."""
    view = UnstackedView(flatten_paths(variables))
    return {path: view[path] for path in sorted(view)}


def from_paths(arrays: Mapping[str, np.ndarray], config: Config) -> Variables:
    """Makes variables of arrays by path; stacks the layers if the network scans them."""
    if getattr(config, "scan_layers", False):
        arrays = stack_paths(arrays, lambda layers: np.stack(layers))
    return unflatten_paths({path: jnp.asarray(array) for path, array in arrays.items()})
