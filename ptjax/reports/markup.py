"""Small pieces of HTML and text that all pages share. Everything from data is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len

from ptjax.files import Metadata


def clean(text: object) -> str:
    """Replaces what is not printable, except line breaks and tabs, by a visible mark."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))


def escape(text: object) -> str:
    """Returns `text` as it is written in HTML, in quotes too."""
    return html.escape(clean(text), quote=True)


def shorten(text: object, longest: int) -> str:
    """Returns the text on one line, with an ellipsis after `longest` characters."""
    line = " ".join(clean(text).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "\u2026"


def number(value: object) -> str:
    """Formats a number: an int with thousands separators, a float with three decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "\u2013" if value is None else clean(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def quantity(value: float, unit: str = "") -> str:
    """Formats a number with three digits and a prefix for thousands.

    >>> print(quantity(999, "B"), quantity(11_360, "B"), quantity(13_790_543_872), sep=", ")
    999 B, 11.4 kB, 13.8 G
    """
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        del prefixes[0]
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Formats a duration in its two largest units.

    >>> print(duration(59.7), duration(125), duration(7300), sep=", ")
    1 min 0 s, 2 min 5 s, 2 h 1 min
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def tag(name: str, body: str, class_: str = "", **attributes: object) -> str:
    """Returns an element; `body` is HTML, the values of attributes are escaped."""
    given = {"class": class_} if class_ else {}
    written = "".join(f' {k}="{escape(v)}"' for k, v in {**given, **attributes}.items())
    return f"<{name}{written}>{body}</{name}>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "", *, texts: int = 1
) -> str:
    """Returns a table.

    Args:
        head: the names of the columns, as text.
        rows: cells, as HTML.
        texts: the number of leading columns with text; the others have numbers, to the right.
    """

    def line(cells: Sequence[str], name: str) -> str:
        return tag(
            "tr",
            "".join(tag(name, c, "" if i < texts else "number") for i, c in enumerate(cells)),
        )

    header = tag("thead", line([*map(escape, head)], "th"))
    body = tag("tbody", "\n".join(line(row, "td") for row in rows))
    return tag("div", tag("table", header + body, class_), "scrolled tall")


def meter(value: float) -> str:
    """Returns a number in [0, 1] with a bar of this length under it."""
    width = f"width: {100 * min(max(value, 0), 1):.1f}%"
    return number(value) + tag("span", tag("span", "", style=width), "meter")


def definitions(values: Mapping[str, object]) -> str:
    """Returns a list of names and values; those whose value is None are left out."""
    rows = (
        tag("div", tag("dt", escape(name)) + tag("dd", escape(value)))
        for name, value in values.items()
        if value is not None
    )
    return tag("dl", "\n".join(rows))


def flat(values: Metadata, prefix: str = "") -> dict[str, object]:
    """Flattens nested dicts: the value of b in a becomes that of "a.b"."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def columns(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Aligns cells in columns of plain text.

    Args:
        texts: the number of leading columns that are aligned to the left.
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def aligned(cell: str, width: int, number: int) -> str:
        space = " " * (width - cell_len(cell))  # some characters are two columns wide
        return cell + space if number < texts else space + cell

    lines = ("  ".join(map(aligned, row, widths, range(len(row)))).rstrip() for row in rows)
    return "\n".join(lines)
