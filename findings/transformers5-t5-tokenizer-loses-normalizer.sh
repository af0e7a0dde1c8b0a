#!/usr/bin/env bash
# Software: transformers 5.24.0 (tokenizers 0.23.3)
#
# Behaviour: a T5 folder has a tokenizer.json with a lower-casing normalizer, and no spiece.model.
# AutoTokenizer and T5TokenizerFast load it without the normalizer: other token ids than the file
# gives in the tokenizers library that made it, and no warning.
#
# Expected: the ids of the file. transformers describes tokenizer.json (its argument tokenizer_file)
# as a serialized tokenizers.Tokenizer, and 4.57.6 keeps the normalizer of this folder.
#
# Seen:
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
import json
import pathlib

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, T5TokenizerFast

pieces = ["<pad>", "</s>", "<unk>", "▁", "▁hello", "▁world"]
written = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
written.normalizer = normalizers.Lowercase()
written.pre_tokenizer = pre_tokenizers.Metaspace()
written.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
folder = pathlib.Path("lowercase")
folder.mkdir()
written.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))

ids = {}
for name, backend in {
    "tokenizers": Tokenizer.from_file(str(folder / "tokenizer.json")),
    "AutoTokenizer": AutoTokenizer.from_pretrained(folder).backend_tokenizer,
    "T5TokenizerFast": T5TokenizerFast.from_pretrained(folder).backend_tokenizer,
}.items():
    ids[name] = backend.encode("HELLO WORLD").ids
    print(f"{name:20} normalizer: {str(backend.normalizer):12} ids: {ids[name]}")

assert ids["tokenizers"] == [4, 5, 1], "the behaviour has changed"
assert ids["AutoTokenizer"] == ids["T5TokenizerFast"] != [4, 5, 1], "the behaviour has changed"
PY
