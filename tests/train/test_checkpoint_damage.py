"""Disks that are full, over quota or broken; files that were changed; headers from nowhere.

F10, F11, F12 and F14 of the plan, and fuzzing of the loader.
"""

import contextlib
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bertpipe import artifact
from bertpipe.errors import ArtifactError
from bertpipe.train import checkpoint, checkpoint_files
from bertpipe.train.optim import Optimizer
from tests import saved
from tests.crashes import Changes, in_child, quiet
from tests.fuzz import tiers
from tests.train.test_pretrain import config, inputs, run  # noqa: F401

FIFTH = "step-00000005"
MESSAGE = re.compile(r"^[^\n]*/step-00000003: not written: [^\n]+; a checkpoint takes [\d,]+ bytes, [\d,]+ are free$")


def two_checkpoints(folder: Path) -> Path:
    """A run below `folder` with checkpoints of steps 4 and 5."""
    checkpoints, model, optimizer = saved.make(folder / "run")
    saved.save_steps(checkpoints, model, optimizer, 4, 5)
    return folder / "run"


@pytest.fixture
def two(tmp_path) -> Path:
    """Such a run."""
    return two_checkpoints(tmp_path)


def leftovers(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("*.partial"))


# Full, over quota, broken (F10)


def fail_at_every_change(folder: Path, number: int, once: bool) -> None:
    """The changes from each one on (or each one alone) fail with `number`; deletions work on a full disk."""
    countdown, happened = [0], []

    def on_change(name: str, torn: Callable[[], None]) -> None:
        countdown[0] -= 1
        if countdown[0] == 0 or (countdown[0] < 0 and not once and name not in ("os.remove", "os.rmdir")):
            torn()
            happened.append(name)
            raise OSError(number, os.strerror(number))

    checkpoints, model, optimizer = saved.make(folder)
    saved.save_steps(checkpoints, model, optimizer, 1, 2)
    shutil.copytree(folder / "checkpoints", folder / "before")
    changes = Changes(folder, on_change)
    changes.watch()
    for k in range(1, 1000):
        changes.active = False
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(folder / "before", folder / "checkpoints")
        checkpoints = saved.make(folder)[0]
        countdown[0], changes.active = k, True
        happened.clear()
        checkpoints.save(3, model, optimizer, saved.state(3))
        try:
            checkpoints.wait()
            failed = False
        except ArtifactError as error:
            failed = True
            assert MESSAGE.match(str(error)), str(error)
        changes.active = False
        visible = [path.name for path in checkpoints.steps()]
        assert not [p for path in checkpoints.steps() for p in checkpoint_files.problems(path)]
        assert visible[-1] == "step-00000003" or failed, visible
        assert len(visible) >= 2
        if happened[:1] != ["os.remove"] and happened[:1] != ["os.rmdir"]:
            assert not failed or not leftovers(folder), happened
        if not happened:
            assert k > 40 and not failed
            return
    raise AssertionError("no end")


@pytest.mark.parametrize(("number", "once"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True)])
def test_a_write_that_fails_anywhere(tmp_path, number, once):
    """The last checkpoint stays whole, what was begun is removed, one line says what is needed and free."""
    with quiet():
        assert in_child(lambda: fail_at_every_change(tmp_path / "run", number, once)) == 0


