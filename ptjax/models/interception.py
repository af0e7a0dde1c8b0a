"""Changes modules of a network from outside: they are neither edited nor copied.

A method has arrays of its own for some modules, in a collection of its own, at the path of the
module: `lora/encoder/layers_0/attention/query/a`. An interceptor runs the method's function in the
place of every module that has such arrays. So it also runs where layers are scanned over,
rematerialised or gathered, and in every step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from ptjax.models.family import ApplyFn
from ptjax.trees import Tree

ModuleChange = Callable[
    [Any, Callable[[jax.Array], jax.Array], jax.Array, Mapping[str, jax.Array], bool], jax.Array
]
"""`change(module, call, x, arrays, train)` returns what the network gets instead of `call(x)`.

`module` is bound to its variables, `call` is its own function, `arrays` are the method's arrays for
it by name, and `train` says whether this is a training step.
"""


def change_modules(
    apply_fn: ApplyFn, kind: type[nn.Module], collection: str, change: ModuleChange
) -> ApplyFn:
    """Returns the network `apply_fn` with `change` in the place of some of its modules.

    These are the modules of the class `kind` that have arrays in `collection`. Without that
    collection in the variables, the result computes what `apply_fn` computes.
    """

    def apply(variables: Tree, *args: Any, **settings: Any) -> Any:
        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if not (isinstance(module, kind) and context.method_name == "__call__"):
                return call(*args, **kwargs)
            arrays = module.variables.get(collection)
            if not arrays:
                return call(*args, **kwargs)
            [x] = args
            return change(module, call, x, arrays, bool(settings.get("train")))

        with nn.intercept_methods(intercept):
            return apply_fn(variables, *args, **settings)

    return apply
