"""Where a measurement is made: the processor, what else it does, and the libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

OURS = ("jax", "jaxlib", "flax", "optax")


def require(*modules: str) -> None:
    """Ends the program, before it has measured for minutes, if one of the modules is missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: this needs {', '.join(missing)}: pip install {' '.join(missing)}")


def describe() -> dict[str, Any]:
    """The processor, the cores, the system and the versions, for JSON."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in OURS},
    }


def load() -> float:
    """How many processes wanted to run in the last minute, this one included."""
    return round(os.getloadavg()[0], 2)


def show() -> None:
    """Prints where the figures below are measured."""
    found = describe()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(
        f"{found['processor']}, {found['cores']} cores, load {load()}, Python {found['python']}, "
        f"{versions}",
        flush=True,
    )


if __name__ == "__main__":
    show()
