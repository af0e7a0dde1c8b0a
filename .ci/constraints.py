"""Writes constraints.txt: what the environments hold in which CI ran the tests.

Usage: python .ci/constraints.py PYTHON... > constraints.txt

Each PYTHON is that of an environment, and each of another version of Python. A package that differs
between them gets a line for each, with a marker.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys

HEADER = """\
# What CI ran the tests with: pip install -c constraints.txt . (written by `make constraints`)
"""
LEFT_OUT = {"pip", "ptjax", "setuptools", "wheel"}
INSTALLED = """
import importlib.metadata as metadata, json, re, sys
name = lambda found: re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
found = {name(d): d.version.partition("+")[0] for d in metadata.distributions()}
print(json.dumps(["%d.%d" % sys.version_info[:2], found]))
"""
"""A local version ("2.13.0+cpu") is of one index; its public part is the same release."""


def main(pythons: list[str]) -> None:
    by_name: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for python in pythons:
        said = subprocess.run([python, "-c", INSTALLED], check=True, capture_output=True, text=True)
        minor, found = json.loads(said.stdout)
        for name in found.keys() - LEFT_OUT:
            by_name[name][minor] = found[name]
    print(HEADER, end="")
    for name, versions in sorted(by_name.items()):
        if len(set(versions.values())) == 1:
            print(f"{name}=={next(iter(versions.values()))}")
            continue
        for minor, version in versions.items():
            print(f'{name}=={version} ; python_version == "{minor}"')


if __name__ == "__main__":
    main(sys.argv[1:])
