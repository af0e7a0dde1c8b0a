"""`Report`: what a run came to, as text and as a page; and `Comparison`, several of them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

from absl import logging
from etils import epath

from ptjax import files
from ptjax.errors import InputError, check_path, missing
from ptjax.files import JsonObject, PathLike
from ptjax.output import check_place
from ptjax.reports.comparison import comparison_page, comparison_text
from ptjax.reports.content import Member, members_of, read_content, read_rows
from ptjax.reports.libraries import check_libraries
from ptjax.reports.markup import escape
from ptjax.reports.page import page_of
from ptjax.reports.style import fragment, whole_page
from ptjax.reports.text import text_of


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """A report on a finished run. Its text is a table; a notebook shows it as a page.

    Attributes:
        path: the run's folder, as it was given.
        content: the content of `report.json`; without predictions if the run has not recorded them.
        rows: the rows of `metrics.jsonl`.
    """

    path: str
    content: JsonObject
    rows: Sequence[JsonObject] = ()

    @classmethod
    def read(cls, model_dir: PathLike) -> Report:
        """Reads the report of the run in `model_dir`.

        Raises:
            InputError: the folder lacks a finished run, a file is damaged, or a library that
                reports need is not installed.
        """
        check_libraries()
        check_path("the run's folder", model_dir)
        directory = epath.Path(model_dir).expanduser()
        if not directory.exists():
            raise missing("run", os.fspath(model_dir))
        content = read_content(directory)
        if content is None:
            raise InputError(f"{os.fspath(model_dir)}: no finished run; train it to the end first")
        rows = read_rows(directory)
        ended = content["results"].get("trained_steps")
        if isinstance(ended, int) and rows and rows[-1]["step"] > ended:
            logging.warning(
                "%s: the run was continued after step %d and has not finished again; the report "
                "is of that step",
                os.fspath(model_dir),
                ended,
            )
        return cls(os.fspath(model_dir), content, rows)

    @functools.cached_property
    def members(self) -> list[Member]:
        """The members of a sweep, the best one first; a single one in an ordinary run."""
        return members_of(self.content)

    def __str__(self) -> str:
        return text_of(self.path, self.content["results"], self.members)

    def __repr__(self) -> str:
        return f"<Report of {self.path}>"

    def _repr_html_(self) -> str:
        return fragment(self._body())

    def to_html(self) -> str:
        """Returns the page as an HTML file that needs no other file and no network."""
        task = self.members[0].results.get("task")
        return whole_page(escape(f"{task} \u2013 ptjax report"), self._body())

    def save(self, path: PathLike) -> None:
        """Writes the page to a file, atomically. InputError if it cannot be written there."""
        check_place(path, "path")
        files.write_bytes(path, self.to_html().encode("utf-8", "replace"))

    def _body(self) -> str:
        return page_of(self.path, self.content["results"], self.members, self.rows)


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Several reports beside each other. Of a sweep its best member is compared.

    Attributes:
        reports: at least one.
    """

    reports: Sequence[Report]

    def __str__(self) -> str:
        return comparison_text(self._runs())

    def _repr_html_(self) -> str:
        return fragment(comparison_page(self._runs()))

    def to_html(self) -> str:
        """Returns the page as an HTML file that needs no other file and no network."""
        title = f"{len(self.reports)} runs \u2013 ptjax report"
        return whole_page(escape(title), comparison_page(self._runs()))

    def save(self, path: PathLike) -> None:
        """Writes the page to a file, atomically. InputError if it cannot be written there."""
        check_place(path, "path")
        files.write_bytes(path, self.to_html().encode("utf-8", "replace"))

    def _runs(self) -> list[tuple[str, JsonObject, list[Member], Sequence[JsonObject]]]:
        return [(x.path, x.content["results"], x.members, x.rows) for x in self.reports]
