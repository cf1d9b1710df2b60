"""Stopping a process at the k-th change it makes to the disk, and what a power cut would leave of those changes."""

import builtins
import contextlib
import io
import os
import random
import shutil
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KILLED = 137
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork of this process; its exit status, 1 with a traceback for an exception."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Written:
    """A file open for writing: each `write` is a change, and one that is cut short leaves the first half."""

    def __init__(self, file: Any, changes: "Changes"):
        self.file, self.changes = file, changes

    def write(self, data: Any) -> int:
        def torn() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.changes.about_to("write", torn)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


class Changes:
    """Every change below `root` that this process makes from `watch` on, announced to `on_change` before it happens.

    Seen are opening for writing, each write, fsync, rename, unlink, mkdir, rmdir and chmod. A process has one instance
    at most, for audit hooks stay.
    """

    def __init__(self, root: Path, on_change: Callable[[str, Callable[[], None]], None]):
        self.root, self.on_change, self.active = str(root), on_change, False

    def about_to(self, name: str, torn: Callable[[], None] = lambda: None) -> None:
        if self.active:
            self.active = False  # what is done to look at the change is none
            try:
                self.on_change(name, torn)
            finally:
                self.active = True

    def watch(self) -> None:
        """From here on."""
        fsync, opened = os.fsync, io.open

        def watched_fsync(descriptor: int) -> None:
            self.about_to("fsync")
            fsync(descriptor)
            self.synced(descriptor)

        def watched_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(path, mode, *args, **kwargs)
            ours = self.active and set(mode) & set("wax+") and str(path).startswith(self.root)
            return _Written(file, self) if ours else file

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if not self.active:
                return
            if event in EVENTS:
                self.about_to(event)
            elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.about_to("open")

        os.fsync = watched_fsync
        io.open = builtins.open = watched_open
        sys.addaudithook(hook)
        self.active = True

    def synced(self, descriptor: int) -> None:
        """Called after an fsync."""


def count_changes(root: Path, work: Callable[[], Any]) -> list[str]:
    """The changes below `root` that `work` makes, in order, from a run in a child."""
    log = root.with_name(root.name + ".log")

    def logged() -> None:
        names: list[str] = []
        changes = Changes(root, lambda name, torn: names.append(name))
        changes.watch()
        work()
        changes.active = False
        log.write_text("\n".join(names))

    assert in_child(logged) == 0
    return log.read_text().split("\n")


def killed_at(root: Path, work: Callable[[], Any], number: int, torn: bool) -> int:
    """Exit status of a child that exits at its change `number` (from 0), before it or, `torn`, half way through it."""

    def killed() -> None:
        left = [number]

        def on_change(name: str, tear: Callable[[], None]) -> None:
            if left[0] == 0:
                if torn:
                    tear()
                os._exit(KILLED)
            left[0] -= 1

        Changes(root, on_change).watch()
        work()

    return in_child(killed)


class Disk(Changes):
    """What of the tree at `root` would outlive a power cut, at every change.

    Durable are a file's content at its last fsync and a folder's entries at its last fsync; all of it at the start.
    Of the rest a power cut keeps any part (`after_power_cut`).
    """

    def __init__(self, root: Path):
        super().__init__(root, lambda name, torn: self.moments.append(self.look()))
        self.moments: list[tuple[dict, dict, dict, dict]] = []
        self.held: dict[int, int] = {}  # an open descriptor keeps an inode's number from being used again
        self.contents: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        _, _, self.contents, self.entries = self.look()

    def _walk(self, folder: Path) -> Iterator[Path]:
        yield folder
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                yield from self._walk(path)
            else:
                yield path

    def look(self) -> tuple[dict, dict, dict, dict]:
        """(durable contents, durable entries, present contents, present entries), by inode."""
        contents, entries = {}, {}
        for path in self._walk(Path(self.root)):
            number = path.stat().st_ino
            if number not in self.held:
                self.held[number] = os.open(path, os.O_RDONLY)
            if path.is_dir():
                entries[number] = {child.name: child.stat().st_ino for child in path.iterdir()}
            else:
                contents[number] = path.read_bytes()
        return dict(self.contents), dict(self.entries), contents, entries

    def synced(self, descriptor: int) -> None:
        """Make durable what was flushed."""
        if not self.active:
            return
        self.active = False
        number, mode = os.fstat(descriptor).st_ino, os.fstat(descriptor).st_mode
        _, _, contents, entries = self.look()
        if stat.S_ISDIR(mode):
            self.entries[number] = entries[number]
        else:
            self.contents[number] = contents[number]
        self.active = True

    def after_power_cut(self, moment: tuple[dict, dict, dict, dict], seed: int, target: Path) -> None:
        """Build at `target` what a power cut at `moment` leaves. Seed 0: only what is durable; 1: all names, but no
        content that is not; others: any part of either."""
        durable_contents, durable_entries, contents, entries = moment
        rng = random.Random(seed)

        def kept() -> bool:
            return seed == 1 or (seed > 1 and rng.random() < 0.5)

        def content(number: int) -> bytes:
            durable, now = durable_contents.get(number, b""), contents.get(number)
            if now is None or now == durable or seed < 2:
                return durable
            cut = rng.randrange(len(now) + 1)
            ways = (durable, now, now[:cut], now[:cut] + bytes(len(now) - cut), bytes(len(now)))
            return rng.choice(ways)

        def names(number: int) -> dict[str, int]:
            durable, now = durable_entries.get(number, {}), entries.get(number)
            found = dict(durable)
            if now is None:
                return found
            for inode in sorted({*durable.values(), *now.values()}):  # a rename is kept or lost as one
                before = {name for name, other in durable.items() if other == inode}
                after = {name for name, other in now.items() if other == inode}
                if before != after and kept():
                    for name in before:
                        found.pop(name, None)
                    found |= dict.fromkeys(after, inode)
            return found

        def build(number: int, path: Path) -> None:
            if number in durable_contents or number in contents:
                path.write_bytes(content(number))
                return
            path.mkdir()
            for name, child in sorted(names(number).items()):
                build(child, path / name)

        shutil.rmtree(target, ignore_errors=True)
        build(Path(self.root).stat().st_ino, target)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says about each file it writes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
