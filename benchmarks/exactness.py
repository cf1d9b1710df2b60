"""Three questions that decide how slots are reduced (outcome in docs/decisions.md, figures in benchmarks/results/).

    python benchmarks/exactness.py          some minutes on 2 idle cores; prints tables, writes a dated JSON

S0  Is gloo's all_reduce bitwise stable from run to run, and across DDP's bucket layouts, at 2 and 4 ranks?
S1  Is one slot's backward, re-seeded by its index, bitwise equal in different processes?
S2  What does an exact reduction cost against DDP at 1, 2 and 4 ranks?

A slot is one forward and backward. `fast` is DDP: a rank adds up its own slots, all_reduce adds up the ranks. `exact`
adds the slots' gradients in one fixed binary tree, whichever rank computed them; `exact_subtree` does the same sum,
but each rank adds its own (adjacent) slots first, so that one vector a rank travels instead of one a slot.
Every process has one thread. Stands alone: torch and transformers, nothing of bertpipe.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bertpipe.artifact import processor

SLOTS = 4
WORLDS = (1, 2, 4)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
BUCKET_CAPS_MB = (0.02, 0.1, 0.4, 25.0)


@dataclass(frozen=True)
class Setup:
    """A model and the shape of one of its slots."""

    name: str
    layers: int
    hidden: int
    vocabulary: int
    sequences: int
    length: int


SMALL = Setup("BERT 2x64, vocabulary 1,000, slots of 8 x 64", 2, 64, 1_000, 8, 64)
MINI = Setup("BERT-mini 4x256, vocabulary 30,522, slots of 8 x 128", 4, 256, 30_522, 8, 128)
TIMED = ((SMALL, 40), (MINI, 6))  # with steps


class MaskedLM(nn.Module):
    """A stock BERT whose head sees the positions to predict alone; returns the summed loss."""

    def __init__(self, setup: Setup):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=setup.vocabulary,
            num_hidden_layers=setup.layers,
            hidden_size=setup.hidden,
            num_attention_heads=setup.hidden // 32,
            intermediate_size=4 * setup.hidden,
        )
        self.model = transformers.BertForMaskedLM(config).train()

    def forward(self, input_ids: torch.Tensor, index: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.model.bert(input_ids=input_ids).last_hidden_state.flatten(0, 1)  # [B * L, H]
        return nn.functional.cross_entropy(self.model.cls(hidden[index]).float(), labels, reduction="sum")


def backward(module: nn.Module, setup: Setup, slot: int, precision: str, scale: float) -> None:
    """Forward and backward of one slot; its data and its dropout follow from its index alone."""
    torch.manual_seed(slot)
    tokens = setup.sequences * setup.length
    input_ids = torch.randint(setup.vocabulary, (setup.sequences, setup.length))
    index = torch.randperm(tokens)[: int(0.15 * tokens)]
    labels = torch.randint(setup.vocabulary, index.shape)
    dtype = PRECISIONS[precision]
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        loss = module(input_ids, index, labels)
    (loss * scale / (SLOTS * len(index))).backward()


def take_gradient(module: nn.Module, out: torch.Tensor | None = None) -> torch.Tensor:
    """Every gradient in one fp32 vector [P], written to `out` if given; the module's own are dropped."""
    flat = torch.cat([p.grad.flatten() for p in module.parameters()], out=out)
    module.zero_grad(set_to_none=True)
    return flat


def tree_sum_(rows: torch.Tensor) -> torch.Tensor:
    """Add up the rows of [N, P] in place, neighbours in pairs: the order depends on N alone. Returns the first row."""
    stride = 1
    while stride < len(rows):
        for left in range(0, len(rows) - stride, 2 * stride):
            rows[left] += rows[left + stride]
        stride *= 2
    return rows[0]


