#!/usr/bin/env bash
# Software: transformers 5.24.0 (torch 2.13.0, safetensors 0.8.0)
#
# Behaviour: a T5 1.1 folder has a trained lm_head.weight and says tie_word_embeddings: false.
# from_pretrained loads it untied, but with a config that says true. resize_token_embeddings, the
# usual call after adding tokens, then replaces the trained lm_head by the input embedding: the
# logits of the old tokens change, and no message says so.
#
# Expected: the old rows of lm_head stay. resize_token_embeddings documents that a larger size
# adds vectors at the end; on loading, a message says that the two weights will not be tied
# (and advises tie_word_embeddings=False, which the folder has). 4.57.6 keeps lm_head here.
#
# Seen:
#   loaded:  tied=False, model.config.tie_word_embeddings=True
#   resized: tied=True, largest change of an old token's logit: 16.93
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  transformers==5.24.0 torch==2.13.0 safetensors==0.8.0

cd "$dir"
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

torch.manual_seed(0)
folder = pathlib.Path("t5_1_1")
config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
                  feed_forward_proj="gated-gelu", decoder_start_token_id=0)
T5ForConditionalGeneration(config).save_pretrained(folder)

# The layout of T5 1.1's released folders: an lm_head of its own, and the config says so.
weights = load_file(folder / "model.safetensors")
save_file(weights | {"lm_head.weight": torch.randn(32, 8)}, folder / "model.safetensors",
          metadata={"format": "pt"})
settings = json.loads((folder / "config.json").read_text())
del settings["scale_decoder_outputs"]
(folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))

model = T5ForConditionalGeneration.from_pretrained(folder).eval()
ids = torch.arange(3, 10)[None]
with torch.no_grad():
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    tied_before = model.lm_head.weight is model.shared.weight
    print(f"loaded:  tied={tied_before}, {model.config.tie_word_embeddings=}")
    model.resize_token_embeddings(40)
    after = model(input_ids=ids, decoder_input_ids=ids).logits[..., :32]
change = (after - before).abs().max().item()
tied_after = model.lm_head.weight is model.shared.weight
print(f"resized: tied={tied_after}, largest change of an old token's logit: {change:.2f}")
assert not tied_before and tied_after and change > 1, "the behaviour has changed"
PY
