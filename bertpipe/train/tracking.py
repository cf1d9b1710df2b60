"""The record of a run.

    metrics.jsonl   what the recipe determines: a line a step and a line an evaluation; the same after any resume
    speed.jsonl     what the machine determines: tokens/s, share of time waiting for data, memory, seconds, model
                    FLOPs/s, their share of a matrix product timed here (mfu) and of the card's datasheet

Files are the record; trackers are copies, best effort (trackers.py), under the names that `named` gives.
"""

from __future__ import annotations

import heapq
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bertpipe.data.batches import PackedBatch
from bertpipe.train import trackers
from bertpipe.train.flops import Meter
from bertpipe.train.trackers import Background, Figures


def named(name: str, line: dict[str, Any]) -> Figures:
    """A line of the file `name` as every tracker shows it: its step, its figures as train/..., eval/... and speed/...

    Units are those of the files (docs/artifacts.md); a step that was skipped has train/skipped 1, not the reason.
    """
    figures = {}
    for key, value in line.items():
        group = "speed" if name == "speed" else "eval" if key.startswith("eval_") else "train"
        if key != "step":
            figures[f"{group}/{key.removeprefix('eval_')}"] = 1 if key == "skipped" else value
    return line["step"], figures


class Record:
    """The files of one run, written by its main process only; a no-op elsewhere (`folder` None)."""

    def __init__(self, folder: Path | None, log_every: int = 10, copies: Sequence[Background] = ()):
        self.folder, self.log_every, self.copies = folder, log_every, copies
        self.files = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.files = {name: (folder / f"{name}.jsonl").open("a", 1, "utf-8") for name in ("metrics", "speed")}

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to `metrics` or `speed`; trackers get what `_shows` lets through."""
        if name not in self.files:
            return
        self.files[name].write(json.dumps(line) + "\n")
        if self._shows(name, line):
            for copy in self.copies:
                copy.log(*named(name, line))

    def positions(self) -> dict[str, int]:
        """Bytes written so far, after flushing them to the disk: where a checkpoint's record ends."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    def rewind(self, positions: dict[str, int]) -> None:
        """Cut the files back to `positions`, forgetting what came after a checkpoint; from here on trackers listen."""
        for name, file in self.files.items():
            file.truncate(positions.get(name, 0))
            file.seek(0, os.SEEK_END)
        for copy in self.copies:
            copy.begin(self._past(positions))

    def _shows(self, name: str, line: dict[str, Any]) -> bool:
        """Whether trackers get a line: every `log_every`th step, what is odd, and every evaluation."""
        return name == "speed" or "loss" not in line or "skipped" in line or line["step"] % self.log_every == 0

    def _past(self, positions: dict[str, int]) -> Iterator[Figures]:
        """The files' lines up to `positions`, as trackers get them; read as they are asked for, in another thread."""

        def lines(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
            assert self.folder is not None
            with (self.folder / f"{name}.jsonl").open("rb") as file:
                while file.tell() < positions.get(name, 0):
                    yield name, json.loads(file.readline())

        for name, line in heapq.merge(*map(lines, self.files), key=lambda pair: pair[1]["step"]):
            if self._shows(name, line):
                yield named(name, line)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self.positions()
            for file in self.files.values():
                file.close()
        finally:
            trackers.finish(self.copies)


class Speed:
    """Tokens/s, waiting for data, utilisation and time left, between two readings and over the run."""

    def __init__(self, seconds_before: float = 0.0, meter: Meter | None = None):
        self.before, self.started, self.meter = seconds_before, time.monotonic(), meter
        self.last, self.tokens, self.waited, self.flops = self.started, 0, 0.0, 0.0
        self.all_tokens, self.all_flops, self.paused = 0, 0.0, 0.0

    def pause(self, seconds: float) -> None:
        """Leave time spent on something else (an evaluation) out of the throughput; it stays in `seconds`."""
        self.paused += seconds
        self.last += seconds

    def watch(self, batches: Iterator[tuple[int, list[PackedBatch]]]) -> Iterator[tuple[int, list[PackedBatch]]]:
        """The same batches, their FLOPs counted as they pass, before they go to the device."""
        for step, slots in batches:
            if self.meter is not None:
                flops = self.meter.of(slots)
                self.flops += flops
                self.all_flops += flops
            yield step, slots

    def add(self, tokens: int, waited: float) -> None:
        """Count a step's real tokens and the seconds it waited for data."""
        self.tokens += tokens
        self.all_tokens += tokens
        self.waited += waited

    @property
    def seconds(self) -> float:
        """Training time so far, earlier sittings of the same run counted in."""
        return self.before + time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Over this sitting, evaluations left out."""
        return self.all_tokens / self._trained

    @property
    def mfu(self) -> float | None:
        """Model FLOPs/s over those of the matrix product, over this sitting; None where they aren't metered."""
        return None if self.meter is None else self.all_flops / self._trained / self.meter.matmul

    @property
    def _trained(self) -> float:
        return max(1e-9, time.monotonic() - self.started - self.paused)

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        now = time.monotonic()
        passed = max(1e-9, now - self.last)
        figures = {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / passed, 1),
            "data_wait_share": round(self.waited / passed, 4),
            "memory_bytes": _memory(),
        }
        if self.meter is not None:
            figures |= self.meter.read(self.flops, passed)
        self.last, self.tokens, self.waited, self.flops = now, 0, 0.0, 0.0
        return figures


def _memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
