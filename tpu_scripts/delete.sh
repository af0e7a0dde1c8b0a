#!/usr/bin/env bash
# Deletes one slice: the queued resource of that name with its node and the disks of its workers.
#
#   delete.sh --project=P --zone=Z --name=N
#
#   --yes               do not ask
#   --dry_run           print the commands, run none
#
# A MODEL_DIR on gs:// stays; one on a worker's disk is gone (fetch.sh first).
# Exit codes: 0 deleted, 1 not deleted (it still costs money), 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

yes=''
flags 'project= zone= name= yes' "$@"
place
need name
((${#arguments[@]} == 0)) || die "nothing may follow --"

if [[ -z $yes && -z $dry_run ]]; then
    printf 'Delete the slice %s in %s of project %s? [y/N] ' "$name" "$zone" "$project" >&2
    read -r answer || { echo >&2; die "nobody to ask: give --yes"; }
    [[ $answer == [yY] || $answer == yes ]] || { say "nothing was deleted"; exit 1; }
fi
run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
