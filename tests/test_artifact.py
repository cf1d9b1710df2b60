"""Artifacts: written whole or not at all, named by recipe, and any flipped byte is noticed."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from bertpipe import artifact
from bertpipe.errors import ArtifactError


def make(folder: Path) -> Path:
    with artifact.committing(folder, stage="x", fingerprint="f") as (scratch, counts):
        (scratch / "sub").mkdir()
        (scratch / "a.txt").write_text("hello")
        (scratch / "sub" / "b.bin").write_bytes(bytes(range(256)))
        counts["lines"] = 1
    return folder


def test_what_is_published_verifies_and_says_what_it_is(tmp_path):
    folder = make(tmp_path / "x-1")
    manifest = artifact.read_manifest(folder)
    assert artifact.is_complete(folder) and artifact.verify(folder) == []
    assert manifest["stage"] == "x" and manifest["counts"] == {"lines": 1} and manifest["schema"] == 1
    assert sorted(manifest["files"]) == ["a.txt", "sub/b.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1"]
    assert not (folder / artifact.LOCK).exists()


@pytest.mark.parametrize("position", [0, 100, 255])
def test_one_flipped_bit_is_noticed(tmp_path, position):
    folder = make(tmp_path / "x-1")
    path = folder / "sub" / "b.bin"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert artifact.verify(folder) == [f"{path}: content differs from the manifest's sha256"]


def test_missing_longer_and_foreign_files_are_noticed(tmp_path):
    folder = make(tmp_path / "x-1")
    (folder / "a.txt").unlink()
    (folder / "sub" / "b.bin").write_bytes(b"longer than it was" * 100)
    (folder / "c.txt").write_text("?")
    problems = artifact.verify(folder)
    assert len(problems) == 3
    for name, expected in zip(("a.txt", "b.bin", "c.txt"), ("missing", "1800 bytes", "not in the"), strict=True):
        assert any(name in line and expected in line for line in problems)


def test_a_failure_publishes_nothing_and_a_rerun_continues(tmp_path):
    folder = tmp_path / "x-1"
    with pytest.raises(RuntimeError), artifact.committing(folder) as (scratch, _):
        (scratch / "unit.txt").write_text("done")
        raise RuntimeError
    assert not folder.exists()
    with artifact.committing(folder) as (scratch, _):
        assert (scratch / "unit.txt").read_text() == "done"
    assert artifact.is_complete(folder)


def _hold(folder: str, ready, kill: bool) -> None:
    with artifact.committing(Path(folder)) as (scratch, _):
        (scratch / "half.txt").write_text("half")
        ready.set()
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


@pytest.mark.parametrize("kill", [True, False])
def test_a_second_process_is_refused_but_a_dead_one_blocks_nobody(tmp_path, kill):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "x-1"), ready, kill))
    holder.start()
    assert ready.wait(60)
    if kill:
        holder.join()
        make(tmp_path / "x-1")
        assert artifact.verify(tmp_path / "x-1") == []
    else:
        with pytest.raises(ArtifactError, match=f"in use by process {holder.pid} on"):
            make(tmp_path / "x-1")
        holder.kill()
        holder.join()
    assert not (tmp_path / "x-1.partial").exists() or not kill


def test_fingerprints_follow_recipe_parents_and_inputs():
    def of(**changes):
        recipe = {"stage": "s", "version": 1, "settings": {"a": 1, "b": 2}, "parents": {"p": "1"}, "raw": {"r": [1]}}
        return artifact.fingerprint(**(recipe | changes))

    assert of() == of(settings={"b": 2, "a": 1})
    others = [of(stage="t"), of(version=2), of(settings={"a": 1}), of(parents={"p": "2"}), of(raw={"r": [2]})]
    assert len({of(), *others}) == 6


def test_inputs_are_known_by_content_and_the_cache_follows_it(tmp_path):
    path, cache = tmp_path / "in.txt", tmp_path / "root" / "cache.json"
    path.write_text("one")
    first = artifact.identify_files([path], cache)
    assert first == artifact.identify_files([path], cache) == artifact.identify_files([path])
    path.write_text("two")
    assert artifact.identify_files([path], cache) != first
    cache.write_text("{ broken")
    assert artifact.identify_files([path], cache) == artifact.identify_files([path])


def test_a_broken_manifest_is_one_clear_error(tmp_path):
    folder = make(tmp_path / "x-1")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest.json: not readable as JSON .* delete the folder"):
        artifact.verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest.json here"):
        artifact.verify(folder)


def test_json_is_replaced_whole(tmp_path):
    artifact.write_json(tmp_path / "a.json", {"ä": 1})
    artifact.write_json(tmp_path / "a.json", {"ä": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ä": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_whether_a_folder_is_worked_on(tmp_path):
    folder = tmp_path / "stage-0123456789ab"
    scratch = folder.with_name(folder.name + artifact.PARTIAL)
    assert not artifact.is_at_work(scratch)
    with pytest.raises(KeyboardInterrupt), artifact.committing(folder, stage="stage"):
        assert artifact.is_at_work(scratch)
        raise KeyboardInterrupt
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock = scratch / artifact.LOCK
    for holder, at_work in (
        (f"process {ended.pid} on {socket.gethostname()}", False),
        ("process 1 on another-machine", False),
        ("nonsense", False),
        (f"process {os.getpid()} on {socket.gethostname()}", True),
        (f"process 1 on {socket.gethostname()}", True),
    ):
        lock.write_text(holder)
        assert artifact.is_at_work(scratch) == at_work, holder
