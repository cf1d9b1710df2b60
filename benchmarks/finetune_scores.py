"""Does fine-tuning here give the scores that transformers.Trainer gives? Tasks, with paired seeds.

    python benchmarks/finetune_scores.py --model FOLDER --data FOLDER
    python benchmarks/finetune_scores.py --model FOLDER --data FOLDER --poolers     a checkpoint without a pooler

Each seed is run on both sides with the same settings, precision, new head and order of examples; what differs is how a
batch is computed and what dropout draws. The headline score on validation after the last epoch is compared: the mean of
the paired differences, bertpipe's less Trainer's, and its 95 % interval (Student's t). One that leaves 0 out says that
the sides differ. A run is kept as soon as it is done, so a call may be stopped, and given again with other --tasks or
more --seeds: the newest results/finetune_scores-*.json of the same settings is gone on with.

With --poolers both sides are bertpipe's: a pooler that starts as the identity against one that starts random
(`finetune.pooler`), in results/finetune_poolers-*.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import finetune_baseline as baseline
import numpy as np
import torch
import transformers as tr
from accelerate.state import AcceleratorState
from common import RESULTS, machine, write_result

from bertpipe.config import Config, FinetuneConfig, RuntimeConfig
from bertpipe.data.batches import ExampleSlots
from bertpipe.downstream.finetuning import training
from bertpipe.downstream.tasks.kind import Task
from bertpipe.train.place import Place

TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "wnut17")
Side = Callable[[Config, training.Job, int], dict[str, Any]]
SHARE = {"sst2": 0.1}  # of the training examples, unless --examples says how many


class Ordered(tr.Trainer):
    """A stock Trainer that sees the examples in bertpipe's order."""

    source: ExampleSlots

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        source, epochs = self.source, iter(range(10**9))

        class Order(torch.utils.data.Sampler):
            def __len__(self) -> int:
                return len(source.examples)

            def __iter__(self) -> Iterator[int]:
                first = next(epochs) * source.steps_per_epoch
                for chosen in baseline.orders(
                    source, range(first, first + source.steps_per_epoch), source.slots_per_step
                ):
                    yield from chosen

        return Order()


def by_bertpipe(cfg: Config, job: training.Job, seed: int) -> dict[str, Any]:
    """Fine-tuning as the stage does it."""
    place = Place(cfg.runtime, cfg.finetune.precision)
    facts = training.train(cfg, place, job, "model", seed, None)
    return {"score": facts["by_epoch"][-1], "failed": facts["failed"]}


def by_trainer(cfg: Config, job: training.Job, seed: int) -> dict[str, Any]:
    """transformers.Trainer: padded to the batch's longest, its own attention, dropout and loop."""
    settings, head, task = cfg.finetune, job.kind.head, job.task
    model = training.build(job, settings, "model", seed)
    model.set_attn_implementation("sdpa")
    examples = job.encoded["train"].examples
    source = ExampleSlots(examples, settings.batch_size, 1, seed, job.pad_id)
    recipe = training.recipe(settings, source.steps_per_epoch * settings.epochs)
    with tempfile.TemporaryDirectory() as folder:
        given = baseline.arguments(
            *(recipe, settings.batch_size, Path(folder)),
            per_device_eval_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            bf16=settings.precision == "bf16",
            seed=seed,
        )
        trainer = Ordered(
            *(model, given, baseline.FORMS[head].collator(job.tokenizer)),
            train_dataset=baseline.features(head, examples),
        )
        trainer.source = source
        trainer.remove_callback(tr.PrinterCallback)
        trainer.train()
        validation = job.encoded[task.validation].examples
        logits = trainer.predict(baseline.features(head, validation)).predictions
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, and Trainer's is of another precision
    outputs = baseline.outputs(head, logits, validation, job.head.module)
    scores = job.score(task.validation, job.decide(task.validation, outputs))
    return {"score": scores[task.headline], "failed": training.failure(job, outputs, scores)}


def by_pooler(start: str) -> Side:
    """bertpipe with a pooler that starts so."""

    def run(cfg: Config, job: training.Job, seed: int) -> dict[str, Any]:
        settings = cfg.finetune.model_copy(update={"pooler": start})
        return by_bertpipe(cfg.model_copy(update={"finetune": settings}), job, seed)

    return run


SIDES: dict[str, Side] = {"bertpipe": by_bertpipe, "trainer": by_trainer}
POOLERS: dict[str, Side] = {start: by_pooler(start) for start in ("identity", "random")}


class Kept:
    """The results file: all runs of some settings, written after each of them."""

    def __init__(self, name: str, folder: Path | None, settings: dict[str, Any], sides: dict[str, Side]):
        self.name, self.folder, self.sides, self.before = name, folder or RESULTS, sides, machine()
        self.facts: dict[str, Any] = {"settings": settings, "tasks": {}, "runs": {}}
        for path in sorted(self.folder.glob(f"{name}-*.json")):
            known = json.loads(path.read_text())
            if known["settings"] == settings:
                self.facts |= {name: known[name] for name in self.facts} | {"since": known.get("since", known["date"])}

    def get(self, task: str, seed: int, side: str) -> dict[str, Any] | None:
        """A run's result, if it is known."""
        return self.facts["runs"].get(task, {}).get(str(seed), {}).get(side)

    def put(self, task: Task, seed: int, side: str, result: dict[str, Any]) -> None:
        """Keep a result, and say what the task's differences are by now."""
        runs = self.facts["runs"].setdefault(task.name, {})
        runs.setdefault(str(seed), {})[side] = result
        pairs = [run for run in runs.values() if run.keys() == self.sides.keys()]
        if len(pairs) > 1:
            self.facts["tasks"][task.name] = {"metric": task.headline} | compare(pairs)
        with contextlib.redirect_stdout(None):
            write_result(self.name, self.before, self.facts, self.folder)


