"""The corpus stage: exact documents, a ledger that balances, the same bytes whatever happens on the way."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.artifact import is_complete
from bertpipe.config import Config
from bertpipe.data import corpus, docstrings, sources
from bertpipe.data.cleaning import clean, content_hash, in_holdout
from bertpipe.data.corpus import count_documents, identify, list_parts, read_documents
from bertpipe.errors import ArtifactError, DataError

DATA = os.environ.get("BERTPIPE_DATA")


def prose(number: int) -> str:
    """A document of its own for each number, of 100 to 400 characters."""
    words = random.Random(number)
    return f"Document {number}: " + " ".join(words.choice(WORDS) for _ in range(words.randint(15, 50))) + "."


WORDS = ["the", "parrot", "has", "ceased", "to", "be", "bereft", "of", "life", "under", "a", "Norwegian", "fjord"]


PADDING = "x" * sources.UNIT_BYTES
"""No unit holds two files with so much in them."""


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def make(out: Path, workers: int = 1, **settings_of_corpus) -> dict:
    """Run the stage into `out`; its counts."""
    out.mkdir(parents=True, exist_ok=True)
    counts: dict = {}
    settings_of_corpus = {"holdout": 0.2, **settings_of_corpus}
    cfg = Config(corpus=settings_of_corpus, runtime={"workers": workers, "progress": False})
    corpus.run(cfg, {}, out, counts)
    return counts


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents(out: Path) -> list[str]:
    return [text for split in corpus.SPLITS for text in read_documents(out, split)]


@pytest.fixture
def several_units(tmp_path):
    """A glob of five files that are a unit each, with duplicates within and across them."""
    for number in range(5):
        texts = [prose(k) for k in range(number * 40, number * 40 + 60)]  # the last 20 of each come again in the next
        write_jsonl(tmp_path / f"{number}.jsonl", texts)
        with (tmp_path / f"{number}.jsonl").open("a") as file:
            file.write(json.dumps({"padding": PADDING, "text": texts[0]}))
    return f"{tmp_path}/*.jsonl"


def test_documents_are_cleaned_split_and_accounted_for(tmp_path):
    texts = [prose(number) for number in range(300)]
    messy = [text.replace(" ", " \t ", 1) + "\r\n" for text in texts]
    write_jsonl(tmp_path / "a.jsonl", [*messy[:200], "", " \n", "short", "long " * 200, messy[7]])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts[200:]).encode()))
    (tmp_path / "ignored.csv").write_text("x")
    names = [f"{tmp_path}/*.jsonl", f"{tmp_path}/b.txt*"]
    out = tmp_path / "out"
    counts = make(out, sources=names, txt_documents="line", max_chars=900)

    held = [in_holdout(content_hash(text.encode()), 0.2) for text in texts]
    for split, wanted in (("train", False), ("holdout", True)):
        expected = [text for text, side in zip(texts, held, strict=True) if side is wanted]
        assert list(read_documents(out, split)) == expected
        assert count_documents(out, split) == len(expected) > 20
        rows = list(read_documents(out, split, ("id", "source", "text")))
        assert [text for _, _, text in rows] == expected
        assert all(identity == content_hash(text.encode()).hex() for identity, _, text in rows)
        number_of = {text: number for number, text in enumerate(texts)}
        assert all(source == ("a.jsonl" if number_of[text] < 200 else "b.txt.gz") for _, source, text in rows)

    ledger = json.loads((out / "ledger.json").read_text())
    assert counts == ledger["total"]
    size = sum(len(text.encode()) for text in texts)
    assert counts == {
        "documents_in": 305,
        "documents_out": 300,
        "train_documents": held.count(False),
        "holdout_documents": held.count(True),
        "characters": sum(map(len, texts)),
        "bytes": size,
        "skipped": {"duplicate": 1, "empty": 2, "too_long": 1, "too_short": 1},
    }
    assert list(ledger["sources"]) == names
    assert [row["documents_in"] for row in ledger["sources"].values()] == [205, 100]
    assert sorted(path.name for path in out.iterdir()) == ["holdout", "ledger.json", "train"]


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, several_units):
    counts = [make(tmp_path / f"out{workers}", workers, sources=several_units) for workers in (1, 2, 3)]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["documents_out"] == 220 and counts[0]["skipped"]["duplicate"] == 4 * 20 + 5
    assert content(tmp_path / "out1") == content(tmp_path / "out2") == content(tmp_path / "out3")
    assert sorted(documents(tmp_path / "out1")) == sorted({prose(number) for number in range(220)})


def test_of_equal_documents_the_first_in_source_order_stays(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [prose(number) for number in range(50)])
    for order in ("ab", "ba"):
        specs = [f"{tmp_path}/{name}.jsonl" for name in order]
        make(tmp_path / order, sources=specs)
        names = {
            source
            for split in corpus.SPLITS
            for (source, _) in read_documents(tmp_path / order, split, ("source", "id"))
        }
        assert names == {f"{order[0]}.jsonl"}
        rows = json.loads((tmp_path / order / "ledger.json").read_text())["sources"]
        assert [row["documents_out"] for row in rows.values()] == [50, 0]
        assert rows[specs[1]]["skipped"] == {"duplicate": 50}


def test_duplicates_stay_when_asked_and_a_repeated_source_has_its_own_row(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [prose(number) for number in range(50)])
    spec = f"{tmp_path}/a.jsonl"
    counts = make(tmp_path / "out", sources=[spec, spec], deduplicate=False)
    assert counts["documents_out"] == 100 and counts["skipped"] == {}
    assert Counter(documents(tmp_path / "out")) == {prose(number): 2 for number in range(50)}
    assert list(json.loads((tmp_path / "out" / "ledger.json").read_text())["sources"]) == [spec, f"{spec} (2)"]


def test_the_holdout_stays_when_the_corpus_grows(tmp_path):
    held = []
    for size in (100, 250):
        write_jsonl(tmp_path / "a.jsonl", [prose(number) for number in range(size)])
        make(tmp_path / f"out{size}", sources=f"{tmp_path}/a.jsonl")
        held.append([set(read_documents(tmp_path / f"out{size}", split)) for split in corpus.SPLITS])
    assert held[0][0] < held[1][0] and held[0][1] < held[1][1]


def test_docstrings_of_a_file_are_on_one_side(tmp_path):
    files = [file for file in docstrings.list_files() if file.package == "rich"]
    unit = sources.Unit(0, "docs", tuple(sources.Part(file, file.bytes) for file in files))
    config = Config(corpus={"holdout": 0.3}).corpus
    corpus._clean_unit(config, corpus._Task(unit, 0, tmp_path))
    train, holdout = (
        {source for source, _ in read_documents(tmp_path / "units" / "00000", split, ("source", "id"))}
        for split in corpus.SPLITS
    )
    assert len(train) > 10 and len(holdout) > 5 and not train & holdout


def test_parts_and_row_groups_are_bounded_and_keep_the_order(tmp_path, monkeypatch):
    texts = [prose(number) for number in range(400)]
    write_jsonl(tmp_path / "a.jsonl", [*texts[:200], "giant " * 2_000, *texts[200:]])
    monkeypatch.setattr(corpus, "GROUP_BYTES", 2_000)
    make(tmp_path / "out", sources=f"{tmp_path}/a.jsonl", shard_bytes=10_000, holdout=0.05)
    parts = list_parts(tmp_path / "out", "train")
    assert [path.name for path in parts] == [f"part-{number:05d}.parquet" for number in range(len(parts))]
    sizes = [sum(len(text) for text in pq.read_table(path)["text"].to_pylist()) for path in parts]
    assert len(parts) > 5 and sorted(sizes)[-2] <= 10_000 < sorted(sizes)[-1] < 12_000  # the giant is alone
    groups = [pq.ParquetFile(path) for path in parts]
    assert all(group.num_row_groups >= 4 for group, size in zip(groups, sizes, strict=True) if 9_000 < size <= 10_000)
    train = list(read_documents(tmp_path / "out", "train"))
    assert [text for text in train if not text.startswith("giant")] == [text for text in texts if text in set(train)]


def test_a_damaged_part_is_an_artifact_error(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [prose(number) for number in range(300)])
    make(tmp_path / "out", sources=f"{tmp_path}/a.jsonl")
    (path, *_) = list_parts(tmp_path / "out", "train")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{path}: not readable .*run `bertpipe corpus`"):
        list(read_documents(tmp_path / "out", "train"))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_the_run_or_is_counted_alone(tmp_path, workers):
    texts = [prose(number) for number in range(100)]
    for number in range(2):
        lines = [json.dumps({"text": text}) for text in texts[number * 50 : number * 50 + 50]]
        lines[20] = lines[20][:-1]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join([*lines, json.dumps({"padding": PADDING, "text": texts[0]})]))
    spec = f"{tmp_path}/*.jsonl"
    with pytest.raises(DataError, match=rf"^{tmp_path}/0\.jsonl: line 21: broken JSON at byte \d+ .*on_error: skip$"):
        make(tmp_path / "strict", workers, sources=spec)
    assert not (tmp_path / "strict" / "ledger.json").exists()
    counts = make(tmp_path / "lenient", workers, sources=spec, on_error="skip")
    assert counts["skipped"] == {"duplicate": 2, "unreadable": 2}
    assert sorted(documents(tmp_path / "lenient")) == sorted(text for k, text in enumerate(texts) if k % 50 != 20)
    (row,) = json.loads((tmp_path / "lenient" / "ledger.json").read_text())["sources"].values()
    assert [problem.split(": ")[1] for problem in row["problems"]] == ["line 21", "line 21"]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "no document is left of 0 (none skipped)"),
        (["", "x"], {}, "no document is left of 2 (1 empty, 1 too_short)"),
        ([prose(1)], {"holdout": 0.0001}, "corpus.holdout: at 0.0001, none of the 1 documents is in holdout"),
        ([prose(1)], {"holdout": 0.9999999}, "corpus.holdout: at 0.9999999, none of the 1 documents is in train"),
    ],
)
def test_a_corpus_that_is_of_no_use_is_refused(tmp_path, lines, options, message):
    (tmp_path / "a.txt").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DataError) as error:
        make(tmp_path / "out", sources=f"{tmp_path}/a.txt", txt_documents="line", **options)
    assert message in str(error.value)
    assert not (tmp_path / "out" / "ledger.json").exists()


def test_no_holdout_when_none_is_asked_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [prose(1)])
    assert make(tmp_path / "out", sources=f"{tmp_path}/a.jsonl", holdout=0)["train_documents"] == 1
    assert list(read_documents(tmp_path / "out", "holdout")) == []


RECORDS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(["same", "same ", "e\u0301", "\u00e9", "\n", "long enough to be too long"]),
        st.sampled_from([None, 1, [], {}]),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(RECORDS, min_size=1, max_size=3), st.sampled_from(["", ".gz"]), st.booleans(), st.data())
def test_the_ledger_balances_and_documents_are_exact_on_anything(files, ending, deduplicate, draw):
    """Against a reference of a few lines: arbitrary records in several files, the last one cut anywhere."""
    expected, skipped = [], Counter()
    with tempfile.TemporaryDirectory() as name:
        for number, records in enumerate(files):
            data = "".join(json.dumps({"text": record}) + "\n" for record in records).encode()
            whole = len(records)
            if number == len(files) - 1 and not ending:
                cut = draw.draw(st.integers(0, len(data)))
                whole = data[:cut].count(b"\n")
                rest = data[:cut].rpartition(b"\n")[2]
                complete = bool(rest) and rest == data.split(b"\n")[whole]  # only its line end is cut off
                whole += complete
                skipped["unreadable"] += bool(rest) and not complete
                data = data[:cut]
            (Path(name) / f"{number}.jsonl{ending}").write_bytes(gzip.compress(data) if ending else data)
            for record in records[:whole]:
                text = clean(record) if isinstance(record, str) else None
                if text is None:
                    skipped["unreadable"] += 1
                elif not 2 <= len(text) <= 15:
                    skipped["empty" if not text else "too_short" if len(text) < 2 else "too_long"] += 1
                elif deduplicate and text in expected:
                    skipped["duplicate"] += 1
                else:
                    expected.append(text)
        options = {"on_error": "skip", "min_chars": 2, "max_chars": 15, "deduplicate": deduplicate, "holdout": 0}
        out = Path(name) / "out"
        if not expected:
            with pytest.raises(DataError, match="no document is left"):
                make(out, sources=f"{name}/*.jsonl{ending}", **options)
            return
        counts = make(out, sources=f"{name}/*.jsonl{ending}", **options)
        assert list(read_documents(out, "train")) == expected
        assert counts["skipped"] == {reason: count for reason, count in sorted(skipped.items()) if count}
        assert counts["documents_in"] == len(expected) + skipped.total()


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_a_rerun_reads_unfinished_units_only(tmp_path, several_units):
    make(tmp_path / "straight", sources=several_units)
    last = tmp_path / "4.jsonl"
    good = last.read_bytes()
    last.write_bytes(good[:-1])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"4\.jsonl: line"):
        make(out, sources=several_units)
    assert [is_complete(out / "units" / f"{number:05d}") for number in range(5)] == [True] * 4 + [False]
    last.write_bytes(good)
    for number in range(4):  # were they read again, this would show
        (tmp_path / f"{number}.jsonl").write_bytes(b"?" * sources.UNIT_BYTES)
    make(out, sources=several_units)
    assert content(out) == content(tmp_path / "straight")


def test_a_run_interrupted_while_parts_are_moved_goes_on(tmp_path, several_units):
    make(tmp_path / "straight", sources=several_units)
    out = tmp_path / "out"
    (out / "train" / "part-00002.parquet").mkdir(parents=True)  # a rename onto it fails
    with pytest.raises(IsADirectoryError):
        make(out, sources=several_units)
    (out / "train" / "part-00002.parquet").rmdir()
    assert len(list((out / "train").iterdir())) == 2
    make(out, sources=several_units)
    assert content(out) == content(tmp_path / "straight")


def test_a_finished_run_does_nothing_but_count(tmp_path, several_units):
    counts = make(tmp_path / "out", sources=several_units)
    for number in range(5):
        (tmp_path / f"{number}.jsonl").unlink()
    (tmp_path / "out" / "units" / "00000").mkdir(parents=True)  # killed between the ledger and the cleaning up
    assert make(tmp_path / "out", sources=several_units) == counts
    assert not (tmp_path / "out" / "units").exists()


RUN = """
import sys
from pathlib import Path
from bertpipe.config import Config
from bertpipe.data import corpus

