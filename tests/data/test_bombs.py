"""Files that are small on the disk and huge inside: refused by real processes in bounded memory."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

MIB = 1 << 20
GIB = 1 << 30
READ = """
import json, sys
from pathlib import Path
from bertpipe.config import CorpusConfig
from bertpipe.data.readers import Bad, read_file

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

config = CorpusConfig(txt_documents=sys.argv[3])
list(read_file(Path(sys.argv[1]), config))  # a sound file of that kind: the libraries are in memory
base, found, texts = peak(), [], 0
for item in read_file(Path(sys.argv[2]), config):
    texts += not isinstance(item, Bad)
    if isinstance(item, Bad):
        found.append(item.message)
        if sys.argv[4] == "raise":
            break
print(json.dumps({"grown": peak() - base, "messages": found, "texts": texts}))
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")


def read(folder: Path, path: Path, documents: str, on_error: str) -> dict:
    """What a process of its own reads: messages, number of texts, and how its peak memory grew, in bytes."""
    sound = folder / f"sound.{path.name.partition('.')[2]}"
    data = b'{"text": "sound"}\n'
    if sound.suffix == ".gz":
        data = gzip.compress(data)
    elif sound.suffix == ".zst":
        data = zstandard.compress(data)
    sound.write_bytes(data)
    command = [sys.executable, "-c", READ, sound, path, documents, on_error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def gzip_member(size: int, level: int = 9) -> bytes:
    """`size` zeros in one gzip member, made in pieces."""
    packer = zlib.compressobj(level, wbits=31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(size // MIB)) + packer.flush()


def gzip_members(size: int) -> bytes:
    """`size` zeros, 64 MiB to a member."""
    return gzip_member(64 * MIB) * (size // (64 * MIB))


def zstd_zeros(size: int) -> bytes:
    """One frame of `size` zeros: blocks of 128 KiB that are a byte to repeat, in a window of 128 KiB."""
    block = (1 << 17) << 3 | 1 << 1
    blocks = [block] * (size >> 17)
    blocks[-1] |= 1  # the last
    return b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(header.to_bytes(3, "little") + b"\0" for header in blocks)


def zstd_window(log: int) -> bytes:
    """A sound frame of a few bytes that asks for a window of 2^log bytes."""
    body = b"one document"
    return b"\x28\xb5\x2f\xfd\x00" + bytes([log - 10 << 3]) + (len(body) << 3 | 1).to_bytes(3, "little") + body


def test_the_bombs_are_what_they_say():
    assert len(gzip_member(8 * MIB)) < 8 * MIB / 900
    assert zstandard.decompress(zstd_zeros(MIB), max_output_size=MIB) == bytes(MIB)
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    assert decoder.decompress(zstd_window(20)) == b"one document"


SKIP = re.compile(r"line 1: longer than \d+ bytes \(it starts at byte 0")
CASES = {
    "gzip 1:1000": (
        "x.{form}.gz",
        lambda: gzip_members(10 * GIB),
        r"the data before byte \d+ expand more than 200 times",
    ),
    "zstd 1:30000": (
        "x.{form}.zst",
        lambda: zstd_zeros(10 * GIB),
        r"the data before byte \d+ expand more than 200 times",
    ),
    "nested gzip": (
        "x.{form}.gz",
        lambda: gzip.compress(gzip.compress(gzip_member(64 * MIB))),
        "gzip-compressed once more inside, from byte 0",
    ),
    "zstd window": ("x.{form}.zst", lambda: zstd_window(31), r"zstd data corrupt or over the limits before byte \d+"),
}


SLOW = [("gzip 1:1000", "jsonl"), ("gzip 1:1000", "parquet"), ("zstd 1:30000", "jsonl")]


@pytest.mark.parametrize(
    ("case", "form"),
    [
        pytest.param(case, form, marks=[pytest.mark.slow] if (case, form) in SLOW else [])
        for case in CASES
        for form in ("txt", "jsonl", "parquet")
    ],
)
def test_bombs_are_refused_in_bounded_memory(tmp_path, monkeypatch, case, form):
    name, make, message = CASES[case]
    path = tmp_path / name.format(form=form)
    path.write_bytes(make())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for documents in ("line", "file") if form == "txt" else ("line",):
        result = read(tmp_path, path, documents, "skip")
        assert result["texts"] == 0 and result["grown"] <= 256 * MIB
        last = result["messages"][-1]
        if "expand" in message and (documents == "file" or len(result["messages"]) > 1):
            assert len(result["messages"]) == (1 if documents == "file" else 2)
            limit = r"one document of more than \d+ bytes" if documents == "file" else SKIP.pattern
            assert re.match(rf"{path}: {limit}", result["messages"][0])
            if documents == "file":
                continue
        assert re.match(rf"{path}: {message}", last), last
        if found := re.search(r"before byte (\d+)", last):
            assert int(found[1]) <= 3 * MIB, "no more is read than tells what it is"


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_line_of_ten_gigabytes_is_refused_at_once(tmp_path, form):
    path = tmp_path / f"x.{form}"
    with path.open("wb") as file:
        file.truncate(10 * GIB)  # takes no room on the disk
    result = read(tmp_path, path, "line", "raise")
    assert result["grown"] <= 256 * MIB and result["texts"] == 0
    assert re.match(rf"{path}: {SKIP.pattern}", result["messages"][0])


def write_dictionary(path: Path, size: int, rows: int) -> None:
    """A parquet file of `rows` times the same text of `size` bytes, which it holds once."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
    pq.write_table(
        pa.table({"text": text}), path, compression="zstd", store_schema=False, dictionary_pagesize_limit=GIB
    )


def test_a_parquet_text_that_stands_in_many_rows_is_in_memory_once(tmp_path):
    path = tmp_path / "x.parquet"
    write_dictionary(path, 20 * MIB, 200)
    result = read(tmp_path, path, "line", "skip")
    assert result["grown"] <= 256 * MIB and result["texts"] == 200
    write_dictionary(path, 30 * MIB, 1000)
    result = read(tmp_path, path, "line", "skip")
    assert result["grown"] <= 256 * MIB and result["texts"] == 0 and len(result["messages"]) == 1000
    assert result["messages"][999].startswith(f"{path}: row 999: longer than ")


def test_a_parquet_column_that_expands_as_no_text_does_is_not_read(tmp_path):
    path = tmp_path / "x.parquet"
    write_dictionary(path, 400 * MIB, 3)
    result = read(tmp_path, path, "line", "skip")
    assert result["grown"] <= 64 * MIB and result["texts"] == 0
    assert re.search(r"row group 0: rows 0 to 2 can't be read \(\d+ bytes that expand to \d+", result["messages"][0])


@pytest.mark.slow
def test_behind_a_line_of_ten_gigabytes_the_next_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(10 * GIB)
        file.seek(0, 2)
        file.write(b'\n{"text": "next"}\n')
    result = read(tmp_path, path, "line", "skip")
    assert result["grown"] <= 256 * MIB and result["texts"] == 1
    assert len(result["messages"]) == 1 and re.match(rf"{path}: {SKIP.pattern}", result["messages"][0])
