"""The compile cache that ptjax sets up, how it is bounded and turned off; options for CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ptjax.sharding import devices


def test_the_least_recently_used_programs_are_removed(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "used", "old", "older")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    os.utime(tmp_path / "used", (2000, 0))  # written long ago, read last
    for most, left in ((40, 4), (25, 2), (10, 1), (0, 0)):
        devices._remove_oldest(str(tmp_path), most)
        assert len(list(tmp_path.iterdir())) == left
        if left:
            assert (tmp_path / "used").exists()
    devices._remove_oldest(str(tmp_path / "none"), 0)


PROGRAM = """
import jax
from ptjax.sharding import devices
devices.MOST_CACHED = 5
devices.use_compile_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
"""


@pytest.mark.parametrize(("enabled", "left"), [("true", {"new"}), ("false", {"before"})])
def test_the_cache_is_bounded_and_can_be_turned_off(
    tmp_path: Path, enabled: str, left: set[str]
) -> None:
    folder = tmp_path / "ptjax" / "xla"
    folder.mkdir(parents=True)
    (folder / "before").write_bytes(b"longer than five")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": enabled}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    kept = {path.name for path in folder.iterdir()}
    assert {name if name == "before" else "new" for name in kept} == left


def test_products_of_few_rows_are_xla_s_own_on_cpus() -> None:
    def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.relu(x) @ w

    def has_ynnpack(options: dict[str, str] | None) -> bool:
        product = jax.jit(multiply, compiler_options=options)
        compiled = product.lower(jnp.ones((32, 512)), jnp.ones((512, 1024))).compile()
        return "ynn_fusion" in (compiled.as_text() or "")

    assert has_ynnpack(None) and not has_ynnpack(devices.few_rows_options("cpu"))
    assert devices.few_rows_options("tpu") is devices.few_rows_options("gpu") is None
