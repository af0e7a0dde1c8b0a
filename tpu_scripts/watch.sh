#!/usr/bin/env bash
# Shows what a slice does: its state and each worker's, a worker's log, or TensorBoard.
#
#   watch.sh --project=P --zone=Z --name=N
#   watch.sh --project=P --zone=Z --name=N --log [--worker=0]
#   watch.sh --project=P --zone=Z --name=N --tensorboard=MODEL_DIR
#
#   --log               follow the log of a worker (Ctrl-C leaves it running)
#   --worker=N          which one (default 0, which also prints the metrics)
#   --tensorboard=DIR   TensorBoard of that MODEL_DIR (gs:// or on worker 0), at localhost:6006
#   --dry_run           print the commands, run none
#
# Exit codes: 0, 1 failed, 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

log='' worker=0 tensorboard=''
flags 'project= zone= name= log worker= tensorboard=' "$@"
place
need name
need_number worker
((${#arguments[@]} == 0)) || die "nothing may follow --"
[[ -z $log || -z $tensorboard ]] || die "--log or --tensorboard, not both"

if [[ -n $log ]]; then
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$worker" \
        --command='tail -n 100 -F ptjax-run/log'
elif [[ -n $tensorboard ]]; then
    command="ptjax-venv/bin/tensorboard --port=6006 --logdir=$(quote "$tensorboard/tensorboard")"
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
        --ssh-flag='-L 6006:localhost:6006' --command="$command"
else
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        --format='value(state.state)'
    # "absent": nothing is installed there. A preempted worker must not hold this up.
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
        --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=20 --command="\
bash ptjax/tpu_scripts/worker.sh status 2>/dev/null || echo 'ptjax-status: absent'"
fi