def compare(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean difference of paired runs, the first side's less the second's, with its 95 % interval."""
    from scipy import stats

    scores = {side: [run[side]["score"] for run in pairs] for side in pairs[0]}
    differences = np.subtract(*scores.values())
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(differences)
    low, high = differences.mean() - half, differences.mean() + half
    return {
        "pairs": len(pairs),
        "difference": float(differences.mean()),
        "interval": [float(low), float(high)],
        "width": float(high - low),
        "contains_0": bool(low <= 0 <= high),
        "medians": {side: statistics.median(values) for side, values in scores.items()},
        "failed": {side: sum(run[side]["failed"] is not None for run in pairs) for side in scores},
    }


def run_scores(options: argparse.Namespace) -> bool:
    """All runs that are missing; returns whether every task's interval contains 0."""
    precision = options.precision
    if precision == "auto":
        precision = Place(RuntimeConfig(device="cpu", threads=options.threads), "auto").precision
    recipe = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size, "max_length": 128}
    described = {"model": _fingerprint(options.model), "examples": options.examples, "precision": precision, **recipe}
    sides, name = (POOLERS, "finetune_poolers") if options.poolers else (SIDES, "finetune_scores")
    kept = Kept(name, options.out, described, sides)
    runtime = RuntimeConfig(device="cpu", threads=options.threads, progress=False)
    jobs: dict[str, training.Job] = {}
    for seed in range(1, options.seeds + 1):
        for name in options.tasks:
            data = str(baseline.find_data(name, options.data))
            settings = FinetuneConfig(model=options.model, data=data, precision=precision, **recipe)
            cfg = Config(finetune=settings, runtime=runtime)
            for side, run in sides.items():
                if kept.get(name, seed, side) is not None:
                    continue
                job = jobs.setdefault(name, _prepare(name, settings, options.examples))
                started = time.monotonic()
                result = run(cfg, job, seed) | {"num_examples": len(job.encoded["train"].examples)}
                kept.put(job.task, seed, side, result | {"seconds": round(time.monotonic() - started, 1)})
                print(f"{name} seed {seed} {side}: {job.task.headline} {result['score']:.4f}", flush=True)
    print(f"\n{summarise(kept.facts)}")
    return all(task["contains_0"] for task in kept.facts["tasks"].values())


def _prepare(name: str, settings: FinetuneConfig, num: int | None) -> training.Job:
    """A task with some of its training examples, and of the other splits only the one to score."""
    job = training.prepare(name, settings, str(settings.model))
    examples = job.encoded["train"].examples
    job = baseline.shorten(job, num or round(len(examples) * SHARE.get(name, 1.0)))
    splits = ("train", job.task.validation)
    return dataclasses.replace(
        job, splits={s: job.splits[s] for s in splits}, encoded={s: job.encoded[s] for s in splits}
    )


def _fingerprint(model: str) -> str:
    """The checkpoint's name and a part of its weights' hash, so that one's runs aren't taken for another's."""
    from bertpipe.artifact import hash_file

    return f"{Path(model).name}-{hash_file(Path(model) / 'model.safetensors')[:12]}"


def summarise(facts: dict[str, Any]) -> str:
    """The table of the README."""
    sides = next(iter(facts["tasks"].values()), {"medians": SIDES})["medians"]
    lines = [f"| task | metric | pairs | {' | '.join(sides)} | difference | 95 % interval |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for name, task in facts["tasks"].items():
        low, high = task["interval"]
        medians = " | ".join(f"{task['medians'][side]:.3f}" for side in sides)
        lines.append(
            f"| {name} | {task['metric']} | {task['pairs']} | {medians} | "
            f"{task['difference']:+.4f} | {low:+.4f} to {high:+.4f}{'' if task['contains_0'] else ', without 0'} |"
        )
    return "\n".join(lines)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--model", required=True, help="a checkpoint's folder")
    reader.add_argument(
        "--data", type=Path, nargs="+", default=[], help="folders that hold TASK/; default: those below BERTPIPE_DATA"
    )
    reader.add_argument("--poolers", action="store_true", help="two starts of a pooler in place of Trainer")
    reader.add_argument("--tasks", nargs="+", default=TASKS)
    reader.add_argument("--seeds", type=int, default=10, help="1 .. SEEDS")
    reader.add_argument("--epochs", type=int, default=3)
    reader.add_argument("--examples", type=int, help="training examples at most")
    reader.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of both sides")
    reader.add_argument("--batch-size", type=int, default=32)
    reader.add_argument("--lr", type=float, default=5e-5, help="peak learning rate")
    reader.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options = reader.parse_args()
    baseline.settle(options.threads)
    raise SystemExit(0 if run_scores(options) else 1)


if __name__ == "__main__":
    main()
