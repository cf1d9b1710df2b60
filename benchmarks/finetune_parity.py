"""Does fine-tuning here give what transformers.Trainer gives?

    python benchmarks/finetune_parity.py losses                                  every head, on a tiny BERT
    python benchmarks/finetune_parity.py losses --model FOLDER                   the same from a checkpoint's weights
    python benchmarks/finetune_parity.py scores --model FOLDER --data FOLDER     tasks, with paired seeds

`losses`: both sides in fp32, without dropout, from the same weights and on the same batches, which the stock collators
pad for Trainer. Prints the largest difference of 50 losses, for each head; the aim is 1e-5. A stock model for spans
has its softmax run over the padding as well, so the examples of that head are all of one length. AdamW divides a
gradient that is nothing but rounding by its own size, so at high rates equal losses drift apart: with 3e-3 in place of
1e-3, multiple choice is equal to 2e-7 for 15 steps and 8e-3 apart in the 46th.

`scores`: each seed is run on both sides with the same settings, precision, new head and order of examples; what differs
is how a batch is computed and what dropout draws. The headline score on validation after the last epoch is compared:
the mean of the paired differences, bertpipe's less Trainer's, and its 95 % interval (Student's t). One that leaves
0 out says that the sides differ. A run is kept as soon as it is done, so a call may be stopped, and given again with
other --tasks or more --seeds: the newest results/finetune_parity-*.json of the same settings is gone on with.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune_baseline as baseline
import numpy as np
import torch
import transformers as tr
from accelerate.state import AcceleratorState
from common import RESULTS, machine, write_result

from bertpipe.config import Config, FinetuneConfig, RuntimeConfig
from bertpipe.data.batches import Examples, ExampleSlots
from bertpipe.downstream.finetuning import training
from bertpipe.downstream.tasks.kind import Task
from bertpipe.model import encoders
from bertpipe.model.labelled import HEADS_OF
from bertpipe.train import loop
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place
from bertpipe.train.tracking import Record

TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "wnut17")
SHARE = {"sst2": 0.1}  # of the training examples, where not all of them are taken
STEPS, BATCH, SLOTS = 50, 16, 2  # of `losses`
BOUND = 1e-5
VOCAB_SIZE = 200  # of the tiny BERT
ORDINARY = 5  # the first id that isn't a special token's, of the tiny BERT


# --- losses ---


@dataclass(frozen=True)
class Row:
    """A head to compare: examples whose labels follow from their tokens, and what the stock config must say."""

    head: str
    fields: dict[str, Any]
    make: Callable[[np.random.Generator, int], Examples]
    """(random numbers, size of the vocabulary) -> about 100 examples"""


def _sentences(rng: np.random.Generator, vocab_size: int, lengths: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([[2], rng.integers(ORDINARY, vocab_size, n), [3]]) for n in lengths]


def _examples(ids: list[np.ndarray], labels: Any, **more: Any) -> Examples:
    types = [np.arange(len(x)) * 2 // len(x) for x in ids]  # as of a pair
    return Examples(ids, types, labels, **more)


def _classified(rng: np.random.Generator, vocab_size: int) -> Examples:
    ids = _sentences(rng, vocab_size, rng.integers(1, 40, 100))
    return _examples(ids, np.array([x[1] * 3 // vocab_size for x in ids]))


def _numbers(rng: np.random.Generator, vocab_size: int) -> Examples:
    ids = _sentences(rng, vocab_size, rng.integers(1, 40, 100))
    return _examples(ids, np.array([5 * x[1] / vocab_size for x in ids], np.float32))


def _several(rng: np.random.Generator, vocab_size: int) -> Examples:
    ids = _sentences(rng, vocab_size, rng.integers(4, 40, 100))
    return _examples(ids, np.array([x[1:5] * 2 // vocab_size for x in ids], np.float32))


def _tagged(rng: np.random.Generator, vocab_size: int) -> Examples:
    ids = _sentences(rng, vocab_size, rng.integers(2, 40, 100))
    positions = [np.flatnonzero(np.append(True, rng.random(len(x) - 3) < 0.7)) + 1 for x in ids]
    labels = [x[p] * 5 // vocab_size for x, p in zip(ids, positions, strict=True)]
    return _examples(ids, labels, positions=positions)


def _answers(rng: np.random.Generator, vocab_size: int) -> Examples:
    ids = _sentences(rng, vocab_size, np.full(100, 30))
    return _examples(ids, np.array([(x[1:-1].argmin() + 1, max(x[1:-1].argmin(), x[1:-1].argmax()) + 1) for x in ids]))


def _chosen(rng: np.random.Generator, vocab_size: int) -> Examples:
    ids = _sentences(rng, vocab_size, rng.integers(1, 20, 400))
    labels = np.array([max(range(4), key=lambda c: ids[4 * i + c][1]) for i in range(100)])
    return _examples(ids, labels, choices=4)


ROWS = {
    "classification": Row("sequence", {"num_labels": 3}, _classified),
    "regression": Row("sequence", {"num_labels": 1}, _numbers),
    "multi-label": Row("sequence", {"num_labels": 4, "problem_type": "multi_label_classification"}, _several),
    "tokens": Row("token", {"num_labels": 5}, _tagged),
    "answers": Row("span", {"num_labels": 2}, _answers),
    "multiple choice": Row("choice", {"num_labels": 1}, _chosen),
}


class Recorder(tr.Trainer):
    """A stock Trainer that is given its batches and keeps its losses unrounded."""

    def get_train_dataloader(self) -> Any:
        """The batches."""
        return self.train_dataset

    def compute_loss(self, *given: Any, **more: Any) -> Any:
        """Kept in `losses`."""
        loss = super().compute_loss(*given, **more)
        self.losses.append(float(loss.detach()))
        return loss


def compare_losses(row: Row, model: str | None, steps: int, lr: float | None) -> dict[str, Any]:
    """Losses of both sides for one head, and the largest difference."""
    recipe = Recipe("adamw", lr or (5e-5 if model else 1e-3), 0.01, (0.9, 0.999), 1e-8, "linear", 5, steps, 1.0)
    tokenizer = tr.AutoTokenizer.from_pretrained(model) if model else _padder()
    vocab_size = tr.AutoConfig.from_pretrained(model).vocab_size if model else VOCAB_SIZE
    examples = row.make(np.random.default_rng(0), vocab_size)
    source = ExampleSlots(examples, BATCH, SLOTS, seed=0, pad_id=0)
    collate = baseline.FORMS[row.head].collator(tokenizer)
    made = baseline.features(row.head, examples)
    batches = [collate([dict(made[i]) for i in chosen]) for chosen in orders(source, range(steps), SLOTS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorder(_stock(row, model), baseline.arguments(recipe, BATCH, Path(folder), max_steps=steps))
        trainer.train_dataset, trainer.losses = batches, []
        trainer.remove_callback(tr.PrinterCallback)
        trainer.train()
        objective = HEADS_OF[row.head].module(encoders.make_packed(_stock(row, model)))
        settings = loop.LoopSettings(steps, SLOTS, seed=0, eval_every=10**9, progress=False)
        place = Place(RuntimeConfig(device="cpu", threads=torch.get_num_threads()), "fp32")
        with Record(Path(folder)) as record:
            loop.fit(objective, source, Optimizer(objective.model, recipe), settings, place, record)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]
    assert len(ours) == len(trainer.losses) == steps
    differences = [abs(a - b) for a, b in zip(ours, trainer.losses, strict=True)]
    return {
        "head": row.head,
        "largest_difference": max(differences),
        "first_loss": statistics.mean(ours[:5]),
        "last_loss": statistics.mean(ours[-5:]),
        "bertpipe": ours,
        "trainer": trainer.losses,
    }


def orders(source: ExampleSlots, steps: range, slots: int) -> Iterator[list[int]]:
    """The examples of each step in bertpipe's order."""
    for step in steps:
        ids = torch.cat([slot.example_ids for slot in source.slots(step, 0, slots)])
        yield torch.unique_consecutive(ids).tolist()


