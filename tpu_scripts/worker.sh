#!/usr/bin/env bash
# Runs on a worker, called by the other scripts over ssh; there it lies in ~/ptjax/tpu_scripts.
#
#   worker.sh install                      a virtual environment with ptjax and JAX for TPU
#   worker.sh start MAX PAUSE [ARG...]     `python -m ptjax.train ARG...` in the background
#   worker.sh keep MAX PAUSE [ARG...]      the same in the foreground (what `start` starts)
#   worker.sh stop                         SIGTERM, so that the run saves, then SIGKILL
#   worker.sh status                       one line: running PID | exit CODE | stopped | idle
#
# Any exit code but 0 (finished) and 2 (bad input) starts the training again, which goes on from
# MODEL_DIR, after PAUSE seconds and at most MAX times. ~/ptjax-run holds log, pid and exit_code.

set -euo pipefail
state=$HOME/ptjax-run
python=$HOME/ptjax-venv/bin/python
mkdir -p "$state"

alive() {  # after a reboot another process may have the number
    [[ -s $state/pid ]] && grep -qs worker.sh "/proc/$(cat "$state/pid")/cmdline"
}

install() {
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [[ -x $python ]] || uv venv --quiet --python 3.12 "$HOME/ptjax-venv"
    uv pip install --quiet --python "$python" -e "$HOME/ptjax[tpu,gcs]" tensorboard
    echo "ptjax-status: installed"
}

ended() {  # the exit code, whole or not at all
    echo "$1" >"$state/exit_code.new"
    mv "$state/exit_code.new" "$state/exit_code"
    exit "$1"
}

keep() {
    local most=$1 pause=$2 attempt=0 code
    shift 2
    stopping=''
    trap 'stopping=1' TERM
    cd "$HOME/ptjax"
    while true; do
        code=0
        echo "worker.sh: $(date -u +%FT%TZ) start $((attempt + 1))"
        "$python" -m ptjax.train "$@" || code=$?
        echo "worker.sh: $(date -u +%FT%TZ) exit code $code"
        if [[ $code == 0 || $code == 2 || -n $stopping ]]; then ended "$code"; fi
        if ((attempt++ >= most)); then
            echo "worker.sh: gave up after $most restarts"
            ended "$code"
        fi
        sleep "$pause" || true  # `stop` ends the sleep too
        if [[ -n $stopping ]]; then ended "$code"; fi
    done
}

start() {
    if alive; then
        echo "worker.sh: already running; run.sh --restart stops it first" >&2
        exit 1
    fi
    rm -f "$state/exit_code"
    # A session of its own: it outlives ssh, and `stop` reaches the whole group.
    setsid nohup bash "$HOME/ptjax/tpu_scripts/worker.sh" keep "$@" \
        >>"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    echo "ptjax-status: running $!"
}

stop() {
    alive || return 0
    local group
    group=$(cat "$state/pid")
    kill -TERM -- "-$group"
    for _ in {1..120}; do
        alive || return 0
        sleep 1
    done
    kill -KILL -- "-$group"
}

status() {
    if alive; then
        echo "ptjax-status: running $(cat "$state/pid")"
    elif [[ -s $state/exit_code ]]; then
        echo "ptjax-status: exit $(cat "$state/exit_code")"
    elif [[ -s $state/pid ]]; then
        echo "ptjax-status: stopped"
    else
        echo "ptjax-status: idle"
    fi
}

case ${1:-} in
    install | start | keep | stop | status) "$@" ;;
    --help) sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0" ;;
    *)
        echo "error: worker.sh: which of install, start, keep, stop, status? (see worker.sh --help)" >&2
        exit 2
        ;;
esac
