"""What infer and evaluate read and write: streams, files that are there, records, bad bytes."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ptjax
from ptjax import cli
from ptjax.cli import logs, output
from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.inference import predict
from ptjax.interop.prompt_file import save_prompt

pytestmark = pytest.mark.usefixtures("own_process")
TASK = Task(name="mood", inputs="mood: {text}", label="label", verbalizer={"0": "good", "1": "bad"})


@pytest.fixture(scope="module")
def prompt(backbone, tmp_path_factory) -> str:
    """A prompt of the random backbone with a closed set of labels."""
    file = tmp_path_factory.mktemp("prompt") / "mood.safetensors"
    metadata = {
        "backbone_name": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "task": TASK.describe(),
        "input_length": 16,
        "target_length": 4,
    }
    save_prompt(file, np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32), metadata)
    return str(file)


@pytest.fixture
def infer(call, prompt):
    """`infer("--flag", stdin=b"...")` -> (exit code, rows, stderr)."""

    def run(*flags: object, stdin: bytes = b"") -> tuple[int, list[dict], str]:
        code, out, err = call("infer", f"--prompt={prompt}", *flags, stdin=stdin)
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


@pytest.fixture
def refused(infer):
    """The one error line of an infer that ends with exit code 2."""

    def run(*flags: object, stdin: bytes = b"") -> str:
        code, rows, err = infer(*flags, stdin=stdin)
        assert (code, rows) == (2, []), err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")

    return run


# Records


def test_case_5_10_a_byte_order_mark_is_no_text(infer):
    record = json.dumps({"text": "fine", "id": 7}).encode()
    _, rows, err = infer("--input=-", stdin=b"\xef\xbb\xbf" + record + b"\n")
    assert [(row["inputs"], row["id"]) for row in rows] == [("mood: fine", 7)], err
    _, rows, err = infer("--input=-", stdin=b"\xef\xbb\xbffine\n")
    assert [row["inputs"] for row in rows] == ["mood: fine"], err
    # In brackets, and yet no JSON array.
    _, rows, err = infer("--input=-", stdin=b"[1] a footnote\n[sic]\n")
    assert [row["text"] for row in rows] == ["[1] a footnote", "[sic]"], err


@pytest.mark.parametrize(
    "text",
    ['[{"text": "a"}, {"text": "b"}]', '[\n  {"text": "a"}\n]\n', '\ufeff["a", "b"]', '[{"text"'],
)
def test_case_5_10_a_json_array_is_named(refused, text):
    said = refused("--input=-", stdin=text.encode())
    assert said.startswith("standard input:1: ") and "array" in said
    assert "write one JSON object per line" in said
    Path("in.json").write_text(text)
    assert "array" in refused("--input=in.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_case_5_10_standard_input_is_looked_at_in_its_encoding(infer, encoding):
    record = '{"text": "fine", "id": 7}\n'.encode(encoding)
    _, rows, err = infer("--input=-", f"--encoding={encoding}", stdin=record)
    assert [(row["inputs"], row["id"]) for row in rows] == [("mood: fine", 7)], err
    code, _, err = infer("--input=-", f"--encoding={encoding}", stdin='["a"]'.encode(encoding))
    assert code == 2 and "standard input:1: " in err and "array" in err


def test_case_3_6_what_messages_advise_infer_can_do(infer, refused):
    Path("in.tsv").write_text('"text"\t"id"\n"she said ""no"""\t"1"\n')
    said = refused("--input=in.tsv")
    assert """no field 'text' (fields: "text", "id")""" in said
    _, rows, err = infer("--input=in.tsv", "--quoting=true")
    assert [(row["text"], row["id"]) for row in rows] == [('she said "no"', "1")], err
    Path("in.csv").write_text('a "b, 1\n"c, 2\n')
    assert "set --gin.ptjax.Task.quoting=False (infer: --quoting=false)" in refused(
        "--input=in.csv", "--columns=text,id"
    )
    flags = ("--columns=text,id", "--quoting=false")
    _, rows, err = infer("--input=-", "--format=csv", *flags, stdin=Path("in.csv").read_bytes())
    assert [row["inputs"] for row in rows] == ['mood: a "b', 'mood: "c'], err


