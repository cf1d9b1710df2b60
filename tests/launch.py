"""Start the real command as one or several processes, quickly: forked from a server that has imported it all already.

Several meet through gloo as under torchrun, whose environment variables they are given; only the launcher and its
restarts are missing. Each can be signalled or killed by itself.
"""

import atexit
import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PRELOAD = ["tests.imported"]
SECONDS = 240  # after which a launch that hangs fails its test


def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(arguments: list[str], environment: dict[str, str], out: str, hook: Any) -> None:
    """One process: the command with this environment, its output in a file."""
    os.environ.clear()
    os.environ.update(environment)
    os.setpgid(0, 0)
    for number, name in ((1, f"{out}.out"), (2, f"{out}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(os.dup(1), "w", 1)
    sys.stderr = os.fdopen(os.dup(2), "w", 1, errors="backslashreplace")
    np.random.seed()  # a fork has the server's generator
    from bertpipe.cli import main

    if hook is not None:
        hook(int(environment["RANK"]))
    code = main(arguments)
    threading._shutdown()  # what a forked process leaves out: to wait for its threads, to run what is left to the end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `bertpipe ARGUMENTS` to its end, with this process's environment; what it printed is in the result."""
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        given, out = [*map(str, arguments)], Path(folder) / "said"
        process = server().Process(target=serve, args=(given, dict(os.environ), str(out), None))
        process.start()
        try:
            process.join(SECONDS)
            hung = process.is_alive()
        finally:  # of a Ctrl-C too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.kill()
            process.join()
        printed, errors = (read(out.with_suffix(ending)) for ending in (".out", ".err"))
        assert not hung, f"bertpipe {' '.join(given)} hung:\n{errors}"
        return subprocess.CompletedProcess(["bertpipe", *given], process.exitcode, printed, errors)


def read(path: Path) -> str:
    """What a process printed."""
    return path.read_text() if path.exists() else f"{path.name}: ended before it began\n"


@dataclass
class Launch:
    """Processes of one run."""

    processes: list[Any]
    folder: Path

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks, to all without any."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def wait(self) -> list[int]:
        """Exit codes (negative: the signal that ended it); an AssertionError, and no process left, if it hangs."""
        until = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        codes = [process.exitcode for process in self.processes]
        assert not hung, f"ranks {hung} hung, exit codes {codes}:\n{self.text('err')}"
        return codes

    def kill(self) -> None:
        """kill -9 all of them."""
        for process in self.processes:
            process.kill()
            process.join()

    def text(self, stream: str = "err") -> str:
        """What they printed, rank by rank."""
        files = [self.folder / f"rank-{rank}.{stream}" for rank in range(len(self.processes))]
        return "".join(map(read, files))

    def done(self) -> str:
        """Wait for all to end well; returns what they printed."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"{codes}\n{self.text('err')}{self.text('out')}"
        return self.text("out")


def launch(world: int, *arguments: str | Path, hook: Any = None, **environment: str) -> Launch:
    """Start `bertpipe ARGUMENTS` as `world` processes; `hook(rank)`, a module's function, runs in each before it."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="launch-"))
    context, processes = server(), []
    for rank in range(world):
        own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        own = os.environ | own | {"CUDA_VISIBLE_DEVICES": "", **environment}
        processes.append(
            context.Process(target=serve, args=([*map(str, arguments)], own, str(folder / f"rank-{rank}"), hook))
        )
        processes[-1].start()
    started = Launch(processes, folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(started.kill)
    return started
