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

from common import Data, machine, measured_run, prepare, real_data, spread, write_result

from bertpipe.artifact import list_files
from bertpipe.config import ModelConfig, RuntimeConfig
from bertpipe.train import loop, pretrain

EVERY_SECONDS = 300.0  # between two checkpoints, for the share


class EnoughError(Exception):
    """All rounds are measured."""


class Windows:
    """A StepSource that times windows of steps and saves at the beginning of some."""

    def __init__(self, source: Any, save: Any, wait: Any, options: argparse.Namespace):
        self.source, self.save, self.wait, self.options = source, save, wait, options
        self.begun, self.saving = 0.0, False
        self.copied = list[float]()
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def slots(self, step: int, first: int, last: int) -> list[Any]:
        """The batch of a step; whatever came before it is finished."""
        if step == 1:
            self.save(step)
            self.wait()
        window, within = divmod(step - self.options.warmup, self.options.steps)
        if window >= 0 and within == 0:
            self.turn(step, window)
        return self.source.slots(step, first, last)

    def turn(self, step: int, window: int) -> None:
        """End a window, begin the next."""
        if window > 0:
            self.wait()  # the write is part of the window it began in
            self.seconds[self.saving].append(time.perf_counter() - self.begun)
            if window % 2 == 0:
                print(f"  round {window // 2}/{self.options.rounds}: {self.last_cost():+.2f} s", flush=True)
        if window == 2 * self.options.rounds:
            raise EnoughError
        self.saving = window % 4 in (0, 3)
        self.begun = time.perf_counter()
        if self.saving:
            self.save(step)
            self.copied.append(time.perf_counter() - self.begun)

    def last_cost(self) -> float:
        """Seconds, of the last pair."""
        return self.seconds[True][-1] - self.seconds[False][-1]


def measure(options: argparse.Namespace, data: Data, work: Path) -> dict[str, Any]:
    """The windows' seconds and what follows from them."""
    cfg = measured_run(
        ModelConfig(preset=options.preset),
        options.tokens_per_step,
        RuntimeConfig(root=str(work), threads=options.threads, device="cpu"),
        steps=options.warmup + 2 * options.rounds * options.steps + 1,
        sequence_length=options.length,
        slot_tokens=options.slot_tokens,
    )
    fit, windows, written, facts = loop.fit, list[Windows](), list[float](), dict[str, Any]()

    def timed(objective: Any, source: Any, optimizer: Any, settings: Any, place: Any, record: Any, *rest: Any) -> Any:
        checkpoints = rest[1]
        write = checkpoints._write

        def watched(snapshot: Any) -> None:
            started = time.perf_counter()
            write(snapshot)
            written.append(time.perf_counter() - started)

        def save(step: int) -> None:
            state = {"tokens": 0, "seconds": 0.0, "positions": record.positions(), "place": place.facts()}
            checkpoints.save(step, objective.model, optimizer, state)

        checkpoints._write = watched
        windows.append(Windows(source, save, checkpoints.wait, options))
        try:
            return fit(objective, windows[0], optimizer, settings, place, record)
        finally:
            checkpoints.wait()
            facts["bytes"] = sum(path.stat().st_size for path in list_files(checkpoints.steps()[-1]))
            facts["place"] = place.facts()

    loop.fit = timed
    try:
        pretrain.run(cfg, {"tokenizer": data.tokenizer, "shards": data.shards}, work / "run", {})
    except EnoughError:
        pass
    finally:
        loop.fit = fit
    seconds = windows[0].seconds
    cost = [saving - plain for saving, plain in zip(seconds[True], seconds[False], strict=True)]
    median = spread(cost)["median"]
    return facts | {
        "share_every_5_minutes": median / EVERY_SECONDS,
        "cost_seconds": spread(cost),
        "window_seconds_without": spread(seconds[False]),
        "window_seconds_with": spread(seconds[True]),
        "copy_seconds": spread(windows[0].copied),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bert-base")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--slot-tokens", type=int, default=1024)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of windows")
    parser.add_argument("--steps", type=int, default=5, help="steps of a window")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first window")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--characters", type=int, default=2_000_000)
    parser.add_argument("--vocab-size", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="bert-tiny, small steps, 2 rounds")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file instead of results/")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.length, options.slot_tokens, options.tokens_per_step = "bert-tiny", 32, 256, 512
        options.rounds, options.characters, options.vocab_size = 2, 600_000, 300
    before = machine()
    with tempfile.TemporaryDirectory(prefix="bertpipe-") as folder:
        data = prepare(Path(folder) / "data", real_data(), options.characters, options.vocab_size)
        facts = measure(options, data, Path(folder))
    show(facts)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write_result("checkpoint_cost", before, {"source": data.source, "settings": settings} | facts, options.out)


if __name__ == "__main__":
    main()
