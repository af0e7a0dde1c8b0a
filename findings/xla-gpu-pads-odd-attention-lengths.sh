#!/usr/bin/env bash
# Software: jax 0.10.2 with its CUDA 13 plugin, which compiles for an H100 without having one; products
# by cuBLAS (xla_gpu_enable_triton_gemm off)
#
# Behaviour: in bfloat16, attention over a length that is not a multiple of 8 is compiled with copies.
# XLA pads the queries, keys, values, weights and their gradients to the next multiple of 8 in
# kernels of their own, because cuBLAS wants that, and cuts the results. A soft prompt of 100 rows
# before inputs of 32, 64, ..., 512 tokens never makes a multiple of 8.
#
# Expected: a length is computed as it is; shorter is never slower. On an H200, a train step of a T5
# XL with 612 positions took 0.407 s and one with 640 positions 0.389 s.
#
# Seen (padded arrays of one attention, forward and backward):
#   length 608: 0, length 612: 8, length 616: 0, length 132: 8, length 128: 0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2

cd "$dir"
JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 venv/bin/python - <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128
  clock_rate_ghz: 1.98 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_block_limit: 65536
  registers_per_core_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 device_memory_size: 85899345920 memory_bandwidth: 3350000000000
}
platform_name: "CUDA"
"""
described = topologies.get_topology_desc(
    platform="cuda", topology_name="", topology="1x1x1", target_config=H100
)
place = SingleDeviceSharding(described.devices[0])


def attention(query, key, value):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32))
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(query.dtype), value).sum()


def padded(length):
    array = jax.ShapeDtypeStruct((4, length, 8, 64), jnp.bfloat16, sharding=place)
    step = jax.jit(jax.grad(attention, argnums=(0, 1, 2))).lower(array, array, array)
    text = step.compile(compiler_options={"xla_gpu_enable_triton_gemm": False}).as_text()
    return len(re.findall(r"= bf16\[[\d,]+\]\S* pad\(", text))


found = {length: padded(length) for length in (608, 612, 616, 132, 128)}
print(f"jax {jax.__version__}:", ", ".join(f"length {n}: {count}" for n, count in found.items()))
assert found[608] == found[616] == found[128] == 0, "a multiple of 8 is padded, too"
assert found[612] > 0 and found[132] > 0, "nothing is padded any more"
PY
