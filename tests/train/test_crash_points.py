"""A process that stops at any change to the disk, and a machine that does: the last checkpoint or the one before.

F02 and F03 of the plan: one save and the deletion of the oldest, cut short at every one of its changes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertpipe import artifact
from bertpipe.train import checkpoint_files, tensor_file
from tests import saved
from tests.crashes import KILLED, Disk, count_changes, in_child, killed_at, quiet

ORACLE = saved.oracle(1, 2, 3)
FOREIGN = "step-00000000"
ALL_CHANGES = {
    "open",
    "write",
    "fsync",
    *(f"os.{n}" for n in ("rename", "remove", "mkdir", "rmdir", "chmod")),
}


@pytest.fixture(autouse=True)
def several_writes(monkeypatch):
    """To a file of tensors, here as in a run, all but the last past the page cache."""
    monkeypatch.setattr(tensor_file, "BUFFER", 8192)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1 and 2, and something in their folder that isn't the run's."""
    folder = tmp_path_factory.mktemp("base") / "run"
    checkpoints, model, optimizer = saved.make(folder)
    saved.save_steps(checkpoints, model, optimizer, 1, 2)
    stray = checkpoints.folder / FOREIGN
    shutil.copytree(checkpoints.newest(), stray)
    (stray / "notes.txt").write_text("not ours")
    return folder


