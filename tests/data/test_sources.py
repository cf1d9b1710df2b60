"""Which files, shards and docstrings an entry of corpus.sources means, and how they are gathered into units."""

from __future__ import annotations

import json
import os
import pickle
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertpipe.config import CorpusConfig
from bertpipe.data import docstrings, sources
from bertpipe.data.readers import Bad, Document
from bertpipe.data.sources import SOURCES, list_units, parse_hub, source_of
from bertpipe.errors import DataError


@pytest.fixture
def hub_folder(tmp_path):
    """A data set as `datasets` reads it from a folder: two files, so two shards."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for number, texts in enumerate((["one", "two"], ["three", None])):
        pq.write_table(pa.table({"text": texts, "n": [1, 2]}), folder / f"train-{number}.parquet")
    return folder


@pytest.fixture
def spec_of(tmp_path, hub_folder):
    """An entry of corpus.sources that can be read here, for every kind of source."""
    (tmp_path / "x.txt").write_text("text")
    specs = {"docs": "docs", "hub": f"hub:{hub_folder}", "files": str(tmp_path / "*.txt")}
    assert set(specs) == set(SOURCES), "give every kind of source an entry that this test can read"
    return specs


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_lists_reads_and_identifies(kind, spec_of):
    spec = spec_of[kind]
    source = source_of(spec)
    assert source is SOURCES[kind]
    config = CorpusConfig(sources=spec)
    parts = source.parts(spec, config)
    assert parts == source.parts(spec, config)
    read = [item for part in parts[:20] for item in source.read(part.place, config)]
    assert any(isinstance(item, Document) for item in read)
    assert read == [item for part in parts[:20] for item in source.read(part.place, config)]
    assert json.loads(json.dumps(source.identify(spec, None))) == source.identify(spec, None)
    units = list_units(config)
    assert [part for unit in units for part in unit.parts] == parts
    assert pickle.loads(pickle.dumps(units)) == units
    assert all(len(str(unit)) < 300 for unit in units)


def test_globs_are_sorted_recursive_and_keep_the_order_of_the_sources(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/deep/x.jsonl.gz", "a/y.jsonl", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    specs = [f"{tmp_path}/b/*", f"{tmp_path}/a/**/*.jsonl*", f"{tmp_path}/odd[1].txt", f"{tmp_path}/b/2.txt"]
    units = list_units(CorpusConfig(sources=specs))
    assert [unit.source for unit in units] == [0, 1, 2, 3]
    found = [str(part.place.relative_to(tmp_path)) for unit in units for part in unit.parts]
    assert found == ["b/10.txt", "b/2.txt", "a/deep/x.jsonl.gz", "a/y.jsonl", "odd[1].txt", "b/2.txt"]


def test_small_files_share_a_unit_and_a_large_one_is_its_own(tmp_path):
    sizes = [10, 20, sources.UNIT_BYTES, 30, 0, sources.UNIT_BYTES - 30, 5]
    for number, size in enumerate(sizes):
        with (tmp_path / f"{number}.txt").open("wb") as file:
            file.truncate(size)
    units = list_units(CorpusConfig(sources=f"{tmp_path}/*.txt"))
    assert [[part.place.stem for part in unit.parts] for unit in units] == [["0", "1"], ["2"], ["3", "4"], ["5", "6"]]
    assert str(units[0]) == f"{tmp_path}/0.txt and 1 more"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing*.txt", "matches no file; give a glob of files, hub:NAME"),
        ("doc", "matches no file; give a glob of files, hub:NAME"),
        ("folder", "is a folder"),
        ("x.csv", r"not a kind of file that corpus.sources reads \(.txt, .jsonl, .parquet, each plain or with .gz"),
        ("pipe.txt", "not a regular file"),
        ("loop.txt", "not a regular file"),
        ("socket.txt", "not a regular file"),
    ],
)
def test_an_entry_that_names_nothing_to_read_is_refused(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.csv").write_text("text")
    os.mkfifo("pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        pattern = spec.replace("loop", "lo*p")  # a glob sees a dangling link that its plain name does not
        with pytest.raises(DataError, match=message):
            list_units(CorpusConfig(sources=pattern))


def test_no_entry_at_all_is_refused():
    with pytest.raises(DataError, match=r"corpus\.sources is empty; name a glob"):
        list_units(CorpusConfig(sources=[]))


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("hub:owner/name", ("owner/name", None, "train", None)),
        ("hub:name@v1:en", ("name", "en", "train", "v1")),
        ("hub:owner/name:20231101.en:validation", ("owner/name", "20231101.en", "validation", None)),
        ("hub:name::test", ("name", None, "test", None)),
    ],
)
def test_hub_entries(spec, parsed):
    assert parse_hub(spec) == parsed


@pytest.mark.parametrize("spec", ["hub:", "hub::en", "hub:a:b:c:d"])
def test_malformed_hub_entries(spec):
    with pytest.raises(DataError, match=r"is not hub:NAME\[@REVISION\]"):
        parse_hub(spec)


def test_a_hub_data_set_is_streamed_shard_by_shard(hub_folder):
    units = list_units(CorpusConfig(sources=f"hub:{hub_folder}"))
    assert len(units) == 2
    config = CorpusConfig()
    read = [item for unit in units for part in unit.parts for item in SOURCES["hub"].read(part.place, config)]
    assert [item.text for item in read if isinstance(item, Document)] == ["one", "two", "three"]
    (bad,) = (item for item in read if isinstance(item, Bad))
    assert "shard 1 of 2): row 1: the text under 'text' (corpus.text_key) is NoneType" in bad.message


def test_a_hub_data_set_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"^corpus\.sources: hub:.*: the data set can't be opened \([^\n]+\)$"):
        list_units(CorpusConfig(sources=f"hub:{tmp_path}/missing"))


def test_docs_are_never_a_users_fault_and_held_out_by_file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('"""One."""\ndef f(): "\\ud800"\ndef g(): "Two."')
    file = docstrings.SourceFile("package", "package/x.py", path, 1)
    one, bad, two = SOURCES["docs"].read(file, CorpusConfig())
    assert one == Document("One.", "package/x.py", "package/x.py") and two.group == one.group
    assert isinstance(bad, Bad) and SOURCES["docs"].lenient
