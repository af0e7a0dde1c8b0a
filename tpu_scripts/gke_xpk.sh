#!/usr/bin/env bash
# The same run on GKE: submits it to a cluster with xpk (`pip install xpk`; it needs Docker).
#
#   gke_xpk.sh --project=P --zone=Z --name=N --cluster=C --accelerator=v6e-16 -- ARG...
#
#   --name=N            of the workload
#   --cluster=C         a GKE cluster that `xpk cluster create` made, with that accelerator
#   --accelerator=TYPE  v6e-16, v5litepod-16 (v5e-16 is understood), v5p-8, tpu7x-8, ...
#   --slices=N          several slices of it (default 1)
#   --max_restarts=N    start again at most so often (default 20), after a preemption or any exit code
#                       but 0 (finished) and 2 (bad input)
#   --delete            delete that workload instead (the cluster stays, and costs)
#   --dry_run           print the commands, run none
#
# This clone (what install.sh would copy) is put on top of the image python:3.12 and installed when a
# container starts.
# ARG... are those of `python -m ptjax.train`; MODEL_DIR has to be on gs://. The log is in Cloud
# Logging (xpk prints the link) and in `kubectl logs`.
# Exit codes: 0 submitted, 1 failed, 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

cluster='' accelerator='' slices=1 max_restarts=20 delete=''
flags 'project= zone= name= cluster= accelerator= slices= max_restarts= delete' "$@"
place
need name cluster
need_number slices max_restarts
workload=("${where[@]}" --cluster="$cluster" --workload="$name")

if [[ -n $delete ]]; then
    ((${#arguments[@]} == 0)) || die "nothing may follow --"
    run xpk workload delete "${workload[@]}"
    exit 0
fi
need accelerator
((${#arguments[@]})) || die "nothing to run: the arguments of ptjax.train follow --"

files=$clone/dist/xpk-$name
pack "$files.tar.gz"
run rm -rf "$files"
run mkdir "$files"
run tar -xzf "$files.tar.gz" -C "$files"
# `exec`, so that a SIGTERM reaches Python, which saves. xpk itself restarts on 42 and 127-255.
run xpk workload create "${workload[@]}" --tpu-type="${accelerator/#v5e-/v5litepod-}" \
    --num-slices="$slices" --max-restarts="$max_restarts" --restart-on-exit-codes=1,3-126 \
    --base-docker-image=python:3.12 --script-dir="$files" \
    --command="pip install --quiet -e '.[tpu,gcs]' && exec python -m ptjax.train $(quote "${arguments[@]}")"
