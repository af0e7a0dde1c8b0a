"""Methods that compute a prompt, beside PEFT's own with equal weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from ptjax.methods.p_tuning import PTuning
from ptjax.trees import flatten_paths

pytestmark = pytest.mark.oracle


def lstm_weights(state: dict[str, np.ndarray], layers: int) -> dict[str, Any]:
    """torch's LSTM in ptjax's names: its matrices are transposed, its two biases add up."""
    return {
        f"lstm_{layer}": {
            direction: {
                "input": state[f"lstm_head.weight_ih_l{layer}{suffix}"].T,
                "recurrent": state[f"lstm_head.weight_hh_l{layer}{suffix}"].T,
                "bias": state[f"lstm_head.bias_ih_l{layer}{suffix}"]
                + state[f"lstm_head.bias_hh_l{layer}{suffix}"],
            }
            for direction, suffix in (("forward", ""), ("backward", "_reverse"))
        }
        for layer in range(layers)
    }


@pytest.mark.parametrize(("encoder", "layers"), [("mlp", 2), ("lstm", 2), ("lstm", 1)])
def test_the_prompt_is_that_of_pefts_prompt_encoder(encoder, layers) -> None:
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=7,
        num_transformer_submodules=1,
        token_dim=16,
        encoder_hidden_size=5,
        encoder_num_layers=layers,
        encoder_reparameterization_type=encoder.upper(),
    )
    network = peft.PromptEncoder(config).eval()
    with torch.no_grad():
        expected = network(torch.arange(7)[None])[0].numpy()
    state = {name: x.numpy() for name, x in network.state_dict().items()}
    own: dict[str, Any] = lstm_weights(state, layers) if encoder == "lstm" else {}
    own["embedding"] = state["embedding.weight"]
    dense = [name.removesuffix(".weight") for name in state if name.startswith("mlp_head")
             and name.endswith(".weight")]  # fmt: skip
    for layer, name in enumerate(dense):
        own[f"dense_{layer}"] = {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
    method = PTuning(7, encoder, hidden=5, lstm_layers=layers)
    shapes = {name: x.shape for name, x in flatten_paths(own).items()}
    assert shapes == {
        k: x.shape
        for k, x in flatten_paths(method.variable_shapes(tiny_config())["p_tuning"]).items()
    }
    found = np.asarray(method.matrix(own))
    # float32 sums of 16 terms in another order.
    np.testing.assert_allclose(found, expected, atol=2e-6)
