"""A full disk in the data stages: one line that says where, how much and what to do; nothing lost; a rerun ends well.

The disk really is full, for real commands with real workers: a file system of a few hundred KiB where the machine lets
a user mount one in a namespace of its own, and a limit on the size of files everywhere.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bertpipe import artifact
from bertpipe.data import npy
from bertpipe.errors import DataError, StorageError
from tests.data.test_engine import call
from tests.runs import prepare

LINE = re.compile(r"bertpipe: (?P<path>/\S+): (?P<what>[\w ]+) \((?P<sizes>.*)\); (?P<advice>.*)\n")
STAGES = ("corpus", "tokenizer", "shards")


def command(stage: str, config: Path, *more: str, **options) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "bertpipe.cli", stage, "--config", str(config), *more]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)


def limit_files(size: int):
    """For the child: no file may grow beyond `size` bytes (EFBIG, as Python ignores the signal)."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def content(folder: Path) -> dict:
    """What the manifest says of every file."""
    assert artifact.verify(folder) == []
    return artifact.read_manifest(folder)["files"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A config, and the artifacts of all three stages beside it in runs/."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = prepare(folder, 1500)
    rng = random.Random(0)
    with (folder / "text.txt").open("a") as file:  # what compresses badly, so that files have a size
        file.writelines(f"{rng.randbytes(40).hex()} {rng.randbytes(40).hex()}\n" for _ in range(2000))
    (folder / "more.txt").write_text("".join(f"{rng.randbytes(30).hex()} one more line\n" for _ in range(500)))
    text = config.read_text().replace("vocab_size: 120", "vocab_size: 2000")
    config.write_text(text.replace(f"{folder / 'text.txt'}", f"['{folder / 'more.txt'}', '{folder / 'text.txt'}']"))
    for stage in STAGES:
        done = command(stage, config)
        assert done.returncode == 0, done.stderr
    return config


def made(root: Path, stage: str) -> Path:
    (folder,) = [p for p in root.glob(f"{stage}-*") if not p.name.endswith(artifact.PARTIAL)]
    return folder


def check_refusal(done: subprocess.CompletedProcess, root: Path, what: str, advice: str) -> re.Match:
    assert done.returncode == 2, done.stderr
    found = LINE.fullmatch(done.stderr)
    assert found, done.stderr
    assert found["what"] == what and found["advice"].startswith(advice) and "run the command again" in found["advice"]
    assert Path(found["path"]).is_relative_to(root)
    assert re.fullmatch(r"([\d,]+ bytes to write, )?[\d,]+ bytes free", found["sizes"])
    temporaries = list(root.rglob(f".*{artifact.TEMPORARY}"))
    assert not temporaries
    for unit in root.rglob(artifact.MANIFEST):  # finished units of the stage at hand, and the stages before
        assert artifact.verify(unit.parent) == [] and (unit.parent.name.split("-")[0] in STAGES or unit.parent.parts)
    return found


def start_from(undisturbed: Path, folder: Path, stage: str) -> list[str]:
    """Copies of what the stages before `stage` made, in `folder`; the flags that go on from there."""
    for before in STAGES[: STAGES.index(stage)]:
        source = made(undisturbed.parent / "runs", before)
        shutil.copytree(source, folder / source.name)
    return ["--runtime.root", str(folder)]


@pytest.mark.parametrize(
    ("stage", "size", "workers"),
    [
        ("corpus", 10_000, 2),  # a unit's parquet file, in a worker
        ("tokenizer", 20_000, 1),  # tokenizer.json, by a library in Rust
        ("shards", 40_000, 2),  # a unit's tokens, in a worker
        pytest.param("corpus", 10_000, 1, marks=pytest.mark.slow),
        pytest.param("tokenizer", 6_000, 1, marks=pytest.mark.slow),
        pytest.param("shards", 100, 1, marks=pytest.mark.slow),
        pytest.param("shards", 9_000, 1, marks=pytest.mark.slow),
    ],
)
def test_no_file_may_grow_and_then_it_may(undisturbed, tmp_path, stage, size, workers):
    flags = [*start_from(undisturbed, tmp_path, stage), "--runtime.workers", str(workers)]
    earlier = {path: content(path) for path in tmp_path.iterdir()}
    done = command(stage, undisturbed, *flags, preexec_fn=limit_files(size))
    check_refusal(done, tmp_path, "File too large", "raise the limit on the size of files (ulimit -f)")
    assert earlier == {path: content(path) for path in earlier}
    done = command(stage, undisturbed, *flags)
    assert done.returncode == 0, done.stderr
    assert content(made(tmp_path, stage)) == content(made(undisturbed.parent / "runs", stage))
    assert not list(tmp_path.glob(f"*{artifact.PARTIAL}"))


def in_small_disk(script: str, folder: Path, size: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a namespace in which `folder` is a file system of `size` bytes."""
    mount = f'mount -t tmpfs -o size={size} none "{folder}" && {script}'
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


def can_mount(folder: Path) -> bool:
    return shutil.which("unshare") is not None and in_small_disk("true", folder, 1 << 16).returncode == 0


SCENE = """
cp -r "$EARLIER"/. "$DISK"/ 2>/dev/null
free=$(df --output=avail -B1 "$DISK" | tail -1)
dd if=/dev/zero of="$DISK/filler" bs=4096 count=$(( (free - ROOM) / 4096 )) 2>/dev/null
$COMMAND; echo "exit $?" >&2
rm "$DISK/filler"
$COMMAND >/dev/null || exit 9
cp -r "$DISK"/. "$RESULT"/
"""


@pytest.mark.parametrize(
    ("stage", "room"),
    [
        ("corpus", 150_000),
        ("shards", 90_000),
        pytest.param("corpus", 8_192, marks=pytest.mark.slow),
        pytest.param("tokenizer", 40_960, marks=pytest.mark.slow),
        pytest.param("shards", 0, marks=pytest.mark.slow),
    ],
)
def test_the_disk_is_full_and_then_it_is_not(undisturbed, tmp_path, stage, room):
    disk, earlier, result = tmp_path / "disk", tmp_path / "earlier", tmp_path / "result"
    for folder in (disk, earlier, result):
        folder.mkdir()
    if not can_mount(disk):
        pytest.skip("this machine lets no user mount a file system in a namespace")
    start_from(undisturbed, earlier, stage)
    words = [sys.executable, "-m", "bertpipe.cli", stage, "--config", str(undisturbed), "--runtime.root", str(disk)]
    done = in_small_disk(
        SCENE.replace("ROOM", str(room)),
        disk,
        8 << 20,
        EARLIER=str(earlier),
        DISK=str(disk),
        RESULT=str(result),
        COMMAND=" ".join(words),
    )
    assert done.returncode == 0, done.stderr
    line, code = done.stderr.splitlines(keepends=True)
    found = LINE.fullmatch(line)
    assert found and code == "exit 2\n", done.stderr
    assert found["what"] == "No space left on device" and found["path"].startswith(str(disk))
    free = int(re.search(r"([\d,]+) bytes free", found["sizes"])[1].replace(",", ""))
    assert free <= room
    assert content(made(result, stage)) == content(made(undisturbed.parent / "runs", stage))
    for path in earlier.iterdir():
        assert content(result / path.name) == content(path)


@pytest.mark.parametrize("number", artifact.REMEDIES)
def test_every_kind_of_error_that_means_a_full_disk_is_known(tmp_path, number):
    line = rf"^{tmp_path}/a: .* \(7 bytes to write, [\d,]+ bytes free\); "
    for error in (OSError(number, "x"), Exception(f"Error while serializing: x (os error {number})")):
        with pytest.raises(StorageError, match=line), artifact.writing(tmp_path / "a", 7):
            raise error


def test_numpys_word_for_it_is_known_and_other_errors_stay_what_they_are(tmp_path):
    path = tmp_path / "no" / "b"
    with pytest.raises(StorageError, match=rf"^{path}: No space left"), artifact.writing(path):
        raise OSError("10000 requested and 609 written")
    for other in (PermissionError(errno.EACCES, "x"), DataError("No space left (os error 28)"), KeyError(28)):
        with pytest.raises(type(other)), artifact.writing(tmp_path):
            raise other


def out_of_space(number: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", f"unit {number}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_workers_full_disk_is_no_mistake_of_ours(workers):
    with pytest.raises(OSError, match="unit 0") as caught:
        list(call(out_of_space, range(4), workers))
    assert caught.value.errno == errno.ENOSPC


LIMITED = """
import sys
from pathlib import Path
import numpy as np
from bertpipe import artifact
from bertpipe.data import npy
from bertpipe.errors import StorageError

folder = Path(sys.argv[1])
for write in (
    lambda: npy.save(folder / "a.npy", np.arange(10_000)),
    lambda: npy.GrowingNpy(folder / "b.npy", np.dtype(np.int64)).append(np.arange(10_000)),
    lambda: artifact.write_json(folder / "c.json", list(range(10_000))),
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def test_a_file_is_whole_or_not_there(tmp_path):
    npy.save(tmp_path / "a.npy", np.arange(3))
    artifact.write_json(tmp_path / "c.json", [1])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, preexec_fn=limit_files(4_000)
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    for name, line in zip(("a.npy", "b.npy", "c.json"), lines, strict=True):
        assert re.match(rf"{tmp_path}/{name}: .* \([\d,]+ bytes to write, [\d,]+ bytes free\); ", line)
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.arange(3))
    assert json.loads((tmp_path / "c.json").read_text()) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", "c.json"]


def test_what_a_killed_process_was_writing_is_not_published(tmp_path):
    scratch = tmp_path / f"x-1{artifact.PARTIAL}"
    scratch.mkdir()
    (scratch / f".manifest.json.1234{artifact.TEMPORARY}").write_text("{")
    with artifact.committing(tmp_path / "x-1") as (folder, _):
        (folder / "a.txt").write_text("whole")
    assert list(content(tmp_path / "x-1")) == ["a.txt"]


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_while_a_compressed_parquet_file_is_unpacked_is_no_bad_record(undisturbed, tmp_path, full):
    """Counted as unreadable, the file's documents would silently be gone from the corpus."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(1)
    pq.write_table(pa.table({"text": [rng.randbytes(300).hex() for _ in range(400)]}), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(data))
    flags = ["--runtime.root", str(tmp_path / "runs"), "--corpus.sources", str(tmp_path / "x.parquet.gz")]
    limits = {"preexec_fn": limit_files(len(data) - 1)} if full else {}
    done = command("corpus", undisturbed, *flags, "--corpus.on_error", "skip", **limits)
    if full:
        assert done.returncode == 2 and LINE.fullmatch(done.stderr)["what"] == "File too large", done.stderr
        assert not list((tmp_path / "runs").glob("corpus-*[0-9a-f]"))
    else:
        assert done.returncode == 0, done.stderr
