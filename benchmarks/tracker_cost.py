"""What do trackers cost the steps beside which they are written?

    python benchmarks/tracker_cost.py          BERT-mini@128, 4 x 10 rounds
    python benchmarks/tracker_cost.py --quick  a toy model; only to see that it runs

The pretrain stage trains on one order without a break; its steps are cut into windows of equal length. In one of each
pair of neighbouring windows, by turns the first and the second, the run's lines go to trackers too, and it ends when
they have taken all of them. `share` is the median of the pairs' differences over the median window without (aim: at
most 0.01); `cpu_share` the same of processor seconds, those of the trackers' own processes included, which a busy
machine disturbs less. In turn: the three real ones together (wandb offline), one that hangs at its first line, one that
takes 10 s for each line, and one that fails. Also measured: how long the run waits for them at its end (aim: at most 30
s), and that metrics.jsonl has every step. Prints a table and writes results/tracker_cost-<date>.json. Text: Wikipedia
of BERTPIPE_DATA, else the installed packages' docstrings. Wants idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from common import (
    Data,
    Windows,
    machine,
    measured_run,
    num_steps,
    prepare,
    pretrain_by,
    real_data,
    spread,
    window_options,
    write_result,
)

from bertpipe.config import ModelConfig, RuntimeConfig
from bertpipe.train import loop
from bertpipe.train.boards import TRACKERS
from bertpipe.train.trackers import Background


class Misbehaved:
    """A tracker that does `deed` at every line."""

    def __init__(self, deed: Callable[[], None]):
        self.deed = deed

    def start(self) -> None:
        """Nothing."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """The deed."""
        self.deed()

    def finish(self) -> None:
        """Nothing."""


def _behind(tracker: Background) -> bool:
    """Whether it is still to record lines that it was given."""
    given = tracker._asked + tracker._again - tracker._refused
    return not tracker._failed and tracker._recorded < given


def _processor_seconds() -> float:
    """Of this process and all that it started."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _hang() -> None:
    threading.Event().wait()


def _late() -> None:
    time.sleep(10)


def _fail() -> None:
    raise ConnectionError("the server is gone")


PATIENCE = 60.0  # seconds for the trackers to take a window's lines
ALL = " + ".join(TRACKERS)
DEEDS: dict[str, Callable[[], None]] = {"hangs": _hang, "10 s a line": _late, "fails": _fail}


def measure(name: str, options: argparse.Namespace, data: Data, work: Path) -> dict[str, Any]:
    """What one row of the table says: `name` is ALL or one of DEEDS."""
    deed = DEEDS.get(name)
    cfg = measured_run(
        ModelConfig(preset=options.preset),
        options.tokens_per_step,
        RuntimeConfig(root=str(work), threads=options.threads, device="cpu", trackers=[] if deed else list(TRACKERS)),
        steps=num_steps(options),
        sequence_length=options.length,
        slot_tokens=options.slot_tokens,
    )
    fit, windows, ended, place_facts = loop.fit, list[Windows](), list[float](), dict[str, Any]()

    def timed(objective: Any, source: Any, optimizer: Any, settings: Any, place: Any, record: Any, *rest: Any) -> Any:
        trackers = [Background(name, Misbehaved(deed))] if deed else list(record.copies)
        record.copies = trackers

        begun: list[tuple[bool, float]] = []

        def listen(step: int, listening: bool) -> None:
            record.copies = trackers if listening else []
            begun.append((listening, _processor_seconds()))

        def taken() -> None:
            until = time.monotonic() + PATIENCE
            while not deed and any(map(_behind, trackers)) and time.monotonic() < until:
                time.sleep(0.01)
            if begun:
                listening, before = begun[-1]
                processor[listening].append(_processor_seconds() - before)

        windows.append(Windows(source, options, listen, taken))
        place_facts.update(place.facts())
        try:
            return fit(objective, windows[0], optimizer, settings, place, record)
        finally:
            record.copies = trackers
            ended.append(time.perf_counter())

    processor: dict[bool, list[float]] = {False: [], True: []}
    pretrain_by(timed, cfg, data, work / "run")
    waited = time.perf_counter() - ended[0]
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "lr" in line]
    cost, plain = spread(windows[0].costs()), spread(windows[0].seconds[False])
    pairs = zip(processor[True], processor[False], strict=True)
    cpu_cost, cpu_plain = spread([a - b for a, b in pairs]), spread(processor[False])
    return {
        "share": cost["median"] / plain["median"],
        "cpu_share": cpu_cost["median"] / cpu_plain["median"],
        "cpu_cost_seconds": cpu_cost,
        "cpu_seconds_without": cpu_plain,
        "cost_seconds": cost,
        "window_seconds_without": plain,
        "window_seconds_with": spread(windows[0].seconds[True]),
        "exit_seconds": waited,
        "steps": len(steps),
        "record_complete": steps == list(range(1, num_steps(options))),
        "place": place_facts,
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table."""
    print("\n| trackers | step time | of a window, s | processor time | waited at the end, s | record |")
    print("|---|---:|---:|---:|---:|---|")
    for name, row in rows.items():
        cost = row["cost_seconds"]
        print(
            f"| {name} | {row['share']:+.2%} | {cost['median']:+.3f} ({cost['min']:+.3f} to {cost['max']:+.3f}) of "
            f"{row['window_seconds_without']['median']:.2f} | {row['cpu_share']:+.2%} | {row['exit_seconds']:.1f} | "
            f"{'complete' if row['record_complete'] else 'INCOMPLETE'}, {row['steps']} steps |"
        )


def main() -> None:
    """Measure, print, write."""
    options = window_options(
        *(__doc__, "bert-mini"),
        {"slot_tokens": 2048, "tokens_per_step": 2048, "steps": 20, "warmup": 10},
        {"slot_tokens": 256, "tokens_per_step": 256},
    )
    os.environ["WANDB_MODE"] = "offline"
    before, rows = machine(), dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="bertpipe-") as folder:
        data = prepare(Path(folder) / "data", real_data(), options.characters, options.vocab_size)
        for number, name in enumerate((ALL, *DEEDS)):
            print(f"{name}:", flush=True)
            rows[name] = measure(name, options, data, Path(folder) / str(number))
    show(rows)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write_result("tracker_cost", before, {"source": data.source, "settings": settings, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
