"""Three questions that decide how slots are reduced (outcome in docs/decisions.md, figures in benchmarks/results/).

    python benchmarks/exactness.py          about 4 minutes on 2 cores; prints tables, writes a dated JSON

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
from torch.nn.parallel import DistributedDataParallel as DDP

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


def take_gradient(module: nn.Module) -> torch.Tensor:
    """Every gradient in one vector [P], fp32; the module's own are dropped."""
    flat = torch.cat([p.grad.flatten() for p in module.parameters()])
    module.zero_grad(set_to_none=True)
    return flat


def tree_sum(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Neighbours are added in pairs until one is left: the order depends on the number of vectors alone."""
    while len(vectors) > 1:
        pairs = [left + right for left, right in zip(vectors[::2], vectors[1::2], strict=False)]
        vectors = pairs + vectors[len(pairs) * 2 :]
    return vectors[0]


def digest(vector: torch.Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()


def own_slots(rank: int, world: int) -> range:
    """Adjacent slots, so that a rank's share is a subtree of the tree."""
    share = SLOTS // world
    return range(rank * share, (rank + 1) * share)


def gather(vector: torch.Tensor, world: int) -> list[torch.Tensor]:
    """Every rank's `vector`, in rank order."""
    out = [torch.empty_like(vector) for _ in range(world)]
    dist.all_gather(out, vector)
    return out


# The three reductions: each leaves the gradient of the whole batch in `.grad` on every rank.


def reduce_fast(ddp: DDP, setup: Setup, precision: str, rank: int, world: int) -> None:
    slots = own_slots(rank, world)
    for slot in slots:
        with contextlib.nullcontext() if slot == slots[-1] else ddp.no_sync():
            backward(ddp, setup, slot, precision, scale=world)  # DDP divides by the world


def reduce_exact(ddp: DDP, setup: Setup, precision: str, rank: int, world: int, subtree: bool = False) -> None:
    module, own = ddp.module, []
    for slot in own_slots(rank, world):
        backward(module, setup, slot, precision, scale=1.0)
        own.append(take_gradient(module))
    if subtree:
        total = tree_sum(gather(tree_sum(own), world))
    else:
        gathered = gather(torch.stack(own), world)
        total = tree_sum([vector for share in gathered for vector in share])
    sizes = [p.numel() for p in module.parameters()]
    for parameter, gradient in zip(module.parameters(), total.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def reduce_exact_subtree(ddp: DDP, setup: Setup, precision: str, rank: int, world: int) -> None:
    reduce_exact(ddp, setup, precision, rank, world, subtree=True)


REDUCTIONS: dict[str, Callable[[DDP, Setup, str, int, int], None]] = {
    "fast": reduce_fast,
    "exact": reduce_exact,
    "exact_subtree": reduce_exact_subtree,
}


# S0


def sum_every_way(rank: int, world: int) -> dict[str, Any]:
    """The same batch gradient by every reduction: digests, and distance from the fixed tree."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        module = MaskedLM(SMALL)
        row: dict[str, Any] = {"ddp": {}}
        local = []
        for slot in own_slots(rank, world):
            backward(module, SMALL, slot, precision, scale=1.0)
            local.append(take_gradient(module))
        tree = tree_sum([vector for share in gather(torch.stack(local), world) for vector in share])
        row["tree"] = digest(tree)
        reduced = []
        for _ in range(50):
            vector = tree_sum(local).clone()
            dist.all_reduce(vector)
            reduced.append(digest(vector))
        row["all_reduce"] = sorted(set(reduced))
        row["all_reduce_distance"] = distance(vector, tree)
        for cap in BUCKET_CAPS_MB:
            ddp = DDP(module, bucket_cap_mb=cap)  # type: ignore[arg-type]
            steps = []
            for _ in range(3):  # DDP rebuilds its buckets after the first
                reduce_fast(ddp, SMALL, precision, rank, world)
                vector = take_gradient(module)
                steps.append(digest(vector))
            row["ddp"][str(cap)] = {"steps": steps, "distance": distance(vector, tree)}
        found[precision] = row
    return found


def distance(vector: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((vector - reference).abs().max() / reference.abs().max()).item()


def answer_s0() -> dict[str, Any]:
    runs = {world: [start(world, sum_every_way) for _ in range(2)] for world in WORLDS}
    answer: dict[str, Any] = {}
    print(f"\nS0  {SMALL.name}, {SLOTS} slots, two runs of fresh processes, every rank")
    for precision in PRECISIONS:
        every = {world: [rank[precision] for run in runs[world] for rank in run] for world in WORLDS}
        trees = {row["tree"] for rows in every.values() for row in rows}
        print(f"  {precision}: fixed tree: {len(trees)} distinct result(s) in worlds {WORLDS}")
        answer[precision] = {"distinct_tree_results_over_worlds": len(trees), "worlds": {}}
        for world, rows in every.items():
            layouts = {cap: {h for row in rows for h in row["ddp"][cap]["steps"]} for cap in rows[0]["ddp"]}
            facts = {
                "distinct_all_reduce": len({h for row in rows for h in row["all_reduce"]}),
                "all_reduce_distance_from_tree": max(row["all_reduce_distance"] for row in rows),
                "distinct_within_a_layout": max(len(hashes) for hashes in layouts.values()),
                "distinct_over_layouts": len(set.union(*layouts.values())),
                "ddp_distance_from_tree": max(d["distance"] for row in rows for d in row["ddp"].values()),
            }
            answer[precision]["worlds"][world] = facts
            print(f"    world {world}: " + ", ".join(f"{k} {v:.2g}" for k, v in facts.items()))
    return answer


# S1


def hash_slots(rank: int, world: int, count: int, precision: str, threads: int) -> list[str]:
    """Digest of each slot's gradient, visited in an order of this rank's own."""
    torch.set_num_threads(threads)
    module = MaskedLM(SMALL)
    hashes = [""] * count
    for slot in torch.randperm(count, generator=torch.Generator().manual_seed(rank)).tolist():
        backward(module, SMALL, slot, precision, scale=1.0)
        hashes[slot] = digest(take_gradient(module))
    return hashes


def answer_s1(comparisons: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    print("\nS1  the same slot in different processes, each visiting the slots in its own order")
    for precision in PRECISIONS:
        one = start(5, hash_slots, comparisons // 4, precision, 1)
        two = start(2, hash_slots, comparisons // 4, precision, 2)
        answer[precision] = {
            "1 thread": count_equal(one[0], one[1:]),
            "2 threads": count_equal(two[0], two[1:]),
            "2 threads against 1": count_equal(one[0], two[:1]),
        }
        for name, (equal, total) in answer[precision].items():
            print(f"  {precision} {name}: {equal} of {total} bitwise equal")
    return answer


def count_equal(reference: list[str], others: list[list[str]]) -> tuple[int, int]:
    equal = sum(a == b for other in others for a, b in zip(reference, other, strict=True))
    return equal, len(reference) * len(others)


# S2


def time_reductions(rank: int, world: int, setup: Setup, steps: int) -> dict[str, list[float]]:
    """Seconds of each whole step (optimizer included), the reductions taking turns."""
    module = MaskedLM(setup)
    ddp = DDP(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in REDUCTIONS}
    for step in range(steps + 1):
        for name, reduction in REDUCTIONS.items():
            dist.barrier()
            started = time.perf_counter()
            reduction(ddp, setup, "bf16", rank, world)
            optimizer.step()
            dist.barrier()
            if step:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
            module.zero_grad(set_to_none=True)
    return seconds


def answer_s2() -> list[dict[str, Any]]:
    answer = []
    print("\nS2  milliseconds a step in bf16, median [quartiles]; price: median over steps of exact / fast - 1")
    for setup, steps in ((SMALL, 60), (MINI, 8)):
        print(f"  {setup.name}, {SLOTS} slots a step")
        for world in WORLDS:
            seconds = start(world, time_reductions, setup, steps)[0]
            row: dict[str, Any] = {"setup": asdict(setup), "world": world, "steps": steps}
            for name, values in seconds.items():
                low, middle, high = statistics.quantiles(values, n=4)
                ratios = [value / fast - 1 for value, fast in zip(values, seconds["fast"], strict=True)]
                row[name] = {"ms": [round(1e3 * v, 1) for v in (low, middle, high)]}
                row[name]["price"] = round(statistics.median(ratios), 3)
            answer.append(row)
            cells = (
                f"{n} {row[n]['ms'][1]:.0f} [{row[n]['ms'][0]:.0f}-{row[n]['ms'][2]:.0f}] {row[n]['price']:+.1%}"
                for n in REDUCTIONS
            )
            print(f"    world {world}: " + "   ".join(cells))
    return answer


# Processes


def start(world: int, job: Callable, *args: Any) -> list[Any]:
    """Run `job(rank, world, *args)` in `world` fresh processes joined by gloo; their results in rank order."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        mp.spawn(_join_and_run, args=(world, f"{folder}/store", queue, job, args), nprocs=world)
        results = dict(queue.get() for _ in range(world))
    return [results[rank] for rank in range(world)]


def _join_and_run(rank: int, world: int, store: str, queue: Any, job: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    queue.put((rank, job(rank, world, *args)))
    dist.barrier()
    dist.destroy_process_group()


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
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
    started = time.monotonic()
    result = {"machine": describe_machine(), "S0": answer_s0(), "S1": answer_s1(options.comparisons)}
    result["S2"] = answer_s2()
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    path = options.output / f"exactness-{datetime.date.today()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['wall_seconds']} s; written to {path}")


if __name__ == "__main__":
    main()