def digest(vector: torch.Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()


def own_slots(rank: int, world: int) -> range:
    """Adjacent slots, so that a rank's share is a subtree of the tree."""
    share = SLOTS // world
    return range(rank * share, (rank + 1) * share)


# The reductions: each leaves the gradient of the whole batch in `.grad` on every rank.


class Fast:
    """DDP, silent on all slots of a rank but its last."""

    def __init__(self, ddp: DistributedDataParallel, setup: Setup, rank: int, world: int):
        self.ddp, self.setup, self.slots, self.world = ddp, setup, own_slots(rank, world), world

    def __call__(self, precision: str) -> None:
        for slot in self.slots:
            with contextlib.nullcontext() if slot == self.slots[-1] else self.ddp.no_sync():
                backward(self.ddp, self.setup, slot, precision, scale=self.world)  # DDP divides by the world


class Exact:
    """Every slot's gradient gathered, then the fixed tree. Holds (slots + own slots) x P numbers."""

    subtree = False

    def __init__(self, ddp: DistributedDataParallel, setup: Setup, rank: int, world: int):
        self.module, self.setup, self.slots, self.world = ddp.module, setup, own_slots(rank, world), world
        self.sizes = [p.numel() for p in self.module.parameters()]
        self.own = torch.empty(len(self.slots), sum(self.sizes))
        self.all = torch.empty(world if self.subtree else SLOTS, sum(self.sizes))

    def __call__(self, precision: str) -> None:
        for row, slot in zip(self.own, self.slots, strict=True):
            backward(self.module, self.setup, slot, precision, scale=1.0)
            take_gradient(self.module, out=row)
        sent = tree_sum_(self.own) if self.subtree else self.own
        if self.world > 1:
            dist.all_gather(list(self.all.view(self.world, *sent.shape)), sent)
        else:
            self.all.view(1, *sent.shape)[0] = sent
        total = tree_sum_(self.all)
        for parameter, gradient in zip(self.module.parameters(), total.split(self.sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)


class ExactSubtree(Exact):
    """The same sum with a rank's own slots added before they travel. Holds (world + own slots) x P numbers."""

    subtree = True


REDUCTIONS = {"fast": Fast, "exact": Exact, "exact_subtree": ExactSubtree}


# S0


def sum_every_way(rank: int, world: int) -> dict[str, Any]:
    """Digests of the same batch's gradient by every reduction, and the distance of DDP's from the fixed tree."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        module = MaskedLM(SMALL)
        exact = {}
        for name, reduction in (("exact", Exact), ("exact_subtree", ExactSubtree)):
            reduction(DistributedDataParallel(module), SMALL, rank, world)(precision)
            tree = take_gradient(module)
            exact[name] = digest(tree)

        rows = torch.empty(len(own_slots(rank, world)), tree.numel())
        for row, slot in zip(rows, own_slots(rank, world), strict=True):
            backward(module, SMALL, slot, precision, scale=1.0)
            take_gradient(module, out=row)
        share = tree_sum_(rows)
        repeats = []
        for _ in range(50):
            vector = share.clone()
            dist.all_reduce(vector)
            repeats.append(digest(vector))

        layouts = {}
        for cap in BUCKET_CAPS_MB:
            fast = Fast(DistributedDataParallel(module, bucket_cap_mb=cap), SMALL, rank, world)  # type: ignore[arg-type]
            layouts[cap] = []
            for _ in range(3):  # DDP rebuilds its buckets after the first
                fast(precision)
                vector = take_gradient(module)
                layouts[cap].append(digest(vector))
        distance = ((vector - tree).abs().max() / tree.abs().max()).item()
        found[precision] = {"exact": exact, "all_reduce": repeats, "ddp": layouts, "distance": distance}
    return found


def answer_s0() -> dict[str, Any]:
    print(f"\nS0  distinct results (1: bitwise stable), {SMALL.name}, {SLOTS} slots; two runs of fresh processes")
    print("             world  fixed tree  all_reduce       is the  DDP: run  first step  bucket    from the")
    print("                    both ways   of rank's trees  tree    to run    or later    layouts   tree, relative")
    every = {world: [rank for _ in range(2) for rank in start(world, sum_every_way)] for world in WORLDS}
    answer: dict[str, Any] = {}
    for precision in PRECISIONS:
        trees = {digest for rows in every.values() for row in rows for digest in row[precision]["exact"].values()}
        answer[precision] = {"fixed_tree_over_worlds": len(trees)}
        for world, ranks in every.items():
            rows = [rank[precision] for rank in ranks]
            reduced = {digest for row in rows for digest in row["all_reduce"]}
            facts = {
                "fixed_tree": len({digest for row in rows for digest in row["exact"].values()}),
                "all_reduce": len(reduced),
                "all_reduce_is_tree": reduced == trees,
                "ddp_run_to_run": max(
                    len({row["ddp"][str(cap)][step] for row in rows}) for cap in BUCKET_CAPS_MB for step in range(3)
                ),
                "ddp_steps": max(len(set(rows[0]["ddp"][str(cap)])) for cap in BUCKET_CAPS_MB),
                "ddp_layouts": len({rows[0]["ddp"][str(cap)][-1] for cap in BUCKET_CAPS_MB}),
                "ddp_distance": max(row["distance"] for row in rows),
            }
            answer[precision][f"world {world}"] = facts
            tree, reduce, same, runs, steps, layouts, distance = facts.values()
            print(
                f"       {precision}  {world:5}  {tree:<12}{reduce:<17}{'yes' if same else 'no':8}{runs:<10}"
                f"{steps:<12}{layouts:<10}{distance:.1e}"
            )
        print(f"       {precision}  fixed tree over all worlds: {len(trees)}")
    return answer


# S1


def hash_slots(rank: int, world: int, count: int, threads: int) -> dict[str, list[str]]:
    """Digest of each slot's gradient, the slots visited in an order of this rank's own."""
    torch.set_num_threads(threads)
    module = MaskedLM(SMALL)
    hashes = {precision: [""] * count for precision in PRECISIONS}
    for precision, slots in hashes.items():
        for slot in torch.randperm(count, generator=torch.Generator().manual_seed(rank)).tolist():
            backward(module, SMALL, slot, precision, scale=1.0)
            slots[slot] = digest(take_gradient(module))
    return hashes


def answer_s1(comparisons: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    print("\nS1  the same slot in different processes, each visiting the slots in its own order")
    one = start(5, hash_slots, comparisons // 4, 1)
    two = start(2, hash_slots, comparisons // 20, 2)
    for precision in PRECISIONS:
        alone, paired = [rank[precision] for rank in one], [rank[precision] for rank in two]
        answer[precision] = {
            "1 thread": count_equal(alone[0], alone[1:]),
            "2 threads": count_equal(paired[0], paired[1:]),
            "2 threads against 1": count_equal(alone[0], paired[:1]),
        }
        for name, (equal, total) in answer[precision].items():
            print(f"  {precision} {name}: {equal} of {total} bitwise equal")
    return answer


def count_equal(reference: list[str], others: list[list[str]]) -> tuple[int, int]:
    pairs = [pair for other in others for pair in zip(reference, other, strict=False)]
    return sum(a == b for a, b in pairs), len(pairs)


# S2


def time_setups(rank: int, world: int) -> list[dict[str, list[tuple[float, float]]]]:
    return [time_reductions(rank, world, setup, steps) for setup, steps in TIMED]


def time_reductions(rank: int, world: int, setup: Setup, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each whole step of this rank, optimizer included, the reductions taking turns."""
    module = MaskedLM(setup)
    ddp = DistributedDataParallel(module)
    reductions = {name: make(ddp, setup, rank, world) for name, make in REDUCTIONS.items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in REDUCTIONS}
    for step in range(steps + 1):
        for name, reduce in reductions.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            reduce("bf16")
            optimizer.step()
            dist.barrier()
            if step:  # the first warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            module.zero_grad(set_to_none=True)
    return seconds


def answer_s2() -> list[dict[str, Any]]:
    answer = []
    print(f"\nS2  milliseconds a step of {SLOTS} slots, bf16: median [quartiles]; price: median of exact / fast - 1")
    print("    CPU is what one rank computed: on a busy machine it tells more than the wall does")
    for world in WORLDS:
        for (setup, steps), seconds in zip(TIMED, start(world, time_setups)[0], strict=True):
            row: dict[str, Any] = {"setup": asdict(setup), "world": world, "steps": steps}
            turns = [dict(zip(seconds, turn, strict=True)) for turn in zip(*seconds.values(), strict=True)]
            for number, clock in enumerate(("wall", "cpu")):
                row[clock] = compare([{name: both[number] for name, both in turn.items()} for turn in turns])
                cells = (
                    f"{name} {f['median']:.0f} [{f['low']:.0f}-{f['high']:.0f}] {f['price']:+.1%}"
                    for name, f in row[clock].items()
                )
                print(f"    {setup.name.partition(',')[0]:<15} world {world} {clock:<4} " + "   ".join(cells))
            answer.append(row)
    return answer


def compare(turns: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles in ms of each reduction, and its price beside `fast` of the same turn."""
    facts = {}
    for name in REDUCTIONS:
        low, median, high = (round(1e3 * q, 1) for q in statistics.quantiles((turn[name] for turn in turns), n=4))
        price = round(statistics.median(turn[name] / turn["fast"] - 1 for turn in turns), 3)
        facts[name] = {"low": low, "median": median, "high": high, "price": price}
    return facts


# Processes


def start(world: int, job: Callable, *args: Any) -> list[Any]:
    """Run `job(rank, world, *args)` in `world` fresh processes joined by gloo; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_join_and_run, args=(world, folder, job, args), nprocs=world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def _join_and_run(rank: int, world: int, folder: str, job: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    Path(folder, f"{rank}.json").write_text(json.dumps(job(rank, world, *args)))
    dist.barrier()  # without it, a rank that leaves early can abort another
    dist.destroy_process_group()


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1_000, help="slots compared in S1 (default 1000)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # S1 runs more threads than there may be cores: don't spin
    started = time.monotonic()
    result = {"machine": describe_machine(), "S0": answer_s0(), "S1": answer_s1(options.comparisons)}
    result["S2"] = answer_s2()
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    path = options.output / f"exactness-{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['wall_seconds']} s; written to {path}")


if __name__ == "__main__":
    main()
