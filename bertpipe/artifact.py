"""What a stage leaves behind: a folder whose manifest.json is written last, named by its recipe.

    {root}/{stage}-{fingerprint[:12]}/            complete: present means whole
    {root}/{stage}-{fingerprint[:12]}.partial/    work in progress, continued by a rerun

The same write-then-rename (`committing`) makes the units inside a long stage: an input file, a checkpoint, a
task x seed. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from bertpipe import __version__
from bertpipe.errors import ArtifactError, BertpipeError, StorageError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
LOCK = ".lock"
RECIPE = "recipe.json"  # in a `.partial` folder: whose work it is
TEMPORARY = ".tmp"
SCHEMA = 1
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there or have the quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "check the disk",
}
"""What to do where the disk doesn't take what is written."""


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(stage: str, version: int, settings: dict, parents: dict[str, str], raw: dict | None = None) -> str:
    """Identity of an artifact: its recipe, its parents' fingerprints and the content identity of its raw inputs."""
    return digest({"stage": stage, "version": version, "settings": settings, "parents": parents, "raw": raw or {}})


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify_files(paths: Iterable[Path], cache: Path | None = None) -> list[dict]:
    """Content identity of input files: name, bytes and sha256 of each, in the order given.

    `cache` (a JSON file) remembers hashes by path, size, modification time and inode, so that a plan over many
    gigabytes answers at once; deleting it costs only the time to hash again.
    """
    known: dict[str, str] = {}
    if cache is not None and cache.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            known = json.loads(cache.read_text())
    rows, fresh = [], dict(known)
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        sha256 = fresh.get(key) or hash_file(path)
        fresh[key] = sha256
        rows.append({"name": path.name, "bytes": stat.st_size, "sha256": sha256})
    if cache is not None and fresh != known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, fresh)
    return rows


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old or the new whole, even after a power cut."""
    data = (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()
    with writing(path, len(data)), replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fsync(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that takes its place if the body succeeds, and is removed if it fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, which must not be there, that takes its name if the body succeeds, and is
    removed if it fails."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{TEMPORARY}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Make a full or failing disk a StorageError of one line: the path, the bytes `needed` and free, what to do.

    The innermost one speaks. `path` is the file or folder that the body writes; its folder need not exist yet.
    """
    try:
        yield
    except Exception as error:
        number = storage_errno(error)
        if number is None:
            raise
        place = str(getattr(error, "filename", None) or path)
        raise StorageError(f"{place}: {storage_fault(number, Path(place), needed)}") from None


def storage_errno(error: BaseException) -> int | None:
    """The error number, one of REMEDIES, where `error` is a full or failing disk not yet put in words; else None.

    Not every library passes it on: NumPy's `tofile` says how much it could not write, those in Rust write a text.
    """
    if isinstance(error, BertpipeError):
        return None
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    elif number is None and isinstance(error, OSError) and re.search(r"^\d+ requested and \d+ written", str(error)):
        number = errno.ENOSPC
    return number if number in REMEDIES else None


def storage_fault(number: int, path: Path, needed: int | None = None) -> str:
    """What is wrong, how many bytes are `needed` and free where `path` lies, and what to do."""
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    sizes = f"{shutil.disk_usage(there).free:,} bytes free"
    if needed is not None:
        sizes = f"{needed:,} bytes to write, {sizes}"
    return f"{os.strerror(number)} ({sizes}); {REMEDIES[number]} and run the command again: what is finished stays"


