"""What the base installation leaves out is named where it is needed, and pyproject.toml has it."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from etils import epath
from packaging.requirements import Requirement

import ptjax
from ptjax import cli
from ptjax.data import metrics, parquet, tfds_convert, tfds_source
from ptjax.errors import InputError
from ptjax.trainer import task_data
from ptjax.trainer.lock import Lock

PACKAGE = Path(ptjax.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_USERS = {"gcs", "metrics", "mlflow", "parquet", "report", "tfds", "wandb"}
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}
"""Of the packages that are called otherwise than what is installed."""
AFTER_TFDS = {"tfds_convert.py", "tfds_files.py"}
"""Their functions take a builder, which TFDS made."""


def names(requirements: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", Requirement(r).name).lower() for r in requirements}


BASE = names(PROJECT["dependencies"])


def extra_of(item: ast.withitem) -> str | None:
    """ "tfds" of `with needs("tfds", ...):`."""
    call = item.context_expr
    if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("needs"):
        return ast.literal_eval(call.args[0])
    return None


def third_party(
    node: ast.AST, extra: str | None = None
) -> Iterator[tuple[ast.stmt, str, str | None]]:
    """Every import of another package that is executed, its top name, and the extra around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        around = extra
        if isinstance(child, ast.With):
            around = next(filter(None, map(extra_of, child.items)), extra)
        modules = []
        if isinstance(child, ast.Import):
            modules = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            modules = [str(child.module)]
        for module in modules:
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names | {"__future__", "ptjax"}:
                yield child, top, around
        yield from third_party(child, around)


def test_every_import_is_of_the_base_or_under_its_extra():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node, top, extra in third_party(ast.parse(file.read_text("utf-8"))):
            by = DISTRIBUTIONS.get(top, top.replace("_", "-").lower())
            if by in (BASE if extra is None else names(EXTRAS[extra])):
                continue
            if file.name in AFTER_TFDS and top == "tensorflow_datasets":
                continue
            wrong.append(f"{file.name}:{node.lineno}: {top} ({extra or 'base'})")
    assert not wrong


