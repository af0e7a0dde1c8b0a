"""Prints the marker expression for `make test-all`: everything whose needs this machine has.

Rehearsals are left out: they test benchmarks, not ptjax.

What is left out is said by `conftest.pytest_report_header`.
"""

import importlib.util
import pathlib
from importlib import metadata

SHARED = pathlib.Path(__file__).parent.parent.parent / "shared"


def missing() -> dict[str, str]:
    """Marker -> what it needs and this machine lacks."""
    lacks = {}
    if not (SHARED / "data").exists():
        lacks["shared"] = "the data sets beside the clone"
    if not importlib.util.find_spec("libtpu"):
        lacks["tpu"] = "libtpu"
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        lacks["cuda"] = "XLA's CUDA plugin"
    if not all(map(importlib.util.find_spec, ("torch", "peft", "pandas", "datasets"))):
        lacks["oracle"] = "torch, peft, pandas and datasets"
    # By distribution: mlflow-skinny imports as mlflow, and has no store of its own.
    if not all(any(metadata.distributions(name=name)) for name in ("wandb", "mlflow")):
        lacks["trackers"] = "wandb and mlflow (make trackers)"
    return lacks


if __name__ == "__main__":
    print(" and ".join(f"not {marker}" for marker in (*missing(), "rehearsal")))
