"""Records: every format, compression and setting; and what is said about broken files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from markers import SHARED

from ptjax.data import sources
from ptjax.data.sources import read_records
from ptjax.errors import InputError

DATA = SHARED / "data"


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _fields(records) -> list[dict]:
    return [record.fields for record in records]


def test_json_lines_keep_types_and_line_numbers(tmp_path):
    path = _write(tmp_path / "a.jsonl", '{"t": "x", "y": true}\r\n\n{"t": "\\u00e9", "y": 0}')
    records = read_records(path)
    assert _fields(records) == [{"t": "x", "y": True}, {"t": "é", "y": 0}]
    assert [record.where for record in records] == [f"{path}:1", f"{path}:3"]
    assert records.bad.count == 0


def test_line_separators_of_unicode_are_text(tmp_path):
    text = "a\u2028b\x85c\x1cd"
    jsonl = _write(tmp_path / "a.jsonl", json.dumps({"t": text}, ensure_ascii=False))
    tsv = _write(tmp_path / "a.tsv", f"t\tu\n{text}\tz\n")
    plain = _write(tmp_path / "a.txt", f"{text}\nb\n")
    assert _fields(read_records(jsonl)) == [{"t": text}]
    assert _fields(read_records(tsv)) == [{"t": text, "u": "z"}]
    assert _fields(read_records(plain)) == [{"text": text}, {"text": "b"}]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)],
)
def test_compressed_files_whole_and_damaged(tmp_path, suffix, compress):
    data = compress(b'{"t": "x"}\n' * 50)
    path = _write(tmp_path / f"a.jsonl{suffix}", data)
    assert len(read_records(path)) == 50
    for broken in (data[: len(data) // 2], b"plain text, not compressed at all"):
        with pytest.raises(InputError, match=rf"a\.jsonl{suffix}: not a whole {suffix} file"):
            read_records(_write(path, broken))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".gz", gzip.compress(b"")[:10] + b"\xff" * 20),
        (".gz", gzip.compress(b"x" * 99)[:-8] + bytes(8)),
        (".xz", lzma.compress(b"x" * 99)[:40] + bytes(60)),
        (".bz2", bz2.compress(b"x" * 99)[:-1]),
    ],
    ids=["zlib.error", "OSError", "lzma.LZMAError", "EOFError"],
)
def test_damage_inside_a_compressed_file(tmp_path, suffix, content):
    path = _write(tmp_path / f"a.txt{suffix}", content)
    with pytest.raises(
        InputError, match=rf"a\.txt{suffix}: not a whole {suffix} file \(.+\); copy"
    ):
        read_records(path)


def test_a_file_that_inflates_without_measure_is_refused(tmp_path):
    path = _write(tmp_path / "a.txt.gz", gzip.compress(bytes(65 << 20), 1))
    with pytest.raises(InputError, match=r"a\.txt\.gz: .* bytes inflate to more than 67,108,864"):
        read_records(path)


def test_records_say_how_many_lines_they_take(tmp_path):
    for name, content in [
        ("a.txt", b"x\n\n\xff\ny\n"),
        ("a.jsonl", b'{"t": 1}\n\n{"t": \n{"t": 2}\n'),
        ("a.tsv", b"t\tu\n1\t2\n\n\xff\t1\n3\t4\n"),
    ]:
        records = read_records(_write(tmp_path / name, content), on_bad_record="skip")
        assert [record.lines for record in records] == [1, 1]
        bad = records.bad
        assert (bad.count, bad.lines, bad.blank) == (1, 1, 1)
    quoted = _write(tmp_path / "a.csv", 't,u\n"1\n2",3\n\n"4\n5\n6",7,8\n9,0\n')
    records = read_records(quoted, on_bad_record="skip")
    assert [record.lines for record in records] == [2, 1]
    assert (records.bad.count, records.bad.lines, records.bad.blank) == (1, 3, 1)


def test_csv_has_quoting_and_counts_the_line_a_record_starts_on(tmp_path):
    path = _write(tmp_path / "a.csv", 'text,label\n"a, ""b""\nc",1\nd,2\n')
    records = read_records(path)
    assert _fields(records) == [{"text": 'a, "b"\nc', "label": "1"}, {"text": "d", "label": "2"}]
    assert [record.line for record in records] == [2, 4]


def test_csv_without_quoting_and_tsv_with(tmp_path):
    csv_path = _write(tmp_path / "a.csv", 'a,b\n"x,2\n')
    assert _fields(read_records(csv_path, quoting=False)) == [{"a": '"x', "b": "2"}]
    tsv_path = _write(tmp_path / "a.tsv", 'a\tb\n"x\ty"\t2\n')
    assert _fields(read_records(tsv_path, quoting=True)) == [{"a": "x\ty", "b": "2"}]


def test_tsv_quotes_are_text_by_default(tmp_path):
    path = _write(tmp_path / "a.tsv", 'a\tb\n"open\t1\nnext\t2\nclose"\t3\n')
    assert [r.fields["a"] for r in read_records(path)] == ['"open', "next", 'close"']


@hypothesis.given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            min_size=2,
            max_size=2,
        ),
        min_size=1,
    )
)
def test_csv_gives_back_what_the_csv_module_wrote(tmp_path_factory, rows):
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerows(rows)
    path = _write(tmp_path_factory.mktemp("csv") / "a.csv", buffer.getvalue())
    read = read_records(path, columns=("a", "b"))
    assert _fields(read) == [{"a": a, "b": b} for a, b in rows]


def test_long_csv_fields_and_the_limit_of_the_module_stays(tmp_path):
    path = _write(tmp_path / "a.csv", "a,b\n" + "x" * 200_000 + ",1\n")
    limit = csv.field_size_limit(1000)
    try:
        assert len(read_records(path)[0].fields["a"]) == 200_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(limit)


def test_columns_name_the_fields_of_files_without_a_header(tmp_path):
    path = _write(tmp_path / "a.tsv", "1\tx\n0\ty\n")
    records = read_records(path, columns=("label", "text"))
    assert _fields(records) == [{"label": "1", "text": "x"}, {"label": "0", "text": "y"}]
    assert [record.line for record in records] == [1, 2]
    lines = _write(tmp_path / "a.txt", "x\n\ny\n")
    assert _fields(read_records(lines, columns=("s",))) == [{"s": "x"}, {"s": "y"}]


def test_format_is_told_where_the_suffix_does_not(tmp_path):
    path = _write(tmp_path / "msr.data", "1\tx\n")
    with pytest.raises(
        InputError,
        match=r"set Task\.format \(infer: --format\) to one of jsonl, csv, tsv, text, parquet",
    ):
        read_records(path)
    assert read_records(path, format="tsv", columns=("l", "t"))[0].fields == {"l": "1", "t": "x"}
    with pytest.raises(InputError, match=r"Task\.format must be one of 'jsonl'"):
        read_records(path, format="xml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_encodings_and_the_byte_order_mark(tmp_path, encoding):
    path = _write(tmp_path / "a.tsv", "naïve\tb\né\t1\n".encode(encoding))
    assert _fields(read_records(path, encoding=encoding)) == [{"naïve": "é", "b": "1"}]
    marked = _write(tmp_path / "b.tsv", "\ufeffa\tb\né\t1\n")
    assert _fields(read_records(marked)) == [{"a": "é", "b": "1"}]


def test_a_wrong_encoding_names_file_and_line_or_is_counted(tmp_path):
    path = _write(tmp_path / "a.txt", b"one\ntwo\n\xe9t\xe9\nfour\n")
    with pytest.raises(InputError, match=r"a\.txt:3: not utf-8 text.*set Task\.encoding"):
        read_records(path)
    records = read_records(path, on_bad_record="skip")
    assert [record.line for record in records] == [1, 2, 4]
    assert records.bad.count == 1
    assert f"{path}:3: characters that are not utf-8 text" in str(records.bad.first)
    with pytest.raises(InputError, match="not an encoding that Python knows"):
        read_records(path, encoding="utf-9")


def test_a_lone_surrogate_in_json_is_a_bad_record(tmp_path):
    path = _write(tmp_path / "a.jsonl", '{"t": "\\ud83d\\ude00"}\n{"t": "\\ud83d"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: characters that are not"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"t": 1}\n{"t": }\n{"t": 2}\n', r":2: not valid JSON \(Expecting value\)"),
        ("a.jsonl", '{"t": 1}\n[1]\n{"t": 2}\n', ":2: an array, not a JSON object"),
        ("a.jsonl", '{"t": 1}\n3\n{"t": 2}\n', ":2: a bare value, not a JSON object"),
        ("a.jsonl", '{"t": 1}\n' + "[" * 9**5 + '\n{"t": 2}\n', ":2: not valid JSON"),
        ("a.csv", "a,b\n1,2\n1,2,3\n3,4\n", r":3: 3 columns instead of 2 \(a, b\)"),
        ("a.tsv", "a\tb\n1\t2\n1\n3\t4\n", r":3: 1 columns instead of 2"),
        (
            "a.csv",
            'a,b\n1,2\n"x"y,2\n3,4\n',
            r":3: bad quoting .* set --gin\.ptjax\.Task\.quoting=False \(infer: --quoting=false\)",
        ),
        ("a.csv", 'a,b\n1,2\n3,4\n"x,2\n', r":4: bad quoting"),
    ],
)
def test_a_malformed_record_is_an_error_with_its_line_or_is_counted(
    tmp_path, name, content, message
):
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError, match=name + message) as error:
        read_records(path)
    assert "\n" not in str(error.value)
    records = read_records(path, on_bad_record="skip")
    assert len(records) == 2
    assert records.bad.count == 1
    assert str(records.bad.first) in str(error.value)


@pytest.mark.parametrize("header", ["a,a", "a,", ",,b", ",b,"])
def test_headers_with_empty_or_repeated_names_are_refused(tmp_path, header):
    path = _write(tmp_path / "a.csv", f"{header}\n1,2\n")
    with pytest.raises(InputError, match=r"a\.csv:1: the header line has an empty or a repeated"):
        read_records(path)
    with pytest.raises(InputError, match=r"Task\.columns .* has an empty or a repeated"):
        read_records(path, columns=("x", "x"))


def test_settings_that_do_not_fit_the_format_are_refused(tmp_path):
    jsonl = _write(tmp_path / "a.jsonl", '{"t": 1}\n')
    text = _write(tmp_path / "a.txt", "a\n")
    for path, settings in [
        (jsonl, {"columns": ("t",)}),
        (jsonl, {"quoting": True}),
        (text, {"quoting": False}),
        (text, {"columns": ("a", "b")}),
        (text, {"on_bad_record": "ignore"}),
    ]:
        with pytest.raises(InputError):
            read_records(path, **settings)


def test_globs_are_sorted_and_name_their_files(tmp_path):
    (tmp_path / "part").mkdir()
    for name in "cab":
        _write(tmp_path / "part" / f"{name}.txt", f"{name}1\n{name}2\n")
    records = read_records(tmp_path / "par*" / "?.txt")
    assert [r.fields["text"] for r in records] == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert records[2].where == f"{tmp_path}/part/b.txt:1"
    literal = _write(tmp_path / "x[1].txt", "brackets\n")
    assert read_records(literal)[0].fields["text"] == "brackets"


def test_relative_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "a.txt", "x\n")
    assert read_records("*.txt")[0].fields == {"text": "x"}


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(InputError, match=r"no records at .*a\.txt: the path does not exist"):
        read_records(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"\*\.txt: no file matches"):
        read_records(tmp_path / "*.txt")
    with pytest.raises(InputError, match=r"a folder; name a file"):
        read_records(tmp_path)
    for name, content in [("e.txt", "\n \n"), ("e.jsonl", ""), ("e.csv", ""), ("e.tsv", "a\tb\n")]:
        with pytest.raises(InputError, match="no records in it"):
            read_records(_write(tmp_path / name, content))
    bad = _write(tmp_path / "bad.jsonl", "{\n[\n")
    with pytest.raises(InputError, match=r"no usable record, 2 bad ones; the first: .*:1: not"):
        read_records(bad, on_bad_record="skip")


def test_package_data_and_home(tmp_path, monkeypatch):
    assert sources.resolve_path("package:nano/spiece.model").exists()
    for name in ("package:", "package:../errors.py"):
        with pytest.raises(InputError, match="package:"):
            sources.resolve_path(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path / "a.txt", "x\n")
    assert len(read_records("~/a.txt")) == 1


@pytest.mark.shared
@pytest.mark.parametrize(("name", "lines"), [("train", 4076), ("test", 1725)])
def test_mrpc_gives_exactly_its_lines(name, lines):
    path = DATA / "mrpc" / f"{name}.tsv"
    records = read_records(path, columns=("label", "id1", "id2", "sentence1", "sentence2"))
    assert len(records) == lines == path.read_bytes().count(b"\n")
    assert {record.fields["label"] for record in records} == {"0", "1"}
