"""`python -m ptjax.report`: reports on a run, or compares several."""

from __future__ import annotations

import argparse
import os

from etils import epath

from ptjax import cli
from ptjax.cli import output
from ptjax.model_dir import ModelDir


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "report",
        """
        Reports on the finished run in a MODEL_DIR: prints scores, classes and confusion as text,
        and writes the page DIR/report.html, one file that needs no network: learning curve,
        per-class scores, confusion matrix, calibration, the most confident mistakes, the nearest
        tokens of each prompt row, settings. It reads DIR/report.json, which `train` writes.

        With several DIRs it compares the runs: prints a table and, with --output=PATH, writes a
        page.

          python -m ptjax.report runs/quickstart
          python -m ptjax.report runs/a runs/b --output=comparison.html
        """,
        gin=False,
    )
    parser.add_argument("dirs", metavar="DIR", nargs="+", help="the folder of a finished run")
    output.add_flags(parser, "write the page to PATH; of a single run the default is in DIR")
    arguments = cli.parse(parser)
    cli.run(lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    """Prints a report or a comparison, and writes its page.

    Args:
        arguments: the parsed flags: "dirs", "output" and "force".
    """
    from ptjax.reports.files import write_page
    from ptjax.reports.report import Comparison, Report

    path, single = arguments.output, len(arguments.dirs) == 1
    if path is not None:
        runs = [*map(ModelDir, arguments.dirs)]
        inputs = [os.fspath(file) for run in runs for file in (run.report_data, run.results)]
        output.check(path, force=arguments.force, inputs=inputs)
    reports = [Report.read(directory) for directory in arguments.dirs]
    made = reports[0] if single else Comparison(reports)
    if path is not None:
        output.write(path, made.to_html())
    elif single:
        folder = epath.Path(arguments.dirs[0]).expanduser()
        if "://" not in os.fspath(folder):
            output.check_place(os.fspath(ModelDir(folder).report), "the page")
        write_page(folder)
    output.show(str(made))


if __name__ == "__main__":
    main()
