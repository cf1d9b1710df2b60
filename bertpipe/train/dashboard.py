"""`bertpipe dashboard [FOLDER]`: open what trackio or TensorBoard wrote of a run, or of all below a folder.

On this machine alone (127.0.0.1), until Ctrl-C. trackio is taken where there are records of both.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import socket
import sqlite3
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

from bertpipe import artifact
from bertpipe.errors import ConfigError
from bertpipe.train.boards import EXTRAS, trackio_environment

HOST = "127.0.0.1"
PORTS = {"trackio": 7860, "tensorboard": 6006}


def run(folder: Path, wanted: str | None = None, port: int | None = None, browser: bool = True) -> None:
    """Serve until Ctrl-C. ConfigError when nothing is tracked there, what shows it is missing, or the port is taken.

    `port` 0 takes any that is free; None the first free one from the tracker's own on.
    """
    root, name = _find(folder)
    board = _choose(root, name, folder, wanted)
    port = free_port(port, PORTS[board])
    address = f"http://{HOST}:{port}/{BOARDS[board](root, name, port)}"
    print(f"{board} shows {folder if name else root} at {address} (Ctrl-C ends it)", flush=True)
    if browser and _has_display():
        with contextlib.suppress(webbrowser.Error, OSError):
            webbrowser.open(address)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _find(folder: Path) -> tuple[Path, str | None]:
    """The folder that trackers wrote into, and the run's name if `folder` is a run of pretraining; an artifact of
    fine-tuning is of many runs, so all of the folder it lies in are shown."""
    if not folder.is_dir():
        raise ConfigError(f"dashboard: {folder} is no folder; give runtime.root (runs) or a run in it")
    whole = folder.resolve()  # also . and runs/../runs
    if (whole / "metrics.jsonl").exists():
        return whole.parent, whole.name.removesuffix(artifact.PARTIAL)
    return (whole.parent if whole.name.startswith("finetune-") else folder), None


def _choose(root: Path, name: str | None, folder: Path, wanted: str | None) -> str:
    """The tracker to show."""
    there = [board for board in BOARDS if board == (wanted or board) and _has(board, root, name)]
    if not there:
        what = wanted or " or ".join(BOARDS)
        raise ConfigError(f"dashboard: {what} recorded nothing of {folder}; runs do with runtime.trackers: [trackio]")
    installed = [board for board in there if importlib.util.find_spec(board)]
    if not installed:
        raise ConfigError(f"dashboard: {there[0]} is not installed; pip install {EXTRAS.get(there[0], there[0])}")
    return installed[0]


def _has(board: str, root: Path, name: str | None) -> bool:
    """Whether a tracker recorded the run, or any; what can't be looked into is taken to have it."""
    if board == "tensorboard":
        return any(root.glob(f"tensorboard/{name or '*'}/events.out.tfevents.*"))
    if any(root.glob("trackio/inbox/*")) or not importlib.util.find_spec("trackio"):
        return any(root.glob("trackio/*"))
    return any(root.glob("trackio/*.db")) and (name is None or _project(root, name) is not None)


def _project(root: Path, name: str) -> str | None:
    """The project of trackio that has the run; ConfigError for a file of its that can't be read."""
    environment = trackio_environment(root / "trackio")
    os.environ.clear()
    os.environ.update(environment)
    import trackio

    for file in sorted(root.glob("trackio/*.db")):
        try:
            if any(run.name == name for run in trackio.Api().runs(file.stem)):
                return file.stem
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"dashboard: {file}: {error}; move it away, the runs' own records are whole") from None
    return None


def free_port(port: int | None, first: int) -> int:
    """The port, 0 for any, or the first free one from `first` on; ConfigError where something else listens on it."""
    why = ""
    for number in [port] if port is not None else range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not held up by a server that has just ended
            try:
                probe.bind((HOST, number))
                return int(probe.getsockname()[1])
            except OSError as error:
                why = "is in use" if error.errno == errno.EADDRINUSE else f"can't be had ({error.strerror})"
    taken = f"{first} to {first + 99}" if port is None else port
    raise ConfigError(f"--port: {taken} on {HOST} {why}; name another, or leave it out")


def _trackio(root: Path, name: str | None, port: int) -> str:
    """Serve it; returns what stands behind the address."""
    project = _project(root, name or "")
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a token that lets one delete runs
        trackio.show(open_browser=False, block_thread=False, host=HOST, share=False, server_port=port)
    return f"?{urlencode({'project': project, 'runs': name})}" if project else ""


def _tensorboard(root: Path, name: str | None, port: int) -> str:
    """The same."""
    from tensorboard import program

    board, folder = program.TensorBoard(), str(root / "tensorboard")
    board.configure(argv=["", "--logdir", folder, "--host", HOST, "--port", str(port), "--load_fast", "false"])
    board.launch()
    return f"?{urlencode({'runFilter': name})}" if name else ""


def _has_display() -> bool:
    """Whether a browser would have a window; without one Python starts one of text, in this very terminal."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


BOARDS: dict[str, Callable[[Path, str | None, int], str]] = {"trackio": _trackio, "tensorboard": _tensorboard}
