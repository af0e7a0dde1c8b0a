"""Writes untrusted texts as Markdown, so that none ends its line, code span or table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any


def line(text: object) -> str:
    """A text on one line, without characters that Markdown or HTML reads as markup."""
    return re.sub(r"[\x00-\x20<>\[\]|`]+", " ", str(text)).strip()


def code(text: object) -> str:
    """A code span; line breaks are shown as escapes."""
    shown = json.dumps(str(text), ensure_ascii=False)[1:-1].replace('\\"', '"')
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    padding = " " if len(fence) > 1 else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def cell(text: object) -> str:
    """A text in a cell of a table."""
    return re.sub(r"[\x00-\x20]+", " ", str(text)).replace("|", "\\|")


def string(text: str) -> str:
    """Python code of a string."""
    return json.dumps(text, ensure_ascii=False)


def block(lines: Iterable[str], language: str = "") -> str:
    """A block of code."""
    # Three backticks would end it.
    return f"```{language}\n" + "\n".join(x.replace("```", "'''") for x in lines) + "\n```"


def section(title: str, lines: list[str]) -> str:
    """A title and lines below it; "" without lines."""
    return f"## {title}\n\n" + "\n".join(lines) if lines else ""


def setting(value: Any) -> str:
    """A setting as `trainer.identity.describe` writes it: `FromText(text="a")`."""
    if not isinstance(value, Mapping):
        return line(value) if isinstance(value, int | float) else code(value)
    fields = [f"{name}={json.dumps(item)}" for name, item in value.items() if name != "is"]
    return code(f"{value.get('is', '')}({', '.join(fields)})")