def test_all_has_what_a_user_may_want_and_dev_has_all():
    [every] = map(Requirement, EXTRAS["all"])
    assert every.extras == FOR_USERS and set(EXTRAS) > FOR_USERS
    assert Requirement("ptjax[all]") in map(Requirement, EXTRAS["dev"])
    for extra in FOR_USERS:
        assert not names(EXTRAS[extra]) & BASE, extra


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """An import of `package` fails as where it is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def f1_task(folder: Path) -> ptjax.Task:
    (folder / "a.jsonl").write_text('{"text": "a", "label": "no"}\n' * 4)
    return ptjax.Task(
        name="a",
        data_dir=str(folder),
        splits={"train": "a.jsonl", "validation": "a.jsonl"},
        inputs="{text}",
        label="label",
        verbalizer={"no": "no", "yes": "yes"},
        metrics="f1",
    )


LABELS = {"labels": ("no", "yes")}
CASES = {
    "mean_f1": ("sklearn", "report", lambda _: metrics.mean_f1(["no"], ["no"], **LABELS)),
    "f1": ("sklearn", "report", lambda _: metrics.f1(["no"], ["no"], **LABELS)),
    "matthews": (
        "sklearn",
        "report",
        lambda _: metrics.matthews(["no", "yes"], ["no", "yes"], **LABELS),
    ),
    "rougeL": (
        "rouge_score",
        "metrics",
        lambda _: metrics.METRICS["rougeL"].function(["a"], ["a"]),
    ),
    "sentence_bleu": ("sacrebleu", "metrics", lambda _: metrics.sentence_bleu(["a"], ["a"])),
    "FrequentWords": ("sklearn", "report", lambda _: ptjax.FrequentWords().words(2, ["a film"])),
    "Parquet": ("pyarrow", "parquet", lambda _: parquet.parquet_rows(b"PAR1", "x.parquet")),
    "tfds:": (
        "tensorflow_datasets",
        "tfds",
        lambda folder: tfds_source.read_tfds("tfds:glue/sst2", split="train", data_dir=str(folder)),
    ),
    "TFDS": (
        "tensorflow_datasets",
        "tfds",
        lambda folder: tfds_convert.convert_to_array_record(folder, folder / "new"),
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_missing_extra_is_named_in_one_line(what, tmp_path, monkeypatch):
    package, extra, call = CASES[what]
    missing(monkeypatch, package)
    with pytest.raises(InputError) as raised:
        call(tmp_path)
    line = str(raised.value)
    assert what in line and "\n" not in line
    assert line.endswith(f" needs {package}; pip install 'ptjax[{extra}]'")
    assert not (tmp_path / "new").exists()


def test_a_run_whose_metric_is_not_installed_does_not_begin(tmp_path, monkeypatch, backbone):
    missing(monkeypatch, "sklearn")
    with pytest.raises(InputError, match=r"the metric f1 needs sklearn; pip install 'ptjax\[rep"):
        task_data.load_task_data(f1_task(tmp_path), backbone, ptjax.RunSettings())


def test_gs_without_gcsfs_is_one_line(monkeypatch, capsys):
    missing(monkeypatch, "gcsfs")
    imported = importlib.import_module("fsspec.registry")._registry  # fsspec remembers it
    for protocol in ("gs", "gcs"):
        monkeypatch.delitem(imported, protocol, raising=False)
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: epath.Path("gs://without-gcsfs/prompt").exists())
    line = "error: paths of gs:// need gcsfs; pip install 'ptjax[gcs]'\n"
    assert capsys.readouterr().err == line


PRIVATE = {
    "gin-config": r"_gin\._[A-Z]",
    "orbax-checkpoint": r"from orbax\.checkpoint import v1",
    "tensorboardX": r"\.event_writer",
    "tensorflow-datasets": r"tensorflow_datasets\.(core|proto)",
}
"""What may change in any release, by the package that has it."""


def test_what_ptjax_uses_of_private_interfaces_is_bounded():
    source = "\n".join(file.read_text("utf-8") for file in PACKAGE.rglob("*.py"))
    listed = map(Requirement, [*PROJECT["dependencies"], *EXTRAS["tfds"]])
    bounded = {r.name for r in listed if any(s.operator == "<" for s in r.specifier)}
    assert bounded == {name for name, use in PRIVATE.items() if re.search(use, source)}


def test_windows_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: 1 / 0)
    assert capsys.readouterr().err == (
        "error: ptjax does not train or run commands on Windows; use it under WSL2\n"
    )
    with pytest.raises(InputError, match="does not train or run commands on Windows"):
        Lock(epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text("raise ImportError('numpy is too old')")
    monkeypatch.syspath_prepend(str(tmp_path))
    missing(monkeypatch, "sklearn")
    monkeypatch.delitem(sys.modules, "sklearn")
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match="numpy is too old"):
        metrics.matthews(["no", "yes"], ["no", "yes"], labels=("no", "yes"))


CONSTRAINTS = PACKAGE.parent / "constraints.txt"
NOT_IN_CI = {"cuda", "docs", "mutation"}
"""Extras that CI does not install."""


def pins(version: str) -> dict[str, str]:
    """The line of each package for a version of Python."""
    lines = CONSTRAINTS.read_text().splitlines()
    listed = [Requirement(line) for line in lines if not line.startswith("#")]
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    valid = [r for r in listed if r.marker is None or r.marker.evaluate(environment)]
    assert len({r.name for r in valid}) == len(valid), "two lines for one package"
    return {r.name: str(r.specifier).removeprefix("==") for r in valid}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_constraints_hold_every_direct_dependency(version):
    pinned = pins(version)
    extras = {name: required for name, required in EXTRAS.items() if name not in NOT_IN_CI}
    for requirement in map(Requirement, [*PROJECT["dependencies"], *chain(*extras.values())]):
        if requirement.name == "ptjax":
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pinned and pinned[name] in requirement.specifier, requirement


def test_the_constraints_hold_what_their_packages_need_and_no_address():
    pinned = pins("{}.{}".format(*sys.version_info))
    installed = {
        re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found
        for found in metadata.distributions()
    }
    same = [
        name for name in pinned if name in installed and installed[name].version == pinned[name]
    ]
    assert len(same) > len(pinned) // 4  # others have a newer release here, and may need more
    for name in same:
        for requirement in map(Requirement, installed[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = re.sub(r"[-_.]+", "-", requirement.name).lower()
                assert needed in pinned or needed in {"pip", "setuptools"}, f"{name}: {needed}"
    assert not re.search(r"[/@\\]|--|:", CONSTRAINTS.read_text().partition("\n")[2])