def limit_files(size: int) -> None:
    """No file of this process may grow beyond `size` bytes: a write that would fails with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def save_under_limits(folder: Path, sizes: list[int]) -> None:
    checkpoints, model, optimizer = saved.make(folder)
    saved.save_steps(checkpoints, model, optimizer, 1, 2)
    failures = 0
    for size in sizes:
        limit_files(size)
        checkpoints.save(3, model, optimizer, saved.state(3))
        try:
            checkpoints.wait()
        except ArtifactError as error:
            failures += 1
            assert MESSAGE.match(str(error)) and "File too large" in str(error)
        limit_files(resource.RLIM_INFINITY)
        if leftovers(folder) or len(checkpoints.steps()) < 2 or checkpoints.newest() is None:
            raise AssertionError(size)
    assert failures == len(sizes) - 1 and checkpoints.newest().name == "step-00000003"


def test_files_cut_off_at_a_size(tmp_path):
    """By the kernel, at 50 sizes; with room for the largest file the next save succeeds."""
    with quiet():
        probe, model, optimizer = saved.make(tmp_path / "probe")
        saved.save_steps(probe, model, optimizer, 1)
        largest = max(path.stat().st_size for path in artifact.list_files(probe.newest()))
        sizes = [*range(0, largest, largest // 49 + 1), largest]
        assert in_child(lambda: save_under_limits(tmp_path / "run", sizes)) == 0


def fail_in_a_row(folder: Path) -> None:
    checkpoints, model, optimizer = saved.make(folder, failures=2)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for step, fails, stops in ((1, 1, 0), (2, 1, 0), (3, 0, 0), (4, 1, 0), (5, 1, 0), (6, 1, 1)):
            limit_files(9 if fails else resource.RLIM_INFINITY)
            checkpoints.save(step, model, optimizer, saved.state(step))
            try:
                checkpoints.wait()
                assert not stops
            except ArtifactError:
                assert stops
            limit_files(resource.RLIM_INFINITY)
            assert [path.name for path in checkpoints.steps()] == ["step-00000003"] * (step >= 3)
    lines = said.getvalue().splitlines()
    assert [re.search(r"not written: .* \(failure (\d) of 2 allowed\)$", line)[1] for line in lines] == list("1212")


def test_some_failures_in_a_row_may_be_allowed(tmp_path):
    """runtime.checkpoint_failures; one that succeeds starts the count again."""
    with quiet():
        assert in_child(lambda: fail_in_a_row(tmp_path)) == 0


def test_a_full_disk_under_stderr_hides_no_failure(tmp_path):
    """What can't be said is counted all the same."""
    checkpoints, model, optimizer = saved.make(tmp_path, failures=1)
    checkpoints.folder.write_text("a file in the way")
    with Path("/dev/full").open("w", encoding="utf-8") as full, contextlib.redirect_stderr(full):
        checkpoints.save(1, model, optimizer, {})
        checkpoints.save(2, model, optimizer, {})
        with pytest.raises(ArtifactError, match="not written"):
            checkpoints.wait()
        full.buffer.raw.close()


def test_the_error_of_one_write_is_raised_by_the_next(tmp_path):
    checkpoints, model, optimizer = saved.make(tmp_path)
    checkpoints.folder.write_text("a file in the way")
    checkpoints.save(1, model, optimizer, {})
    with pytest.raises(ArtifactError, match="not written"):
        checkpoints.save(2, model, optimizer, {})
    checkpoints.folder.unlink()
    saved.save_steps(checkpoints, model, optimizer, 3)
    assert checkpoints.newest().name == "step-00000003"


# Too little room (F11)


