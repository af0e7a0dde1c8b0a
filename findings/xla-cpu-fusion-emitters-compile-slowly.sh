#!/usr/bin/env bash
# Software: jax 0.10.2 and 0.11.2 on CPU, Python 3.12 (PYTHON=... for another; 0.11 needs 3.12)
#
# Behaviour: of the CPU time that jax 0.10.2 takes to compile the gradient of a small T5-like
# network (width 16, one layer) without LLVM's optimisations, as test suites do, most goes into
# the newer fusion emitters: with --xla_cpu_use_fusion_emitters=false the same program compiles in
# less than half. jax 0.11.2 no longer has the flag, so the older emitters cannot be chosen, and a
# process that sets it does not start.
#
# Expected: emitters that cost a few percent, or a flag that newer releases ignore.
#
# Seen, CPU seconds of the compilation, the median of three (they differ between machines):
#   jax 0.10.2, default: 0.43
#   jax 0.10.2, without fusion emitters: 0.13
#   jax 0.11.2, default: 0.44
#   jax 0.11.2, without fusion emitters: Unknown flag in XLA_FLAGS
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

cat >"$dir/compile.py" <<'PY'
import statistics
import time

import jax
import jax.numpy as jnp

WIDTH, HEADS, LENGTH = 16, 2, 12


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer(x, w, mask):
    y = norm(x, w["norm"][0])
    q, k, v = (jnp.einsum("bld,dhk->bhlk", y, w[name]) for name in ("q", "k", "v"))
    scores = jnp.einsum("bhqk,bhlk->bhql", q, k) + w["bias"] + mask[:, None, None]
    mixed = jnp.einsum("bhql,bhlk->bqhk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bqhk,hkd->bqd", mixed, w["o"])
    y = norm(x, w["norm"][1])
    return x + (jax.nn.gelu(y @ w["wi"]) * (y @ w["gate"])) @ w["wo"]


def loss(prompt, w, tokens, targets):
    prompts = jnp.broadcast_to(prompt, (len(tokens), *prompt.shape))
    x = jnp.concatenate([prompts, w["embedding"][tokens]], 1)
    present = jnp.concatenate([jnp.ones(prompts.shape[:2], bool), tokens > 0], 1)
    x = layer(x, w, jnp.where(present, 0.0, -1e9))
    logits = jax.nn.log_softmax(x[:, -targets.shape[1] :] @ w["embedding"].T)
    told = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return -jnp.sum(told * (targets > 0)) / jnp.sum(targets > 0)


head = (WIDTH, HEADS, 8)
shapes = {
    "embedding": (64, WIDTH), "norm": (2, WIDTH), "q": head, "k": head, "v": head,
    "o": (HEADS, 8, WIDTH), "bias": (HEADS, LENGTH, LENGTH),
    "wi": (WIDTH, 32), "gate": (WIDTH, 32), "wo": (32, WIDTH),
}
weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
prompt = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
seconds = []
for _ in range(3):
    jax.clear_caches()
    lowered = jax.jit(jax.grad(loss)).lower(prompt, weights, tokens, tokens)
    began = time.process_time()
    lowered.compile()
    seconds.append(time.process_time() - began)
print(f"{statistics.median(seconds):.2f}")
PY

cd "$dir"
export JAX_PLATFORMS=cpu
tests="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
for release in 0.10.2 0.11.2; do
  "${PYTHON:-python3.12}" -m venv "venv-$release"
  "venv-$release/bin/pip" install --quiet --disable-pip-version-check "jax[cpu]==$release"
  for flag in "" --xla_cpu_use_fusion_emitters=false; do
    name=$([ -z "$flag" ] && echo "default" || echo "without fusion emitters")
    if ! said=$(XLA_FLAGS="$tests $flag" "venv-$release/bin/python" compile.py 2>errors); then
      said=$(grep -o "Unknown flag in XLA_FLAGS" errors)
    fi
    echo "jax $release, $name: $said" | tee -a seen
  done
done
seconds() { sed -n "s/^jax 0.10.2, $1: //p" seen; }
awk -v slow="$(seconds default)" -v fast="$(seconds 'without fusion emitters')" \
  'BEGIN { exit !(fast < slow / 2) }'
grep -qx "jax 0.11.2, without fusion emitters: Unknown flag in XLA_FLAGS" seen
