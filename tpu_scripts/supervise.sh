#!/usr/bin/env bash
# Creates a slice, installs, runs, and brings it all back after a preemption, until the run is over.
#
#   supervise.sh --project=P --zone=Z --name=N --accelerator=v6e-8 --spot -- ARG...
#
#   --accelerator=, --runtime=, --spot, --reserved   as in create.sh
#   --max_restarts=N      a slice is made again at most so often, and a process on a worker restarted
#                         (default 20)
#   --pause=SECONDS       between two looks (default 30)
#   --delete_when_done    delete the slice at the end, however it ends (but not on Ctrl-C)
#   --dry_run             print the commands, run none
#
# ARG... are those of `python -m ptjax.train`. MODEL_DIR has to be on gs://, for the disks go with the
# slice; ptjax then goes on exactly where it saved. Run it where it may stay: tmux on a small VM.
# It deletes the slice of that name only when it is lost (SUSPENDED, FAILED, its node PREEMPTED), and is
# safe to start again.
# Exit codes: 0 the run finished, 2 bad input (ptjax's too), else ptjax's last, or 1: it gave up.

# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

accelerator='' runtime='' spot='' reserved='' max_restarts=20 pause=30 delete_when_done=''
flags 'project= zone= name= accelerator= runtime= spot reserved max_restarts= pause= delete_when_done' \
    "$@"
place
need name accelerator
need_number max_restarts pause
((${#arguments[@]})) || die "nothing to run: the arguments of ptjax.train follow --"
[[ " ${arguments[*]} " == *MODEL_DIR*gs://* ]] ||
    say "warning: no MODEL_DIR on gs:// among the arguments; a preempted slice loses its disks"

at=("${where[@]}" --name="$name" ${dry_run:+--dry_run})
slice=(--accelerator="$accelerator" ${runtime:+--runtime="$runtime"} ${spot:+--spot}
    ${reserved:+--reserved} --pause="$pause")

create() { bash "$here/create.sh" "${at[@]}" "${slice[@]}" "$@"; }
delete() { bash "$here/delete.sh" "${at[@]}" --yes; }
install() { bash "$here/install.sh" "${at[@]}"; }
start() {
    bash "$here/run.sh" "${at[@]}" --restart --max_restarts="$max_restarts" --pause="$pause" \
        -- "${arguments[@]}"
}
over() {
    say "$2"
    [[ -z $delete_when_done ]] || delete || say "$name was NOT deleted: it still costs money"
    exit "$1"
}

if [[ -n $dry_run ]]; then
    echo "# when there is no slice:"
    create
    echo "# when it is ACTIVE and nothing is installed, or nothing runs on it:"
    install
    start
    echo "# every $pause seconds:"
    bash "$here/watch.sh" "${at[@]}"
    echo "# when it is lost (SUSPENDED, FAILED, its node PREEMPTED), before all of the above again:"
    delete
    exit 0
fi

workers() {  # one word or two for each worker, such as "running" or "exit 0"; fails if one is silent
    local answer
    answer=$(bash "$here/watch.sh" "${at[@]}" 2>/dev/null) || return 1
    sed -n 's/^.*ptjax-status: \(running\|exit [0-9]*\|[a-z]*\).*$/\1/p' <<<"$answer"
}

remake() {  # the slice is in that state: lost, or not made yet
    ((made++ <= max_restarts)) || over 1 "gave up: $name was made $((made - 1)) times"
    say "$name is $1: making it"
    if [[ $1 != ABSENT ]]; then delete || return 0; fi
    create || say "no slice yet"
}

create --dry_run >/dev/null || exit  # bad input, before anything is spent
made=0 known=''
while true; do
    state=$(state_of queued-resources state.state)
    case $state in
        ABSENT | SUSPENDED | FAILED) remake "$state" ;;
        ACTIVE)
            found=$(workers) || found=''
            case $found in
                '')
                    say "the workers of $name do not answer"
                    node=$(state_of tpu-vm state)
                    [[ $node != PREEMPTED && $node != TERMINATED ]] || remake "$node"
                    ;;
                *absent*)
                    say "installing and starting on $name"
                    if install; then start || say "not started yet"; fi
                    ;;
                *idle* | *stopped*)
                    say "starting on $name"
                    start || say "not started yet"
                    ;;
                *running*) ;;
                *"exit 2"[!0-9]* | *"exit 2") over 2 "bad input: watch.sh --name=$name --log shows it" ;;
                *)
                    code=$(sed -n 's/^exit \([1-9][0-9]*\)$/\1/p' <<<"$found" | head -n 1)
                    [[ -n $code ]] || over 0 "the run finished"
                    over "$code" "gave up: a worker ended $((max_restarts + 1)) times, last with $code"
                    ;;
            esac
            ;;
        UNKNOWN) [[ -n $known ]] || exit 1 ;;  # no such project, not logged in
        *) ;;  # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING, ...
    esac
    known=1
    sleep "$pause"
done
