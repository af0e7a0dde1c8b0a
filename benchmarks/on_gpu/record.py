"""Results of a part of `run.sh`: rows in a JSON file, which is replaced atomically after each row.

A part that hits its limit or fails keeps the rows that it finished. The same command continues with
the others.
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
"""When a part began, provided that it imports this module before the slow ones."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `run.sh` passes to every part."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare.py")
    parser.add_argument("--limit", type=float, default=240, help="seconds for the part")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on any device")


@dataclasses.dataclass
class Record:
    """The rows of one part.

    Attributes:
        part: its name in `run.sh`.
        path: `gpu_PART.json`, or `rehearsal_PART.json`, which is never a result.
        deadline: `time.monotonic()` by which the last row should have ended.
        about: the part and the machine.
    """

    part: str
    path: Path
    deadline: float
    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def open(
        cls,
        part: str,
        flags: argparse.Namespace,
        *,
        started: float = STARTED,
        any_device: bool = False,
    ) -> Record:
        """Reads the rows of earlier runs, if there are any.

        Args:
            started: `time.monotonic()` before the slow imports.
            any_device: whether the part may run on a CPU without `--rehearse`; its file is then
                cpu_PART.json.

        Raises:
            SystemExit: there is no accelerator and this is no rehearsal, or the earlier rows are of
                another device.
        """
        about = {"part": part, "rehearsal": flags.rehearse, **describe_machine()}
        if about["platform"] == "cpu" and not (flags.rehearse or any_device):
            raise SystemExit(f"{part}: JAX finds no accelerator here; --rehearse runs on a CPU")
        flags.output.mkdir(parents=True, exist_ok=True)
        kind = "rehearsal" if flags.rehearse else about["platform"]
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
        """Adds the result of `find` as the row `name`, unless an earlier run has it.

        An exception becomes the row's `error`. The part continues, and the next run tries the row
        again.

        Args:
            needs: seconds that the row needs.

        Raises:
            TimeoutError: less time than that is left; this ends the part.
        """
        if any(row["row"] == name and "error" not in row for row in self.rows):
            return
        self.rows = [row for row in self.rows if row["row"] != name]
        if self.time_left() < needs:
            raise TimeoutError(f"no time left for {name}, which takes {needs:.0f} s")
        began = time.monotonic()
        try:
            found = find()
        except Exception as error:  # whatever fails, the other rows still run
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
    """Date, device, driver and versions, for JSON."""
    import jax  # slow to import: not before STARTED is taken

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
