#!/usr/bin/env bash
# Software: transformers 5.17.0 with tokenizers 0.23.2; beside it 5.24.0 with 0.23.3
# (sentencepiece 0.2.2, protobuf 7.36.2)
#
# Behaviour: AutoTokenizer of 5.17.0 does not load a T5 folder whose spiece.model was trained with
# normalization_rule_name="identity". Such a model holds an empty character map, which is handed to
# tokenizers as a map to parse.
#
# Expected: the ids of SentencePiece and </s>, as for the same text with the default rule, nmt_nfkc,
# and as 5.24.0 gives them.
#
# Seen:
#   transformers 5.17.0, nmt_nfkc: the ids of SentencePiece
#   transformers 5.17.0, identity: Exception: Error while attempting to build Precompiled normalizer: Cannot parse precompiled_charsmap
#   transformers 5.24.0, nmt_nfkc: the ids of SentencePiece
#   transformers 5.24.0, identity: the ids of SentencePiece
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
export HF_HOME="$dir/hf" HF_HUB_OFFLINE=1

cat >"$dir/load.py" <<'PY'
import io
import json
import pathlib

import sentencepiece
import transformers

TEXT = "the old mill"
lines = [f"the mill of the old town number {n} was sold in {1800 + n} ." for n in range(300)]
for rule in ("nmt_nfkc", "identity"):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, model_type="unigram",
        normalization_rule_name=rule, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    folder = pathlib.Path(rule)
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    right = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode(TEXT) + [1]
    try:
        ids = transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT)
        said = "the ids of SentencePiece" if ids == right else f"{ids}, not {right}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(f"transformers {transformers.__version__}, {rule}: {said}")
PY

cd "$dir"
for pins in "transformers==5.17.0 tokenizers==0.23.2" "transformers==5.24.0 tokenizers==0.23.3"; do
  # shellcheck disable=SC2086  # two requirements
  venv/bin/pip install --quiet --disable-pip-version-check \
    $pins sentencepiece==0.2.2 protobuf==7.36.2
  venv/bin/python load.py 2>/dev/null | tee -a seen
done
right="the ids of SentencePiece"
grep -q "5.17.0, nmt_nfkc: $right" seen
grep -q "5.17.0, identity: Exception: .*Cannot parse precompiled_charsmap" seen
grep -q "5.24.0, nmt_nfkc: $right" seen
grep -q "5.24.0, identity: $right" seen
