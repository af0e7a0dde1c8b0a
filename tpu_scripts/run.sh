#!/usr/bin/env bash
# Starts `python -m ptjax.train ARG...` on all workers of a slice, in the background.
#
#   run.sh --project=P --zone=Z --name=N -- --gin_file=tasks/sst2.gin --gin_file=runs/prompt_tune.gin \
#       --gin.MODEL_DIR="'gs://bucket/run'" ...
#
#   --restart           stop what runs there first (it saves; the same MODEL_DIR goes on)
#   --max_restarts=N    a worker starts its process again at most so often (default 20), after any
#                       exit code but 0 (finished) and 2 (bad input)
#   --pause=SECONDS     before it does so (default 30)
#   --dry_run           print the commands, run none
#
# It goes on when the ssh session ends; watch.sh shows the log. A preempted slice needs supervise.sh.
# Exit codes: 0 started, 1 failed, 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

restart='' max_restarts=20 pause=30
flags 'project= zone= name= restart max_restarts= pause=' "$@"
place
need name
need_number max_restarts pause
((${#arguments[@]})) || die "nothing to run: the arguments of ptjax.train follow --"

worker='bash ptjax/tpu_scripts/worker.sh'
command="$worker start $max_restarts $pause $(quote "${arguments[@]}")"
[[ -z $restart ]] || command="$worker stop && $command"
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$command"
