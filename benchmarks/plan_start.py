"""How long does it take to the first batch anywhere in ten billion tokens, with the plan file there?

    python benchmarks/plan_start.py [--tokens N] [--starts N] [--out FOLDER]

Makes shards of so many tokens in a temporary folder, documents of 500 tokens (offsets 0.3 GB; the token files are
sparse and take no room), and a plan whose rows point to evenly spaced segments of the real windows, as the pass that
makes the true one takes minutes. Then fresh
processes each open the shards and give the slots of one step, drawn at random, as a resumed run does before its first
step; imports are not counted. Prints a table and writes results/plan_start-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import machine, spread, write_result

from bertpipe.data import keyed
from bertpipe.data.order import WINDOW_TOKENS, Order
from bertpipe.data.shards import TokenShards, token_dtype, write_index

SHARD_TOKENS, DOCUMENT, VOCABULARY = 32_000_000, 500, 30_522
SETTINGS = {"seed": 0, "sequence_length": 128, "slot_tokens": 8_192, "slots_per_step": 4}
START = """
import json, sys, time
from pathlib import Path
import numpy, torch

from bertpipe.data.order import Order
from bertpipe.data.shards import TokenShards

folder, step, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
times = [time.perf_counter()]
shards = TokenShards(folder, "train")
times.append(time.perf_counter())
order = Order(shards, plans=folder / "plans", **settings)
slots = order.slots(step)
times.append(time.perf_counter())
tokens = [shards.tokens(int(p.shard[0]))[p.start[0] : p.start[0] + p.length[0]].sum() for p in slots]
print(json.dumps([b - a for a, b in zip(times, times[1:])] + [times[-1] - times[0]]))
"""


def write_shards(folder: Path, tokens: int) -> TokenShards:
    """Shards of `tokens` tokens in all, the token files sparse."""
    (folder / "train").mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, tokens, SHARD_TOKENS)):
        size = min(SHARD_TOKENS, tokens - first)
        path = folder / "train" / f"tokens-{number:05d}.npy"
        np.lib.format.open_memmap(path, "w+", token_dtype(VOCABULARY), (size,))
        offsets = np.append(np.arange(0, size, DOCUMENT), size)
        for name in ("documents", "sentences"):
            np.save(folder / "train" / f"{name}-{number:05d}.npy", offsets)
        shards.append({"tokens": size, "documents": len(offsets) - 1, "sentences": len(offsets) - 1})
    np.save(folder / "train" / "unigrams.npy", np.zeros(VOCABULARY, np.int64))
    special = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    write_index(folder, {"train": {"shards": shards}}, np.zeros(VOCABULARY, bool), special, list(special.values()))
    return TokenShards(folder, "train")


def write_plan(folder: Path, shards: TokenShards) -> int:
    """A plan of the first epoch; returns its steps. Segments are counted, not shuffled, as that takes no windows."""
    order = Order(shards, **SETTINGS)
    longest = SETTINGS["sequence_length"] - 2
    rows = []
    for window, group in enumerate(order._group_shards(0)):
        sizes = [np.diff(np.asarray(shards.documents(int(shard)))) for shard in group]
        segments = sum(int((-(-size // longest)).sum()) for size in sizes)
        steps = sum(int(size.sum()) for size in sizes) // (SETTINGS["slot_tokens"] * SETTINGS["slots_per_step"])
        first = np.arange(steps) * segments // steps
        rows.append(np.stack([np.full(steps, window), first, np.zeros(steps, np.int64)], 1))
    plan = np.concatenate([*rows, [[len(rows), 0, 0]]]).astype(np.int64)
    (folder / "plans").mkdir()
    np.save(folder / "plans" / "epoch-00000.npy", plan)
    return len(plan) - 1


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--tokens", type=int, default=10_000_000_000)
    reader.add_argument("--starts", type=int, default=10)
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options = reader.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = write_plan(folder, write_shards(folder, options.tokens))
        chosen = keyed.bits(keyed.key("starts"), np.arange(options.starts)) % np.uint64(steps)
        runs = []
        for step in chosen:
            command = [sys.executable, "-c", START, str(folder), str(step), json.dumps(SETTINGS)]
            runs.append(json.loads(subprocess.check_output(command)))
    columns = zip(*runs, strict=True)
    seconds = {what: spread(values) for what, values in zip(("shards", "first_step", "all"), columns, strict=True)}
    print(f"{options.tokens:,} tokens, {steps:,} steps, windows of {WINDOW_TOKENS:,}; seconds of {len(runs)} starts")
    for what, row in seconds.items():
        print(f"{what:<12} median {row['median']:.3f}  min {row['min']:.3f}  max {row['max']:.3f}")
    facts = {"tokens": options.tokens, "steps": steps, "seconds": seconds, **SETTINGS}
    write_result("plan_start", before, facts, options.out)


if __name__ == "__main__":
    main()
