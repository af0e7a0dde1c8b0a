#!/usr/bin/env bash
# Software: transformers 5.24.0 as the writer, 4.57.6 as the reader (torch 2.13.0)
#
# Behaviour: 5.24.0 loads a T5 1.1 folder (an lm_head.weight of its own, tie_word_embeddings: false)
# and saves it again. The new folder still has the trained lm_head.weight, but its config.json says
# tie_word_embeddings: true. 4.57.6 acts on that: it ignores lm_head.weight, ties the output to the
# input embedding, scales the decoder's output, and gives other logits, without a warning.
#
# Expected: loading and saving keeps tie_word_embeddings: false. PretrainedConfig documents it as
# whether the input and output embeddings should be tied; in this model they are not.
#
# Seen:
#   4.57.6 loads original: tied=False, logits[0, 0, 0] = 2.925
#   5.24.0 loads original: tied=False, logits[0, 0, 0] = 2.925
#   tie_word_embeddings: false in original/config.json, true in copy/config.json
#   4.57.6 loads copy: tied=True, logits[0, 0, 0] = 0.617
#   largest change of a logit: 10.74
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
cd "$dir"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1
install() { venv/bin/pip install --quiet --disable-pip-version-check "$@"; }

cat >show.py <<'PY'
import torch
from transformers import T5Config, T5ForConditionalGeneration as T5, __version__

def show(folder):
    model = T5.from_pretrained(folder).eval()
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
    tied = model.lm_head.weight is model.shared.weight
    print(f"{__version__} loads {folder}: {tied=}, logits[0, 0, 0] = {logits[0, 0, 0]:.3f}")
    return model, tied, logits
PY

install transformers==4.57.6 torch==2.13.0
venv/bin/python - <<'PY'
from show import T5, T5Config, show, torch
torch.manual_seed(0)
T5(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False)).save_pretrained("original")
torch.save(show("original")[2], "logits.pt")
PY
install transformers==5.24.0
venv/bin/python -c 'from show import show; show("original")[0].save_pretrained("copy")'
grep tie_word_embeddings original/config.json copy/config.json
install transformers==4.57.6
venv/bin/python - <<'PY'
from show import show, torch
_, tied, logits = show("copy")
change = (logits - torch.load("logits.pt")).abs().max().item()
print(f"largest change of a logit: {change:.2f}")
assert tied and change > 1, "the behaviour has changed"
PY
