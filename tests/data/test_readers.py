"""Reading files strictly: the exact documents, or an error with the exact place; nothing guessed, nothing lost."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import CorpusConfig
from bertpipe.data.readers import FORMATS, Bad, Document, read_file, record_limit
from bertpipe.errors import DataError

LINES = CorpusConfig(txt_documents="line")
FILES = CorpusConfig(txt_documents="file")


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zst}


def parquet(columns: dict, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def read(folder: Path, name: str, data: bytes, config: CorpusConfig = LINES) -> tuple[list[str], list[Bad]]:
    """(texts, bad records) of a file with these bytes."""
    path = folder / name
    path.write_bytes(data)
    items = list(read_file(path, config))
    assert all(item.source == name for item in items if isinstance(item, Document))
    return [item.text for item in items if isinstance(item, Document)], [i for i in items if isinstance(i, Bad)]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize(
    ("name", "data", "config", "texts"),
    [
        ("x.txt", "one\ntwo ä\n".encode(), FILES, ["one\ntwo ä\n"]),
        ("x.txt", b"", FILES, [""]),
        ("x.txt", "one\ntwo ä\n\nlast".encode(), LINES, ["one", "two ä", "", "last"]),
        ("x.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", LINES, ["one\r", "two\r"]),
        ("x.txt", b"\xef\xbb\xbfwhole", FILES, ["whole"]),
        (
            "x.jsonl",
            b'{"text": "one", "n": NaN}\n\n{"text": "\\u0000\\ud83d\\ude00"}',
            LINES,
            ["one", "", "\0\U0001f600"],
        ),
        ("x.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "old", "text": "new"}\r\n', LINES, ["one", "new"]),
        ("x.parquet", parquet({"n": [1, 2], "text": ["one", "two"]}), LINES, ["one", "two"]),
        ("x.parquet", parquet({"text": pa.array(["a", "a"]).dictionary_encode()}), LINES, ["a", "a"]),
        ("x.parquet", parquet({"text": pa.array([], pa.large_string())}), LINES, []),
    ],
)
def test_good_files_are_read_exactly(tmp_path, name, data, config, texts, ending):
    assert read(tmp_path, name + ending, PACK[ending](data), config) == (texts, [])


BAD_RECORDS = {
    "bad UTF-8": ("x.txt", b"good\nbad \xff\nlast", "line 2: not UTF-8 at byte 9"),
    "cut UTF-8 behind a byte-order mark": ("x.txt", b"\xef\xbb\xbf\xc3\ngood\nlast", "line 1: not UTF-8 at byte 3"),
    "NUL": ("x.txt", b"good\nlast\na\0b", "line 3: a NUL byte (binary or UTF-16?) at byte 11"),
    "broken JSON": (
        "x.jsonl",
        '{"text": "good"}\n{"text": "ä" x}\n{"text": "last"}'.encode(),
        "line 2: broken JSON at byte 31",
    ),
    "cut JSON": ("x.jsonl", b'{"text": "good"}\n{"text": "last"}\n{"text": "la', "line 3: broken JSON at byte 43"),
    "missing key": (
        "x.jsonl",
        b'{"txt": 1}\n{"text": "good"}\n{"text": "last"}',
        "line 1: no key 'text' (corpus.text_key)",
    ),
    "no object": (
        "x.jsonl",
        b'{"text": "good"}\n["text"]\n{"text": "last"}',
        "line 2: not a JSON object but a list, at byte 17",
    ),
    "no string": (
        "x.jsonl",
        b'{"text": "good"}\n{"text": null}\n{"text": "last"}',
        "line 2: the text under 'text' is null",
    ),
    "surrogate": (
        "x.jsonl",
        b'{"text": "good"}\n{"text": "\\ud800"}\n{"text": "last"}',
        "line 2: an escape for half a char",
    ),
    "deep": (
        "x.jsonl",
        b'{"text": "good"}\n' + b"[" * 99_999 + b'\n{"text": "last"}',
        "line 2: JSON that can't be read",
    ),
    "digits": (
        "x.jsonl",
        b'{"text": "good"}\n' + b"1" * 9_999 + b'\n{"text": "last"}',
        "line 2: JSON that can't be read",
    ),
    "bad UTF-8 in JSON": (
        "x.jsonl",
        b'{"text": "good"}\n{"text": "\xc3"}\n{"text": "last"}',
        "line 2: not UTF-8 at byte 27",
    ),
    "null": ("x.parquet", parquet({"text": ["good", None, "last"]}), "row 1: the text under 'text' is null"),
    "bad UTF-8 in parquet": (
        "x.parquet",
        parquet({"text": pa.array([b"good", b"last", b"a\xff"]).view(pa.string())}),
        "row 2: not UTF-8 at byte 1 of 'text'",
    ),
}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("case", BAD_RECORDS)
def test_one_bad_record_is_named_with_its_place_and_the_others_are_read(tmp_path, case, ending):
    name, data, message = BAD_RECORDS[case]
    texts, bad = read(tmp_path, name + ending, PACK[ending](data))
    assert texts == ["good", "last"]
    assert len(bad) == 1 and bad[0].records == 1
    assert bad[0].message.startswith(f"{tmp_path / (name + ending)}: {message}")
    assert "\n" not in bad[0].message


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "x.txt",
            gzip.compress(b"text", mtime=0),
            "byte 0: gzip-compressed, but not named so; rename it to end in .gz",
        ),
        ("x.jsonl", zst(b"text"), "byte 0: zstd-compressed, but not named so"),
        ("x.txt.gz", b"text", "byte 0: not a gzip file"),
        ("x.txt.gz", b"", "byte 0: not a gzip file"),
        ("x.txt.gz", gzip.compress(b"text", mtime=0) + b"more", "gzip data corrupt before byte"),
        ("x.txt.zst", b"", "zstd data end early, at byte 0"),
        ("x.txt.zst", b"text", "zstd data corrupt"),
        (
            "x.txt.zst",
            b"\x28\xb5\x2f\xfd\x00\xa8\x19\x00\x00abc",
            "zstd data corrupt or over the limits",
        ),  # 2 GiB window
        ("x.parquet", b"PAR1 no", "not readable as parquet"),
        ("x.parquet", parquet({"body": ["a"], "id": [1]}), "no column 'text' (corpus.text_key); it has 'body', 'id'"),
        ("x.parquet", parquet({"text": [1]}), "column 'text' (corpus.text_key) holds int64, not strings"),
    ],
)
@pytest.mark.parametrize("config", [LINES, FILES], ids=["line", "file"])
def test_a_file_that_is_no_such_file_is_one_bad_record(tmp_path, name, data, message, config):
    texts, bad = read(tmp_path, name, data, config)
    assert texts == []
    assert [(item.records, item.message.startswith(f"{tmp_path / name}: {message}")) for item in bad] == [(1, True)]


@pytest.mark.parametrize("name", ["x.csv", "x", "x.gz", "gz", "x.txt.bz2"])
def test_other_endings_are_refused_with_the_ones_there_are(tmp_path, name):
    with pytest.raises(DataError, match=", ".join(rf"\.{form}" for form in FORMATS)):
        read(tmp_path, name, b"text")


def test_a_missing_file_is_a_bad_record(tmp_path):
    assert list(read_file(tmp_path / "x.txt", LINES)) == [Bad(f"{tmp_path / 'x.txt'}: No such file or directory")]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncation_at_every_byte_keeps_whole_records_and_is_one_bad_record(tmp_path, ending):
    texts = [f"record {number} {number**9}" for number in range(40)]
    # Two members or frames: the cut may fall between them, too.
    halves = ["".join(text + "\n" for text in part) for part in (texts[:20], texts[20:])]
    first, second = (PACK[ending](half.encode()) for half in halves)
    data = first + second
    most = 0
    for length in range(1 if ending == ".zst" else 2, len(data)):
        found, bad = read(tmp_path, "x.txt" + ending, data[:length])
        assert found == texts[: len(found)]
        if length == len(first):  # a whole file of its own
            assert (len(found), bad) == (20, [])
        else:
            assert len(bad) == 1 and f"data end early, at byte {length};" in bad[0].message
        most = max(most, len(found))
        assert read(tmp_path, "x.txt" + ending, data[:length], FILES)[0] == (
            [halves[0]] if length == len(first) else []
        )
    assert most > 20


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30), min_size=1, max_size=12),
    st.sampled_from(["x.txt", "x.jsonl"]),
    st.sampled_from([".gz", ".zst"]),
    st.data(),
)
def test_a_flipped_bit_in_a_checksummed_file_is_found(texts, name, ending, draw):
    wrap = (lambda text: text) if name == "x.txt" else (lambda text: json.dumps({"text": text}))
    plain = "".join(wrap("t" + text) + "\n" for text in texts).encode()
    data = bytearray(PACK[ending](plain))
    data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        found, bad = read(Path(folder), name + ending, bytes(data))
        assert bad or found == ["t" + text for text in texts]  # some header bits (time, system) mean nothing
        assert (found, bad) == read(Path(folder), name + ending, bytes(data))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20), min_size=1, max_size=12),
    st.sampled_from(["x.txt", "x.jsonl"]),
    st.data(),
)
def test_a_flipped_bit_in_a_plain_file_harms_one_line_or_two_joined_ones(texts, name, draw):
    texts = [f"line {number} {text}" for number, text in enumerate(texts)]
    wrap = (lambda text: text) if name == "x.txt" else (lambda text: json.dumps({"text": text}, ensure_ascii=False))
    data = bytearray("".join(wrap(text) + "\n" for text in texts).encode())
    at = draw.draw(st.integers(4, len(data) - 1))  # not the first bytes: they could become a compressed file's
    data[at] ^= 1 << draw.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        found, bad = read(Path(folder), name, bytes(data))
    assert len(found) + len(bad) == bytes(data).count(b"\n") + (not data.endswith(b"\n"))
    assert len(set(texts) - set(found)) <= 2


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=30), st.integers(1, 10), st.data()
)
def test_a_damaged_parquet_file_gives_exact_rows_or_a_bad_record(texts, rows, draw):
    data = bytearray(parquet({"text": pa.array(texts, pa.string())}, row_group_size=rows, write_page_checksum=True))
    cut = draw.draw(st.integers(1, len(data)))
    with tempfile.TemporaryDirectory() as folder:
        found, bad = read(Path(folder), "x.parquet", bytes(data[:cut]))
        assert found == texts if cut == len(data) else (not found and len(bad) == 1)
        # Flips in the pages alone: the footer has no checksum, so a changed one can't be told from a right one.
        footer = int.from_bytes(data[-8:-4], "little") + 8
        if len(data) - footer > 4 and texts:
            data[draw.draw(st.integers(4, len(data) - footer - 1))] ^= 1 << draw.draw(st.integers(0, 7))
            found, bad = read(Path(folder), "x.parquet", bytes(data))
            assert len(found) + sum(item.records for item in bad) == len(texts)


@pytest.mark.parametrize(
    ("name", "config", "advice"),
    [
        ("x.txt", LINES, "(it starts at byte 16"),
        ("x.jsonl", LINES, "(it starts at byte 16"),
        ("x.txt", FILES, "txt_documents: line"),
    ],
)
@pytest.mark.parametrize("ending", PACK)
def test_a_giant_record_is_refused_in_bounded_memory_and_the_next_is_read(tmp_path, name, config, advice, ending):
    giant = b'{"text": "one"}\n' + b" " * (5 * record_limit(config)) + b'\n{"text": "next"}\n'
    data = PACK[ending](giant)
    del giant
    tracemalloc.start()
    try:
        texts, bad = read(tmp_path, name + ending, data, config)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(bad) == 1 and advice in bad[0].message
    assert len(texts) == 2 * (config is LINES)
    assert peak < 3 * record_limit(config)
