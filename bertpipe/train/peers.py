"""Which process is lost, when processes wait for one another in vain.

Every process has a thread that answers roll calls through the launch's key-value store, whatever its main thread
does. When a collective fails, the first process to notice calls the roll and writes down who did not answer within
GRACE seconds; all others read that, so that no process is blamed that only ended because of the first. A process that
was stopped (SIGSTOP, a debugger) is ended by those on its machine: its run is over, and it would never know.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from bertpipe.errors import RunError

GRACE = 4.0  # seconds to answer a roll call
POLL = 0.25  # seconds between two looks for one


class Peers:
    """The processes of this launch."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.doing = "starting"
        self.store = dist.PrefixStore("bertpipe-peers", dist.distributed_c10d._get_default_store())
        self.store.set(f"who-{rank}", f"{os.getpid()} {socket.gethostname()}")
        self.who = [self.store.get(f"who-{other}").decode().split(" ", 1) for other in range(world)]
        self.handles = {other: handle for other in range(world) if (handle := self._open(other)) is not None}
        threading.Thread(target=self._answer, name="roll calls", daemon=True).start()

    def _open(self, other: int) -> int | None:
        """A handle on a process of this machine, which names that very process even after its number is reused."""
        pid, host = self.who[other]
        if host != socket.gethostname() or not hasattr(os, "pidfd_open"):
            return None
        with contextlib.suppress(OSError):
            return os.pidfd_open(int(pid))
        return None

    def _answer(self) -> None:
        with contextlib.suppress(Exception):  # the store goes away with the launcher
            while not self.store.check(["call"]):
                time.sleep(POLL)
            self.store.set(f"here-{self.rank}", self.doing)

    def missing(self) -> dict[int, str]:
        """Processes that are gone or don't answer, with what they are; empty when all do. Called once."""
        try:
            if self.store.compare_set("call", "", str(self.rank)).decode() == str(self.rank):
                self.store.set("verdict", ",".join(self._call_roll()))
            until = time.monotonic() + 3 * GRACE
            while not self.store.check(["verdict"]):  # `store.wait` would hold up the thread that answers
                if time.monotonic() > until:
                    raise RuntimeError("whoever called the roll is gone")
                time.sleep(0.05)
            lost = [int(rank) for rank in self.store.get("verdict").decode().split(",") if rank]
            self.store.set(f"read-{self.rank}", "")
            if self.rank == 0:  # with whom the store may go
                self._await({f"read-{rank}" for rank in range(self.world) if rank not in lost})
        except (dist.DistError, RuntimeError):  # the store is gone, or who called the roll is
            return {0: f"process {self.who[0][0]} on {self.who[0][1]}, or its launcher"}
        return {rank: "process {} on {}".format(*self.who[rank]) for rank in lost}

    def _call_roll(self) -> list[str]:
        silent = self._await({f"here-{rank}" for rank in range(self.world) if rank != self.rank})
        return [name.removeprefix("here-") for name in sorted(silent)]

    def _await(self, keys: set[str]) -> set[str]:
        """Those of `keys` that nobody has set within GRACE seconds."""
        until = time.monotonic() + GRACE
        while keys and time.monotonic() < until:
            time.sleep(0.05)
            keys = {key for key in keys if not self.store.check([key])}
        return keys

    def end(self, ranks: dict[int, str]) -> None:
        """Kill those of `ranks` that run on this machine."""
        for rank in ranks:
            with contextlib.suppress(OSError):  # gone already
                if rank in self.handles:
                    signal.pidfd_send_signal(self.handles[rank], signal.SIGKILL)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the failure of a collective into a RunError that names who is lost."""
        try:
            yield
        except RuntimeError as error:
            if not _is_collective(error):
                raise
            lost = self.missing()
            self.end(lost)
            names = "; ".join(f"rank {rank} ({name})" for rank, name in lost.items())
            what = f"{names} ended or stopped answering" if lost else "no process is lost, but they no longer keep step"
            raise RunError(
                f"{self.doing}: rank {self.rank} of {self.world} waited in vain: {what}; the same command goes on from "
                "the last checkpoint"
            ) from error


def _is_collective(error: Any) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection closed by"))
