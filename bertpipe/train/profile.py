"""A trace of a few training steps, by torch.profiler, and what they cost most.

    profile/trace.json.gz   for https://ui.perfetto.dev or chrome://tracing
    profile/costs.txt       the ten operators with the largest times of their own

Watching changes no result; it costs time, so speed.jsonl is lower where the trace was taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 1  # steps before the profiler starts: allocations, first plans
WARMUP = 1  # steps under the profiler, thrown away
LARGEST = 10


class Trace:
    """Context around a training loop that calls `step` after each step; traces `steps` steps of the first few."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            self.activities.append(ProfilerActivity.CUDA)
        plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARMUP, active=steps, repeat=1)
        self.profiler = profile(activities=self.activities, schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> Trace:
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)

    def step(self) -> None:
        """A training step has ended."""
        self.profiler.step()

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        text = table(profiler.key_averages(), len(self.activities) > 1)
        (self.folder / "costs.txt").write_text(text + "\n")
        print(f"profile: {self.folder}\n{text}", flush=True)


def table(events: Any, cuda: bool) -> str:
    """The operators with the largest self times, on the GPU where there is one: name, times, share, calls."""
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(events, key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in rows) or 1.0
    lines = [f"{'operator':<48}{'CPU ms':>11}" + (f"{'GPU ms':>11}" if cuda else "") + f"{'share':>8}{'calls':>8}"]
    for event in rows[:LARGEST]:
        name = "between operators (Python)" if event.key.startswith("ProfilerStep") else event.key
        line = f"{name[:47]:<48}{event.self_cpu_time_total / 1e3:>11.1f}"
        line += f"{event.self_device_time_total / 1e3:>11.1f}" if cuda else ""
        lines.append(line + f"{getattr(event, key) / total:>8.1%}{event.count:>8}")
    return "\n".join(lines)
