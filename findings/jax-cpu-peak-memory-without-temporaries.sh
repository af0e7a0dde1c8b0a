#!/usr/bin/env bash
# Software: jax 0.10.2 and 0.11.2, `Compiled.memory_analysis()` on the CPU
#
# Behaviour: `peak_memory_in_bytes` is the size of the arguments and outputs alone. The temporary
# buffers, which `temp_size_in_bytes` of the same object counts, are not in it, however large they
# are. A program that needs 8.6 GB reports a peak of one megabyte, so a check of the peak against the
# memory of the machine finds that everything fits.
#
# Expected: a peak of at least the largest buffers that live at the same time. Running the small
# program below raises the process's resident memory by more than 200 MB.
#
# Seen (both releases):
#   1024: arguments 262144, temporaries 536870912, peak 262152
#   4096: arguments 1048576, temporaries 8589934592, peak 1048584
#   running 1024 took more than 200 MB
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

cat >"$dir/peak.py" <<'PY'
import resource

import jax
import jax.numpy as jnp


def grow(x):
    return jnp.sin(jnp.einsum("bi,bj->bij", x, x)).cumsum(1).sum()


for n in (1024, 4096):
    shape = jax.ShapeDtypeStruct((64, n), jnp.float32)
    memory = jax.jit(grow).lower(shape).compile().memory_analysis()
    print(
        f"{n}: arguments {memory.argument_size_in_bytes}, temporaries "
        f"{memory.temp_size_in_bytes}, peak {memory.peak_memory_in_bytes}"
    )
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jax.jit(grow)(jnp.ones((64, 1024))).block_until_ready()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("running 1024 took", "more" if after - before > 200_000 else "less", "than 200 MB")
PY

for release in 0.10.2 0.11.2; do
    "${PYTHON:-python3.12}" -m venv "$dir/venv" # jax 0.11 needs Python 3.12
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$release" "jaxlib==$release"
    JAX_PLATFORMS=cpu "$dir/venv/bin/python" "$dir/peak.py" | tee "$dir/seen"
    grep -qx "1024: arguments 262144, temporaries 536870912, peak 262152" "$dir/seen"
    grep -qx "4096: arguments 1048576, temporaries 8589934592, peak 1048584" "$dir/seen"
    grep -qx "running 1024 took more than 200 MB" "$dir/seen"
    rm -r "$dir/venv"
done
