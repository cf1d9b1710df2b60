"""Trackers: copies of a run's record that others show (boards.py has them), best effort and in bounded time.

A tracker is a class with `start`, `log` and `finish`, each free to hang or to fail. `Background` calls them from one
daemon thread, so that training never waits for them; at the end CLOSE_SECONDS are waited for all of them together, what
was lost is said, and the run goes on. A thread can't be ended from outside, and a library may have left hooks for the
interpreter's end that wait for ever: `given_up` tells the command line to end the process without them.

A run that is resumed gives its record anew from the start: what a kill kept from a tracker it gets then, and steps that
are trained again don't come twice.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from bertpipe.redaction import redact

ROOM = 1_000
"""Lines that may wait for a tracker; further ones are left out of its record."""
CLOSE_SECONDS = 20.0
"""Waited at the end for a tracker to start, catch up and close, all in all."""

given_up: list[str] = []
"""Trackers of this process that failed or were not closed in time; the interpreter's own end may hang on them."""


Figures = tuple[int, dict[str, float]]
"""A line of the record: its step and its figures by name."""


class Tracker(Protocol):
    """One run's record elsewhere. All calls come from one thread, in this order; `finish` also after a failed `log`."""

    def start(self) -> None:
        """Open the record anew; all of a resumed run's lines follow again."""

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
        self.name = name
        self._tracker, self._room, self._failed = tracker, room, False
        self._waiting: queue.SimpleQueue[Figures | None] = queue.SimpleQueue()  # None: nothing more
        self._thread: threading.Thread | None = None
        self.waited = 0.0
        """Seconds that the run waited at its end, for all of its trackers."""
        self._asked = self._again = self._recorded = self._refused = 0

    def begin(self, past: Iterable[Figures] = ()) -> None:
        """Start the tracker and give it the record so far. Needed once, before `log`."""
        assert self._thread is None, "begun twice"
        self._thread = threading.Thread(target=self._serve, args=(past,), name=f"tracker-{self.name}", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Pass on a line of the record."""
        self._asked += 1
        if self._failed:
            return
        if self._waiting.qsize() < self._room:
            self._waiting.put((step, figures))
            return
        self._refused += 1
        if self._refused == 1:
            self._say(f"does not keep up at step {step}; lines are left out of its record from here on")

    def close(self) -> None:
        """Say that there is nothing more."""
        self._waiting.put(None)

    def wait(self, until: float) -> None:
        """Wait for the record to be closed, at most until that moment of time.monotonic()."""
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))

    def settle(self) -> None:
        """Give the tracker up aloud if it isn't closed, and say what its record lacks."""
        if self._thread is None:
            return
        hanging = self._thread.is_alive()
        if hanging or self._failed:
            given_up.append(self.name)
        if hanging:
            self._say(f"not closed in {CLOSE_SECONDS:g} s and given up")
        asked = self._asked + self._again
        if lost := asked - self._recorded:
            self._say(f"its record lacks {lost} of {asked} lines; metrics.jsonl and speed.jsonl have them")

    def _serve(self, past: Iterable[Figures]) -> None:
        """The thread's whole life."""
        started = self._try("starting", self._tracker.start)
        if started:
            self._try("reading the record", self._repeat, past)
        while started and not self._failed and (line := self._waiting.get()) is not None:
            self._record(*line)
        if started:
            self._try("closing", self._tracker.finish)

    def _repeat(self, past: Iterable[Figures]) -> None:
        for step, figures in past:
            self._again += 1
            if not self._failed:
                self._record(step, figures)

    def _record(self, step: int, figures: dict[str, float]) -> None:
        self._recorded += self._try(f"recording step {step}", self._tracker.log, step, figures)

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


def finish(trackers: Sequence[Background]) -> None:
    """Close their records, or give them up aloud: within CLOSE_SECONDS, all in all."""
    begun = time.monotonic()
    until = begun + CLOSE_SECONDS
    for tracker in trackers:
        tracker.close()
    try:
        for tracker in trackers:
            tracker.wait(until)
    finally:  # of a second Ctrl-C too
        for tracker in trackers:
            tracker.settle()
            tracker.waited = time.monotonic() - begun
