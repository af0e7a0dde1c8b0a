"""Hooks of MkDocs, named in mkdocs.yml: pages from outside of docs/, links to files, the API page.

The Markdown files link to each other as files of the repository, so that they can be read there.
Here the pages in `OUTSIDE` are added to the site, and links between all of them are resolved. A
link to a file that is not a page, such as a gin file, becomes its name; a link to nothing is left
to MkDocs, which fails.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
HOME = "README.md"
OUTSIDE = (
    HOME,
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "AGENTS.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "examples/README.md",
    "findings/README.md",
    "models/README.md",
    "ptjax/assets/nano/README.md",
    "ptjax/assets/tickets/README.md",
    "tpu_scripts/README.md",
)
PREFIX = "repository/"
GROUPS = {
    "trainer": "Runs",
    "settings": "Settings",
    "training": "Settings",
    "data": "Tasks and data",
    "methods": "Methods and initial prompts",
    "models": "Backbones",
    "backbones": "Backbones",
    "inference": "Predicting and scoring",
    "evaluation": "Predicting and scoring",
    "reports": "Reports",
    "interop": "Prompt files",
    "planning": "Planning",
}
"""The room that defines a public name -> its heading; others are "More"."""
FIRST = ("tune", "RunSettings", "Task", "PromptTuning", "load_backbone", "predict", "load_prompt")
"""The names that begin their headings; after them come functions, then classes, by name."""
RETURNED = {
    "PromptFile": "ptjax.interop.prompt_file.PromptFile",
    "Plan": "ptjax.planning.plan.Plan",
}
"""Classes that are not public names; public functions return them, and users call their methods."""
LINK = re.compile(r"(!?)\[((?:[^\]`]|`[^`]*`)*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside, and the images beside them."""
    folders = {(ROOT / path).parent for path in OUTSIDE} - {ROOT}
    images = [p for folder in folders for kind in ("png", "svg") for p in folder.glob(f"*.{kind}")]
    for path in (*OUTSIDE, *(image.relative_to(ROOT).as_posix() for image in images)):
        files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Resolves links, and writes the entries of the API page."""
    source = page.file.src_uri
    here = f"docs/{source}"
    if source == "index.md":
        here = HOME
    elif source.startswith(PREFIX):
        here = source.removeprefix(PREFIX)
    markdown = markdown.replace("<!-- public names -->", public_names())

    def resolve(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if not target or re.match(r"\w+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if path.startswith("docs/") or path in OUTSIDE or image:
            relative = os.path.relpath(_place(path), posixpath.dirname(source) or ".")
            return f"{image}[{text}]({relative}{anchor})"
        return text if (ROOT / path).exists() else link[0]

    return LINK.sub(resolve, markdown)


def _place(path: str) -> str:
    """The place in the site of a file of the repository."""
    if path == HOME:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def public_names() -> str:
    """An entry of mkdocstrings for each public name, by the module that defines it.

    `ptjax` resolves its names on first use, and some are names of commands too (`ptjax.pretrain`),
    so the entries name the modules.
    """
    tree = ast.parse((ROOT / "ptjax" / "__init__.py").read_text())
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("_HOMES", "_MODULES", "__all__")
    }
    groups: dict[str, list[str]] = {title: [] for title in (*GROUPS.values(), "More")}
    for name in sorted(
        tables["__all__"], key=lambda name: (name not in FIRST, name[0].isupper(), name)
    ):
        home = tables["_HOMES"].get(name)
        path = tables["_MODULES"][name] if home is None else f"{home}.{name}"
        entries = groups[GROUPS.get(path.split(".")[1], "More")]
        entries.append(_entry(path, f"ptjax.{name}", module=home is None))
        if home is None:
            entries += [_entry(p, f"ptjax.{name}.{p.split('.')[-1]}") for p in _imported(path)]
    for name, path in RETURNED.items():
        groups[GROUPS[path.split(".")[1]]].append(_entry(path, name))
    parts = [f"## {title}\n\n" + "\n".join(entries) for title, entries in groups.items() if entries]
    return "\n".join(parts)


def _entry(path: str, heading: str, module: bool = False) -> str:
    """An entry of mkdocstrings; of a module the docstring alone."""
    options = {"heading": heading, "toc_label": heading.removeprefix("ptjax.")}
    if module:
        options["members"] = "false"
    return f"::: {path}\n    options:\n" + "".join(f"      {k}: {v}\n" for k, v in options.items())


def _imported(module: str) -> list[str]:
    """The functions that a package imports from its own modules, with the path of each."""
    tree = ast.parse((ROOT.joinpath(*module.split(".")) / "__init__.py").read_text())
    return sorted(
        f"{node.module}.{name.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(module)
        for name in node.names
    )
