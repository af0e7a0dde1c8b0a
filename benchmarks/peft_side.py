"""Hugging Face PEFT's part in `against_peft.py`, in an environment that may have no JAX.

    python benchmarks/peft_side.py step FOLDER SIDE        takes turns (see turns.py)
    python benchmarks/peft_side.py train FOLDER SEED       trains, prints its accuracy as JSON

FOLDER holds what `against_peft.py` wrote: `settings.json`, the backbone (for `train` its weights,
for `step` the recipe to make them), prompts, and tokens as numpy arrays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import seeded
import torch
import transformers
import turns

IGNORED = -100


def load_backbone(folder: Path, settings: dict[str, Any]) -> Any:
    """The backbone that was saved in `folder`."""
    return transformers.T5ForConditionalGeneration.from_pretrained(
        folder / "backbone", dtype=getattr(torch, settings["dtype"])
    )


def make_backbone(folder: Path, settings: dict[str, Any]) -> Any:
    """Makes the random backbone of `backbone.json`, on the device."""
    about = json.loads((folder / "backbone.json").read_text())
    config = transformers.T5Config(**about["config"])
    dtype = getattr(torch, settings["dtype"])
    with torch.device(settings["device"]):
        backbone = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    # transformers 5 leaves this out of the config, so the constructor ties it to the embedding.
    backbone.lm_head.weight = torch.nn.Parameter(torch.empty_like(backbone.lm_head.weight))
    parameters = dict(backbone.named_parameters())
    if missing := parameters.keys() ^ about["weights"].keys():
        raise ValueError(f"parameters of one side alone: {sorted(missing)}")
    with torch.no_grad():
        for name, (shape, seed, size, transposed) in about["weights"].items():
            parameter = parameters[name]
            if size is None:
                parameter.fill_(1)
                continue
            index = torch.arange(parameter.numel(), dtype=torch.int32, device=parameter.device)
            values = seeded.noise(index, seed).to(torch.float32).mul_(size).reshape(shape)
            parameter.copy_(values.T if transposed else values)
    return backbone


def add_prompt(backbone: Any, settings: dict[str, Any], prompt: np.ndarray) -> Any:
    """PEFT's prompt tuning of the backbone, its prompt set to `prompt` [P, D]."""
    # PEFT's default, two submodules, would double the prompt and never read the second half.
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompt), num_transformer_submodules=1
    )
    model = peft.get_peft_model(backbone, config).to(settings["device"])
    with torch.no_grad():
        trainable(model)[0].copy_(torch.from_numpy(prompt))
    return model


def trainable(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model: Any, settings: dict[str, Any]) -> Any:
    return transformers.Adafactor(
        trainable(model),
        lr=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        scale_parameter=False,
        relative_step=False,
    )


def to_batch(inputs: np.ndarray, targets: np.ndarray, device: str) -> dict[str, torch.Tensor]:
    """What the model takes, of padded tokens [B, T] and [B, L]; 0 is padding."""
    input_ids = torch.from_numpy(inputs).long().to(device)
    labels = torch.from_numpy(targets).long().to(device)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids > 0).long(),
        "labels": labels.masked_fill(labels == 0, IGNORED),
    }


def start(folder: Path, side: str) -> turns.Side:
    """Tuning steps over the batches that `against_peft.py` made for this side."""
    settings = json.loads((folder / "settings.json").read_text())
    device = settings["device"]
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    backbone = make_backbone(folder, settings)
    model = add_prompt(backbone, settings, np.load(folder / "prompt.npy"))
    stored = np.load(folder / f"{side}.npz")
    check, *batches = (
        to_batch(stored[f"{i}/encoder_input_tokens"], stored[f"{i}/decoder_target_tokens"], device)
        for i in range(settings["batches"] + 1)
    )
    model.eval()
    with torch.no_grad():
        logits = model(**check).logits[check["labels"] != IGNORED]
    np.save(folder / f"{side}_logits.npy", logits.float().cpu().numpy())
    model.train()
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # making the weights is not part of a step
    about = {
        "trained": sum(parameter.numel() for parameter in trainable(model)),
        "attention": backbone.config._attn_implementation,
        "microbatches": 1,
    }
    steps = Steps(model, make_optimizer(model, settings), about, compiled=side == "peft_compiled")
    # The smallest and the largest, between which a compiled model has to be right for all.
    extremes = [batches[0], batches[-1]]
    peak = torch.cuda.max_memory_allocated if on_gpu else turns.resident_bytes
    return turns.Side(
        lambda: steps.warm_up(extremes), lambda: steps.run(batches), about, peak_bytes=peak
    )


