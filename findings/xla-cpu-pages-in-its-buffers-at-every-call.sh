#!/usr/bin/env bash
# Software: jax 0.10.2 and 0.11.2 on Linux with glibc, CPU
#
# Behaviour: a compiled program takes its temporary buffer from malloc at every call and frees it at
# the end. glibc serves more than 32 MB by mmap and munmap, always, so every call touches every page of
# the buffer for the first time: one page fault per 4 KiB. A train step of a small T5 with 150 MB of
# temporaries had 38,000. On a virtual machine, where a fault cost about 3 microseconds, that step took
# 0.38 s, of which 0.11 s in the kernel, and 0.27 s when malloc asked for huge pages
# (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, in glibc 2.35 and newer). M_MMAP_MAX = 0 and a large
# M_TRIM_THRESHOLD, set by mallopt once Python runs, changed nothing.
#
# Expected: a program that is called again and again keeps its buffer, as on a GPU.
#
# Seen (the second number differs a little from run to run):
#   0.10.2: default 16392, glibc.malloc.hugetlb=1 248 page faults a call
#   0.11.2: default 16385, glibc.malloc.hugetlb=1 33 page faults a call
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

cat >"$dir/faults.py" <<'PY'
import resource

import jax
import jax.numpy as jnp


@jax.jit
def sort_twice(x):  # sorts cannot be fused with what is around them
    return jnp.sort(jnp.sort(jnp.outer(x, x), axis=0), axis=1).sum()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


x = jnp.arange(4096.0)
for _ in range(2):
    sort_twice(x).block_until_ready()
before = faults()
for _ in range(5):
    sort_twice(x).block_until_ready()
print((faults() - before) // 5)
PY

for release in 0.10.2 0.11.2; do
    "${PYTHON:-python3.12}" -m venv "$dir/venv" # jax 0.11 needs Python 3.12
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$release" "jaxlib==$release"
    grep -q '\[never\]' /sys/kernel/mm/transparent_hugepage/enabled && exit 1 # no huge pages here
    export JAX_PLATFORMS=cpu
    default=$("$dir/venv/bin/python" "$dir/faults.py")
    huge=$(GLIBC_TUNABLES=glibc.malloc.hugetlb=1 "$dir/venv/bin/python" "$dir/faults.py")
    echo "$release: default $default, glibc.malloc.hugetlb=1 $huge page faults a call"
    ((default > 16000 && huge < 1000))
    rm -r "$dir/venv"
done
