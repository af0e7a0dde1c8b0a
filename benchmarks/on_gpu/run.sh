#!/usr/bin/env bash
# Benchmarks ptjax on a GPU machine without a network, in parts of at most four minutes each.
#
#   benchmarks/on_gpu/run.sh [--rehearse] [--data=DIR] [--output=DIR] [--limit=SECONDS] [PART...]
#
# PART: pretrain, parity, step, attention, peft, generate; default: those without a complete result,
# in this order. --data is the folder that `python benchmarks/on_gpu/prepare.py` wrote. Each part
# writes gpu_PART.json to --output, with every row that it finished; the same command keeps those
# rows and continues. --limit: seconds for each part (default: 240). --rehearse: toy sizes on the
# CPU, written to rehearsal_PART.json. The exit code is 0 if every part is complete.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
data=$here/data output=$root/benchmarks/results limit=240 rehearse=() parts=()
for word in "$@"; do
    case $word in
        --rehearse) rehearse=(--rehearse) ;;
        --data=*) data=${word#*=} ;;
        --output=*) output=${word#*=} ;;
        --limit=*) limit=${word#*=} ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        pretrain | parity | step | attention | peft | generate) parts+=("$word") ;;
        *) echo "run.sh: $word is neither a flag nor a part; see --help" >&2; exit 2 ;;
    esac
done
if [ ${#rehearse[@]} -gt 0 ]; then
    export JAX_PLATFORMS=cpu
    # Toy sizes spend nearly all of their time compiling.
    export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    kind=rehearsal
else
    # Named, so that JAX fails if it cannot use the GPU instead of falling back to the CPU.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
    kind=gpu
fi
if [ ${#parts[@]} -eq 0 ]; then
    for part in pretrain parity step attention peft generate; do
        grep -qs '"status": "complete"' "$output/${kind}_$part.json" || parts+=("$part")
    done
    [ ${#parts[@]} -gt 0 ] || echo "every part has a complete result in $output" >&2
fi
export PYTHONPATH=$root:$root/benchmarks:$here:$root/models${PYTHONPATH:+:$PYTHONPATH}
# The parts share compiled programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/ptjax_on_gpu_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.2}

for part in "${parts[@]}"; do
    echo "== $part" >&2
    file=$part
    # A module called `peft` on the path would shadow PEFT itself.
    [ "$part" = peft ] && file=peft_speed
    # A part stops by itself before the limit; timeout ends one that hangs.
    timeout --signal=INT --kill-after=10 "$limit" "$python" "$here/$file.py" \
        --data="$data" --output="$output" --limit="$((limit - 20))" "${rehearse[@]}" \
        || echo "== $part ended with $?" >&2
done
"$python" "$here/table.py" "$output" "$kind" "${parts[@]}"
