#!/usr/bin/env bash
# Copies the tuned prompt and its results from MODEL_DIR to this machine.
#
#   fetch.sh --project=P --zone=Z --model_dir=gs://bucket/run --to=DIR
#   fetch.sh --project=P --zone=Z --name=N --model_dir=runs/sst2 --to=DIR    from worker 0's disk
#
#   --model_dir=DIR     gs://..., or a path on worker 0 (relative ones start in ~/ptjax, as in a run)
#   --to=DIR            gets prompts/ (best.safetensors; of a bank, one folder each) and results.json
#   --dry_run           print the commands, run none
#
# Exit codes: 0 done, 1 failed (results.json is there only when the run is over), 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

model_dir='' to=''
flags 'project= zone= name= model_dir= to=' "$@"
place
need model_dir to
[[ $model_dir == gs://* ]] || need name
((${#arguments[@]} == 0)) || die "nothing may follow --"
model_dir=${model_dir%/}

run mkdir -p "$to"
if [[ $model_dir == gs://* ]]; then
    run gcloud storage cp "$model_dir/prompts" "$to" --project="$project" --recursive
    run gcloud storage cp "$model_dir/results.json" "$to" --project="$project"
else
    [[ $model_dir == /* ]] || model_dir=ptjax/$model_dir
    run gcloud compute tpus tpu-vm scp "$name:$model_dir/prompts" "$to" "${where[@]}" --worker=0 \
        --recurse
    run gcloud compute tpus tpu-vm scp "$name:$model_dir/results.json" "$to" "${where[@]}" --worker=0
fi
