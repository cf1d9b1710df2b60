"""What does a checkpoint cost the steps beside which it is written?

    python benchmarks/checkpoint_cost.py          BERT-base@128, 10 rounds: about 8 minutes on two cores
    python benchmarks/checkpoint_cost.py --quick  a toy model; only to see that it runs

The pretrain stage trains on one order without a break; its steps are cut into windows of equal length. Of each pair of
neighbouring windows one, by turns the first and the second, begins with a save as the loop makes it and ends when its
files stand on the disk, hashed, flushed, older ones deleted. The difference of a pair's seconds is what the save cost
training; its median over the rounds, divided by 300 s, is `share_every_5_minutes` (aim: 0.005). A save before the first
window warms up. Prints a table and writes results/checkpoint_cost-<date>.json. Text: Wikipedia of BERTPIPE_DATA, else
the installed packages' docstrings. Wants idle cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

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

from bertpipe.artifact import list_files
from bertpipe.config import ModelConfig, RuntimeConfig
from bertpipe.train import loop

EVERY_SECONDS = 300.0  # between two checkpoints, for the share


def measure(options: argparse.Namespace, data: Data, work: Path) -> dict[str, Any]:
    """The windows' seconds and what follows from them."""
    cfg = measured_run(
        ModelConfig(preset=options.preset),
        options.tokens_per_step,
        RuntimeConfig(root=str(work), threads=options.threads, device="cpu"),
        steps=num_steps(options),
        sequence_length=options.length,
        slot_tokens=options.slot_tokens,
    )
    fit, windows, written, copied = loop.fit, list[Windows](), list[float](), list[float]()
    facts: dict[str, Any] = {}

    def timed(objective: Any, source: Any, optimizer: Any, settings: Any, place: Any, record: Any, *rest: Any) -> Any:
        checkpoints = rest[1]
        write = checkpoints._write

        def watched(snapshot: Any) -> None:
            started = time.perf_counter()
            write(snapshot)
            written.append(time.perf_counter() - started)

        def save(step: int, saving: bool) -> None:
            if saving:
                started = time.perf_counter()
                state = {"tokens": 0, "seconds": 0.0, "positions": record.positions(), "place": place.facts()}
                checkpoints.save(step, objective.model, optimizer, state)
                copied.append(time.perf_counter() - started)

        class WarmedUp(Windows):
            def slots(self, step: int, first: int, last: int) -> list[Any]:
                """Saves before the first window too."""
                if step == 1:
                    save(step, True)
                    checkpoints.wait()
                return super().slots(step, first, last)

        checkpoints._write = watched
        windows.append(WarmedUp(source, options, save, checkpoints.wait))  # a write is part of the window it began in
        try:
            return fit(objective, windows[0], optimizer, settings, place, record)
        finally:
            checkpoints.wait()
            facts["bytes"] = sum(path.stat().st_size for path in list_files(checkpoints.steps()[-1]))
            facts["place"] = place.facts()

    pretrain_by(timed, cfg, data, work / "run")
    seconds, cost = windows[0].seconds, windows[0].costs()
    median = spread(cost)["median"]
    return facts | {
        "share_every_5_minutes": median / EVERY_SECONDS,
        "cost_seconds": spread(cost),
        "window_seconds_without": spread(seconds[False]),
        "window_seconds_with": spread(seconds[True]),
        "copy_seconds": spread(copied[1:]),
        "write_seconds": spread(written[1:]),
        "steps_per_window": options.steps,
        "tokens_per_step": options.tokens_per_step,
    }


def show(facts: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{'seconds':<34}{'median':>9}{'min - max':>20}")
    rows = {
        "window without a save": "window_seconds_without",
        "window with one": "window_seconds_with",
        "difference of a pair": "cost_seconds",
        "  copying, training stands still": "copy_seconds",
        "  writing, beside training": "write_seconds",
    }
    for label, name in rows.items():
        figures = facts[name]
        print(f"{label:<34}{figures['median']:>9.3f}{figures['min']:>10.3f} - {figures['max']:<8.3f}")
    print(
        f"\n{facts['bytes']:,} bytes a checkpoint; one each 5 minutes costs {facts['share_every_5_minutes']:.2%} of "
        "the tokens/s (aim: at most 0.5 %)"
    )


def main() -> None:
    """Measure, print, write."""
    options = window_options(
        *(__doc__, "bert-base"),
        {"slot_tokens": 1024, "tokens_per_step": 2048, "steps": 5, "warmup": 4},
        {"slot_tokens": 256, "tokens_per_step": 512},
    )
    before = machine()
    with tempfile.TemporaryDirectory(prefix="bertpipe-") as folder:
        data = prepare(Path(folder) / "data", real_data(), options.characters, options.vocab_size)
        facts = measure(options, data, Path(folder))
    show(facts)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write_result("checkpoint_cost", before, {"source": data.source, "settings": settings} | facts, options.out)


if __name__ == "__main__":
    main()
