"""Map work units over local processes: `for result in map_units(function, units, ...)`.

A unit is a small picklable value that names a piece of work (an input file, a range of rows); the function does the
piece and must be idempotent: a unit may be run again after an interruption. A cluster would come behind the same call.

Why not `concurrent.futures`: it can't say which unit a dead worker had, and its workers outlive a parent that was
killed (they keep both ends of the queue open, so they never see it close) and would still be writing when a rerun
starts. Here each worker has one pipe, so the parent knows its unit, and one thread that ends it with the parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple, TypeVar

from bertpipe.artifact import storage_errno
from bertpipe.errors import BertpipeError, DataError

U = TypeVar("U")
R = TypeVar("R")

LOOK_AHEAD = 4
"""Units started beyond the one awaited, times the workers: bounds the results held back to keep the order."""


def map_units(
    function: Callable[[U], R], units: Sequence[U], *, workers: int | None, description: str, progress: bool
) -> Iterator[R]:
    """Yield function(unit) for every unit, in the order of `units`, whatever the number of workers.

    With `workers` 1, or a single unit, everything runs in this process; None takes every core. `function` must be
    importable by name (a module's function or a `functools.partial` of one). An exception in a unit is raised here
    when its turn comes, as it would be in line: a BertpipeError, or a full disk's error, unchanged, anything else as a
    RuntimeError with the worker's traceback. A worker that dies (out of memory, a crash in C) is a DataError naming its
    unit. However the iteration ends, Ctrl-C included, no worker is left behind.
    """
    workers = min(workers or available_cores(), len(units))
    results = map(function, units) if workers <= 1 else _map_in_workers(function, units, workers, description)
    with _progress_bar(description, len(units), progress) as advance:
        for result in results:
            advance()
            yield result


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Failure(NamedTuple):
    """A unit's exception on its way to the caller."""

    error: Exception


class _Worker:
    """A process, our end of its pipe, and the index of the unit it has."""

    def __init__(self, function: Callable) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.index: int | None = None
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        # A blocked SIGINT is inherited: Ctrl-C, which a terminal sends to the whole group, reaches the parent alone.
        # The resource tracker's own start would unblock it half-way, so that has to come first.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _map_in_workers(function: Callable, units: Sequence, workers: int, description: str) -> Iterator:
    """Feed idle workers, hold finished results back until their turn."""
    pool: list[_Worker] = []
    finished: dict[int, Any] = {}
    started, failed = 0, False
    try:
        pool.extend(_Worker(function) for _ in range(workers))
        for turn in range(len(units)):
            while True:
                for worker in pool:
                    if worker.index is None and not failed and started < min(len(units), turn + LOOK_AHEAD * workers):
                        worker.index = started
                        with contextlib.suppress(BrokenPipeError):  # it died; the wait below sees that
                            worker.pipe.send(units[started])
                        started += 1
                if turn in finished:
                    break
                for worker in _ready(pool):
                    assert worker.index is not None
                    outcome = _receive(worker, units[worker.index], description)
                    failed = failed or isinstance(outcome, _Failure)
                    finished[worker.index], worker.index = outcome, None
            result = finished.pop(turn)
            if isinstance(result, _Failure):
                raise result.error
            yield result
    finally:
        for worker in pool:
            worker.stop()


def _ready(pool: list[_Worker]) -> list[_Worker]:
    """Wait for busy workers that have answered, or died."""
    busy = {worker.pipe: worker for worker in pool if worker.index is not None}
    return [busy[pipe] for pipe in connection.wait(list(busy))]  # type: ignore[index]


def _receive(worker: _Worker, unit: Any, description: str) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        return _Failure(
            DataError(
                f"{description}: the worker on {_name(unit)} died (exit code {code}), often from too little memory; "
                "finished units are kept: run again, with a smaller runtime.workers if it repeats"
            )
        )


def _serve(function: Callable, pipe: connection.Connection) -> None:
    """A worker's life: a unit in, its result or failure out, until the parent closes the pipe."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            unit = pipe.recv()
            try:
                result = function(unit)
            except BertpipeError as error:
                result = _Failure(error)
            except Exception as error:
                ours = RuntimeError(f"{_name(unit)} failed in a worker:\n{traceback.format_exc()}")
                result = _Failure(error if storage_errno(error) else ours)
            pipe.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _name(unit: Any) -> str:
    text = str(unit)
    return text if len(text) <= 300 else text[:300] + "..."


@contextlib.contextmanager
def _progress_bar(description: str, total: int, progress: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that moves a bar on stderr one unit on; without a terminal there is no bar."""
    if not (progress and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
