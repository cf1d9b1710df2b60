"""The bytes of one checkpoint folder: sealed by a manifest, moved by one rename, read with suspicion.

`seal` sees to it that every file and folder is flushed, then writes manifest.json with each file's sha256 and, last, a
digest of itself, so that no bit of the folder can change unseen. `problems` and `load` take a folder to be anything at
all: whatever is wrong with it is a line or an ArtifactError, and nothing large is read before its size has been
compared.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model

from bertpipe import __version__, artifact
from bertpipe.errors import ArtifactError
from bertpipe.train.optim import Optimizer
from bertpipe.train.tensor_file import DTYPES

KIND = "checkpoint"
MODEL, OPTIMIZER, STATE = "model/model.safetensors", "optimizer.safetensors", "state.json"
MOST_JSON = 1 << 20  # bytes of a manifest or state; parsed, JSON takes up to some fifty times its size
MOST_HEADER = 1 << 22  # bytes; ten thousand tensors take two million


def scratch_of(target: Path) -> Path:
    """A name beside `target` that nobody else takes, and that marks what lies there as unfinished or thrown away."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{artifact.PARTIAL}")


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seal(folder: Path, step: int, run: str, wall_seconds: float, flushed: dict[str, str], **facts: Any) -> None:
    """Flush all that lies in `folder`, then its manifest. `flushed`: the sha256 of the files that are already."""
    files = {}
    for path in artifact.list_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in flushed:
            artifact.fsync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": flushed.get(name) or artifact.hash_file(path)}
    body = {
        "schema": artifact.SCHEMA,
        "kind": KIND,
        "run": run,
        **facts,
        "counts": {"step": step},
        "wall_seconds": round(wall_seconds, 1),
        "code_version": __version__,
        "environment": artifact.environment(),
        "files": files,
    }
    write_text(folder / artifact.MANIFEST, _render(body | {"digest": artifact.digest(body)}))
    for path in (*(path for path in sorted(folder.rglob("*")) if path.is_dir()), folder):
        artifact.fsync(path)


def publish(scratch: Path, target: Path) -> None:
    """Make a sealed folder visible under its name, for good."""
    scratch.rename(target)
    artifact.fsync(target.parent)


def remove(folders: list[Path]) -> None:
    """Delete checkpoints: out of sight first, so that a half deleted one is never seen."""
    hidden = [folder.rename(scratch_of(folder)) for folder in folders]
    if hidden:
        artifact.fsync(hidden[0].parent)
    for folder in hidden:
        shutil.rmtree(folder)


def adopt(source: Path, folder: Path, run: str) -> Path:
    """Copy the whole checkpoint `source` of another run into `folder` as one of `run`; returns the copy."""
    manifest = read_manifest(source)
    target = folder / source.name
    folder.mkdir(parents=True, exist_ok=True)
    artifact.fsync(folder.parent)
    scratch = scratch_of(target)
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(artifact.MANIFEST))
    seal(scratch, manifest["counts"]["step"], run, 0.0, {}, adopted_from=manifest.get("run", ""))
    publish(scratch, target)
    return target


