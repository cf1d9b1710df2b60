"""Checkpoints: a stock model folder, optimizer tensors by parameter name, a few integers; safetensors and JSON alone.

checkpoints/step-00000500/
    model/                  from_pretrained loads it
    optimizer.safetensors   `parameter//state` tensors
    state.json              step, tokens, where the record ends, where the run ran
    manifest.json           written last; every file's sha256, the run it belongs to

A checkpoint is copied out of the way of training and written beside it, into a `.partial` folder under a name of its
own; one rename makes it visible. So a visible one is whole, whenever the process or the machine stops. Only then are
older ones deleted, by their step; nothing is touched that isn't a checkpoint of this run.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.data.tokenizer import save as save_tokenizer
from bertpipe.errors import ArtifactError, StorageError
from bertpipe.model import encoders
from bertpipe.train import checkpoint_files as files
from bertpipe.train import tensor_file
from bertpipe.train.optim import Optimizer

FEWEST = 2  # checkpoints that are always kept: the newest might be damaged
VISIBLE = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(r"step-\d{8,}(\.[0-9a-f]{8})?" + re.escape(artifact.PARTIAL))


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A stock folder with its tokenizer, readable by the group (transformers writes weights with mode 0600)."""
    encoders.save(model, folder)
    save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def identify(cfg: Config, inputs: dict[str, Path]) -> str:
    """What a run's checkpoints are known by: a digest of its recipe and of the artifacts it reads."""
    sections = {"model": {"init"}, "masking": set(), "optim": set(), "train": {"extend_from"}}
    recipe = {name: getattr(cfg, name).model_dump(mode="json", exclude=out) for name, out in sections.items()}
    parents = {name: artifact.read_manifest(path)["fingerprint"] for name, path in inputs.items()}
    return artifact.digest({"recipe": recipe, "parents": parents})[:16]


@dataclass
class _Snapshot:
    """What is written, copied: training goes on with the originals."""

    step: int
    model: Any
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def bytes(self) -> int:
        return _size(self.weights) + _size(self.optimizer)


