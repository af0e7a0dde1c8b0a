"""Writes the page of a finished run into its folder."""

from __future__ import annotations

from absl import logging
from etils import epath

from ptjax import files
from ptjax.model_dir import ModelDir
from ptjax.reports.content import as_json, make_content
from ptjax.reports.libraries import missing_libraries
from ptjax.reports.report import Report


def write_page(model_dir: epath.Path, *, again: bool = True) -> None:
    """Writes `report.html` from `report.json`.

    If the libraries for it are not installed, logs what to install and writes nothing.

    Args:
        again: whether to replace an existing page. If not, a run without `report.json`, of an older
            version, gets no page either.
    """
    run = ModelDir(model_dir)
    if not again and (run.report.exists() or not run.report_data.exists()):
        return
    if (problem := missing_libraries()) is not None:
        logging.info("no %s: %s", run.report.name, problem)
        return
    report = Report.read(model_dir)
    records = report.content["members"]
    if any(record.get("statistics") is None for record in records.values()):
        # Written where the libraries were missing.
        text = as_json(make_content(report.content["results"], records))
        files.write_bytes(run.report_data, text.encode())
    report.save(run.report)