def _render(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not readable as JSON of a table, but of a {type(value).__name__}")
    return value


def _read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A small JSON file's bytes and its table."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing")
    if path.stat().st_size > MOST_JSON:
        raise ArtifactError(f"{path}: {path.stat().st_size} bytes, where at most {MOST_JSON} are ever written")
    content = path.read_bytes()
    return content, _parse(path, content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint as it was written; ArtifactError for any other.

    One without `run` and `digest` was written before there were any, and is taken as it is.
    """
    path = folder / artifact.MANIFEST
    content, manifest = _read_json(path)
    body = {key: value for key, value in manifest.items() if key != "digest"}
    legacy = "run" not in manifest and "digest" not in manifest
    same = artifact.digest(body) == manifest.get("digest") and _render(manifest).encode(errors="replace") == content
    if not legacy and not same:
        raise ArtifactError(f"{path}: content differs from its own digest")
    files, counts = manifest.get("files"), manifest.get("counts")
    if not isinstance(files, dict) or not isinstance(counts, dict) or not _is_count(counts.get("step")):
        raise ArtifactError(f"{path}: no list of files or no step in it")
    for name, facts in files.items():
        inside = name and "\0" not in name and not {"..", "/"} & set(PurePosixPath(name).parts)
        if not inside or not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ArtifactError(f"{path}: {name!r} is no file of a checkpoint")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; nothing when it is whole."""
    try:
        manifest = read_manifest(folder)
        step = manifest["counts"]["step"]
        if folder.name != f"step-{step:08d}":
            return [f"{folder}: its manifest is of step {step}"]
        return artifact.verify(folder)
    except ArtifactError as error:
        return [str(error)]
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return [f"{folder}: not readable ({error})"]


def _read_header(path: Path) -> dict[str, tuple[Any, Any]]:
    """(dtype, shape) of each tensor in a safetensors file, as they stand there."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER, path.stat().st_size - 8):
            raise ArtifactError(f"{path}: no safetensors file (a header of {length} bytes)")
        entries = _parse(path, file.read(length))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ArtifactError(f"{path}: tensor {name} is not described")
    return {name: (entry.get("dtype"), entry.get("shape")) for name, entry in entries.items()}


def _check(path: Path, name: str, found: tuple[Any, Any], tensor: torch.Tensor, scalar: bool = False) -> None:
    """ArtifactError unless what a header says of a tensor fits `tensor`; `scalar`: or is a single number."""
    dtype, shape = found
    if shape == list(tensor.shape) and dtype == DTYPES.get(tensor.dtype):
        return
    if scalar and shape == [] and dtype in ("F32", "I64"):
        return
    raise ArtifactError(
        f"{path}: {name} is {dtype} {shape}, the model's is {DTYPES.get(tensor.dtype)} {list(tensor.shape)}"
    )


def _check_model(path: Path, model: torch.nn.Module) -> None:
    """Every tensor of the model once, tied ones under one of their names, nothing else."""
    header, own = _read_header(path), model.state_dict()
    for name, found in header.items():
        if name not in own:
            raise ArtifactError(f"{path}: {name} is no tensor of this model")
        _check(path, name, found, own[name])
    there = {own[name].data_ptr() for name in header}
    for name, tensor in own.items():
        if name not in header and tensor.data_ptr() not in there:
            raise ArtifactError(f"{path}: {name} is missing")


def _check_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Tensors of this optimizer's parameters, shaped like them or single numbers."""
    for name, found in _read_header(path).items():
        parameter, _, key = name.partition("//")
        if parameter not in optimizer.parameters or not key or "//" in key:
            raise ArtifactError(f"{path}: {name} is no tensor of this run's optimizer")
        _check(path, name, found, optimizer.parameters[parameter], scalar=True)


def _read_state(path: Path) -> dict[str, Any]:
    _, state = _read_json(path)
    positions = state.get("positions", {})
    counts = [
        state.get("step"),
        state.get("tokens", 0),
        *(positions.values() if isinstance(positions, dict) else [None]),
    ]
    seconds = state.get("seconds", 0.0)
    good = all(_is_count(count) for count in counts) and isinstance(state.get("place", {}), dict)
    if not good or type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
        raise ArtifactError(f"{path}: not the state of a run")
    return state


def load(folder: Path, model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load weights and optimizer in place; returns the state. ArtifactError when they aren't this model's."""
    state = _read_state(folder / STATE)
    _check_model(folder / MODEL, model)
    _check_optimizer(folder / OPTIMIZER, optimizer)
    path = folder / MODEL
    try:
        load_model(model, path)
        path = folder / OPTIMIZER
        optimizer.load_state(load_file(path))
    except SafetensorError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return state
