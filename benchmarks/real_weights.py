"""The Python parts of on_real_weights.sh: parity with transformers, the data, the table."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import ptjax

TEXTS = (
    "translate English to German: The house is wonderful.",
    "sentence: a gripping film, if one forgives it the last half hour.",
    "The capital of France is",
    "Ünïcödé, 1,234.5 % and\ttabs: what a tokenizer must keep or drop the same way.",
)
TARGETS = "das Haus ist wunderbar, positive and Paris"
NEW_TOKENS = 12
MOST_DIFFERENCE = 1e-4
"""Of a logit, over the spread of all: both sides compute in float32, in another order."""
PUBLISHED = {
    "published: SST-2 validation, prompt-tuning's own prompt for the LM-adapted T5 1.1 base": 0.951
}
"""google-research/prompt-tuning, pretrained_prompts/t5_1_1_lm100k_base/README.md: 100 rows, which
start as the class labels, batch 128. The paper itself has no SST-2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("parity", "data", "table"))
    parser.add_argument("name", nargs="?")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--tokenizer", default="None")
    flags = parser.parse_args()
    if flags.part == "data":
        write_sst2(flags.output / "sst2")
    elif flags.part == "parity":
        tokenizer = None if flags.tokenizer == "None" else flags.tokenizer
        found = parity(flags.name, tokenizer, flags.output)
        (flags.output / "parity.json").write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found, indent=2))
        if found["relative_difference"] > MOST_DIFFERENCE or not found["generated_equal"]:
            raise SystemExit("ptjax and transformers differ: see parity.json")
    else:
        print(table(flags.name, flags.output))


def parity(name: str, tokenizer: str | None, folder: Path) -> dict[str, Any]:
    """Logits and greedy texts of ptjax and of transformers, on the same ids in float32."""
    import torch
    import transformers

    backbone = ptjax.load_backbone(name, tokenizer=tokenizer, dtype="float32")
    assert backbone.tokenizer is not None
    reference = name
    if tokenizer is not None:  # T5X: transformers reads what ptjax writes of it
        reference = str(folder / "huggingface")
        params = backbone.variables["params"]
        ptjax.save_backbone(reference, backbone.config, params, dtype="float32")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(reference, dtype=torch.float32)
    model.eval()
    ids = backbone.config.special_ids
    rows = [[*backbone.tokenizer.encode(text), backbone.tokenizer.eos_id] for text in TEXTS]
    inputs = np.full((len(rows), max(map(len, rows))), ids.pad_id, np.int32)
    for row, tokens in zip(inputs, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in rows], np.int32)
    start = model.config.decoder_start_token_id
    targets = np.tile([start, *backbone.tokenizer.encode(TARGETS)], (len(rows), 1)).astype(np.int32)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": targets,
        "encoder_lengths": lengths,
    }
    ours = np.asarray(ptjax.forward(backbone, batch))
    mask = torch.tensor(np.arange(inputs.shape[1]) < lengths[:, None])
    asked = {"input_ids": torch.tensor(inputs).long(), "attention_mask": mask.long()}
    with torch.no_grad():
        theirs = model(**asked, decoder_input_ids=torch.tensor(targets).long()).logits.numpy()
        written = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    theirs = theirs[..., : ours.shape[-1]]  # transformers may pad the vocabulary
    generated = ptjax.generate(backbone, list(TEXTS), max_new_tokens=NEW_TOKENS)
    decoded = [backbone.tokenizer.decode(row[1:].tolist()) for row in written]
    difference = float(np.abs(ours - theirs).max())
    return {
        "name": name,
        "transformers": transformers.__version__,
        "texts": len(TEXTS),
        "logits": list(ours.shape),
        "largest_difference": difference,
        "relative_difference": difference / float(theirs.std()),
        "generated_equal": generated == decoded,
        "generated": generated,
        "generated_by_transformers": decoded,
    }


def write_sst2(folder: Path) -> None:
    """GLUE's SST-2 as tab-separated files; its test split has no labels."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    splits: Any = datasets.load_dataset("nyu-mll/glue", "sst2")
    for split in ("train", "validation"):
        with (folder / f"{split}.tsv").open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
            writer.writerow(["sentence", "label"])
            writer.writerows([row["sentence"].strip(), row["label"]] for row in splits[split])


def table(name: str, folder: Path) -> str:
    """The results, and the published one to compare them with."""
    found = json.loads((folder / "parity.json").read_text())
    results = json.loads((folder / "sst2" / "results.json").read_text())
    rows = {
        "largest difference of a logit to transformers": f"{found['largest_difference']:.2e}",
        "the same over the logits' standard deviation": f"{found['relative_difference']:.2e}",
        "greedy texts equal": f"{found['generated_equal']}",
        "SST-2 validation, always the majority": f"{results['majority']:.3f}",
        "SST-2 validation, the untrained prompt": f"{results['before']:.3f}",
        "SST-2 validation, the tuned prompt": f"{results['value']:.3f}",
        **PUBLISHED,
    }
    lines = [f"| {name} | |", "|---|--:|", *(f"| {row} | {value} |" for row, value in rows.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except ptjax.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