def test_case_3_7_blank_lines_are_counted_and_said(infer):
    _, rows, err = infer("--input=-", stdin=b"one\n\n  \ntwo\n\n")
    assert [row["text"] for row in rows] == ["one", "two"]
    assert "warning: standard input: 3 of 5 lines are blank and left out; the others are" in err
    Path("in.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    _, rows, err = infer("--input=in.jsonl")
    assert len(rows) == 2 and "in.jsonl: 1 of 3 lines are blank and left out" in err
    Path("in.txt").write_text("one\ntwo\n")
    assert "blank" not in infer("--input=in.txt")[2]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("flags", [["in.csv"], ["in.tsv"], ["in.tsv", "--quoting=true"]])
def test_case_3_7_blank_lines_of_a_table_are_counted(infer, newline, flags):
    lines = ["text", "one", "", '"two"', "", "", "three"]
    Path(flags[0]).write_bytes("".join(line + newline for line in lines).encode())
    _, rows, err = infer(f"--input={flags[0]}", *flags[1:])
    assert len(rows) == 3
    assert "3 of 6 lines are blank and left out; the others are answered in order" in err


def test_case_3_8_infer_refuses_its_own_output(infer, refused):
    code, _, err = infer("one", "two", "--output=first.jsonl")
    assert code == 0, err
    said = refused("--input=first.jsonl")
    assert said.startswith("first.jsonl:1: the record has a field 'prediction', which the output")
    assert "--prefix=TEXT" in said
    code, rows, err = infer("--input=first.jsonl", "--prefix=second_")
    first = [json.loads(line) for line in Path("first.jsonl").read_text().splitlines()]
    for before, after in zip(first, rows, strict=True):
        assert before.items() <= after.items()
        assert after["second_score"] == pytest.approx(before["score"], abs=1e-5)  # other batches
        assert after["second_inputs"] == before["inputs"]
    assert refused("--input=-", stdin=b'{"text": "a", "inputs": "b"}').startswith(
        "standard input:1: the record has a field 'inputs'"
    )
    # It would be replaced by itself.
    _, rows, err = infer("--input=-", stdin=b'{"text": "a", "inputs": "mood: a"}')
    assert rows[0]["inputs"] == "mood: a", err


def test_case_5_13_records_that_are_no_text(infer, refused):
    said = refused("--input=-", stdin=b"fine\nna\xefve\n")
    assert said.startswith("standard input:2: not utf-8 text")
    _, rows, err = infer("--input=-", "--encoding=latin-1", stdin=b"na\xefve\n")
    assert rows[0]["text"] == "na\u00efve", err
    _, rows, err = infer("--input=-", "--on_bad_record=skip", stdin=b"fine\nna\xefve\n")
    assert [row["text"] for row in rows] == ["fine"]
    assert "warning: left out 1 of 2 records; the first: standard input:2: " in err
    Path("in.jsonl").write_bytes(b'{"text": "a"}\n{"txet": "b"}\n{"text": "c"\n{"text": "d"}\n')
    _, rows, err = infer("--input=in.jsonl", "--on_bad_record=skip")
    assert [row["text"] for row in rows] == ["a", "d"]
    assert "warning: left out 2 of 4 records; the first: in.jsonl:3: not valid JSON" in err
    assert refused("--input=-", "--on_bad_record=skip", stdin=b'{"txet": "b"}\n').startswith(
        "-: no usable record, 1 bad ones; the first: standard input:1: task mood: no field 'text'"
    )


def test_case_5_13_arguments_that_are_no_text(refused):
    # What Python makes of the byte 0xff in argv.
    assert "bytes that are not UTF-8 text" in refused("\udcff")
    assert "bytes that are not UTF-8 text" in refused("x", "--output=\udcff")


# What is written


def test_case_4_10_infer_says_where_its_output_is(infer):
    code, rows, err = infer("one", "two", "--output=out.jsonl")
    assert (code, rows) == (0, [])
    assert err.splitlines()[-1].endswith("wrote 2 predictions to out.jsonl")


def test_case_5_9_a_file_that_is_there_is_kept_unless_forced(infer, refused):
    Path("out.jsonl").write_text("mine")
    assert refused("x", "--output=out.jsonl") == (
        "out.jsonl already exists; overwrite it with --force (force=True)"
    )
    assert Path("out.jsonl").read_text() == "mine"
    code, _, err = infer("x", "--output=out.jsonl", "--force")
    assert code == 0 and json.loads(Path("out.jsonl").read_text())["text"] == "x", err


def test_case_5_9_output_is_checked_before_the_work(refused, prompt):
    """With a gin file that does not exist, which is what the work starts with."""
    later = "--gin_file=none.gin"
    Path("in.jsonl").write_text('{"text": "a"}\n')
    Path("link.jsonl").symlink_to("in.jsonl")
    for name in ("in.jsonl", "link.jsonl", "./in.jsonl"):
        said = refused("--input=in.jsonl", f"--output={name}", "--force", later)
        assert said == f"--output={name}: this is the input in.jsonl; name another file"
    assert "this is the input" in refused("x", f"--output={prompt}", "--force", later)
    Path("folder").mkdir()
    assert "it is a directory" in refused("x", "--output=folder", "--force", later)
    assert "it is a directory" in refused("x", "--output=new/", "--force", later)
    assert "in.jsonl is a file, not a folder" in refused("x", "--output=in.jsonl/out", later)
    assert Path("in.jsonl").read_text() == '{"text": "a"}\n'


@pytest.mark.parametrize("command", ["infer", "evaluate"])
@pytest.mark.parametrize(
    ("flag", "read"),
    [
        ("--model_dir=run", "run/config.gin"),
        ("--model_dir=run", "run/prompts/best.safetensors"),
        ("--model_dir=run", "run/prompts/a/best.safetensors"),
        ("--model_dir=run", "run/models/best/config.json"),
        ("--prompts=run", "run/a.safetensors"),
        ("--prompts=run", "run/a/prompts/best.safetensors"),
        ("--backbone=run", "run/model.safetensors"),
        ("--prompt=run", "run/adapter_model.safetensors"),
        ("--tokenizer=run/spiece.model", "run/spiece.model"),
    ],
)
def test_case_5_9_what_a_flag_reads_is_not_replaced(call, command, flag, read):
    Path(read).parent.mkdir(parents=True)
    Path(read).write_text("kept")
    text = ["x"] if command == "infer" else []
    code, _, err = call(command, flag, f"--output={read}", "--force", "--gin_file=none", *text)
    assert code == 2 and f"error: --output={read}: this is the input run" in err
    assert Path(read).read_text() == "kept"


def test_case_5_9_links_are_followed(infer):
    Path("elsewhere").mkdir()
    Path("out.jsonl").symlink_to("elsewhere/real.jsonl")
    code, _, err = infer("x", "--output=out.jsonl")
    assert code == 0, err
    assert Path("out.jsonl").is_symlink() and Path("elsewhere/real.jsonl").exists()
    code, _, err = infer("y", "--output=out.jsonl", "--force")
    assert json.loads(Path("elsewhere/real.jsonl").read_text())["text"] == "y", err
    assert Path("out.jsonl").is_symlink()


@pytest.fixture
def fifo():
    """`fifo()` is what was written into the fifo of that name; nobody waits for anybody."""
    os.mkfifo("fifo")
    both_ends = os.open("fifo", os.O_RDWR | os.O_NONBLOCK)
    yield lambda: os.read(both_ends, 1 << 16)
    os.close(both_ends)


def test_case_5_9_what_is_no_regular_file_is_written_through_to(infer, fifo):
    code, _, err = infer("x", "--output=fifo")
    assert code == 0 and json.loads(fifo())["text"] == "x", err
    Path("link").symlink_to("fifo")
    code, _, err = infer("y", "--output=link")
    assert code == 0 and json.loads(fifo())["text"] == "y", err
    assert Path("fifo").is_fifo() and Path("link").is_symlink()


def test_case_5_9_export_keeps_links_fifos_and_its_input(call, prompt, fifo):
    Path("p.safetensors").write_bytes(Path(prompt).read_bytes())
    own = ("export", "p.safetensors", "--to=safetensors", "--output=p.safetensors", "--force")
    code, _, err = call(*own)
    assert code == 2 and "this is the input p.safetensors" in err
    Path("link").symlink_to("real.npy")
    code, _, err = call("export", prompt, "--to=npy", "--output=link")
    assert code == 0 and Path("link").is_symlink() and np.load("real.npy").shape == (3, 16), err
    code, _, err = call("export", prompt, "--to=npy", "--output=fifo")
    assert code == 0 and Path("fifo").is_fifo(), err
    assert np.load(io.BytesIO(fifo())).shape == (3, 16)


def test_case_5_12_what_is_not_finite_is_null(infer, monkeypatch):
    answer = predict.Prediction("good", math.nan, {"good": math.nan, "bad": math.inf})
    monkeypatch.setattr("ptjax.inference.infer.predict_texts", lambda *_, **__: [answer])
    record = b'{"text": "a", "kept": 0.5}'
    _, rows, err = infer("--input=-", stdin=record)
    assert rows[0]["score"] is None and rows[0]["kept"] == 0.5, err
    assert rows[0]["probabilities"] == {"good": None, "bad": None}
    assert output.as_json({"a": [1.5, (math.nan,)]}) == '{"a": [1.5, [null]]}'


def test_case_5_12_names_cannot_steer_the_terminal(refused):
    said = refused("--input=a\x1b]2J\nb\u202etxt.jsonl")
    assert said.startswith(r"no records at a\x1b]2J\nb\u202etxt.jsonl: the path")


def test_case_5_12_long_messages_keep_their_ends(capsys):
    text = logs.one_line("where: " + "x" * 5000 + "; what to do")
    assert len(text) < 1600 and text.startswith("where: ") and text.endswith("; what to do")
    error = InputError("\x1b[31mred" + "y" * 3000)

    def body() -> None:
        raise error

    with pytest.raises(SystemExit):
        cli.run(body)
    err = capsys.readouterr().err
    assert err.startswith("error: \\x1b[31mred") and len(err) < 1600


# Streams that others closed

# What a command does that is given to `cli.run`; the whole of infer would take its time here.
COMMAND = """
import sys
from ptjax import cli
from ptjax.cli import output
cli.make_parser("x", "")
cli.run(lambda: {body})
"""
SHOW = "output.show('line\\n' * 100_000)"
STDOUT = "output.check('/dev/stdout', force=False) or output.write('/dev/stdout', 'answer\\n')"
STDIN = "output.show(str(len(sys.stdin.buffer.read())))"


@pytest.mark.parametrize(
    ("body", "streams", "code", "out"),
    [
        (SHOW, "| head -1", 0, b"line\n"),
        (STDIN, "2>&- <&-", 0, b"0\n"),
        (SHOW, ">&- 2>&- <&-", 0, b""),
        (STDOUT, "> out.txt; cat out.txt", 0, b"answer\n"),
    ],
)
def test_case_5_13_closed_streams_end_well(body, streams, code, out):
    Path("command.py").write_text(COMMAND.format(body=body))
    environment = os.environ | {"PYTHONPATH": str(Path(ptjax.__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} command.py {streams}"],
        env=environment,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, b"")


def test_case_5_13_the_launcher_drains_what_nobody_reads(monkeypatch):
    """Else the command would wait for ever, its pipe full."""
    launch = importlib.import_module("ptjax.launch")

    class Gone:
        def write(self, data: bytes | str) -> None:
            raise BrokenPipeError

    gone = Gone()
    gone.buffer = gone
    for name, copy in (("stdout", launch._copy_output), ("stderr", launch._copy_errors)):
        lines = io.BytesIO(b"line\n" * 3)
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, gone)
            copy(lines, launch._Child(None, "", 0))
        assert lines.read() == b""


def test_case_5_13_an_error_that_nobody_reads_keeps_its_code(monkeypatch):
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    def body() -> None:
        monkeypatch.setattr(sys, "stderr", Gone())
        raise InputError("x")

    with pytest.raises(SystemExit) as stopped:
        cli.run(body)
    assert stopped.value.code == 2
