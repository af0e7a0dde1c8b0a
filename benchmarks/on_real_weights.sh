#!/usr/bin/env bash
# Checks ptjax on released weights: parity with transformers, then a prompt for SST-2.
#
#   benchmarks/on_real_weights.sh NAME [--output=DIR] [--data=DIR] [--tokenizer=PATH] [FLAG...]
#
# NAME: a T5 on the Hugging Face hub (google/t5-base-lm-adapt), its folder, or a T5X checkpoint, which
# needs --tokenizer. --data holds sst2/train.tsv and sst2/validation.tsv, laid out as in GLUE; without
# it they are downloaded with `datasets`. --output (default: runs/on_real_weights) keeps everything; the
# same command continues. FLAGs go to `python -m ptjax.train`: --gin.TRAIN_STEPS=1000. Set PYTHON to one
# with ptjax and its extra `oracle`.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
name='' output=runs/on_real_weights data='' tokenizer=None more=()
for word in "$@"; do
    case $word in
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --output=*) output=${word#*=} ;;
        --data=*) data=${word#*=} ;;
        --tokenizer=*) tokenizer="'${word#*=}'" ;;
        -*) more+=("$word") ;;
        *)
            [ -z "$name" ] || { echo "on_real_weights.sh: two names; see --help" >&2; exit 2; }
            name=$word ;;
    esac
done
[ -n "$name" ] || { echo "on_real_weights.sh: give a NAME; see --help" >&2; exit 2; }
mkdir -p "$output"

echo "== parity" >&2
"$python" "$here/real_weights.py" parity "$name" --output="$output" --tokenizer="${tokenizer//\'/}"

if [ -z "$data" ]; then
    data=$output/data
    echo "== data" >&2
    [ -f "$data/sst2/validation.tsv" ] || "$python" "$here/real_weights.py" data --output="$data"
fi

echo "== SST-2" >&2
"$python" -m ptjax.train --gin_file=tasks/sst2.gin --gin_file=runs/prompt_tune.gin \
    --gin.MODEL_DIR="'$output/sst2'" --gin.DATA_DIR="'$(cd "$data" && pwd)'" \
    --gin.INITIAL_CHECKPOINT_PATH="'$name'" --gin.TOKENIZER="$tokenizer" \
    --gin.ptjax.Task.splits="{'train': 'sst2/train.tsv', 'validation': 'sst2/validation.tsv'}" \
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 128, 'targets': 4}" \
    "${more[@]}"

"$python" "$here/real_weights.py" table "$name" --output="$output"
