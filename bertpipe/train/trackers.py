"""Trackers: copies of a run's record that others show (Weights & Biases), best effort and in bounded time.

A tracker is a class with `start`, `log` and `finish`, each free to hang or to fail. `Background` calls them from one
daemon thread, so that training never waits for them; at the end it waits CLOSE_SECONDS, says what was lost, and goes.
A thread can't be ended from outside, and a library may have left hooks for the interpreter's end that wait for ever:
`given_up` tells the command line to end the process without them.
"""

from __future__ import annotations

import netrc
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bertpipe.redaction import redact

ROOM = 1_000
"""Lines that may wait for a tracker; further ones are left out of its record."""
CLOSE_SECONDS = 20.0
"""Waited at the end for a tracker to start, catch up and close, all in all."""

given_up: list[str] = []
"""Trackers of this process that failed or were not closed in time; the interpreter's own end may hang on them."""


class Tracker(Protocol):
    """One run's record elsewhere. All calls come from one thread, in this order; `finish` also after a failed `log`."""

    def start(self) -> None:
        """Open the record."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Add a line; steps never fall."""

    def finish(self) -> None:
        """Close the record and let go of all that could keep the process from ending."""


class Background:
    """A tracker that can neither hold up nor end a run.

    `log` returns at once; a line that finds no room is left out, said once. `finish` returns within
    CLOSE_SECONDS.
    """

    def __init__(self, name: str, tracker: Tracker, room: int = ROOM):
        self.name, self.seconds = name, CLOSE_SECONDS
        self._tracker, self._room, self._failed = tracker, room, False
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()  # None: nothing more
        self._asked = self._recorded = self._refused = 0
        self._thread = threading.Thread(target=self._serve, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line of the record: its "step" and its figures."""
        self._asked += 1
        if self._failed:
            return
        if self._waiting.qsize() < self._room:
            self._waiting.put(dict(line))
            return
        self._refused += 1
        if self._refused == 1:
            self._say(f"does not keep up at step {line['step']}; lines are left out of its record from here on")

    def finish(self) -> None:
        """Close the record, or give it up aloud."""
        self._waiting.put(None)
        try:
            self._thread.join(self.seconds)
        finally:  # of a second Ctrl-C too
            hanging = self._thread.is_alive()
            if hanging or self._failed:
                given_up.append(self.name)
            if hanging:
                self._say(f"not closed in {self.seconds:g} s and given up")
            if lost := self._asked - self._recorded:
                self._say(f"its record lacks {lost} of {self._asked} lines; metrics.jsonl and speed.jsonl have them")

    def _serve(self) -> None:
        """The thread's whole life."""
        started = self._try("starting", self._tracker.start)
        while started and not self._failed and (line := self._waiting.get()) is not None:
            step = line.pop("step")
            self._recorded += self._try(f"recording step {step}", self._tracker.log, step, line)
        if started:
            self._try("closing", self._tracker.finish)

    def _try(self, doing: str, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether no call has failed so far; what one raises, exits included, ends this record alone."""
        try:
            call(*arguments)
        except BaseException as error:
            if not self._failed:
                reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
                self._say(f"failed while {doing} ({reason}); the run goes on without it")
            self._failed = True
        return not self._failed

    def _say(self, what: str) -> None:
        print(redact(f"{self.name}: {what}"), file=sys.stderr, flush=True)


class Wandb:
    """Weights & Biases, offline without a key.

    It is given the settings and the figures: by default it would also take the command line, the git remote, the list
    of packages and all that is printed, which is where others' credentials were found.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any], name: str):
        self.project, self.folder, self.config, self.name = project, folder, config, name
        self.run: Any = None

    def start(self) -> None:
        """Start the run; without a key, say how to upload it later."""
        import wandb

        online = _has_wandb_key()
        settings = wandb.Settings(
            silent=True,
            init_timeout=30,
            console="off",  # it would put itself into sys.stdout, between training and its prints
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self.run = wandb.init(
            project=self.project,
            name=self.name,
            dir=str(self.folder),
            config=self.config,
            mode="online" if online else "offline",
            settings=settings,
        )
        if not online:
            print(f"wandb: no key, so offline; upload later with: wandb sync {Path(self.run.dir).parent}", flush=True)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Send one line."""
        self.run.log(figures, step=step)

    def finish(self) -> None:
        """Close the run, then its service process, which otherwise the interpreter's end waits for."""
        import wandb

        self.run.finish()
        wandb.teardown()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] == "online"
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc(os.environ.get("NETRC")).hosts)
    except (OSError, netrc.NetrcParseError):
        return False
