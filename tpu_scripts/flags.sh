# Sourced by the scripts here: flags, refusals, --dry_run, quoting. Not a script of its own.
# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts use what is set here
#
# A script names its flags and their defaults as variables, then calls
#   flags 'name= spot' "$@"     "name=" takes a value (--name=VALUE), "spot" is set to 1 (--spot)
# What follows a lone -- becomes the array `arguments`. --help and --dry_run are always there.
# PROJECT and ZONE may come from the environment; a name never does, because scripts delete by it.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
clone=$(dirname "$here")
script=$(basename "$0")
project=${PROJECT:-} zone=${ZONE:-} name='' dry_run='' arguments=()
# Where the commands of gcloud act: filled in by `place`.
where=()

die() {  # bad input: one line, exit code 2
    printf 'error: %s: %s (see %s --help)\n' "$script" "$1" "$script" >&2
    exit 2
}

say() { printf '%s: %s\n' "$script" "$*" >&2; }

flags() {
    local known=" $1 dry_run help " given key
    shift
    while (($#)); do
        given=$1 key=${1#--} key=${key%%=*}
        shift
        [[ $given == -- ]] && { arguments=("$@"); return; }
        [[ $given == -h ]] && key=help
        [[ $given == -* ]] || die "unexpected argument '$given'"
        if [[ $known == *" $key= "* ]]; then
            [[ $given == --*=?* ]] || die "--$key needs a value: --$key=VALUE"
            printf -v "$key" '%s' "${given#*=}"
        elif [[ $known == *" $key "* ]]; then
            [[ $given == *=* ]] && die "--$key takes no value"
            [[ $key == help ]] && { help; exit 0; }
            printf -v "$key" 1
        else
            die "unknown flag $given"
        fi
    done
}

help() {  # the comment at the head of the script
    sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0"
}

need() {  # need NAME...: these flags must have been given
    local key
    for key in "$@"; do
        [[ -n ${!key} ]] || case $key in
            project) die "which project? give --project=VALUE or set PROJECT" ;;
            zone) die "which zone? give --zone=VALUE or set ZONE" ;;
            *) die "which $key? give --$key=VALUE" ;;
        esac
    done
}

need_number() {  # need_number NAME...: whole numbers
    local key
    for key in "$@"; do
        [[ ${!key} =~ ^(0|[1-9][0-9]{0,5})$ ]] || die "--$key=${!key} is not a whole number"
    done
}

place() {  # project and zone are known, and the name, if there has to be one, is a name
    need project zone
    [[ -z $name || $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
        die "--name=$name: use small letters, digits and dashes, a letter first"
    where=(--project="$project" --zone="$zone")
}

quote_word() {
    local escaped="'\\''"
    if [[ $1 =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
        printf '%s' "$1"
    elif [[ $1 =~ ^(--[A-Za-z0-9_.-]+=)(.+)$ ]]; then  # --command='...' reads better than '--command=...'
        local flag=${BASH_REMATCH[1]}
        printf '%s%s' "$flag" "$(quote_word "${BASH_REMATCH[2]}")"
    elif [[ $1 == *\'* && $1 != *[\"\$\`\\!]* ]]; then
        printf '"%s"' "$1"
    else
        printf "'%s'" "${1//\'/$escaped}"
    fi
}

quote() {  # words -> one line that a shell reads back as the same words
    local word gap=''
    for word in "$@"; do
        printf '%s' "$gap"
        quote_word "$word"
        gap=' '
    done
    echo
}

run() {  # shows the command; runs it, unless --dry_run
    if [[ -n $dry_run ]]; then
        quote "$@"
    else
        printf '+ %s\n' "$(quote "$@")" >&2
        "$@"
    fi
}

state_of() {  # state_of queued-resources 'state.state', state_of tpu-vm state: ACTIVE, PREEMPTED, ...
    local answer  # ABSENT: there is none; UNKNOWN: gcloud failed, and said why
    if answer=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>&1); then
        printf '%s\n' "${answer##*$'\n'}"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo ABSENT
    else
        say "${answer//$'\n'/ }"
        echo UNKNOWN
    fi
}

pack() {  # pack ARCHIVE: of this clone, what an installation needs, as it is now
    run mkdir -p "$(dirname "$1")"
    run tar -czf "$1" -C "$clone" --exclude=__pycache__ \
        pyproject.toml README.md LICENSE gin_configs ptjax tpu_scripts
}
