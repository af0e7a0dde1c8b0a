"""What methods have in common whose product is a prompt: a matrix [P, D] before the input."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata, PathLike
from ptjax.methods.base import InitContext, Method
from ptjax.methods.initializers import ClassLabels, Initializer, SampledVocabulary
from ptjax.model_dir import ExportKind
from ptjax.models.family import ApplyFn
from ptjax.models.prompted import with_prompt
from ptjax.sharding import processes
from ptjax.trees import Tree, Variables

if TYPE_CHECKING:
    from ptjax.backbones.load import Backbone


class PromptMethod(Method, abc.ABC):
    """A method that trains some variables, from which `matrix` computes the prompt.

    A subclass is a frozen dataclass with a field `length`, and perhaps `attends_to_input`. It has a
    `name` and a `collection`, and implements `variable_shapes`, `init` and `matrix`. The export is
    an ordinary prompt: the other variables are only in the checkpoints, from which a run resumes.
    """

    exports: ClassVar[ExportKind] = "prompt"
    supports_rows: ClassVar[bool] = True
    supports_sweep: ClassVar[bool] = True

    length: int

    @abc.abstractmethod
    def matrix(self, own: Tree) -> Float[Array, "P D"]:
        """Computes the prompt from the method's own collection."""

    def freeze_rules(self) -> Mapping[str, bool]:
        return {"params/.*": True, f"{self.collection}/.*": False}

    def extra_positions(self) -> int:
        """Returns P, or 0 for a prompt that does not attend to the input.

        All examples share the states of such a prompt.
        """
        return self.length if self.attends_to_input else 0

    def describe(self) -> Metadata:
        return {"sees_input": self.attends_to_input}

    def wrap(self, apply_fn: ApplyFn) -> ApplyFn:
        """Puts the prompt into the variables; an export, in which it is already, stays as it is."""

        def apply(variables: Variables, *args: Tree, **settings: Tree) -> Tree:
            if self.collection in variables:
                variables = with_prompt(variables, self._precise(variables[self.collection]))
            return apply_fn(variables, *args, **settings)

        return apply

    def _precise(self, own: Tree) -> Float[Array, "P D"]:
        """`matrix`, in float32 throughout: a TPU would multiply in bfloat16."""
        with jax.default_matmul_precision("float32"):
            return self.matrix(own)

    # Prompt files are imported late: settings and plans do not need them.

    def save(
        self, path: PathLike, trainable: Variables, metadata: Metadata, backbone: Backbone
    ) -> None:
        from ptjax.interop.prompt_file import save_prompt

        if processes.first():
            own = jax.tree.map(np.asarray, trainable[self.collection])
            save_prompt(path, np.asarray(self._precise(own)), metadata)

    def read_metadata(self, path: PathLike) -> JsonObject:
        from ptjax.interop.prompt_file import load_prompt

        return load_prompt(path).metadata

    def load(self, path: PathLike, backbone: Backbone) -> Variables:
        from ptjax.interop.prompt_file import load_prompt

        return with_prompt({}, load_prompt(path).prompt)


def initial_prompt(
    initializer: Initializer | None, length: int, key: Array, context: InitContext
) -> Float[np.ndarray, "P D"]:
    """Makes the first value of a prompt: float32 [P, D], on the host.

    Args:
        initializer: None means `ClassLabels` if the task has labels, else `SampledVocabulary`.
        length: P.

    Raises:
        InputError: the initialiser cannot be used, or its result does not have shape [P, D].
    """
    if initializer is None:
        initializer = ClassLabels() if context.labels else SampledVocabulary()
    prompt = processes.on_host(initializer(key, length, context)).astype(np.float32)
    shape = (length, context.embedding.shape[1])
    if prompt.shape != shape:
        owner = f" of {context.member}" if context.member else ""
        raise InputError(
            f"the initial prompt{owner} has shape {prompt.shape}, but the run needs {shape}; "
            "change PROMPT_LENGTH or the initialiser"
        )
    return prompt
