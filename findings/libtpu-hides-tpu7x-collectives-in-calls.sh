#!/usr/bin/env bash
# Software: jax 0.10.2 with libtpu 0.0.42.1, which compiles for TPUs without having one
#
# Behaviour: on TPU v5e and v6e, the sum over a mesh's model axis is an `all-reduce` instruction in the
# loop's body in the compiled program. For tpu7x the body has a `call-start` on the thread "sparsecore"
# instead. The `all-reduce` is in the computation that `call-start` names with `to_apply`, the attribute
# with which an `all-reduce` names its reduction. The result has the type ((operand, token[]), result).
#
# Expected: `all-reduce` or `all-reduce-start` where the program communicates, as on v5e. A tool that
# looks for these in the bodies of loops, or that takes to_apply for a scalar function, finds nothing
# sent on a tpu7x; one that expects (operand, result) from a -start instruction misreads the tuple.
#
# Seen (instructions of the loop's body):
#   v5e: all-reduce; v6e: all-reduce; tpu7x: call-start
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1

cd "$dir"
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost venv/bin/python - <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def layer(x, kernels):
    return jax.nn.relu(x @ kernels[0]) @ kernels[1], None


def run(x, first, second):
    return jax.lax.scan(lambda x, _: layer(x, (first, second)), x, length=4)[0]


def communicating(topology):
    """The instructions of the loop's body that communicate, or call what does."""
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(-1, 2), ("data", "model"))

    def array(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    arguments = (
        array((64, 1024, 512), "data"),
        array((512, 2048), None, "model"),
        array((2048, 512), "model", None),
    )
    text = jax.jit(run).lower(*arguments).compile().as_text()
    body = re.search(r"body=(%[\w.\-]+)", text)[1]
    [lines] = re.findall(rf"^{re.escape(body)} .*?^}}", text, re.M | re.S)
    for line in lines.splitlines():
        if called := re.search(r"token\[\]\).* call-start\(.*to_apply=(%[\w.\-]+)", line):
            [computation] = re.findall(rf"^{re.escape(called[1])} .*?^}}", text, re.M | re.S)
            assert '"sparsecore"' in line and " all-reduce(" in computation
    return sorted(set(re.findall(r" (all-reduce(?:-start)?|call-start)\(", lines)))


found = {name: communicating(name) for name in ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")}
print(f"jax {jax.__version__}:", "; ".join(f"{name}: {x}" for name, x in found.items()))
assert found == {
    "v5e:2x2": ["all-reduce"],
    "v6e:2x2": ["all-reduce"],
    "tpu7x:2x2x1": ["call-start"],
}, found
PY
