"""The two sides of `generate.py`, each in its own process; they take turns (see turns.py).

    python generate_sides.py write FOLDER      writes the random backbone and prompt for both sides
    python generate_sides.py ptjax FOLDER
    python generate_sides.py torch FOLDER      transformers

FOLDER holds what `generate.py` wrote: `settings.json`, `inputs.npz` and `turn`, which names the
method of the next turn (one of `METHODS`) and its number of inputs. In the first turn of each pair,
a side also writes its answers: FOLDER/SIDE_METHOD_COUNT.json, one string for each input.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import turns

METHODS = ("labels", "greedy", "beams", "labels_once")
"""For `labels`, transformers runs a forward pass for each label, as PEFT's interface asks for; for
`labels_once`, it runs its encoder only once. ptjax does the same for both."""
SHARPNESS = 3.0
"""Standard deviation of the logarithm of the tokens' scales; see `RandomWeights`."""
LARGEST_SCALE = 30.0
EMPTY, EOS = 0, 1  # T5's padding and end of sequence
Find = Callable[[str, int], list[str]]


def load_inputs(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(inputs, labels), rows of ids of any length."""
    with np.load(folder / "inputs.npz") as stored:
        return tuple(
            np.split(stored[f"{name}_ids"], stored[f"{name}_offsets"][1:-1])
            for name in ("input", "label")
        )


def serve(folder: Path, side: str) -> turns.Side:
    """A side whose warm-up is only to load; the first turn of a method compiles."""
    settings = json.loads((folder / "settings.json").read_text())
    find, peak, reset = {"ptjax": start_ptjax, "torch": start_torch}[side](folder, settings)
    found: set[Path] = set()

    def steps() -> None:
        method, count = (folder / "turn").read_text().split()
        file = folder / f"{side}_{method}_{count}.json"
        if file not in found:
            reset()
        said = find(method, int(count))
        if file not in found:
            file.write_text(json.dumps(said))
            found.add(file)

    return turns.Side(lambda: None, steps, {}, peak)


# ptjax


def write(folder: Path) -> None:
    """Writes a backbone of `RandomWeights` and a prompt; needs no accelerator."""
    from ptjax.interop.huggingface import save_huggingface
    from ptjax.models.config import T5Config

    settings = json.loads((folder / "settings.json").read_text())
    sizes = settings["config"].items()  # JSON has no tuples
    config = T5Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in sizes})
    save_huggingface(folder / "backbone", RandomWeights(config), config, dtype=settings["dtype"])
    shape = settings["prompt"], config.emb_dim
    np.save(folder / "prompt.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))


class RandomWeights(Mapping[str, np.ndarray]):
    """T5X's name -> float32 array, made on access and scaled as T5X initialises it.

    A few tokens have much larger logits than the others. So near-ties are rare, which bfloat16
    could decide either way. The logits of padding and of the end of sequence are 0, far below the
    largest, so every text has the full length.
    """

    def __init__(self, config: Any) -> None:
        from ptjax.models.t5 import parameter_shapes
        from ptjax.trees import flatten_paths

        self._shapes = {k: v.shape for k, v in flatten_paths(parameter_shapes(config)).items()}
        self._head_dim = config.head_dim
        rng = np.random.default_rng(0)
        # All arrays are cut from one block, each from another place in it: drawing billions of
        # numbers would take minutes. Its size is prime, so no two rows of an array are the same.
        self._block = rng.standard_normal(4_194_319, np.float32)
        scale = np.exp(SHARPNESS * rng.normal(size=config.vocab_size)).astype(np.float32)
        self._token_scale = scale * (LARGEST_SCALE / scale.max())
        self._token_scale[[EMPTY, EOS]] = 0

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        if name.endswith("/scale"):
            return np.ones(shape, np.float32)
        start, size = zlib.crc32(name.encode()) % len(self._block), math.prod(shape)
        values = np.resize(self._block, start + size)[start:].reshape(shape)
        if name.endswith("embedding"):
            return values
        if name.endswith("logits_dense/kernel"):
            return values * self._token_scale * shape[0] ** -0.5
        # T5 folds the attention's 1 / sqrt(head_dim) into the initial query weights.
        width = shape[0] * (self._head_dim if name.endswith("query/kernel") else 1)
        return values * width**-0.5

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def start_ptjax(folder: Path, settings: dict[str, Any]) -> tuple[Find, Any, Any]:
    """Functions that (give the answers, return the peak memory, reset the peak)."""
    from ptjax_side import peak_bytes
    from tokens import IdsAsText, make_inputs, make_rows

    from ptjax.backbones.load import load_backbone
    from ptjax.data.batch import pad
    from ptjax.inference.generate import Decoding, decode_tokens, generate_tokens
    from ptjax.inference.labels import Labels, predict_labels
    from ptjax.inference.model import bind
    from ptjax.inference.prompts import open_prompt

    backbone = load_backbone(folder / "backbone", dtype=settings["dtype"])
    model = bind(backbone, open_prompt(backbone, np.load(folder / "prompt.npy")))
    model = dataclasses.replace(model, tokenizer=IdsAsText())
    inputs, labels = load_inputs(folder)
    rows = make_rows(labels)
    tokens = Labels(pad(labels, int(rows.lengths.max()), EMPTY), rows.lengths)

    def find(method: str, count: int) -> list[str]:
        source, batch = make_inputs(inputs[:count]), settings["batch"] or count
        if method.startswith("labels"):
            chosen, _ = predict_labels(model, source, [tokens], batch)
            return [str(i) for i in chosen]
        how = Decoding(num_beams=settings["beams"] if method == "beams" else 1)
        length = settings["new_tokens"]
        written, _ = generate_tokens(model, source, batch, max_new_tokens=length, how=how)
        return decode_tokens(model, written)

    # JAX cannot reset the peak, so `generate.py` goes from fewer inputs to more.
    return find, peak_bytes, lambda: None


# transformers


def start_torch(folder: Path, settings: dict[str, Any]) -> tuple[Find, Any, Any]:
    """As `start_ptjax`, for transformers."""
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(
        folder / "backbone", dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    )
    device = settings["device"]
    model = model.to(device).eval()
    prompt = torch.from_numpy(np.load(folder / "prompt.npy")).to(device, model.dtype)
    inputs, labels = load_inputs(folder)

    def find(method: str, count: int) -> list[str]:
        batch, said = settings["batch"] or count, [""] * count
        by_length = sorted(range(count), key=lambda i: len(inputs[i]))
        for start in range(0, count, batch):
            chosen = by_length[start : start + batch]
            for i, text in zip(chosen, answer(method, [inputs[i] for i in chosen]), strict=True):
                said[i] = text
        return said

    @torch.inference_mode()
    def answer(method: str, rows: list[np.ndarray]) -> list[str]:
        ids, mask = pad_torch(rows, settings["multiple"], device)
        embedded = model.get_input_embeddings()(ids)
        embedded = torch.cat([prompt.expand(len(rows), -1, -1), embedded], dim=1)
        mask = torch.cat([mask.new_ones(len(rows), len(prompt)), mask], dim=1)
        encoder = {"inputs_embeds": embedded, "attention_mask": mask}
        if method.startswith("labels"):
            return rank_torch(model, encoder, labels, once=method == "labels_once")
        written = model.generate(
            **encoder,
            max_new_tokens=settings["new_tokens"],
            num_beams=settings["beams"] if method == "beams" else 1,
            do_sample=False,
        )
        # Without the decoder's start token.
        return [" ".join(map(str, row)) for row in written[:, 1:].tolist()]

    if device == "cpu":
        return find, turns.resident_bytes, lambda: None
    return find, torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats


def pad_torch(rows: list[np.ndarray], multiple: int, device: str) -> tuple[Any, Any]:
    """(ids, mask), int64 [B, the longest row's length rounded up to a multiple]."""
    import torch

    length = -(-max(map(len, rows)) // multiple) * multiple
    ids, mask = np.full((2, len(rows), length), EMPTY)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def rank_torch(
    model: Any, encoder: dict[str, Any], labels: list[np.ndarray], once: bool
) -> list[str]:
    """The index of each row's likeliest label, as text; with `once`, the encoder runs once."""
    import torch

    mask, likelihoods = encoder["attention_mask"], []
    if once:
        encoder = {"encoder_outputs": model.get_encoder()(**encoder), "attention_mask": mask}
    for label in labels:
        start = model.config.decoder_start_token_id
        ids = torch.from_numpy(label.astype(np.int64)).to(mask.device)
        shifted = torch.cat([ids.new_tensor([start]), ids[:-1]]).expand(len(mask), -1)
        logits = model(**encoder, decoder_input_ids=shifted).logits
        each = logits.float().log_softmax(-1)[:, torch.arange(len(ids)), ids]
        likelihoods.append(each.sum(-1))
    return [str(i) for i in torch.stack(likelihoods, -1).argmax(-1).tolist()]


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(where)
    else:
        turns.serve(functools.partial(serve, where, what))
