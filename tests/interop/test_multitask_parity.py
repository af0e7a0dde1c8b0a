"""Multitask prompts in PEFT and in ptjax: the same logits, whoever wrote the file.

transformers and PEFT run beside ptjax, float32 on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_torch_parity import assert_same_logits, load_into_torch
from tiny import save_tiny, tiny_config

import ptjax
from ptjax.backbones.load import load_backbone

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Any:
    """A random T5 as PEFT's base model reads it, and in ptjax."""
    folder = save_tiny(tmp_path_factory.mktemp("base"), tiny_config())
    return folder, load_backbone(folder, dtype="float32")


def multitask_logits(model: Any, tokens: np.ndarray, labels: np.ndarray, task: int) -> np.ndarray:
    import torch

    tasks = torch.full((len(tokens),), task)
    inputs = torch.tensor(tokens)
    with torch.no_grad():
        out = model(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            labels=torch.tensor(labels),
            task_ids=tasks,
        )
    return out.logits.numpy()


def test_multitask_prompts_go_to_peft_and_back(base, tmp_path) -> None:
    """Both ways: PEFT's logits with task_ids are ptjax's with that task's prompt."""
    import peft
    import torch

    folder, backbone = base
    torch.manual_seed(0)
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=5,
        num_transformer_submodules=1,
        num_tasks=3,
        num_ranks=2,
    )
    model = peft.get_peft_model(load_into_torch(folder), config).eval()
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():  # PEFT's own first values are tiny
        encoder.prefix_task_cols += torch.randn_like(encoder.prefix_task_cols)
        encoder.prefix_task_rows += torch.randn_like(encoder.prefix_task_rows)
    model.save_pretrained(tmp_path / "theirs")
    theirs = ptjax.load_multitask(tmp_path / "theirs")
    theirs.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(load_into_torch(folder), str(tmp_path / "ours")).eval()

    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(2, 64, (2, 6)), rng.integers(2, 64, (2, 4))
    starts = np.concatenate([np.zeros((2, 1), int), labels[:, :-1]], axis=1)
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": starts}
    for task in range(3):
        found = np.asarray(ptjax.forward(backbone, batch, theirs.prompt(task)))
        for peft_model in (model, again):
            assert_same_logits(found, multitask_logits(peft_model, tokens, labels, task))
