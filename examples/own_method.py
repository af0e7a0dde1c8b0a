"""A method of one's own in a page of public names: a soft prompt that is a product of rank r.

    ptjax.tune(backbone, task, "runs/low_rank", ptjax.RunSettings(method=LowRankPrompt(rank=4)))

In a gin file: `import own_method` and `ptjax.RunSettings.method = @own_method.LowRankPrompt()`.
`ptjax.Method` says what each part is for. The export is an ordinary prompt.
"""

import dataclasses
from typing import Any

import jax

import ptjax


@dataclasses.dataclass(frozen=True)
class LowRankPrompt(ptjax.Method):
    """`left` [P, r] and `right` [r, D] train; their product is prepended to the input."""

    name, collection = "low_rank_prompt", "factors"
    exports, supports_rows, supports_sweep = "prompt", True, True  # as of any prompt

    length: int = 100
    rank: int = 4

    def variable_shapes(self, config: Any) -> dict[str, Any]:
        sizes = {"left": (self.length, self.rank), "right": (self.rank, config.emb_dim)}
        return {"factors": {k: jax.ShapeDtypeStruct(v, "float32") for k, v in sizes.items()}}

    def init(self, key: jax.Array, context: ptjax.InitContext) -> dict[str, Any]:
        left = jax.random.normal(key, (self.length, self.rank)) / self.rank**0.5
        right = ptjax.SampledVocabulary()(key, self.rank, context)
        return {"factors": {"left": left, "right": right}}

    def freeze_rules(self) -> dict[str, bool]:
        return {"params/.*": True, "factors/.*": False}

    def extra_positions(self) -> int:
        return self.length

    def wrap(self, apply_fn: Any) -> Any:
        def apply(variables: dict[str, Any], *args: Any, **settings: Any) -> Any:
            if factors := variables.get("factors"):
                prompt = factors["left"] @ factors["right"]
                variables = variables | {"prompt": {"prompt": prompt}}
            return apply_fn(variables, *args, **settings)

        return apply

    def save(self, path: Any, trainable: Any, metadata: Any, backbone: Any) -> None:
        if jax.process_index() == 0:
            factors = trainable["factors"]
            ptjax.save_prompt(path, factors["left"] @ factors["right"], metadata)

    def read_metadata(self, path: Any) -> dict[str, Any]:
        return ptjax.load_prompt(path).metadata

    def load(self, path: Any, backbone: Any) -> dict[str, Any]:
        return {"prompt": {"prompt": ptjax.load_prompt(path).prompt}}