if __name__ == "__main__":
    config = {"sources": sys.argv[1], "holdout": 0.2}
    cfg = Config(corpus=config, runtime={"workers": 2, "progress": False})
    print("started", flush=True)
    corpus.run(cfg, {}, Path(sys.argv[2]), {})
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_moments_the_result_is_the_same(tmp_path, several_units, kill):
    make(tmp_path / "straight", sources=several_units)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    out = tmp_path / "out"
    out.mkdir()
    moments = random.Random(0)
    kills = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, script, several_units, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            process.stdout.readline()
            try:
                process.wait(timeout=moments.uniform(0.0, 1.0))
            except subprocess.TimeoutExpired:
                process.send_signal(kill)
                kills += 1
            process.communicate(timeout=300)  # until the last worker has closed its end of the pipe
        assert process.returncode != 0 or (out / "ledger.json").is_file()
    assert kills
    make(out, 2, sources=several_units)
    assert content(out) == content(tmp_path / "straight")


# --- identity and memory ----------------------------------------------------------------------------------------------


def test_the_identity_is_the_content_of_the_files_in_the_order_of_the_sources(tmp_path):
    def identity(folder: str, *specs: str, cache: Path | None = None) -> dict:
        return identify(Config(corpus={"sources": [f"{tmp_path}/{folder}/{spec}" for spec in specs]}).corpus, cache)

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / folder / name).write_text(name)
    first = identity("here", "*.txt")
    assert first == identity("there", "*.txt") == identity("there", "*.txt", cache=tmp_path / "cache.json")
    assert identity("here", "b.txt", "a.txt") != identity("here", "a.txt", "b.txt")
    (tmp_path / "there" / "a.txt").write_text("A.txt")
    assert identity("there", "*.txt", cache=tmp_path / "cache.json") != first
    with pytest.raises(DataError, match="matches no file"):
        identity("nowhere", "*.txt")


MEASURE = """
import json, sys
from pathlib import Path
from bertpipe.config import Config
from bertpipe.data import corpus

cfg = Config(corpus={"sources": json.loads(sys.argv[1])}, runtime={"workers": 1, "progress": False})
Path(sys.argv[2]).mkdir()
corpus.run(cfg, {}, Path(sys.argv[2]), {})
# Not getrusage: its peak counts the memory of the process that started this one.
print(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(DATA is None, reason="BERTPIPE_DATA names no folder of real data")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_memory_stays_flat_when_the_input_is_given_four_times_over(tmp_path):
    def peak(times: int) -> int:
        specs = [f"{DATA}/corpus/enwiki-train-00003-*.parquet"] * times
        return int(subprocess.check_output([sys.executable, "-c", MEASURE, json.dumps(specs), tmp_path / str(times)]))

    assert peak(4) < 1.15 * peak(1)