class Steps:
    """Steps of a model; a batch that does not fit the device's memory is split.

    `about["microbatches"]` is the number of parts.
    """

    def __init__(self, model: Any, optimizer: Any, about: dict[str, Any], compiled: bool) -> None:
        self.optimizer, self.about = optimizer, about
        self.model = torch.compile(model, dynamic=True) if compiled else model

    def warm_up(self, batches: list[dict[str, torch.Tensor]]) -> None:
        while True:
            try:
                return self.run(batches)
            except torch.OutOfMemoryError:
                if self.about["microbatches"] >= len(batches[0]["labels"]):
                    raise
            self.about["microbatches"] *= 2
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def run(self, batches: list[dict[str, torch.Tensor]]) -> None:
        parts = self.about["microbatches"]
        for batch in batches:
            self.optimizer.zero_grad()
            for part in split(batch, parts):
                # All targets have one length, so the mean of the parts' means is the batch's mean.
                (self.model(**part).loss / parts).backward()
            self.optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def split(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    """A batch in equal parts."""
    pieces = {name: array.chunk(parts) for name, array in batch.items()}
    return [{name: pieces[name][i] for name in pieces} for i in range(parts)]


# Accuracy


class Rows:
    """Token rows of any length, as `ptjax.data.preprocess.TokenRows` holds them."""

    def __init__(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        self.ids, self.offsets = ids, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pad(self, chosen: np.ndarray) -> np.ndarray:
        """Rows `chosen`, padded to the longest of them."""
        rows = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        out = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out


def load_rows(folder: Path, name: str) -> Rows:
    stored = np.load(folder / f"{name}.npz")
    return Rows(stored["ids"], stored["offsets"])


def accuracy(model: Any, folder: Path, split: str, labels: np.ndarray, device: str) -> float:
    """Share of a split's examples whose right label [C, L] is the likeliest."""
    inputs, right = load_rows(folder, f"{split}_inputs"), np.load(folder / f"{split}_labels.npy")
    by_length = np.argsort(np.diff(inputs.offsets), kind="stable")
    found = np.zeros(len(inputs), int)
    model.eval()
    with torch.no_grad():
        for start_at in range(0, len(inputs), 64):
            chosen = by_length[start_at : start_at + 64]
            likelihoods = []
            for label in labels:
                targets = np.repeat(label[None], len(chosen), axis=0)
                batch = to_batch(inputs.pad(chosen), targets, device)
                said = model(**batch).logits.float().log_softmax(-1)
                real = batch["labels"] != IGNORED
                tokens = said.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
                likelihoods.append((tokens * real).sum(-1))
            found[chosen] = torch.stack(likelihoods, 1).argmax(1).cpu().numpy()
    model.train()
    return float((found == right).mean())


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of example numbers, epoch after epoch, without the last incomplete one."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from order[: count - count % batch_size].reshape(-1, batch_size)


def train(folder: Path, seed: int) -> dict[str, Any]:
    """Trains as `ptjax.train` does: the best step on validation is what the test split judges."""
    settings = json.loads((folder / "settings.json").read_text())
    device = settings["device"]
    torch.manual_seed(seed)
    torch.set_num_threads(settings["threads"])
    model = add_prompt(
        load_backbone(folder, settings), settings, np.load(folder / f"prompt_{seed}.npy")
    )
    optimizer = make_optimizer(model, settings)
    inputs, targets = load_rows(folder, "train_inputs"), load_rows(folder, "train_targets")
    labels = np.load(folder / "label_tokens.npy")

    def score(split: str) -> float:
        return accuracy(model, folder, split, labels, device)

    before, curve, best = score("test"), {}, None
    for step, chosen in enumerate(shuffled(len(inputs), settings["batch_size"], seed), 1):
        optimizer.zero_grad()
        model(**to_batch(inputs.pad(chosen), targets.pad(chosen), device)).loss.backward()
        optimizer.step()
        if step % settings["eval_period"] == 0:
            curve[step] = score("validation")
            print(f"PEFT, seed {seed}, step {step}: {curve[step]:.4f}", file=sys.stderr)
            if best is None or curve[step] > curve[best]:
                best, kept = step, trainable(model)[0].detach().clone()
        if step == settings["train_steps"]:
            break
    with torch.no_grad():
        trainable(model)[0].copy_(kept)
    return {"value": score("test"), "before": before, "step": best, "validation": curve}


if __name__ == "__main__":
    what, where, which = sys.argv[1:]
    if what == "step":
        turns.serve(lambda: start(Path(where), which))
    else:
        print(json.dumps(train(Path(where), int(which))))
