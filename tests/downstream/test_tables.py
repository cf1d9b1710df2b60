"""Users' files as tables: what is read from real ones, and one line that says where for each way they can be wrong."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import TaskConfig
from bertpipe.downstream.tasks.tables import form_of, read_file
from bertpipe.errors import DataError

WANTED = ("text", "label", "idx")
ROWS = [{"text": 'a "b", c\nd', "label": "x"}, {"text": "", "label": "y"}, {"text": "naïve 東京\u2028!", "label": "-1"}]


def read(path, **settings):
    given = {"kind": "classification", "data": str(path), "text": "text", "label": "label"} | settings
    return read_file(path, TaskConfig(**given), WANTED)


def failure(path, **settings) -> str:
    """The one line that reading fails with, behind the file's name."""
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def as_csv(rows, delimiter=",") -> str:
    lines = [list(ROWS[0]), *(row.values() for row in rows)]
    return "\r\n".join(delimiter.join('"' + value.replace('"', '""') + '"' for value in values) for values in lines)


WAYS = {
    "x.csv": lambda rows: as_csv(rows).encode(),
    "x.tsv": lambda rows: as_csv(rows, "\t").encode(),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows).encode(),
    "X.CSV.GZ": lambda rows: gzip.compress(as_csv(rows).encode()),
    "x.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "x.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode(),
    "x.jsonl.zst": lambda rows: zstandard.compress("\n".join(map(json.dumps, rows)).encode()),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_form_gives_the_same_table(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(WAYS[name](ROWS))
    assert read(path).to_pylist() == ROWS


def test_parquet_too(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet").to_pylist() == ROWS


TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"text": TEXT, "label": TEXT}), max_size=6))
def test_any_text_survives_csv_and_json(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    with (folder / "any.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], lineterminator=os.linesep, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "any.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(folder / "any.csv").to_pylist() == rows
    assert read(folder / "any.jsonl").to_pylist() == rows


def test_forms_go_by_the_name():
    forms = {"a.csv": ("csv", ""), "a.b.TSV.gz": ("tsv", "gz"), "a.parquet": ("parquet", ""), "t.json": ("json", "")}
    assert {name: form_of(Path(name)) for name in forms} == forms
    assert {form_of(Path(name)) for name in ("csv", "a.txt", "a.parquet.gz", "a.xlsx", "a.csv.bz2", ".gz")} == {None}


def test_columns_that_nobody_asks_for_are_there_by_name_alone(tmp_path):
    """So another column of a file may hold what it likes."""
    rows = [{"text": "a", "label": 1, "more": 1}, {"label": 2, "text": "b", "more": "x", "late": [1, {}]}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    table = read(tmp_path / "x.json")
    assert table.column_names == ["text", "label", "more", "late"]
    assert table["label"].to_pylist() == [1, 2] and table["more"].null_count == 2


def test_another_encoding_is_read_when_it_is_named(tmp_path):
    path = tmp_path / "x.csv"
    for encoding in ("cp1252", "utf-16", "latin-1"):
        path.write_bytes("text,label\ncafé,x\n".encode(encoding))
        assert read(path, encoding=encoding).to_pylist() == [{"text": "café", "label": "x"}]


def test_another_delimiter_and_quotes_that_are_text(tmp_path):
    (tmp_path / "x.csv").write_text("text;label\na, b;x\n")
    assert read(tmp_path / "x.csv", delimiter=";").to_pylist() == [{"text": "a, b", "label": "x"}]
    (tmp_path / "x.tsv").write_text('text\tlabel\n"to be\tx\n" or\ty\n')
    assert read(tmp_path / "x.tsv", quotes=False).to_pylist()[0] == {"text": '"to be', "label": "x"}


def test_one_column_may_be_empty_in_a_line(tmp_path):
    (tmp_path / "x.csv").write_text("text\na\n\nb\n")
    assert read(tmp_path / "x.csv")["text"].to_pylist() == ["a", "", "b"]


def test_fields_longer_than_pythons_limit(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "x.csv").write_text(f"text,label\n{'a' * 200_000},x\n")
    assert len(read(tmp_path / "x.csv")["text"][0].as_py()) == 200_000
    assert csv.field_size_limit() == limit


BAD = [
    ("x.csv", "text,label\ncafé,x\nb,y\n".encode("cp1252"), "line 2: not UTF-8 at byte 14; say what it is, e.g. "
     "finetune.task.encoding: cp1252, or write it anew: iconv -f CP1252 -t UTF-8 x.csv"),
    ("x.csv", "text,label\na,x\n".encode("utf-16"), "line 1: not UTF-8 at byte 0; say what it is, e.g. "
     "finetune.task.encoding: utf-16"),
    ("x.csv", b"text,label\na\0,x\n", "line 2: a NUL character; if the file is UTF-16 set finetune.task.encoding: utf"),
    ("x.csv", b'text,label\n"a\nb",x\na,b,x\n', "line 4: 3 fields where the header has 2; quote a field "
     "that holds ','"),
    ("x.csv", b"text,label\na\n", "line 2: 1 fields where the header has 2"),
    ("x.csv", b'text,label\na,x\n"b,y\nc,z\n', "line 3: its quotes don't close"),
    ("x.csv", b'text,label\n"b" or,y\n', "line 2: its quotes don't close"),
    ("x.tsv", b'text\tlabel\n"to be\tx\n', "line 2: its quotes don't close (unexpected end of data); double a quote "
     "within quotes, or, if quotes mean nothing in this file, set finetune.task.quotes: false"),
    ("x.csv", b"text,label\na,x\n\nb,y\n", "line 3: blank; remove it"),
    ("x.csv", b"", "no header; its first line must name the columns"),
    ("x.csv", b"text,label,text\na,b,c\n", "two columns are called 'text'; rename one of them"),
    ("x.jsonl", b'{"text": "a"}\n{"text": }\n', "line 2: broken JSON at column 10 (Expecting value)"),
    ("x.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: blank; remove it"),
    ("x.jsonl", b'{"text": "a"}\n["b"]\n', 'line 2: not an object {column: value, ...} but ["b"]'),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "row 1: column 'text' holds"),
    ("x.jsonl", b"[" * 9_999, "line 1: JSON that can't be read"),
    ("x.jsonl", b'{"text": ' + b"9" * 5_000 + b"}", "line 1: JSON that can't be read"),
    ("x.json", b'[{"text": "a"},\n {"text": "b"]', "line 2: broken JSON at column 14"),
    ("x.json", b'{"data": [\n{"text": "a"}]}', "one object; write a list of objects {column: value, ...}, "
     "or one a line"),
    ("x.json", b'[{"text": "a"}, 3]', "row 1: not an object {column: value, ...} but 3"),
    ("x.json", b'[{"label": null}, {"label": "a"}, {"label": 2}]', "row 2: column 'label' holds 2, which can't stand "
     'with "a" above; give the whole column one type'),
    ("x.json", b'[{"label": 99999999999999999999999999}]', "row 0: column 'label' holds 99999"),
    ("x.csv.gz", gzip.compress(b"text,label\n")[:-3], "gzip data end early"),
    ("x.csv", gzip.compress(b"text,label\n"), "gzip-compressed, but not named so; rename it to end in .gz or .zst"),
    ("x.parquet", b"text,label\n", "not readable as parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(BAD)])
def test_what_is_wrong_is_said_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in failure(tmp_path / name)


NAMES = st.sampled_from(["x.csv", "x.json", "x.jsonl", "x.tsv"])


@settings(deadline=None)
@given(NAMES, st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_a_table_or_one_line(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        assert isinstance(read(path), pa.Table)
    except DataError as error:
        assert "\n" not in str(error) and str(error).startswith(f"{path}: ")
