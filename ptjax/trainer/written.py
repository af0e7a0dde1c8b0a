"""Writes the files of a finished run: `results.json` and its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from etils import epath

from ptjax import files
from ptjax.files import JsonObject
from ptjax.model_dir import ModelDir
from ptjax.reports.content import as_json, make_content
from ptjax.reports.files import write_page
from ptjax.sharding import processes
from ptjax.trainer import lock


def write_results(
    directory: epath.Path,
    results: JsonObject,
    records: Mapping[str, JsonObject],
    run_lock: lock.Lock | None,
) -> JsonObject:
    """Writes the report and `results.json`; returns `results`. With this file a run has finished.

    Args:
        directory: MODEL_DIR.
        results: the content of `results.json`.
        records: the recorded predictions by name of a member.
        run_lock: the lock of MODEL_DIR, which is checked before each write.
    """
    run = ModelDir(directory)

    def write(path: epath.Path, make: Callable[[], str]) -> None:
        if run_lock is not None:
            run_lock.check()
        if processes.first():
            files.write_bytes(path, make().encode())

    # The statistics' libraries take seconds to import: one process does.
    write(run.report_data, lambda: as_json(make_content(results, records)))
    write(run.results, lambda: json.dumps(results, indent=2) + "\n")
    if processes.first():
        write_page(directory)
    return results
