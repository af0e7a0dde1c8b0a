"""What a command writes for the user: to standard output, or to the PATH of --output."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from ptjax import files
from ptjax.errors import InputError
from ptjax.model_dir import ModelDir
from ptjax.trainer.callbacks import Callback

_DESCRIPTORS = {"-": 1, "/dev/stdout": 1, "/dev/stderr": 2}


def add_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """--output and --force; `what` it holds, for the help."""
    parser.add_argument("--output", metavar="PATH", help=what)
    parser.add_argument("--force", action="store_true", help="overwrite PATH if it is there")


def show(text: str) -> None:
    """Prints a result. A reader that has gone (`| head -1`) has seen what it wanted."""
    try:
        sys.stdout.write(text + "\n" if text and not text.endswith("\n") else text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python must not flush into the void when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check(path: str, *, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuses, before any work, a PATH that cannot or must not be written.

    Args:
        force: of the flag; a file that is there is overwritten.
        inputs: local files that the command reads, which it does not overwrite, and folders of
            which it overwrites no file.

    Raises:
        InputError: a folder, an input, a file that is there without `force`, or no place for one.
    """
    if _descriptor(path) is not None:
        return
    target = epath.Path(path).expanduser()
    if "://" in path:
        if target.exists() and not force:
            raise _there(path)
        return
    real = os.path.realpath(target)
    for source in inputs:
        if _is_in(real, source):
            raise InputError(f"--output={path}: this is the input {source}; name another file")
    if os.path.isdir(real) or path.endswith("/"):
        raise InputError(f"--output={path}: it is a directory; name a file")
    if os.path.isfile(real) and not force:
        raise _there(path)
    check_place(path)


def check_place(path: str) -> None:
    """Refuses a local PATH, of a file or a directory, that cannot be created.

    Raises:
        InputError: a name is too long, or its parent is a file or not writable.
    """
    real = os.path.realpath(epath.Path(path).expanduser())
    folder = real
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if folder != real and not os.path.isdir(folder):
        raise InputError(f"--output={path}: {folder} is a file and no folder; name another")
    longest = os.pathconf(folder, "PC_NAME_MAX")
    if long := next((x for x in real.split(os.sep) if len(os.fsencode(x)) > longest), None):
        raise InputError(
            f"--output={path}: a name of {len(os.fsencode(long))} bytes is longer than the "
            f"{longest} that {folder} takes; name it shorter"
        )
    # A new file, made beside the old one, replaces it.
    places = [os.path.dirname(real), real] if os.path.isfile(real) else [folder]
    for place in places:
        if not os.access(place, os.W_OK):
            raise InputError(f"--output={path}: {place} cannot be written to; name another place")


def _is_in(real: str, source: str | os.PathLike[str]) -> bool:
    """Whether a file that is there is an input, or lies in a folder that is one."""
    if not (os.path.exists(source) and os.path.exists(real)):
        return False
    inside = os.path.isfile(real) and real.startswith(os.path.realpath(source) + os.sep)
    return inside or os.path.samefile(source, real)


def _there(path: str | os.PathLike[str]) -> InputError:
    return InputError(f"{os.fspath(path)} is there already; overwrite it with --force")


@contextlib.contextmanager
def target(path: str) -> Iterator[str]:
    """Where to write the whole file that PATH will be: links are followed, devices kept.

    What is no regular file (a device, a fifo, /dev/stdout) gets a copy of a temporary one.
    """
    real = path if "://" in path else os.path.realpath(epath.Path(path).expanduser())
    descriptor = _descriptor(path)
    if descriptor is None and ("://" in path or not os.path.exists(real) or _is_plain(real)):
        yield real
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = os.path.join(folder, "output")
        yield temporary
        data = epath.Path(temporary).read_bytes()
    sys.stdout.flush()
    try:
        with open(real if descriptor is None else os.dup(descriptor), "wb") as stream:
            stream.write(data)
    except BrokenPipeError:
        raise OSError(f"--output={path}: its reader has gone") from None


def write(path: str, text: str) -> None:
    """Writes PATH, whole or not at all; see `target`."""
    with target(path) as place:
        files.write_bytes(place, text.encode())


def _is_plain(path: str) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode)


def is_stream(path: str) -> bool:
    """Whether PATH is an open file of this process, such as standard output."""
    return _descriptor(path) is not None


def _descriptor(path: str) -> int | None:
    """The open file that a PATH such as /dev/stdout or /dev/fd/3 stands for."""
    if match := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", path):
        return int(match[1])
    return _DESCRIPTORS.get(path)


def as_json(value: Any, **settings: Any) -> str:
    """JSON as others read it: what is not finite is null."""
    return json.dumps(_finite(value), allow_nan=False, **settings)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def add_prefix_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefix",
        default="",
        metavar="TEXT",
        help="in front of the names of the fields that are added to a record's own",
    )


def check_fields(fields: Mapping[str, Any], added: Mapping[str, Any], where: str) -> None:
    """Refuses a record of which a field would be replaced.

    Args:
        added: the new fields; those whose values are not known yet are None.

    Raises:
        InputError: with its place, and the flag that helps.
    """
    for name, value in added.items():
        if name in fields and (value is None or fields[name] != value):
            raise InputError(
                f"{where}: the record has a field '{name}', which the output would replace; "
                "--prefix=TEXT puts TEXT in front of the names of the new fields"
            )


class ConfigFile(Callback):
    """Keeps the settings of a run as `MODEL_DIR/config.gin`, a gin file that needs no other."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_start(self, model_dir: epath.Path, step: int) -> None:
        from ptjax.sharding import processes

        if processes.first():
            files.write_bytes(ModelDir(model_dir).config, self.text.encode())