def _stock(row: Row, model: str | None) -> Any:
    """The stock model of a head without dropout; always the same weights."""
    auto = getattr(tr, HEADS_OF[row.head].auto_class)
    torch.manual_seed(0)
    if model:
        return encoders.load(auto, model, "--model", 0.0, **row.fields)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stock = tr.BertConfig(vocab_size=VOCAB_SIZE, **sizes, **row.fields)
    encoders.set_dropout(stock, 0.0)
    return auto.from_config(stock, attn_implementation="eager")


def _padder() -> Any:
    """A tokenizer that can pad, and nothing else."""
    import tokenizers

    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")
    return tr.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="[PAD]")


def run_losses(options: argparse.Namespace) -> bool:
    """Compare all heads; returns whether all are within the bound."""
    before, found = machine(), {}
    print(f"{options.steps} losses, fp32, dropout 0, batches of {BATCH}\n")
    print(f"| head | stock class | loss at first | at last | largest difference |{chr(10)}|---|---|---:|---:|---:|")
    for name in options.heads or ROWS:
        row = ROWS[name]
        if row.head not in HEADS_OF:
            print(f"| {name} | not offered | | | |")
            continue
        found[name] = facts = compare_losses(row, options.model, options.steps, options.lr)
        difference = facts["largest_difference"]
        print(
            f"| {name} | {HEADS_OF[row.head].auto_class} | {facts['first_loss']:.3f} | {facts['last_loss']:.3f} | "
            f"{difference:.1e}{'' if difference <= BOUND else ' TOO LARGE'} |",
            flush=True,
        )
    model = Path(options.model).name if options.model else "BERT, 2 layers of 32"
    facts = {"model": model, "steps": options.steps, "bound": BOUND, "heads": found}
    write_result("finetune_losses", before, facts, options.out)
    return all(facts["largest_difference"] <= BOUND for facts in found.values())


