"""Any bytes under any name: exactly the documents, or errors with file and place, and a ledger that balances.

Case N is a pure function of N: a small file of random records, packed, then damaged. What it must give is worked out
by a reference of a few lines that reads whole files with the standard decompressors and knows nothing of pieces.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import socket
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import CorpusConfig
from bertpipe.data.cleaning import clean
from bertpipe.data.readers import Bad, Document, read_file
from bertpipe.data.sources import list_files, list_units
from bertpipe.errors import DataError
from tests.data.test_corpus import make
from tests.fuzz import SHORT, tiers

PLACE = re.compile(r"\b(byte|line|row|row group|row groups|record) \d+|not readable as parquet|no column|column 'text'")
PACK = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
WORDS = [
    "plain",
    "ä",
    "\u00e9e\u0301",
    "日本",
    "\U0001f600",
    "\u2028",
    "\r",
    "\t",
    "a\u0000b",
    "",
    " ",
    '"',
    "\\",
    "{",
    "x" * 90,
]
LINES = [
    '{"text": "twice", "text": "the last counts"}',
    '{"text": "half \\ud83d"}',
    '{"text": "\\ud83d\\ude00 whole", "n": NaN, "i": -Infinity}',
    '{"text": NaN}',
    '{"text": null}',
    '{"txt": "other key"}',
    '{"text": ["list"]}',
    '{"text": "cut',
    "[" * 3_000,
    '{"a":' * 50 + "1" + "}" * 50,
    '{"n": ' + "9" * 5_000 + ', "text": "digits"}',
    '"a string"',
    "  ",
    "",
    "\u00a0",
]
SNIPPETS = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"PAR1",
    b"\xed\xa0\x80",
]


def records(rng: random.Random) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 4))) for _ in range(rng.randint(0, 8))]


def whole_file(rng: random.Random, form: str) -> bytes:
    """A sound file of random records, in one of the ways in which such files are written."""
    texts = records(rng)
    if form == "parquet":
        buffer, kind = io.BytesIO(), rng.choice([pa.string(), pa.large_string()])
        column = pa.array([None if rng.random() < 0.05 else text for text in texts], kind)
        column = column.dictionary_encode() if rng.random() < 0.2 else column
        size, codec = rng.randint(1, 5), rng.choice(["none", "snappy", "zstd"])
        pq.write_table(
            pa.table({"n": list(range(len(texts))), "text": column}),
            buffer,
            row_group_size=size,
            compression=codec,
            write_page_checksum=rng.random() < 0.7,
        )
        return buffer.getvalue()
    end = rng.choice(["\n", "\r\n"])
    if form == "jsonl":
        lines = [
            rng.choice(LINES) if rng.random() < 0.3 else json.dumps({"text": t}, ensure_ascii=rng.random() < 0.5)
            for t in texts
        ]
    else:
        lines = [text.replace("\n", " ") for text in texts]
    data = (end.join(lines) + end * (rng.random() < 0.7)).encode()
    return (b"\xef\xbb\xbf" if rng.random() < 0.15 else b"") + data


def damage(rng: random.Random, data: bytes) -> bytes:
    """One of the things that happen to files; empty ones stay."""
    at, to = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:at] + rng.choice(SNIPPETS) + data[at:]
    if kind == 3:
        return data[:at] + data[to:]
    if kind == 4:
        return data[:to] + data[at:]
    return data + rng.choice([data, b"\0\0", rng.randbytes(5)])


def make_case(number: int) -> tuple[str, bytes, CorpusConfig]:
    """(file name, bytes, settings) of case `number`."""
    rng = random.Random(number)
    form, ending = rng.choice(["txt", "jsonl", "parquet"]), rng.choice(list(PACK))
    data = whole_file(rng, form)
    if rng.random() < 0.4:
        data = damage(rng, data)
    data = PACK[ending](data)
    if rng.random() < 0.1:
        data += PACK[ending](whole_file(rng, form))  # a second member or frame
    if rng.random() < 0.5:
        data = damage(rng, data)
    if rng.random() < 0.05:
        ending = rng.choice(list(PACK))  # under a wrong name
    return f"x.{form}{ending}", data, CorpusConfig(txt_documents=rng.choice(["file", "line"]), on_error="skip")


def unpack(data: bytes, ending: str) -> bytes | None:
    """The bytes inside, by the libraries' own readers of whole files; None where they refuse."""
    if ending == ".gz":
        try:
            return gzip.decompress(data) if data else None
        except (EOFError, OSError, zlib.error):
            return None
    if ending == ".zst":
        inside = b""
        if not data:
            return None
        while data:
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            try:
                inside += decoder.decompress(data)
            except zstandard.ZstdError:
                return None
            if not decoder.eof:
                return None
            data = decoder.unused_data
        return inside
    return None if data[:2] == b"\x1f\x8b" or data[:4] == b"\x28\xb5\x2f\xfd" else data


def text_of(data: bytes) -> str | None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def value_of(line: str) -> str | None:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
        return text if text.encode() is not None else None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, UnicodeEncodeError):
        return None


