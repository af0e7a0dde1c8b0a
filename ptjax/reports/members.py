"""Several runs beside each other: the members of a sweep, or runs of several folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptjax.files import JsonObject
from ptjax.reports import figures
from ptjax.reports.content import Member
from ptjax.reports.curves import MOST, training_figures
from ptjax.reports.markup import escape, number, shorten, table, tag
from ptjax.reports.wording import error_of


def members_section(members: Sequence[Member], rows: Sequence[JsonObject]) -> str:
    """Returns the section of a page that compares the members of a sweep.

    Args:
        members: the best one first.
        rows: the rows of `metrics.jsonl`.
    """
    ordered = sorted(members, key=lambda member: -float(member.results["value"]))
    head = ["member", "task", "value", "before", "macro F1", "ECE", "best step", "seed"]
    cells = [
        [
            tag("span", escape(member.name), "label"),
            escape(member.results.get("task")),
            escape(value_of(member)),
            number(member.results.get("before")),
            *map(number, (macro_f1(member), ece(member))),
            number(member.results.get("step")),
            number(member.results.get("seed")),
        ]
        for member in ordered
    ]
    selected = f"{members[0].name} has the highest value on the split that selects prompts."
    drawn = training_figures([(m.name, rows, m) for m in ordered], of=" of the members")
    note = (
        f"The curves are of the {MOST} members of the highest value." if len(members) > MOST else ""
    )
    return tag(
        "section",
        tag("h2", f"{len(members)} members")
        + tag("p", escape(selected), "note")
        + values_figure({m.name: float(m.results["value"]) for m in ordered}, members[0].name)
        + table(head, cells, texts=2)
        + (tag("p", note, "note") if note else "")
        + drawn,
    )


def values_figure(values: Mapping[str, float], first: str) -> str:
    """Draws the value of each run, at most 40; that of `first` in the accent colour."""
    shown = dict(list(values.items())[:40])
    return tag("figure", figures.bars("Value of each", shown, first), "wide")


def value_of(member: Member) -> str:
    """Formats a member's value, with its standard error if it is an accuracy."""
    error = error_of(member)
    value = number(member.results.get("value"))
    return value if error is None else f"{value} \u00b1 {number(error)}"


def macro_f1(member: Member) -> float | None:
    """Returns the mean of the F1 of the classes, if there are classes."""
    if member.statistics is None or not member.statistics["averages"]:
        return None
    return member.statistics["averages"][0]["f1"]


def ece(member: Member) -> float | None:
    """Returns the expected calibration error, if labels were ranked."""
    if member.statistics is None or member.statistics["calibration"] is None:
        return None
    return member.statistics["calibration"]["ece"]


def unique_names(paths: Sequence[str]) -> list[str]:
    """Names folders by the ends of their paths that tell them apart.

    >>> unique_names(["runs/a", "runs/b"]), unique_names(["x/seed_0/run", "x/seed_1/run"])
    (['a', 'b'], ['seed_0/run', 'seed_1/run'])
    """
    parts = [[part for part in path.split("/") if part] or [path] for path in paths]

    def name(own: list[str]) -> str:
        others = [each for each in parts if each != own]
        for count in range(1, len(own)):
            if all(each[-count:] != own[-count:] for each in others):
                return "/".join(own[-count:])
        return "/".join(own)

    return [shorten(name(own), 60) for own in parts]
