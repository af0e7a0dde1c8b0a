"""What a part of `run.sh` finds: rows in a JSON file that is whole at every moment.

A part that is stopped by its limit, or fails, leaves the rows that it had. The same command again
keeps them and goes on with the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
"""When a part began, if it imports this module before the slow ones."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What `run.sh` gives every part."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare.py")
    parser.add_argument("--limit", type=float, default=240, help="seconds; rows stop before it")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on any device")


@dataclasses.dataclass
class Record:
    """The rows of one part.

    Attributes:
        part: its name in `run.sh`.
        path: `gpu_PART.json`, or `rehearsal_PART.json`, which is never a result.
        deadline: of `time.monotonic()`, when the last row should have begun.
    """

    part: str
    path: Path
    deadline: float
    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def open(cls, part: str, flags: argparse.Namespace, *, started: float = STARTED) -> Record:
        """`started` is what `time.monotonic()` said before the slow imports.

        Raises:
            SystemExit: there is no accelerator and this is no rehearsal, or the rows that are there
                were found on another device.
        """
        about = {"part": part, "rehearsal": flags.rehearse, **describe_machine()}
        if about["platform"] == "cpu" and not flags.rehearse:
            raise SystemExit(f"{part}: JAX finds no accelerator here; --rehearse runs on a CPU")
        flags.output.mkdir(parents=True, exist_ok=True)
        kind = "rehearsal" if flags.rehearse else "gpu"
        path = flags.output / f"{kind}_{part}.json"
        rows = []
        if path.exists():
            before = json.loads(path.read_text())
            if before["device"] != about["device"]:
                raise SystemExit(
                    f"{path} was found on {before['device']!r}, this is {about['device']!r}: "
                    "give another --output"
                )
            rows = before["rows"]
        return cls(part, path, started + flags.limit, about, rows)

    def __enter__(self) -> Record:
        self._write("did not end")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._write("complete" if error is None else f"{kind.__name__}: {error}")

    def time_left(self) -> float:
        """Seconds until the part's limit."""
        return self.deadline - time.monotonic()

    def measure(self, name: str, find: Callable[[], dict[str, Any]], *, needs: float = 0) -> None:
        """Adds what `find` returns as the row `name`, unless an earlier run has it.

        An error becomes the row's `error`, which the next run tries again: other rows still count.

        Args:
            needs: seconds; with fewer left, the row is not begun and the part is incomplete.
        """
        if any(row["row"] == name and "error" not in row for row in self.rows):
            return
        self.rows = [row for row in self.rows if row["row"] != name]
        if self.time_left() < needs:
            raise TimeoutError(f"no time left for {name}, which takes {needs:.0f} s")
        began = time.monotonic()
        try:
            found = find()
        except Exception as error:  # Whatever a device or a peer comes up with, the rest goes on.
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        row = {"row": name, **found, "row_seconds": round(time.monotonic() - began, 1)}
        self.rows.append(row)
        self._write("did not end")
        print(f"{self.part}: {json.dumps(row)}", file=sys.stderr, flush=True)

    def _write(self, status: str) -> None:
        failed = [row["row"] for row in self.rows if "error" in row]
        if status == "complete" and failed:
            status = f"failed: {', '.join(failed)}"
        text = json.dumps(self.about | {"status": status, "rows": self.rows}, indent=2)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        os.replace(partial, self.path)


def describe_machine() -> dict[str, Any]:
    """Device, driver and versions, as JSON has them."""
    import jax  # here, so that table.py needs none

    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "driver": _nvidia_driver(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