def expected(name: str, data: bytes, config: CorpusConfig) -> list[str | None] | None:
    """The text of each record, None for a bad one; None in all where the file must be refused."""
    _, form, *ending = name.split(".")
    inside = unpack(data, f".{ending[0]}" if ending else "")
    if inside is None:
        return None
    if form == "parquet":
        try:
            return pq.read_table(io.BytesIO(inside), columns=["text"])["text"].to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError):
            return []  # of which the reader may still save some
    if ending and (inside[:2] == b"\x1f\x8b" or inside[:4] == b"\x28\xb5\x2f\xfd"):
        return None
    body = inside.removeprefix(b"\xef\xbb\xbf")
    if form == "txt" and config.txt_documents == "file":
        return [text_of(body)]
    lines = body.split(b"\n")
    texts = [text_of(line) for line in (lines if lines[-1] or (len(lines) == 1 and inside) else lines[:-1])]
    return texts if form == "txt" else [None if text is None else value_of(text) for text in texts]


def read(path: Path, config: CorpusConfig) -> list[Document | Bad]:
    """What the reader gives, twice the same."""
    first, second = (list(read_file(path, config)) for _ in range(2))
    assert first == second
    return first


def check(path: Path, data: bytes, config: CorpusConfig) -> list[Document | Bad]:
    """Write the file, read it and hold what comes against the reference."""
    path.write_bytes(data)
    items = read(path, config)
    for item in items:
        if isinstance(item, Bad):
            assert item.message.startswith(f"{path}: ") and "\n" not in item.message and item.records > 0
            assert PLACE.search(item.message), item.message
    wanted = expected(path.name, data, config)
    found = [item.text if isinstance(item, Document) else None for item in items]
    if any(isinstance(item, Bad) and "unknown header flags" in item.message for item in items):
        return items  # RFC 1952 has them refused; Python's gzip doesn't
    if wanted is None:
        assert None in found, "it should have been refused"
    elif ".parquet" not in path.name or (None not in found and wanted):
        assert found == wanted
    return items


def balance(folder: Path, config: CorpusConfig, items: list[Document | Bad]) -> None:
    """Run the corpus stage on a folder of files, of which reading gave `items`, and check its ledger."""
    skipped, seen = Counter(), set()
    for item in items:
        if isinstance(item, Bad):
            skipped["unreadable"] += item.records
            continue
        text = clean(item.text)
        reason = "empty" if not text else "too_short" if len(text) < 3 else "duplicate" if text in seen else ""
        seen.add(text)
        skipped[reason] += 1
    options = {"on_error": "skip", "min_chars": 3, "holdout": 0, "txt_documents": config.txt_documents}
    if not skipped[""]:
        with pytest.raises(DataError, match="no document is left"):
            make(folder / "out", sources=f"{folder}/x*", **options)
        return
    counts = make(folder / "out", sources=f"{folder}/x*", **options)
    assert counts["documents_out"] == skipped.pop("")
    assert counts["skipped"] == {reason: number for reason, number in sorted(skipped.items()) if number}
    assert counts["documents_in"] == counts["documents_out"] + sum(counts["skipped"].values())


@tiers
def test_damaged_files_give_exact_documents_or_errors_and_the_ledger_balances(memory_path, cases):
    """Each file by itself, and each forty of one configuration together through the stage."""
    batches: dict[str, list] = {"file": [], "line": []}
    for number in range(cases):
        name, data, config = make_case(number)
        folder = memory_path / config.txt_documents
        folder.mkdir(exist_ok=True)
        path = folder / name.replace("x", f"x{number:06d}", 1)
        try:
            items = check(path, data, config)
        except Exception as error:
            error.add_note(f"case {number}: {name}, {data[:2000]!r}")
            raise
        batch = batches[config.txt_documents]
        batch.append(items)
        if len(batch) == 40:
            balance(folder, config, [item for items in batch for item in items])
            batch.clear()
            for file in folder.glob("x*"):
                file.unlink()
            for part in sorted((folder / "out").rglob("*"), reverse=True):
                part.rmdir() if part.is_dir() else part.unlink()


@settings(deadline=None, max_examples=SHORT // 5)
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from([b"\n", b'{"text": "', b'"}', *SNIPPETS])).map(b"".join),
    st.sampled_from(["txt", "jsonl", "parquet"]),
    st.sampled_from(list(PACK)),
    st.booleans(),
    st.sampled_from(["file", "line"]),
)
def test_arbitrary_bytes(data, form, ending, packed, documents):
    with tempfile.TemporaryDirectory() as folder:
        config = CorpusConfig(txt_documents=documents)
        check(Path(folder) / f"x.{form}{ending}", PACK[ending](data) if packed else data, config)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_truncation_at_every_byte(tmp_path, form, ending):
    rng = random.Random(7)
    data = PACK[ending](whole_file(rng, form))
    assert len(data) > 20
    for length in range(len(data)):
        for documents in ("file", "line") if form == "txt" else ("line",):
            check(tmp_path / f"x.{form}{ending}", data[:length], CorpusConfig(txt_documents=documents))


def test_a_quarter_of_a_million_empty_records_are_counted(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n" * 250_000 + b'{"text": "the only one"}')
    counts = make(tmp_path / "out", sources=f"{tmp_path}/x.jsonl", min_chars=1, holdout=0)
    assert counts["documents_in"] == 250_001 and counts["skipped"] == {"empty": 250_000}


def irregular(folder: Path, kind: str) -> Path:
    path = folder / "x.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(folder / "y.txt")
        (folder / "y.txt").symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "gone.txt")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    return path


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "dangling", "socket"])
def test_what_is_no_regular_file_is_refused_unread(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = irregular(Path(), kind)
    for spec in ("x.txt", "*.txt"):
        with pytest.raises(DataError, match=f"{path}: not a regular file"):
            list_files(spec)
        with pytest.raises(DataError, match=f"{path}: not a regular file"):
            list_units(CorpusConfig(sources=spec))
