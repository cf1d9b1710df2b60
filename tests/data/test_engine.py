"""Work units over processes: order, errors, dead workers, and nobody left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from bertpipe.data.engine import map_units
from bertpipe.errors import DataError


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    return os.getpid()


def refuse_three_and_up(number: int) -> int:
    if number >= 3:
        raise DataError(f"file {number}: bad")
    return number


def divide_by(number: int) -> float:
    return 1 / number


def die_on_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def call(function, units, workers):
    return map_units(function, units, workers=workers, description="testing", progress=False)


@pytest.mark.parametrize("workers", [1, 2, 3, None])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_units(workers, count):
    assert list(call(square, range(count), workers)) == [number * number for number in range(count)]


def test_units_run_in_other_processes_only_when_there_are_workers():
    assert set(call(process_id, range(5), 1)) == {os.getpid()}
    assert os.getpid() not in set(call(process_id, range(5), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_failing_unit_is_raised_and_what_came_before_is_yielded(workers):
    results = call(refuse_three_and_up, range(20), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^file 3: bad$"):
        next(results)


def test_our_own_mistakes_keep_the_workers_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)^0 failed in a worker.*divide_by.*ZeroDivisionError"):
        list(call(divide_by, [1, 0, 2], 2))


def test_a_dead_worker_is_an_error_that_names_its_unit():
    results = call(die_on_two, range(20), 2)
    with pytest.raises(DataError, match=r"the worker on 2 died \(exit code -9\).*run again"):
        list(results)


def test_an_abandoned_iteration_leaves_no_worker():
    results = call(process_id, range(100), 2)
    worker = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


BLOCKING = """
import os, signal, sys
from bertpipe.data.engine import map_units

def block(number):
    print(os.getpid(), flush=True)
    signal.pause()

if __name__ == "__main__":
    try:
        list(map_units(block, [0, 1], workers=2, description="testing", progress=True))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_workers_end_with_their_parent(tmp_path, how):
    script = tmp_path / "blocking.py"
    script.write_text(BLOCKING)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        for _ in range(2):
            parent.stdout.readline()  # both workers are at their unit
        if how == "Ctrl-C":
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the whole group
        else:
            parent.kill()
        try:  # the workers hold the pipes' other ends too: this returns when the last of them is gone
            _, errors = parent.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == (130 if how == "Ctrl-C" else -signal.SIGKILL)
    assert "Traceback" not in errors
