"""Prompts out to PEFT and in from it: the same logits, whoever tuned the prompt.

Nothing is recorded: transformers and PEFT run beside ptjax, float32 on both sides.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import FIXTURES
from test_torch_parity import (
    assert_same_logits,
    load_into_torch,
    make_tokens,
    make_torch_model,
    torch_logits,
)

import ptjax
from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.errors import InputError
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import PromptFile, load_prompt

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("own_process"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def load_into_peft(base: Path | str, directory: Path | str) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(load_into_torch(Path(base)), str(directory)).eval()


def ptjax_logits(
    backbone: ptjax.Backbone, prompt: Any, inputs: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": targets}
    return np.asarray(ptjax.forward(backbone, batch, prompt))


# Out


def test_peft_uses_a_prompt_from_the_train_command_as_ptjax_does(call):
    """The logits, what it says of a text and how likely, on the exported backbone."""
    import torch

    settings = ("TRAIN_STEPS=4", "EVAL_PERIOD=4", "EVAL_EXAMPLES=8", "PROMPT_LENGTH=7")
    flags = (*(f"--gin.{s}" for s in settings), "--gin.MODEL_DIR='run'")
    unneeded = "--gin.ptjax.Evaluation.hard_prompts={}"
    code, _, err = call("train", "--gin_file=quickstart.gin", *flags, unneeded)
    assert code == 0, err
    code, _, err = call("export", "--model_dir=run", "--to=huggingface", "--output=peft")
    assert code == 0, err
    prompt = load_prompt("run/prompts/best.safetensors")
    assert prompt.metadata["step"] == 4
    backbone = load_backbone("ptjax-nano", dtype="float32")
    save_backbone(
        "base", backbone.config, backbone.variables["params"],
        tokenizer=backbone.tokenizer, dtype="float32",
    )  # fmt: skip
    model = load_into_peft("base", "peft")
    rows = [json.loads(line) for line in _infer(call, "A lovely film.", "It was not good, sadly")]
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    for row in rows:
        inputs = np.array([[*tokenizer.encode(row["inputs"]), tokenizer.eos_id]], np.int32)
        answer = [*tokenizer.encode(row["prediction"]), tokenizer.eos_id]
        targets = np.array([[0, *answer[:-1]]], np.int32)
        theirs = torch_logits(model, inputs, targets)
        assert_same_logits(ptjax_logits(backbone, prompt, inputs, targets), theirs)
        likely = torch.log_softmax(torch.tensor(theirs[0]), -1)
        score = float(likely[range(len(answer)), answer].sum())
        assert row["score"] == pytest.approx(score, abs=1e-4)
        tokens = torch.tensor(inputs, dtype=torch.long)
        written = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12
        )
        text = tokenizer.decode([int(i) for i in written[0, 1:] if i not in (0, 1)])
        assert ptjax.generate(backbone, [row["inputs"]], prompt, max_new_tokens=12) == [text]


def _infer(call: Any, *texts: str) -> list[str]:
    code, out, err = call("infer", "--prompt=peft", *texts)
    assert code == 0 and "warning" not in err, err
    return out.splitlines()


def test_the_code_of_a_model_card_runs_as_it_stands(backbone, capsys):
    """With ptjax, and with PEFT; both say the same of the same input."""
    assert backbone.tokenizer is not None
    save_backbone(
        "words-t5", backbone.config, backbone.variables["params"],
        tokenizer=backbone.tokenizer, dtype="float32",
    )  # fmt: skip
    task = ptjax.Task(name="words", inputs="text: {text}", targets="{answer}")
    metadata = {
        "ptjax_version": ptjax.__version__,
        "backbone_name": "/elsewhere/words-t5",
        **backbone.fingerprints.as_metadata(),
        "task": task.describe(),
        "input_length": 32,
        "target_length": 20,
    }
    prompt = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    PromptFile(prompt, metadata).save("tickets")
    card = Path("tickets/README.md").read_text()
    answers = []
    for code in re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE):
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        answers.append(capsys.readouterr().out.strip())
    ours, theirs = answers
    assert f"[Prediction(text={theirs!r}, " in ours


@pytest.mark.parametrize("name", ["t5_1_1_tiny_legacy", "t5_1_0_tiny_legacy"])
def test_a_prompt_tuned_on_a_t5x_checkpoint(name):
    backbone = load_backbone(FIXTURES / name, dtype="float32")
    inputs, targets = make_tokens(backbone.config.vocab_size, 3)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": targets,
        "decoder_target_tokens": np.roll(targets, -1, axis=1),
    }
    prompt = 3 * jax.random.normal(jax.random.key(0), (6, backbone.config.emb_dim))
    for _ in range(3):
        loss, gradient = ptjax.loss_and_prompt_gradient(backbone, batch, prompt)
        prompt -= 1e-3 * gradient
    assert np.isfinite(loss) and np.linalg.norm(gradient) > 0
    save_backbone("base", backbone.config, backbone.variables["params"], dtype="float32")
    sizes = dict(num_heads=backbone.config.num_heads, num_layers=backbone.config.num_encoder_layers)
    export_peft("peft", np.asarray(prompt), **sizes)
    ours = ptjax_logits(backbone, prompt, inputs, targets)
    model = load_into_peft("base", "peft")
    assert_same_logits(ours, torch_logits(model, inputs, targets))
    assert np.abs(ours - ptjax_logits(backbone, None, inputs, targets)).max() > 0.1
    # What PEFT makes of it goes back bitwise.
    model.save_pretrained("again")
    np.testing.assert_array_equal(load_prompt("again").prompt, prompt)


# In

TEXT = {
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "IS IT GOOD?",  # bytes that a vocabulary of 90 has
    "tokenizer_name_or_path": "tokenizer",
}
WRITTEN = {
    "defaults": {},
    "one_submodule": {"num_transformer_submodules": 1},
    "text": TEXT,
    "sampled": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "p_tuning": {"encoder_hidden_size": 10},
}


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    ("written", "kind"),
    [*((name, "t5_1_1") for name in WRITTEN), ("text", "t5_1_0"), ("text", "byt5")],
)
def test_ptjax_computes_what_peft_computes_with_a_prompt_that_peft_tuned(
    written, kind, safetensors
):
    import torch

    base, model = make_peft_model(written, kind)
    inputs, targets = make_tokens(90, 2)
    train(model, inputs, targets)
    theirs = torch_logits(model.eval(), inputs, targets)
    model.save_pretrained("peft", safe_serialization=safetensors)
    files = sorted(path.name for path in Path("peft").glob("adapter_model*"))
    assert files == ["adapter_model.safetensors" if safetensors else "adapter_model.bin"]
    prompt = load_prompt("peft")
    assert prompt.metadata == {"backbone_name": str(base)}
    with torch.no_grad():
        np.testing.assert_array_equal(prompt.prompt, model.get_prompt(1)[0, :4].numpy())
    backbone = load_backbone(prompt.metadata["backbone_name"])
    ours = ptjax_logits(backbone, prompt, inputs, targets)
    assert_same_logits(ours, theirs)
    assert np.abs(ours - ptjax_logits(backbone, None, inputs, targets)).max() > 0.1


def make_peft_model(written: str, kind: str = "t5_1_1") -> tuple[Path, Any]:
    """(directory of the backbone, a PeftModel on it whose prompt has 4 rows)."""
    import peft
    import torch
    import transformers

    base = Path("base").absolute()
    make_torch_model(kind, 0).save_pretrained(base)
    transformers.ByT5Tokenizer().save_pretrained("tokenizer")
    make = peft.PromptEncoderConfig if written == "p_tuning" else peft.PromptTuningConfig
    config = make(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, **WRITTEN[written])
    torch.manual_seed(0)
    return base, peft.get_peft_model(load_into_torch(base), config)


def train(model: Any, inputs: np.ndarray, targets: np.ndarray) -> None:
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, 0.1)
    before = model.get_prompt(1).detach().clone()
    tokens, shifted = (torch.tensor(array, dtype=torch.long) for array in (inputs, targets))
    batch = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    batch |= {"decoder_input_ids": shifted, "labels": shifted.roll(-1, 1)}
    model.train()
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.get_prompt(1) - before).abs().max() > 0.1


# What PEFT says nothing about


def test_peft_leaves_out_a_prompt_without_a_task_type():
    base, model = make_peft_model("one_submodule")
    model.save_pretrained("peft")
    config = json.loads(Path("peft/adapter_config.json").read_text())
    Path("peft/adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
    inputs, targets = make_tokens(90, 2)
    np.testing.assert_array_equal(
        torch_logits(load_into_peft(base, "peft"), inputs, targets),
        torch_logits(load_into_torch(base), inputs, targets),
    )
    with pytest.raises(InputError, match="task_type is missing"):
        load_prompt("peft")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_peft_saves_a_resized_embedding_beside_the_prompt():
    _, model = make_peft_model("one_submodule")
    model.base_model.resize_token_embeddings(96)
    model.save_pretrained("peft")
    with pytest.raises(InputError, match=r"also holds base_model.*save_embedding_layers=False"):
        load_prompt("peft")
    model.save_pretrained("peft", save_embedding_layers=False)
    assert load_prompt("peft").prompt.shape == (4, 16)


def test_an_adapter_with_a_name_has_a_folder_of_its_own():
    import peft

    base, _ = make_peft_model("one_submodule")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    peft.get_peft_model(load_into_torch(base), config, adapter_name="mine").save_pretrained("peft")
    with pytest.raises(InputError, match="did you mean peft/mine"):
        load_prompt("peft")
    assert isinstance(load_prompt("peft/mine"), PromptFile)
