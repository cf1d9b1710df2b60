"""What lies around a run, looked at for `bertpipe doctor`: the disk, what its file system can do, the Hub."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertpipe import artifact
from bertpipe.config import Config

SECONDS = 3.0  # that the Hub may take to answer
GB = 10**9
NETWORKED = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "beegfs", "gpfs", "ceph")  # beginnings of types
SLOW_FSYNC = 0.5  # seconds


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    state: str
    """ok; note: works, but could be better; wrong: part of it doesn't work; fatal: nothing does"""
    text: str
    advice: str = ""
    """What to do."""


# --- disk -------------------------------------------------------------------------------------------------------------


def disk(cfg: Config) -> Iterator[Finding]:
    """Room at runtime.root, beside what the checkpoints take."""
    from bertpipe.train import estimate, pretrain

    place = _existing(Path(cfg.runtime.root))
    free = shutil.disk_usage(place).free
    text, needed = f"{free / GB:.1f} GB free for {Path(cfg.runtime.root).absolute()}", 0
    if not cfg.model.init or Path(cfg.model.init).is_dir():
        model = estimate.on_meta(cfg, estimate.vocabulary_size(cfg)[0])
        one = 4 * sum(p.numel() for p in model.parameters()) + estimate.optimizer_bytes(model, pretrain.recipe(cfg))
        needed = one * (cfg.runtime.keep_checkpoints + 1)
        text += f"; {cfg.runtime.keep_checkpoints + 1} checkpoints of the model take {needed / GB:.2g} GB"
    if free < needed:
        yield Finding("disk", "wrong", text, "make room, or set runtime.root to a folder on a larger disk")
    else:
        few = free < GB
        yield Finding("disk", "note" if few else "ok", text, "make room: corpus and shards come on top" if few else "")


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def file_system(cfg: Config) -> Iterator[Finding]:
    """What can be done with files where runtime.root is, or will be."""
    place = _existing(Path(cfg.runtime.root))
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".bertpipe-doctor-") as name:
            yield from _tried(Path(name), _kind(place))
    except OSError as error:
        advice = "set runtime.root to a folder that you may write"
        yield Finding("files", "fatal", f"{place} can't be written ({error.strerror})", advice)


def _kind(place: Path) -> str:
    """The type of the file system that holds a folder; empty where the system doesn't tell."""
    best, kind, real = -1, "", place.resolve()
    with contextlib.suppress(OSError):
        for row in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            point, name = row.split()[1:3]
            if len(point) >= best and real.is_relative_to(point.replace("\\040", " ")):
                best, kind = len(point), name
    return kind


def _tried(folder: Path, kind: str) -> Iterator[Finding]:
    """What artifacts and checkpoints stand on: locks, flushes, renames; direct writes make checkpoints quicker."""
    lock = _locks(folder / "lock")
    if lock is not None:
        yield lock
    started = time.monotonic()
    (folder / "old").write_bytes(b"old")
    (folder / "new").write_bytes(b"new")
    artifact.fsync(folder / "new")
    (folder / "new").replace(folder / "old")
    artifact.fsync(folder)
    seconds = time.monotonic() - started
    direct = "direct writes" if _writes_directly(folder / "direct") else "no direct writes (checkpoints cost more time)"
    holds = "locks, " * (lock is None)
    text = f"{kind or 'unknown type'}: {holds}rename, fsync in {1000 * seconds:.1f} ms, {direct}"
    if (folder / "OLD").exists():
        text += ", a and A are one name"
    state, advice = "ok", ""
    if kind in ("tmpfs", "ramfs"):
        state, advice = "note", "it lies in memory and is gone after a restart; set runtime.root to a folder on a disk"
    elif kind.startswith(NETWORKED):
        state, advice = "note", "locks may not hold between machines: let one run at a time use this runtime.root"
    elif seconds > SLOW_FSYNC:
        state, advice = "note", "a slow disk: raise runtime.checkpoint_every, or set runtime.root to another"
    yield Finding("files", state, text, advice)


def _locks(path: Path) -> Finding | None:
    """None where a lock keeps a second holder out."""
    with path.open("w") as one, path.open("w") as two:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = "set runtime.root to another file system, or mount this one with locks"
            return Finding("files", "fatal", f"files can't be locked ({error.strerror})", advice)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return Finding("files", "wrong", "a lock keeps no one out", "never start two runs in this runtime.root at once")


def _writes_directly(path: Path) -> bool:
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except (OSError, AttributeError):  # tmpfs of old kernels; systems without
        return False
    try:
        return os.write(number, mmap.mmap(-1, mmap.PAGESIZE)) == mmap.PAGESIZE
    except OSError:
        return False
    finally:
        os.close(number)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def hub(cfg: Config) -> Iterator[Finding]:
    """The Hub of this process's environment, and the login."""
    from huggingface_hub import constants, get_token

    yield from hub_at(constants.ENDPOINT, get_token, constants.HF_HUB_OFFLINE)


def hub_at(endpoint: str, get_token: Callable[[], str | None], offline: bool) -> Iterator[Finding]:
    """Whether the Hub at `endpoint` answers, and whose the token is; it is shown nowhere and sent to no other place."""
    found: dict[str, Any] = {}

    def ask() -> None:
        found["token"] = get_token()
        if not offline:
            found["status"], found["who"] = _whoami(endpoint, found["token"])

    asking = threading.Thread(target=ask, daemon=True)  # a look-up of a name has no time limit of its own
    asking.start()
    asking.join(2 * SECONDS)
    status = found.get("status", 0)
    if offline:
        yield Finding("network", "ok", "HF_HUB_OFFLINE is set: models and data come from folders and the cache")
    elif status:
        yield Finding("network", "ok", f"{endpoint} answers")
    else:
        advice = "none needed: folders work offline; for the Hub look at the connection, HTTPS_PROXY, HF_ENDPOINT"
        yield Finding("network", "note", f"{endpoint} does not answer", advice)
    yield _login(found.get("token"), status, found.get("who", {}))


def _login(token: str | None, status: int, who: dict[str, Any]) -> Finding:
    if token is None:
        return Finding("login", "note", "no token of the Hub", "only to publish or for private models: hf auth login")
    if status == 0:
        return Finding("login", "ok", "a token of the Hub is there; whose it is can't be asked now")
    if status in (401, 403):
        return Finding("login", "wrong", f"the Hub refuses the token ({status})", "log in again: hf auth login")
    if status != 200:
        return Finding("login", "note", f"the Hub says {status} to who this is", "try again later")
    role = who.get("auth", {}).get("accessToken", {}).get("role", "unknown")
    text = f"{who.get('name')}, by a token of role {role}"
    if role == "read":
        advice = "to publish, make a token that may write and log in with it: hf auth login"
        return Finding("login", "note", text, advice)
    return Finding("login", "ok", text)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the token is for the Hub alone."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _whoami(endpoint: str, token: str | None) -> tuple[int, dict[str, Any]]:
    """(HTTP status, the answer) of who the token's owner is; status 0 where nothing answers."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        request = urllib.request.Request(f"{endpoint}/api/whoami-v2", headers=headers)
        with urllib.request.build_opener(_Stay).open(request, timeout=SECONDS) as reply:
            found = json.loads(reply.read(1 << 20))
            return reply.status, found if isinstance(found, dict) else {}
    except urllib.error.HTTPError as error:
        return error.code, {}
    except (OSError, ValueError):  # no name, no route, no time; no address, no JSON
        return 0, {}
