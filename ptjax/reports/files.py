"""Writes the page of a finished run into its folder."""

from __future__ import annotations

from absl import logging
from etils import epath

from ptjax.model_dir import ModelDir
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
    Report.read(model_dir).save(run.report)