@pytest.fixture(scope="module")
def battered(base, tmp_path_factory) -> Path:
    """The same after a crash and a broken disk: leftovers, and a step 3 that is damaged."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("battered") / "run"))
    resume_and_save(folder)()
    checkpoints = folder / "checkpoints"
    shutil.copytree(base / "checkpoints" / "step-00000001", checkpoints / "step-00000001")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000003.01234567.partial")
    (checkpoints / "step-00000003" / "state.json").write_text("{")
    return folder


def resume_and_save(folder: Path, keep: int = 2) -> Callable[[], None]:
    """From the newest checkpoint to one of step 3, as a rerun does; models are made before anything is watched."""
    checkpoints, model, optimizer = saved.make(folder, keep=keep)

    def work() -> None:
        newest = checkpoints.newest()
        assert newest is not None
        state = checkpoints.restore(newest, model, optimizer)
        checkpoints.check_room(model, optimizer)
        for step in range(state["step"] + 1, 4):
            saved.advance(model, optimizer, step)
        checkpoints.save(3, model, optimizer, saved.state(3))
        checkpoints.wait()

    return work


def check(folder: Path, capsys: Any = None, damaged: bool = False) -> int:
    """The step that a start finds in `folder`, after checking that it is whole and nothing else was touched."""
    checkpoints = saved.make(folder)[0]
    visible = [path for path in checkpoints.steps() if path.name != FOREIGN]
    broken = [path.name for path in visible if checkpoint_files.problems(path)]
    assert broken in ([], ["step-00000003"] if damaged else []), broken
    assert len(visible) - len(broken) >= 2
    assert (checkpoints.folder / FOREIGN / "notes.txt").read_text() == "not ours"
    newest = checkpoints.newest()
    assert newest is not None
    step, tensors = saved.restored(newest)
    assert newest.name == f"step-{step:08d}" and step in (2, 3)
    assert saved.equal(tensors, ORACLE[step]), "a mix of two steps"
    return step


def finish(folder: Path) -> None:
    """The next start leaves what an uninterrupted one leaves."""
    resume_and_save(folder)()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [FOREIGN, "step-00000002", "step-00000003"]
    assert not [problem for name in names[1:] for problem in checkpoint_files.problems(folder / "checkpoints" / name)]


def stop_at_changes(origin: Path, folder: Path, every: int) -> int:
    """Stop a save of step 3, from `origin`, at every `every`th of its changes, and each write half way through too.

    Returns at how many points it was stopped.
    """
    points = 0

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(origin, folder)

    with quiet():
        fresh()
        work = resume_and_save(folder)  # children change copies of its model
        changes = count_changes(folder, work)
        assert check(folder) == 3
        assert len(changes) > 50 and set(changes) == ALL_CHANGES
        for torn in (False, True):
            numbers = [n for n, name in enumerate(changes) if not torn or name == "write"]
            found = []
            for number in numbers[::every]:
                fresh()
                assert killed_at(folder, work, number, torn) == KILLED
                found.append(check(folder, damaged=origin.parent.name.startswith("battered")))
                finish(folder)
            assert found == sorted(found), "once step 3 stands it stays"
            assert torn or {*found} == {2, 3}
            points += len(found)
    return points


def test_stopped_at_every_change(base, tmp_path):
    """F02: the loader gives step 2 or 3, whole; the next start clears what was left."""
    stop_at_changes(base, tmp_path / "run", 1)


def test_stopped_while_it_resumes_after_a_crash(battered, tmp_path):
    stop_at_changes(battered, tmp_path / "run", 5)


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["base", "battered"])
def test_stopped_at_every_change_of_every_kind(kind, request, tmp_path, record_property):
    record_property("points", stop_at_changes(request.getfixturevalue(kind), tmp_path / "run", 1))


def power_cuts(origin: Path, folder: Path, seeds: int, every: int = 1) -> None:
    """Record a save of step 3 once, then cut the power at every `every`th of its changes in `seeds` ways."""
    shutil.copytree(origin, folder)
    work = resume_and_save(folder)
    disk = Disk(folder)
    disk.watch()
    work()
    disk.active = False
    disk.moments.append(disk.look())
    assert len(disk.moments) > 50
    cut, seen = folder.with_name("cut"), set()
    for number, moment in [*enumerate(disk.moments)][::-every]:
        for seed in range(seeds):
            disk.after_power_cut(moment, seed * (number + 1) if seed > 1 else seed, cut)
            files = {str(path.relative_to(cut)): path.read_bytes() for path in cut.rglob("*") if path.is_file()}
            last = number == len(disk.moments) - 1
            identity = artifact.digest([last, sorted((name, content.hex()) for name, content in files.items())])
            if identity in seen:
                continue
            seen.add(identity)
            folder.with_name("cuts").write_text(str(len(seen)))
            try:
                step = check(cut, damaged=origin.parent.name.startswith("battered"))
                assert step == 3 or not last, "a save that has returned does not outlive a power cut"
                finish(cut)
            except BaseException:
                print(f"change {number}, seed {seed}")
                raise
    assert len(seen) > 10


def test_power_cut_at_every_change(base, tmp_path):
    """F03: bytes and names that were not flushed are lost, kept or torn."""
    with quiet():
        assert in_child(lambda: power_cuts(base, tmp_path / "run", 3)) == 0


def test_power_cut_while_it_resumes_after_a_crash(battered, tmp_path):
    with quiet():
        assert in_child(lambda: power_cuts(battered, tmp_path / "run", 3, 7)) == 0


def save_then_cut(origin: Path, folder: Path) -> None:
    shutil.copytree(origin, folder)
    disk = Disk(folder)
    work = resume_and_save(folder, keep=9)
    disk.watch()
    work()
    disk.active = False
    for seed in range(20):
        disk.after_power_cut(disk.look(), seed, folder.with_name("cut"))
        assert check(folder.with_name("cut")) == 3


def test_a_save_that_has_returned_outlives_a_power_cut(base, tmp_path):
    """Where nothing is deleted after it, too, which would flush the folder."""
    with quiet():
        assert in_child(lambda: save_then_cut(base, tmp_path / "run")) == 0


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["base", "battered"])
def test_power_cut_at_every_change_in_twenty_ways(kind, request, tmp_path, record_property):
    """F03 in full."""
    origin = request.getfixturevalue(kind)
    with quiet():
        assert in_child(lambda: power_cuts(origin, tmp_path / "run", 20)) == 0
    record_property("cuts", int((tmp_path / "cuts").read_text()))