def is_complete(folder: Path) -> bool:
    """Whether a published artifact or unit stands at `folder`."""
    return (folder / MANIFEST).is_file() and not folder.name.endswith(PARTIAL)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`; ArtifactError when there is none or it can't be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder}: no {MANIFEST} here, so this is no complete artifact") from None
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST}: not readable as JSON ({error}); delete the folder, rerun") from None
    files = manifest.get("files", {}) if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(f, dict) and {"bytes", "sha256"} <= set(f) for f in files.values()
    ):
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest of ours; delete the folder, rerun")
    return manifest


def read_recipe(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, or where it is unfinished what its manifest will begin with; ArtifactError else."""
    path = folder / RECIPE
    if (folder / MANIFEST).is_file() or not path.is_file():
        return read_manifest(folder)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error}); run the stage again") from None


def list_files(folder: Path) -> list[Path]:
    """Every file below `folder` that a manifest lists, sorted by relative path."""
    own = {MANIFEST, LOCK}
    return sorted(path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in own)


def verify(folder: Path) -> list[str]:
    """Re-hash every file against the manifest. Returns one line a difference; empty means intact.

    Nothing outside `folder` is looked at, whatever the manifest names and whatever links lie there.
    """
    listed = read_manifest(folder).get("files", {})
    problems = _clashes(folder, listed)
    for name, expected in listed.items():
        path = folder / name
        if wrong := _uncontained(folder, name):
            problems.append(f"{folder / MANIFEST}: {name!r} {wrong}")
        elif not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        elif hash_file(path) != expected["sha256"]:
            problems.append(f"{path}: content differs from the manifest's sha256")
    present = {str(path.relative_to(folder)) for path in list_files(folder)}
    problems += [f"{folder / name}: not in the manifest" for name in sorted(present - set(listed))]
    return problems


def _uncontained(folder: Path, name: str) -> str | None:
    """Why a name in a manifest is none of a file of ours below `folder`, if so; links count as outside."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        return "is no path below the folder"
    steps = [folder.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    return "is a link, or lies behind one" if any(step.is_symlink() for step in steps) else None


def _clashes(folder: Path, names: Iterable[str]) -> list[str]:
    """A line for each name that is another one on a file system that takes A for a."""
    seen: dict[str, str] = {}
    first = [(name, seen.setdefault(name.casefold(), name)) for name in names]
    return [
        f"{folder / MANIFEST}: {name!r} and {other!r} differ in case alone" for name, other in first if name != other
    ]


@contextlib.contextmanager
def committing(folder: Path, **facts: Any) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (scratch folder, counts); publish the scratch as `folder` only if the body succeeds.

    Whatever the body puts into `counts` goes into the manifest with `facts`, every file's bytes and sha256, the code
    version, the environment and the wall seconds. Files and folders are flushed, the manifest last, then one rename
    publishes. If the body fails, the scratch (`folder` + ".partial") stays for a rerun to continue; a full disk is a
    StorageError.
    """
    scratch = folder.with_name(folder.name + PARTIAL)
    started = time.monotonic()
    counts: dict[str, Any] = {}
    with writing(scratch), _locked(scratch):
        if is_complete(folder):
            discard(scratch)
            raise ArtifactError(f"{folder}: another process has just finished it; run the command again")
        for leftover in scratch.rglob(f".*{TEMPORARY}"):  # of a process that was killed
            leftover.unlink()
        yield scratch, counts
        files = {}
        for path in list_files(scratch):
            fsync(path)
            files[str(path.relative_to(scratch))] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(scratch.rglob("*")):
            if path.is_dir():
                fsync(path)
        write_json(
            scratch / MANIFEST,
            {
                "schema": SCHEMA,
                **facts,
                "counts": counts,
                "wall_seconds": round(time.monotonic() - started, 1),
                "code_version": __version__,
                "environment": environment(),
                "files": files,
            },
        )
        (scratch / LOCK).unlink()
        scratch.replace(folder)
    fsync(folder.parent)


def is_at_work(scratch: Path) -> bool:
    """Whether the process that took `scratch` last, on this machine, still runs. Its lock is left alone, for to try it
    would be to hold it.
    """
    try:
        pid, _, host = (scratch / LOCK).read_text().strip().partition(" on ")
        if host != socket.gethostname():
            return False
        os.kill(int(pid.rpartition(" ")[2]), 0)
    except PermissionError:  # somebody else's
        return True
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Hold `scratch`/.lock for this process; the kernel lets go of it however the process ends."""
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ArtifactError(f"{scratch}: in use by {holder}; wait for it or stop it") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def discard(folder: Path) -> None:
    """Remove a folder of ours, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def clear(scratch: Path) -> None:
    """Empty a scratch folder that this process holds."""
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def identify_model(name: str, cache: Path | None) -> Any:
    """Content identity of a checkpoint folder; a Hub id stands for itself."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    kinds = (".json", ".safetensors", ".txt", ".model")
    return identify_files(sorted(path for path in folder.iterdir() if path.suffix in kinds), cache)


def processor() -> str:
    """The CPU's own name where Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what results depend on, as recorded in every manifest; read once, for that takes long enough to hold
    up a thread that trains.
    """
    names = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "pyarrow", "sentencex")
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["processor"] = f"{processor()}, {os.cpu_count()} cores"
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