# --- scores ---


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
                for chosen in orders(source, range(first, first + source.steps_per_epoch), source.slots_per_step):
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


SIDES = {"bertpipe": by_bertpipe, "trainer": by_trainer}


class Kept:
    """The results file: all runs of some settings, written after each of them."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self.folder, self.before = folder or RESULTS, machine()
        self.facts: dict[str, Any] = {"settings": settings, "tasks": {}, "runs": {}}
        for path in sorted(self.folder.glob("finetune_parity-*.json")):
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
        pairs = [run for run in runs.values() if run.keys() == SIDES.keys()]
        if len(pairs) > 1:
            self.facts["tasks"][task.name] = {"metric": task.headline} | compare(pairs)
        with contextlib.redirect_stdout(None):
            write_result("finetune_parity", self.before, self.facts, self.folder)


def compare(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean difference of paired runs, bertpipe's less Trainer's, with its 95 % interval."""
    from scipy import stats

    scores = {side: [run[side]["score"] for run in pairs] for side in SIDES}
    differences = np.subtract(scores["bertpipe"], scores["trainer"])
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(differences)
    low, high = differences.mean() - half, differences.mean() + half
    return {
        "pairs": len(pairs),
        "difference": float(differences.mean()),
        "interval": [float(low), float(high)],
        "width": float(high - low),
        "contains_0": bool(low <= 0 <= high),
        "medians": {side: statistics.median(values) for side, values in scores.items()},
        "failed": {side: sum(run[side]["failed"] is not None for run in pairs) for side in SIDES},
    }


def run_scores(options: argparse.Namespace) -> bool:
    """All runs that are missing; returns whether every task's interval contains 0."""
    precision = options.precision
    if precision == "auto":
        precision = Place(RuntimeConfig(device="cpu", threads=options.threads), "auto").precision
    recipe = {"epochs": options.epochs, "lr": options.lr or 5e-5, "batch_size": 32, "max_length": 128}
    described = {"model": _fingerprint(options.model), "examples": options.examples, "precision": precision, **recipe}
    kept = Kept(options.out, described)
    runtime = RuntimeConfig(device="cpu", threads=options.threads, progress=False)
    jobs: dict[str, training.Job] = {}
    for seed in range(1, options.seeds + 1):
        for name in options.tasks:
            data = str(baseline.find_data(name, options.data))
            settings = FinetuneConfig(model=options.model, data=data, precision=precision, **recipe)
            cfg = Config(finetune=settings, runtime=runtime)
            for side, run in SIDES.items():
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
    wanted = round(len(examples) * SHARE.get(name, 1.0))
    job = baseline.shorten(job, min(num or wanted, wanted))
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
    lines = ["| task | metric | pairs | bertpipe | Trainer | difference | 95 % interval |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for name, task in facts["tasks"].items():
        low, high = task["interval"]
        medians = task["medians"]
        lines.append(
            f"| {name} | {task['metric']} | {task['pairs']} | {medians['bertpipe']:.3f} | {medians['trainer']:.3f} | "
            f"{task['difference']:+.4f} | {low:+.4f} to {high:+.4f}{'' if task['contains_0'] else ', without 0'} |"
        )
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    """The command line."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("what", choices=("losses", "scores"))
    reader.add_argument("--model", help="a checkpoint's folder")
    reader.add_argument(
        "--data", type=Path, nargs="+", default=[], help="folders that hold TASK/; default: those below BERTPIPE_DATA"
    )
    reader.add_argument("--heads", nargs="+", choices=ROWS, help="of losses")
    reader.add_argument("--steps", type=int, default=STEPS, help="of losses")
    reader.add_argument("--tasks", nargs="+", default=TASKS, help="of scores")
    reader.add_argument("--seeds", type=int, default=10, help="of scores: 1 .. SEEDS")
    reader.add_argument("--epochs", type=int, default=3, help="of scores")
    reader.add_argument("--examples", type=int, help="of scores: training examples at most")
    reader.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of scores, both sides")
    reader.add_argument("--lr", type=float, help="peak learning rate")
    reader.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options = reader.parse_args()
    if options.what == "scores" and not options.model:
        reader.error("scores wants --model FOLDER")
    return options


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    options = read_options()
    torch.set_num_threads(options.threads)
    tr.logging.set_verbosity_error()
    tr.logging.disable_progress_bar()
    right = run_losses(options) if options.what == "losses" else run_scores(options)
    raise SystemExit(0 if right else 1)


if __name__ == "__main__":
    main()