def test_too_small_a_disk_is_refused_before_the_first_step(inputs, tmp_path):  # noqa: F811
    """A real disk, and more checkpoints to keep than any has room for."""
    with pytest.raises(
        ArtifactError, match=r"too little room for checkpoints: 1000000001 of [\d,]+ bytes each need"
    ) as e:
        run(config(runtime={"keep_checkpoints": 10**9}), inputs, tmp_path / "out")
    assert "\n" not in str(e.value) and " are free; make room" in str(e.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists() or not (tmp_path / "out" / "metrics.jsonl").read_text()
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_room_is_what_is_needed_beyond_what_is_there(two, monkeypatch):
    """The bytes asked for are those of a real checkpoint, optimizer included, before and after the first step."""
    checkpoints, model, optimizer = saved.make(two)
    asked: list[int] = []
    monkeypatch.setattr(checkpoint, "_has_room", lambda folder, needed: asked.append(needed) or True)
    checkpoints.check_room(model, optimizer)
    saved.advance(model, optimizer, 1)
    checkpoints.check_room(model, optimizer)
    saved.make(two.with_name("new"))[0].check_room(model, optimizer)
    tensors = [t for name in saved.TENSORS for t in load_file(checkpoints.steps()[0] / name).values()]
    exact = sum(t.numel() * t.element_size() for t in tensors)
    assert asked[1:] == [exact, 3 * exact]
    assert exact - 4 * len(tensors) <= asked[0] <= exact, "but for the counts of steps"


def refuse_large_files(folder: Path) -> None:
    checkpoints, model, optimizer = saved.make(folder)
    limit_files(100)
    checkpoints.check_room(model, optimizer)  # no lack of room
    limit_files(resource.RLIM_INFINITY)
    assert not leftovers(folder)


def test_a_limit_on_a_files_size_is_no_lack_of_room(tmp_path):
    assert in_child(lambda: refuse_large_files(tmp_path)) == 0


# Changed files (F12)


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bits(folder: Path, flips: int) -> None:
    newest = folder / "checkpoints" / FIFTH
    rng = random.Random(flips)
    for path in (*artifact.list_files(newest), newest / artifact.MANIFEST):
        content = path.read_bytes()
        for _ in range(flips):
            path.write_bytes(flip(content, rng))
            problems = checkpoint_files.problems(newest)
            assert problems and str(path) in problems[0], path
        path.write_bytes(content)
    assert checkpoint_files.problems(newest) == []


def test_flipped_bits_are_seen(two):
    flip_bits(two, 20)


@pytest.mark.torture
def test_a_thousand_flipped_bits_in_each_file_are_seen(two):
    flip_bits(two, 1000)


def changes_of(newest: Path) -> list[tuple[Path, Callable[[Path], Any]]]:
    older = newest.with_name("step-00000004")
    found: list[tuple[Path, Callable[[Path], Any]]] = []
    for path in (*artifact.list_files(newest), newest / artifact.MANIFEST):
        size = path.stat().st_size
        for cut in sorted({0, 1, size // 2, size - 1}):
            found.append((path, lambda path, cut=cut: os.truncate(path, cut)))
        found.append((path, lambda path: path.write_bytes(path.read_bytes() + b" ")))
        found.append((path, Path.unlink))
        other = older / path.relative_to(newest)
        if other.read_bytes() != path.read_bytes():
            found.append((path, lambda path, other=other: shutil.copyfile(other, path)))
    found.append((newest / "extra", lambda path: path.write_text("not listed")))
    return found


def test_cut_deleted_and_swapped_files_are_passed_over_aloud(two, capsys):
    """From one step into another, too, though each alone is whole; the one before is used."""
    newest = two / "checkpoints" / FIFTH
    checkpoints = saved.make(two)[0]
    changes = changes_of(newest)
    assert len(changes) > 50
    shutil.copytree(newest, two / "whole")
    for path, change in changes:
        change(path)
        found = checkpoints.newest()
        assert found is not None and found.name == "step-00000004"
        error = capsys.readouterr().err
        assert error.startswith("checkpoint passed over: ") and (str(path) in error or "manifest is of step 4" in error)
        shutil.rmtree(newest)
        shutil.copytree(two / "whole", newest)
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name("step-00000004"), newest)
    assert checkpoints.newest().name == "step-00000004"
    assert "its manifest is of step 4" in capsys.readouterr().err


# Two processes on one run (F14)

HOLDER = """
import sys
from pathlib import Path
from bertpipe import artifact
with artifact.committing(Path(sys.argv[1])) as (scratch, _):
    (scratch / "work").write_text("first")
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_on_the_same_folder_is_refused_and_does_no_damage(two):
    """By process and host; the first ends undisturbed."""
    target = two.with_name("pretrain-0123456789ab")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "holding\n"
    second = subprocess.run([sys.executable, "-c", HOLDER, str(target)], input="", capture_output=True, text=True)
    assert second.returncode == 1 and f"in use by process {first.pid} on {os.uname().nodename}" in second.stderr
    first.communicate("", timeout=60)
    assert first.returncode == 0 and (target / "work").read_text() == "first" and not artifact.verify(target)


# Anything at all (fuzzing)

WEIRD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 62,
    1 << 64,
    10**400,
    0.5,
    1e308,
    "",
    "..",
    "\0",
    "a/../b",
    "/etc/passwd",
)
WEIRD += ("\ud800", "x" * 5000, [], {}, [[[[]]]], [1 << 62], {"": {}}, {"bytes": 1, "sha256": 2}, "F32", [8, 8])


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something stands in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in places(child, (*path, key)))]


def mutate(value: Any, rng: random.Random) -> Any:
    """One place replaced, deleted, doubled or renamed."""
    value = json.loads(json.dumps(value))
    path = rng.choice(places(value))
    if not path:
        return rng.choice(WEIRD)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    way = rng.randrange(4)
    if way == 0:
        del inner[path[-1]]
    elif way == 1 and isinstance(inner, dict):
        inner[str(rng.choice(WEIRD))] = inner.pop(path[-1])
    elif way == 2 and isinstance(inner[path[-1]], int):
        inner[path[-1]] += rng.choice((-1, 1, 8, -8, 1 << 40))
    else:
        inner[path[-1]] = rng.choice(WEIRD)
    return value


def deform(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, doubled or put in."""
    at, way = rng.randrange(len(content)), rng.randrange(5)
    if way == 0:
        return flip(content, rng)
    if way == 1:
        return content[:at]
    if way == 2:
        return content[:at] + content[at : at + rng.randrange(1, 99)] * 2 + content[at:]
    if way == 3:
        return (
            content[:at] + rng.choice((b"[" * 9999, b'{"a":' * 9999, b"\xff\xfe", b"9" * 9999, b"NaN")) + content[at:]
        )
    return content[:at] + rng.randbytes(rng.randrange(1, 9)) + content[at + 4 :]


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    way = rng.randrange(4)
    if way == 0:  # a length that promises much
        return (
            rng.choice((0, 1, 1 << 20, 1 << 30, 1 << 40, (1 << 64) - 1, length - 1)).to_bytes(8, "little") + content[8:]
        )
    if way == 1:
        return deform(content[: 8 + length], rng) + data
    if way == 2:
        return content[: 8 + length] + data[: rng.randrange(len(data))]
    header = json.dumps(mutate(json.loads(header), rng)).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    if rng.randrange(2):
        return deform(content, rng)
    return json.dumps(mutate(json.loads(content), rng), indent=2).encode("utf-8", "surrogatepass")


def reseal(content: bytes, rng: random.Random) -> bytes:
    """A changed manifest whose digest is right, as a forger would make it."""
    manifest = mutate(json.loads(content), rng)
    if not isinstance(manifest, dict):
        return json.dumps(manifest).encode()
    manifest.pop("digest", None)
    manifest["digest"] = artifact.digest(manifest)
    return checkpoint_files._render(manifest).encode("utf-8", "surrogatepass")


TARGETS = (
    ("manifest.json", mutate_json),
    ("manifest.json", reseal),
    ("state.json", mutate_json),
    ("model/model.safetensors", mutate_safetensors),
    ("optimizer.safetensors", mutate_safetensors),
)


def fuzz(folder: Path, cases: int) -> None:
    """Load checkpoints changed at random with 256 MiB to spare: loaded, or an ArtifactError, and nothing else."""
    newest = folder / "checkpoints" / FIFTH
    model = saved.make_model()
    optimizer = Optimizer(model, saved.RECIPE)
    checkpoint_files.load(newest, model, optimizer)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (256 << 20), resource.RLIM_INFINITY))
    contents = {name: (newest / name).read_bytes() for name, _ in TARGETS}
    refused = 0
    for case in range(cases):
        name, change = TARGETS[case % len(TARGETS)]
        rng = random.Random(case)
        try:
            (newest / name).write_bytes(change(contents[name], rng))
            if name == "manifest.json":
                refused += bool(checkpoint_files.problems(newest))
                continue
            checkpoint_files.load(newest, model, optimizer)
        except ArtifactError as error:
            assert "\n" not in str(error).strip()
            refused += 1
        except BaseException:
            print(f"case {case}: {name}", file=sys.stderr)
            raise
        finally:
            (newest / name).write_bytes(contents[name])
    assert refused > 0.8 * cases, refused


@tiers
def test_checkpoints_changed_at_random(memory_path, cases):
    two = two_checkpoints(memory_path)
    assert in_child(lambda: fuzz(two, cases)) == 0
