#!/usr/bin/env bash
# Asks Cloud TPU for a slice (a queued resource with one node of the same name), waits for it.
#
#   create.sh --project=P --zone=Z --name=N --accelerator=v6e-8 [--spot | --reserved]
#
#   --accelerator=TYPE  as Cloud TPU calls it: v6e-8, v5litepod-8 (v5e-8 is understood), v5p-8, v4-8
#   --spot              cheap; may be taken away at any moment (supervise.sh brings it back)
#   --reserved          from a reservation of yours that matches
#                       neither: on demand, never taken away
#   --runtime=VERSION   the TPU software version (default: by the accelerator)
#   --no_wait           do not wait until it is ACTIVE
#   --pause=SECONDS     between two looks at its state (default 30)
#   --dry_run           print the commands, run none
#
# It costs money from ACTIVE until delete.sh, whether something runs on it or not.
# Exit codes: 0 it is there, 1 it failed, 2 bad input.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

accelerator='' runtime='' spot='' reserved='' no_wait='' pause=30
flags 'project= zone= name= accelerator= runtime= spot reserved no_wait pause=' "$@"
place
need name accelerator
need_number pause
((${#arguments[@]} == 0)) || die "nothing may follow --"
[[ -z $spot || -z $reserved ]] || die "--spot or --reserved, not both"
accelerator=${accelerator/#v5e-/v5litepod-}

# https://cloud.google.com/tpu/docs/runtimes
if [[ -z $runtime ]]; then
    case $accelerator in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v[234]-*) runtime=tpu-ubuntu2204-base ;;
        tpu7x*) die "the Cloud TPU API has no $accelerator: use gke_xpk.sh" ;;
        *) die "no TPU software version known for $accelerator: give --runtime=VERSION" ;;
    esac
fi

tier=()
[[ -z $spot ]] || tier=(--spot)
[[ -z $reserved ]] || tier=(--reserved)
run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${tier[@]+"${tier[@]}"}

[[ -z $no_wait ]] || exit 0
if [[ -n $dry_run ]]; then
    echo "# again and again, until it says ACTIVE:"
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        --format='value(state.state)'
    exit 0
fi
seen=''
while true; do
    state=$(state_of queued-resources state.state)
    [[ $state == "$seen" ]] || say "$name is $state"
    seen=$state
    case $state in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDING | SUSPENDED | ABSENT)
            say "no slice; delete.sh --name=$name clears the request away"
            exit 1
            ;;
    esac
    sleep "$pause"
done
