"""Progress of a training loop: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bertpipe.train.tracking import Speed

PLAIN_SECONDS = 30.0  # between progress lines where there is no terminal


class Bar:
    """Progress of the main process: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, description: str, steps: int, start: int, shown: bool):
        self.description, self.steps, self.shown = description, steps, shown
        console = Console(stderr=True)
        self.terminal = self.shown and console.is_terminal
        self.said, self.start = time.monotonic(), start
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.terminal,
        )
        self.task = self.bar.add_task(description, total=steps, completed=start, figures="")

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def update(self, step: int, line: dict[str, Any], speed: Speed) -> None:
        """Show a finished step."""
        if not self.shown:
            return
        share = speed.waited / max(1e-9, time.monotonic() - speed.last) if speed.tokens else 0.0
        loss = f"loss {line['loss']:.3f}" if "loss" in line else "skipped"
        figures = f"{loss}  {speed.tokens_per_second:,.0f} tokens/s  data wait {share:.0%}"
        if speed.mfu is not None:
            figures += f"  MFU {speed.mfu:.0%}"
        if self.terminal:
            self.bar.update(self.task, completed=step, figures=figures)
        elif time.monotonic() - self.said > PLAIN_SECONDS:
            self.said = time.monotonic()
            left = (speed.seconds - speed.before) / max(1, step - self.start) * (self.steps - step)
            print(f"{self.description}: step {step}/{self.steps}  {figures}  {left:.0f} s left", file=sys.stderr)

    def say(self, step: int, text: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            self.bar.console.print(f"{self.description}: step {step}  {text}", highlight=False, soft_wrap=True)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Show an evaluation."""
        text = "  ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {v:.4g}" for k, v in figures.items())
        self.say(step, f"hold-out: {text}")
