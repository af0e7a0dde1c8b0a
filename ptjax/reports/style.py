"""The look of all pages: one style sheet, for light and dark screens, paper and notebooks.

Every rule is below `.ptjax-report`, so that a page inside a notebook leaves the rest as it is.
"""

from __future__ import annotations

_LIGHT = """
  --page: #f5f7fa; --card: #ffffff; --ink: #1b2433; --muted: #5d6b82; --line: #dde3ec;
  --accent: #3563e9; --on-accent: #ffffff; --soft: #eaf0fe; --good: #14805a; --bad: #b8324a;
  --series-2: #e0792f; --series-3: #1f9d76; --series-4: #b24fc4; --series-5: #c2405a;
  --series-6: #8a7a1f; --series-7: #2b93b8; --series-8: #7a5cd6; color-scheme: light;
"""
_DARK = """
  --page: #10141b; --card: #181e28; --ink: #e7ebf2; --muted: #98a5ba; --line: #2c3646;
  --accent: #7ea3ff; --on-accent: #0d1420; --soft: #202b42; --good: #57c79b; --bad: #f08095;
  --series-2: #f2a267; --series-3: #4fc79f; --series-4: #d78ae4; --series-5: #ef7d93;
  --series-6: #cdbd5c; --series-7: #67c0e0; --series-8: #aa93f2; color-scheme: dark;
"""

_RULES = """
{ background: var(--page); color: var(--ink); padding: 32px 24px 48px;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; }
* { box-sizing: border-box; }
main { max-width: 1120px; margin: 0 auto; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 76ch; }
p.lead, p.note { color: var(--muted); }
.over { color: var(--accent); font-size: 13px; font-weight: 600; margin: 0 0 4px;
  overflow-wrap: anywhere; }
header { margin-bottom: 20px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 20px 24px 22px; margin: 0 0 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 0 0 16px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 18px 12px; }
.tile span { display: block; color: var(--muted); font-size: 13px; line-height: 1.35;
  overflow-wrap: anywhere; }
.tile strong { display: block; font-size: 26px; line-height: 1.3; letter-spacing: -0.01em; }
.tile.first strong { color: var(--accent); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 12px 24px;
  margin-top: 12px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 16px; }
.pair section { margin: 0; } .pair { margin: 0 0 16px; }
figure { margin: 0; min-width: 0; }
figcaption { margin: 0 0 4px; font-size: 13px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.scrolled, figure.wide { overflow-x: auto; }
.scrolled.tall { max-height: 900px; overflow-y: auto; }
figure.wide svg { min-width: 560px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 8px; }
th { color: var(--muted); font-weight: 600; font-size: 13px; text-align: left;
  border-bottom: 1px solid var(--line); padding: 6px 12px 6px 0; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); padding: 8px 12px 8px 0; text-align: left;
  vertical-align: top; overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
table.classes td.number { width: 17%; min-width: 84px; }
tr td .average { color: var(--muted); }
.meter { display: block; height: 4px; border-radius: 2px; background: var(--soft);
  margin-top: 4px; }
.meter span { display: block; height: 4px; border-radius: 2px; background: var(--accent); }
.text { max-height: 6em; overflow-y: auto; white-space: pre-wrap; min-width: 260px;
  overflow-wrap: anywhere; }
.label { display: inline-block; max-width: 240px; background: var(--soft); border-radius: 6px;
  padding: 1px 8px; white-space: pre-wrap; overflow-wrap: break-word; }
.wrong { color: var(--bad); } .right { color: var(--good); }
.rows { columns: 3 300px; column-gap: 24px; margin: 8px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.rows li { break-inside: avoid; padding: 4px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
.rows b { display: inline-block; min-width: 2.6em; color: var(--muted); font-weight: 600; }
.rows span { white-space: nowrap; margin-right: 8px; }
.rows small { color: var(--muted); } .rows i { color: var(--muted); opacity: 0.5; }
dl { columns: 2 340px; column-gap: 32px; margin: 8px 0 0; font-size: 13px; }
dl div { display: flex; gap: 16px; justify-content: space-between; break-inside: avoid;
  border-bottom: 1px solid var(--line); padding: 4px 0; }
dt { color: var(--muted); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
.missing { border-left: 4px solid var(--series-2); }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 13px; }
"""


def _sheet() -> str:
    """The style sheet: each selector of `_RULES` gets the prefix `.ptjax-report`."""
    root = ".ptjax-report"
    lines = [
        f"{root} {{{_LIGHT}}}",
        f"@media screen and (prefers-color-scheme: dark) {{{root} {{{_DARK}}}}}",
    ]
    for rule in _RULES.strip().split("}"):
        selectors, _, body = rule.strip().partition("{")
        if body:
            scoped = ", ".join(f"{root} {name.strip()}".strip() for name in selectors.split(","))
            lines.append(f"{scoped} {{ {' '.join(body.split())} }}")
    lines.append(f"@media print {{ {root} section {{ break-inside: avoid; }} }}")
    return "\n".join(lines)


STYLE = _sheet()


def whole_page(title: str, body: str) -> str:
    """Returns a whole HTML file.

    Args:
        title: HTML, escaped.
        body: HTML; see `fragment`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="ptjax">\n'
        f"<title>{title}</title>\n"
        "<style>html, body { margin: 0; } .ptjax-report { min-height: 100vh; }</style>\n"
        f"</head>\n<body>\n{fragment(body)}\n</body>\n</html>\n"
    )


def fragment(body: str) -> str:
    """Returns `body` with its style, to be put into another page, such as a notebook."""
    return f'<style>\n{STYLE}\n</style>\n<div class="ptjax-report"><main>\n{body}\n</main></div>'
