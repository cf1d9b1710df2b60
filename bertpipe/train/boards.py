"""The trackers there are (`runtime.trackers`): Weights & Biases, TensorBoard, trackio.

    runs/wandb/                 offline runs, and the logs of those that were sent
    runs/tensorboard/NAME/      a run's event files
    runs/trackio/PROJECT.db     all runs of a project

They lie beside the artifacts rather than in one: an artifact is hashed when it is finished, and these files change when
they are looked at or uploaded; in one place they show several runs side by side. `bertpipe dashboard` opens them.
Each gets the settings, which hold no credential (redaction.py), and the figures; nothing else of the machine.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bertpipe.config import RuntimeConfig, listed
from bertpipe.errors import ConfigError
from bertpipe.redaction import VARIABLE
from bertpipe.train import trackers
from bertpipe.train.trackers import Background, Tracker

PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""Names of projects that wandb and trackio take alike and a file system keeps apart."""
EXTRAS = {"trackio": "'bertpipe[trackio]'"}
"""What to install for those that don't come with bertpipe."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run; `name` is the artifact's or names a cell, and so the same after a resume."""

    root: Path
    project: str
    name: str
    config: dict[str, Any]


class Wandb:
    """Weights & Biases, offline without a key.

    It is given the settings and the figures: by default it would also take the command line, the git remote, the list
    of packages and all that is printed, which is where others' credentials were found.
    """

    def __init__(self, run: Run):
        self.of = run
        self.run: Any = None

    def start(self) -> None:
        """Start the run, or take up the one of this name again; without a key, say how to upload it later."""
        import wandb

        online = _finds_key(wandb.setup().settings.base_url)
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
        self.of.root.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.of.project,
            name=self.of.name,
            id=self.of.name,
            dir=str(self.of.root),
            config=self.of.config,
            mode="online" if online else "offline",
            resume="allow" if online else None,  # offline, each sitting writes a file that is whole
            settings=settings,
        )
        if not online:
            from bertpipe.model.kernels import say_once  # torch, which a dashboard does without

            files = f"{shlex.quote(str(self.of.root / 'wandb'))}/offline-run-*"
            say_once(f"wandb: no key, so offline; upload later with: wandb sync {files}")

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Send one line, unless the server has had that step before."""
        if step >= self.run.starting_step:
            self.run.log(figures, step=step)

    def finish(self) -> None:
        """Close the run, then its service process, which otherwise the interpreter's end waits for."""
        import wandb

        self.run.finish()
        wandb.teardown()


def _finds_key(server: str) -> bool:
    """Whether wandb will find a key for `server` where it looks by itself; in a terminal it would ask for one else."""
    if os.environ.get("WANDB_MODE", "") not in ("", "online"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    """Event files for TensorBoard; numbers are float32 there, the settings a text."""

    def __init__(self, run: Run):
        self.of, self.folder = run, run.root / "tensorboard" / run.name
        self.writer: Any = None

    def start(self) -> None:
        """Begin a file of the whole run; readers drop what an older one told them.

        The last file before it stays: a TensorBoard that is open reads on from there, or never.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(self.folder.glob("events.out.tfevents.*"))[:-1]:
            old.unlink()
        self.writer = SummaryWriter(str(self.folder), purge_step=0, flush_secs=10)
        settings = json.dumps(self.of.config, indent=1)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()), 0)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write one line."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write out what waits."""
        self.writer.close()


class Trackio:
    """trackio, local, in a process of its own (trackio_process.py).

    Its folder and its login are settings of a whole process, read when it is imported; it asks the Hub who one is,
    sends to a Space where the environment names one, and prints. The process has an environment without any of that.
    """

    def __init__(self, run: Run):
        self.of, self.folder = run, run.root / "trackio"

    def start(self) -> None:
        """Start the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "bertpipe.train.trackio_process", self.of.project, self.of.name]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=trackio_environment(self.folder) | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the training; this ends when it is told to, or its input ends
        )
        self._send(self.of.config)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Hand over one line."""
        self._send([step, figures])

    def finish(self) -> None:
        """Wait until all is written; OSError with what the process said last if it is not."""
        self._send(None)
        if reason := self._end():
            raise OSError(reason)

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise OSError(self._end()) from None

    def _end(self) -> str:
        """Wait for the process to end; empty, or the last it said if anything went wrong."""
        lines = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        return "" if code == 0 else lines[-1] if lines else f"its process ended with {code}"


def trackio_environment(folder: Path) -> dict[str, str]:
    """This environment with trackio's data in `folder`, nothing that leads it elsewhere, and no credential."""
    elsewhere = re.compile(r"TRACKIO_|GRADIO_|SPACE_|SYSTEM$")
    kept = {name: v for name, v in os.environ.items() if not (elsewhere.match(name) or VARIABLE.search(name))}
    local = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    added = {"TRACKIO_DIR": str(folder.resolve()), "HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": os.devnull}
    return kept | added | {"NO_PROXY": local, "no_proxy": local}


def check(settings: RuntimeConfig) -> None:
    """ConfigError for a tracker that isn't there, one that is not installed, or a name its project can't have."""
    for name in listed(settings.trackers):
        if name not in TRACKERS:
            raise ConfigError(f"runtime.trackers: {name!r} is not one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"runtime.trackers: {name} is not installed; pip install {EXTRAS.get(name, name)}")
    if not PROJECT.fullmatch(settings.project):
        raise ConfigError(f"runtime.project: {settings.project!r} may hold letters, digits, - and _ only, 100 at most")


def open_all(settings: RuntimeConfig, name: str, config: dict[str, Any]) -> list[Background]:
    """The trackers of a run, yet to begin; those that an earlier run of this process gave up are left out."""
    run = Run(Path(settings.root), settings.project, name, config)
    wanted = [tracker for tracker in dict.fromkeys(listed(settings.trackers)) if tracker not in trackers.given_up]
    return [Background(tracker, TRACKERS[tracker](run)) for tracker in wanted]


TRACKERS: dict[str, Callable[[Run], Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}
