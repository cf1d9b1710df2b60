"""SIGINT and SIGTERM while a model trains: a wish to stop, on which all processes agree."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """All processes agreed to stop, at the same place."""


class Stop:
    """Whether a signal asked this process to stop."""

    asked = False

    def __call__(self, number: int, frame: Any) -> None:
        """The signals' handler: a second SIGINT stops at once; a second SIGTERM changes nothing."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def catching(stop: Stop) -> Iterator[None]:
    """Have `stop` told of SIGINT and SIGTERM; may be nested."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
