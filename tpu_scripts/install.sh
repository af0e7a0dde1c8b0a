#!/usr/bin/env bash
# Copies this clone to all workers of a slice and installs it there, with JAX for TPU.
#
#   install.sh --project=P --zone=Z --name=N
#
#   --dry_run           print the commands, run none
#
# What is copied: ptjax/, gin_configs/ (put gin files of your own there) and tpu_scripts/, as they are
# now, committed or not. On a worker: ~/ptjax, ~/ptjax-venv (Python 3.12, by uv,
# because the TPU images bring 3.10), ~/ptjax-run (logs). To install again is fine.
# Exit codes: 0 done, 1 failed, 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

flags 'project= zone= name=' "$@"
place
need name
((${#arguments[@]} == 0)) || die "nothing may follow --"

archive=$clone/dist/ptjax-$name.tar.gz
pack "$archive"
run gcloud compute tpus tpu-vm scp "$archive" "$name:ptjax.tar.gz" "${where[@]}" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="\
rm -rf ptjax && mkdir ptjax && tar -xzf ptjax.tar.gz -C ptjax && \
bash ptjax/tpu_scripts/worker.sh install"
