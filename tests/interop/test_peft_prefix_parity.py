"""Prefixes of PEFT in, and out to PEFT: the same logits, whoever tuned the prefix.

Nothing is recorded: transformers and PEFT run beside ptjax, float32 on both sides.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from t5_ids import with_lengths
from test_torch_parity import assert_same_logits, make_tokens, torch_logits

import ptjax
from ptjax.backbones.load import Backbone, load_backbone
from ptjax.methods.base import run_with
from ptjax.methods.prefix_tuning import PrefixTuning
from ptjax.trees import unflatten_paths

pytestmark = [
    pytest.mark.oracle,
    # PEFT asks transformers for what that has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

DECODER = PrefixTuning(5, encoder=False, cross=False)


def make_model(layers: int) -> Any:
    """A random T5 1.1 with more heads than d_model / d_kv, in torch."""
    import torch
    import transformers

    settings: dict[str, Any] = {
        **{"d_model": 16, "d_kv": 8, "num_heads": 3, "d_ff": 20, "vocab_size": 90},
        **{"num_layers": 2, "num_decoder_layers": layers, "feed_forward_proj": "gated-gelu"},
        "tie_word_embeddings": True,
    }
    config = transformers.T5Config(**settings)
    torch.manual_seed(layers)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Its own initialisation leaves logits near 0.
            weight.mul_(0.5).add_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
    return model


def logits_of(backbone: Backbone, method: PrefixTuning, arrays: Any, tokens: Any) -> np.ndarray:
    run = jax.jit(with_lengths(run_with(method, backbone)))
    return np.asarray(run(backbone.variables | unflatten_paths(arrays), *tokens))


@pytest.mark.parametrize("layers", [4, 3])
def test_peft_s_prefix_does_in_ptjax_what_it_does_in_peft(tmp_path, layers) -> None:
    """With an even number of layers PEFT uses half of the file, with an odd one all of it."""
    import peft
    import torch

    model = make_model(layers)
    model.save_pretrained(tmp_path / "base")
    backbone, tokens = load_backbone(tmp_path / "base"), make_tokens(90, seed=0)
    config = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, token_dim=24, num_layers=layers,
        prefix_projection=layers == 3, encoder_hidden_size=6,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in wrapped.prompt_encoder.parameters():
            weight.copy_(torch.randn_like(weight))
    wrapped.save_pretrained(str(tmp_path / "prefix"))
    loaded = peft.PeftModel.from_pretrained(
        wrapped.get_base_model(), str(tmp_path / "prefix")
    ).eval()
    adapter = ptjax.load_adapter(tmp_path / "prefix")
    assert adapter.method == DECODER
    ours = logits_of(backbone, DECODER, adapter.arrays, tokens)
    assert_same_logits(ours, torch_logits(loaded, *tokens))
    assert np.abs(ours - logits_of(backbone, DECODER, {}, tokens)).max() > 0.1
    keys = adapter.arrays["prefix/decoder/key"]
    assert np.array_equal(keys[0], keys[layers // 2]) == (layers % 2 == 0)


@pytest.mark.parametrize("layers", [1, 4])
def test_peft_runs_ptjax_s_prefix_of_the_decoder(tmp_path, layers) -> None:
    """Every layer with its own keys and values, whatever the number of layers."""
    import peft

    model = make_model(layers)
    model.save_pretrained(tmp_path / "base")
    backbone, tokens = load_backbone(tmp_path / "base"), make_tokens(90, seed=1)
    rng, shape = np.random.default_rng(0), (layers, 5, 3, 8)
    arrays = {
        f"prefix/decoder/{kind}": rng.normal(size=shape).astype(np.float32)
        for kind in ("key", "value")
    }
    DECODER.save(tmp_path / "prefix.safetensors", unflatten_paths(arrays), {}, backbone)
    adapter = ptjax.load_adapter(tmp_path / "prefix.safetensors")
    ptjax.export(adapter, tmp_path / "peft", to="peft", backbone=backbone)
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    want = logits_of(backbone, DECODER, arrays, tokens)
    assert_same_logits(want, torch_logits(wrapped, *tokens))
    again = ptjax.load_adapter(tmp_path / "peft")
    assert again.method == DECODER
    for name, array in arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
