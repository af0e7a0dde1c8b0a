"""LoRA, IA3 and BitFit out to PEFT and in from it: the same logits, whoever tuned the adapter.

Nothing is recorded: transformers and PEFT run beside ptjax, float32 on both sides.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from t5_ids import with_lengths
from test_torch_parity import (
    PARITY,
    assert_same_logits,
    load_into_torch,
    make_tokens,
    torch_logits,
)

from ptjax.backbones.load import load_backbone
from ptjax.interop.peft_adapters import load_peft_adapter
from ptjax.methods.base import Method, run_with
from ptjax.methods.bitfit import BitFit
from ptjax.methods.ia3 import IA3
from ptjax.methods.lora import LoRA
from ptjax.trees import flatten_paths, unflatten_paths

pytestmark = [
    pytest.mark.oracle,
    # transformers 5 writes tie_word_embeddings=True for an untied T5 1.1 too.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # PEFT says this of T5's norms, its own default targets of LN_TUNING.
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*T5LayerNorm:UserWarning"),
    # PEFT asks transformers for what that has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

METHODS = {"lora": LoRA, "ia3": IA3, "bitfit": BitFit}


def assert_same_network(name: str, method: Method, arrays: Any, model: Any) -> None:
    """The logits of PEFT's model are those of the backbone `name` with these arrays."""
    backbone = load_backbone(PARITY / name)
    inputs, targets = make_tokens(90, seed=0)
    expected = {
        path: x.shape for path, x in flatten_paths(method.variable_shapes(backbone.config)).items()
    }
    assert {path: x.shape for path, x in arrays.items()} == expected
    variables = backbone.variables | unflatten_paths(arrays)
    ours = jax.jit(with_lengths(run_with(method, backbone)))(variables, inputs, targets)
    plain = jax.jit(with_lengths(backbone.make_apply_fn(True)))(backbone.variables, inputs, targets)
    assert np.abs(np.asarray(ours) - plain).max() > 0.1
    assert_same_logits(np.asarray(ours), torch_logits(model, inputs, targets))


IN = {
    "the default": ("t5_1_1", "LoraConfig", {}),
    "all kinds": (
        "t5_1_1",
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        },
    ),
    "a pattern": (
        "t5_1_0",
        "LoraConfig",
        {"target_modules": r"encoder\..*\.wi|.*EncDecAttention\.k"},
    ),
    "IA3": (
        "t5_1_0",
        "IA3Config",
        {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
    ),
    "IA3 of mT5": (
        "t5_1_1",
        "IA3Config",
        {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []},
    ),
    "norms": ("t5_1_1", "LNTuningConfig", {}),
    "norms of stacks of two depths": ("byt5_shaped", "LNTuningConfig", {}),
}


@pytest.mark.parametrize("case", IN)
def test_an_adapter_of_peft_is_the_same_here(case, tmp_path) -> None:
    import peft
    import torch

    name, kind, settings = IN[case]
    config = getattr(peft, kind)(task_type="SEQ_2_SEQ_LM", **settings)
    model = peft.get_peft_model(load_into_torch(PARITY / name), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if any(name in path for name in ("lora_", "ia3_", "ln_tuning_")):
                weight.add_((0.15 if "lora_" in path else 0.3) * torch.randn_like(weight))
    model.save_pretrained(str(tmp_path))
    read = load_peft_adapter(tmp_path)
    method = METHODS[read.method](**read.fields)
    assert_same_network(name, method, read.arrays, model)


OUT = {
    "the default": ("t5_1_1", LoRA()),
    "another scale": (
        "t5_1_0",
        LoRA(rank=3, alpha=2.5, dropout=0.1, targets=["wi", "encoder/.*/out", "key"]),
    ),
    "IA3": ("t5_1_0", IA3()),
    "IA3 elsewhere": (
        "t5_1_1",
        IA3(outputs=["wo", "logits_dense", "decoder/.*/key"], inputs=["out", "wi_0"]),
    ),
    "BitFit": ("t5_1_0", BitFit()),
    "BitFit of stacks of two depths": ("byt5_shaped", BitFit()),
}


@pytest.mark.parametrize("case", OUT)
def test_an_adapter_of_ptjax_is_the_same_in_peft(case, tmp_path) -> None:
    import peft

    name, method = OUT[case]
    shapes = flatten_paths(method.variable_shapes(load_backbone(PARITY / name).config))
    rng = np.random.default_rng(0)
    mean = float(method.name != "lora")
    arrays = {path: rng.normal(mean, 0.3, x.shape).astype(np.float32) for path, x in shapes.items()}
    origin = {"base_model": None, "revision": None, "metadata": {}}
    method.export_peft(epath.Path(tmp_path), arrays, **origin)
    model = peft.PeftModel.from_pretrained(load_into_torch(PARITY / name), str(tmp_path)).eval()
    assert_same_network(name, method, arrays, model)
    # And here again, with the same settings.
    read = load_peft_adapter(tmp_path)
    again = METHODS[read.method](**read.fields)
    config = load_backbone(PARITY / name).config
    assert again.variable_shapes(config) == method.variable_shapes(config)
    assert list(read.arrays) == sorted(arrays)
    for path, array in arrays.items():
        np.testing.assert_array_equal(read.arrays[path], array)