class Checkpoints:
    """The checkpoints of one run; one process writes, every process reads.

    `run` says whose they are: those of another run are refused. "" reads any. `failures` is how many saves in a row
    may fail for want of room before training stops.
    """

    def __init__(self, folder: Path, keep: int, tokenizer: Any, failures: int = 0, run: str = ""):
        self.folder, self.keep, self.tokenizer = folder, max(FEWEST, keep), tokenizer
        self.failures, self.run = failures, run
        self.damaged: set[str] = set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed = 0
        self._tokenizer_files: dict[str, bytes] = {}

    def save(self, step: int, model: Any, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Copy everything and write it in a thread; waits for the write before, and raises what went wrong in it."""
        self.wait()
        snapshot = _Snapshot(
            step,
            encoders.stock_copy(model),
            copy_tensors(model.state_dict()),
            copy_tensors(optimizer.state()),
            copy.deepcopy(state) | {"step": step},
        )
        # No daemon: an interpreter that ends first writes to the end.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong since the last call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, snapshot: _Snapshot) -> None:
        target = self.folder / f"step-{snapshot.step:08d}"
        try:
            self._try(self.clean)
            self._commit(target, snapshot)
            self._failed = 0
            self._try(self._prune)
        except (OSError, StorageError) as error:  # a full disk, a quota, a broken one
            self._failed += 1
            message = f"{target}: not written: {error}; a checkpoint takes {snapshot.bytes:,} bytes, "
            message += f"{_free(self.folder)} are free"
            if self._failed > self.failures:
                self._error = ArtifactError(message)
            else:
                _say(f"{message} (failure {self._failed} of {self.failures} allowed)")
        except Exception as error:  # raised by `wait`, in the thread that trains
            self._error = error

    @staticmethod
    def _try(delete: Callable[[], None]) -> None:
        """Room that isn't made now is made the next time; no reason to stop."""
        try:
            delete()
        except OSError as error:
            _say(f"an old one is not deleted: {error}")

    def _commit(self, target: Path, snapshot: _Snapshot) -> None:
        started = time.monotonic()
        fresh = not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            artifact.fsync(self.folder.parent)
        if target.exists() and not files.problems(target):
            self._refuse_foreign(target)
            return  # written before, by a run with these very steps
        scratch = files.scratch_of(target)
        try:
            self._write_model_files(snapshot.model, scratch / "model")
            hashes = {
                files.MODEL: self._write_weights(snapshot, scratch / files.MODEL),
                files.OPTIMIZER: tensor_file.write(scratch / files.OPTIMIZER, snapshot.optimizer),
            }
            state = json.dumps(snapshot.state, indent=2, ensure_ascii=False, allow_nan=False)
            files.write_text(scratch / files.STATE, state + "\n")
            files.seal(scratch, snapshot.step, self.run, time.monotonic() - started, hashes)
            self._set_aside(target)
            files.publish(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self.damaged.discard(target.name)

    def _write_model_files(self, model: Any, folder: Path) -> None:
        """As `save_model`, but for the weights; the tokenizer, which is always the same, is rendered once."""
        folder.mkdir(parents=True)
        if not self._tokenizer_files:
            save_tokenizer(self.tokenizer, folder)
            self._tokenizer_files = {path.name: path.read_bytes() for path in folder.iterdir()}
        else:
            for name, content in self._tokenizer_files.items():
                (folder / name).write_bytes(content)
        model.save_pretrained(folder, state_dict={})
        for path in folder.iterdir():
            path.chmod(0o644)

    @staticmethod
    def _write_weights(snapshot: _Snapshot, path: Path) -> str:
        """As save_pretrained(save_original_format=False): names as in memory (never "gamma"), tied ones once."""
        weights = remove_tied_weights_from_state_dict(dict(snapshot.weights), snapshot.model)
        return tensor_file.write(path, weights, {"format": "pt"})

    def _set_aside(self, target: Path) -> None:
        """Make way for a checkpoint whose damaged predecessor still stands; kept if it can't be told to be ours."""
        if not target.exists():
            return
        if self._is_ours(target):
            files.remove([target])
        else:
            kept = target.rename(target.with_name(f"damaged-{files.scratch_of(target).stem}"))
            _say(f"the damaged {target} is now {kept}; delete it when you like")

    def _is_ours(self, path: Path) -> bool:
        """Whether a manifest can be read, is a checkpoint's of this run and step, and lists all that lies there."""
        try:
            manifest = files.read_manifest(path)
        except (ArtifactError, OSError):
            return False
        if manifest.get("kind") != files.KIND or manifest.get("run", self.run) != self.run:
            return False
        there = {file.relative_to(path).as_posix() for file in artifact.list_files(path)}
        return path.name == f"step-{manifest['counts']['step']:08d}" and there <= manifest["files"].keys()

    def _refuse_foreign(self, path: Path) -> None:
        manifest = files.read_manifest(path)
        if manifest.get("kind") != files.KIND or self.run not in ("", manifest.get("run", self.run)):
            raise ArtifactError(f"{path}: belongs to another run; move it out of {self.folder}")

    def _prune(self) -> None:
        """Delete this run's checkpoints that are older than the newest `keep` whole ones."""
        ours = [path for path in self.steps() if self._is_ours(path)]
        whole = [path for path in ours if path.name not in self.damaged]
        if len(whole) > self.keep:
            files.remove(ours[: ours.index(whole[-self.keep])])

    def clean(self) -> None:
        """Delete what interrupted writes and deletions left behind."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_room(self, model: Any, optimizer: Optimizer) -> None:
        """ArtifactError unless the disk has room for all checkpoints to be kept and the one being written.

        Clears what an interrupted write left, so call it before the first step, in the process that writes.
        """
        from bertpipe.train.estimate import optimizer_bytes

        self.clean()
        self.folder.mkdir(parents=True, exist_ok=True)
        each = _size(model.state_dict()) + (_size(optimizer.state()) or optimizer_bytes(model, optimizer.recipe))
        needed = max(1, self.keep + 1 - len(self.steps())) * each
        if not _has_room(self.folder, needed):
            raise ArtifactError(
                f"{self.folder}: too little room for checkpoints: {self.keep + 1} of {each:,} bytes each need "
                f"{needed:,} bytes more, {_free(self.folder)} are free; make room, or point runtime.root elsewhere"
            )

    def _visible(self) -> list[Path]:
        """Folders with a checkpoint's name, by step."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        found = [(int(name[1]), path) for path in there if (name := VISIBLE.fullmatch(path.name)) and path.is_dir()]
        return [path for _, path in sorted(found)]

    def steps(self) -> list[Path]:
        """Committed checkpoints, oldest first by step."""
        return [path for path in self._visible() if artifact.is_complete(path)]

    def last_step(self) -> int:
        """Step of the newest committed checkpoint, whole or not; 0 when there is none."""
        return max([int(path.name.removeprefix("step-")) for path in self.steps()], default=0)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; a damaged one is said aloud and passed over. None: there is none yet.

        ArtifactError when all are damaged, and for one of another run.
        """
        passed: list[str] = []
        for path in reversed(self._visible()):
            problems = files.problems(path)
            if not problems:
                self._refuse_foreign(path)
                return path
            for problem in problems:
                print(f"checkpoint passed over: {problem}", file=sys.stderr)
            self.damaged.add(path.name)
            passed += problems[:1]
        if passed:
            raise ArtifactError(
                f"{self.folder}: no checkpoint there is whole ({'; '.join(passed)}); put a whole copy in place, or "
                "delete the folder to train from step 0"
            )
        return None

    @staticmethod
    def restore(path: Path, model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Load weights and optimizer in place; returns the state. ArtifactError for tensors that don't fit."""
        return files.load(path, model, optimizer)


def _say(message: str) -> None:
    """To stderr, which may be a file on the very disk that is full."""
    with contextlib.suppress(OSError):
        print(f"checkpoint: {message}", file=sys.stderr, flush=True)


def copy_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU; what shared its memory shares it still, so that tied weights are known as such."""
    copies: dict[Any, torch.Tensor] = {}
    copied = {}
    for name, tensor in tensors.items():
        key = (
            (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        )
        if key not in copies:
            copies[key] = tensor.detach().contiguous().to("cpu", copy=True)
        copied[name] = copies[key]
    return copied


def _size(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of tensors, tied ones once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors.values()}.values())


def _free(folder: Path) -> str:
    """Free bytes of the disk that `folder` is or will be on, in words."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        return f"{shutil.disk_usage(there).free:,}"
    except OSError as error:
        return f"an unknown number ({error})"


def _has_room(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes can be had, which under a quota is less than what is free; the bytes aren't written."""
    if shutil.disk_usage(folder).free < needed:
        return False
    dummy = files.scratch_of(folder / f"step-{0:08d}")
    try:
        with dummy.open("wb") as file:
            error = _allocate(file.fileno(), needed)
    finally:
        dummy.unlink(missing_ok=True)
    return error not in (errno.ENOSPC, errno.EDQUOT)


def _allocate(descriptor: int, size: int) -> int:
    """fallocate(2), which has no slow emulation as posix_fallocate has; the error's number, 0 for none."""
    try:
        allocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return errno.ENOSYS
    if allocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size)) == 0:
        return 0
    return ctypes.get_errno()
