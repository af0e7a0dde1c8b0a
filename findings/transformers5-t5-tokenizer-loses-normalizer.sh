#!/usr/bin/env bash
# Software: transformers 5.24.0 (tokenizers 0.23.3)
#
# Behaviour: a T5 tokenizer gets a lower-casing normalizer and is saved. tokenizer.json has the
# normalizer, and the tokenizers library applies it. AutoTokenizer and T5TokenizerFast of the same
# transformers drop it when they load the folder: other token ids, without a warning.
#
# Expected: the same ids before saving and after loading. The docstring of save_pretrained says that
# it saves the full state, from which from_pretrained loads the full tokenizer again.
#
# Seen:
#   before saving        normalizer: Lowercase()  ids: [4, 5, 1]
#   tokenizers           normalizer: Lowercase()  ids: [4, 5, 1]
#   AutoTokenizer        normalizer: None         ids: [3, 2, 3, 2, 1]
#   T5TokenizerFast      normalizer: None         ids: [3, 2, 3, 2, 1]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  transformers==5.24.0 tokenizers==0.23.3

cd "$dir"
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1 venv/bin/python - <<'PY'
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, T5TokenizerFast

TEXT = "HELLO WORLD"
pieces = ["<pad>", "</s>", "<unk>", "▁", "▁hello", "▁world"]
tokenizer = T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
tokenizer.save_pretrained("lowercase")

backends = {
    "before saving": tokenizer.backend_tokenizer,
    "tokenizers": Tokenizer.from_file("lowercase/tokenizer.json"),
    "AutoTokenizer": AutoTokenizer.from_pretrained("lowercase").backend_tokenizer,
    "T5TokenizerFast": T5TokenizerFast.from_pretrained("lowercase").backend_tokenizer,
}
ids = {}
for name, backend in backends.items():
    ids[name] = backend.encode(TEXT).ids
    print(f"{name:20} normalizer: {str(backend.normalizer):12} ids: {ids[name]}")

assert ids["before saving"] == ids["tokenizers"] == [4, 5, 1], "the behaviour has changed"
assert ids["AutoTokenizer"] == ids["T5TokenizerFast"] != [4, 5, 1], "the behaviour has changed"
PY
