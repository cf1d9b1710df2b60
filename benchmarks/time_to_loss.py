"""How long does pretraining take to a hold-out loss that transformers.Trainer reaches, on the same machine?

    python benchmarks/time_to_loss.py            up to two hours: five rates of Trainer, then bertpipe
    python benchmarks/time_to_loss.py --quick    some minutes: shows that the script works, no more

First Trainer at its best (bf16, dropout 0, fused AdamW, attention and micro-batch by trial) trains with each of five
learning rates until its hold-out loss is `--margin` nats below the unigram cross-entropy: what a model scores that
knows nothing but word frequencies. A rate that is slower than the fastest so far is stopped there. Then bertpipe, with
its default optimizer at its default rates, trains to the loss that the fastest one had reached. Both start from the
same weights, take the same tokens a step, warm up over the same steps and then hold their rate, since nobody knows
beforehand where the end will be.

The hold-out is cut as Trainer's own rows are (documents strung together), its masks are frozen, and both models are
scored by the same stock forward; bertpipe trains on rows of another shape, so that favours Trainer if either. Clocks
stand still during evaluations and start when the first step does. Last, and apart from the ratio, both once more with
the decoder's bias initialised to the log frequencies of the words, which spares a model the way to the plateau.
Prints a table and writes results/time_to_loss-<date>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import NEVER, Data, machine, prepare, real_data, write_result

from bertpipe.config import Config, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig

RATES = (4e-3, 2e-3, 8e-3, 1e-3, 5e-4)  # likely ones first: whatever is slower is stopped early
STEPS = 20_000  # of a run, at most; more than any reaches in its time


@dataclass(frozen=True)
class Task:
    """One training run to a loss."""

    name: str
    lr: float | None
    """Of Trainer's AdamW; None for bertpipe with its defaults."""
    target: float
    """Hold-out loss to reach, nats."""
    cap_seconds: float
    """Training time after which it is given up."""
    bias: bool
    """Initialise the decoder's bias to the log frequencies."""
    preset: str
    length: int
    tokens_per_step: int
    warmup_steps: int
    eval_every: int
    threads: int
    precision: str
    data: Data
    rows: Path
    heldout: Path
    work: Path

    def config(self) -> Config:
        """Of the pretrain stage; its model section is that of both sides."""
        slot = min(self.tokens_per_step, 4096)
        return Config(
            model=ModelConfig(preset=self.preset, dropout=0.0),
            optim=OptimConfig(schedule="constant", warmup_steps=self.warmup_steps),
            train=TrainConfig(
                steps=STEPS,
                sequence_length=self.length,
                slot_tokens=slot,
                slots_per_step=self.tokens_per_step // slot,
                precision=self.precision,  # type: ignore[arg-type]
                eval_every=NEVER,
                eval_tokens=self.length,
            ),
            runtime=RuntimeConfig(threads=self.threads, device="cpu", checkpoint_every=NEVER, progress=False),
        )


class Watch:
    """Trains until a loss: its clock stands still while the hold-out is scored."""

    def __init__(self, connection: Any, task: Task, batches: list[dict[str, Any]]):
        self.connection, self.task, self.batches = connection, task, batches
        self.seconds, self.begun = 0.0, time.perf_counter()
        self.curve: list[dict[str, float]] = []

    def start(self) -> None:
        """The first step is about to begin."""
        self.begun = time.perf_counter()

    def boundary(self, model: Any, done: int) -> None:
        """After `done` steps; reports and ends the process when the loss is reached or the time is up."""
        if done % self.task.eval_every:
            return
        self.seconds += time.perf_counter() - self.begun
        loss = score(model, self.batches, self.task.precision)
        self.curve.append({"step": done, "seconds": round(self.seconds, 2), "loss": round(loss, 4)})
        last = self.seconds >= self.task.cap_seconds or done + self.task.eval_every >= STEPS
        if loss <= self.task.target or last:
            self.connection.send({"reached": loss <= self.task.target, "curve": self.curve} | self.curve[-1])
            raise SystemExit(0)
        self.begun = time.perf_counter()


def freeze(task: Task) -> tuple[list[dict[str, Any]], float]:
    """The hold-out's batches with frozen masks, and the unigram cross-entropy at their masked positions (nats)."""
    import baseline
    import datasets
    import numpy as np
    import torch
    import transformers as tr

    from bertpipe.data.shards import TokenShards

    dataset = datasets.load_from_disk(task.heldout)
    collator = baseline.make_collator(tr.AutoTokenizer.from_pretrained(task.data.tokenizer))
    torch.manual_seed(0)
    batches = []
    for first in range(0, len(dataset), 32):
        rows = range(first, min(first + 32, len(dataset)))
        batches.append(collator([{key: dataset[row][key] for key in baseline.COLUMNS} for row in rows]))
    counts = TokenShards(task.data.shards, "train").unigrams
    log_q = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches]).numpy()
    return batches, float(-log_q[labels].mean())


def score(model: Any, batches: list[dict[str, Any]], precision: str) -> float:
    """Mean loss of a stock model over frozen batches, nats; the model comes back as it was."""
    import torch

    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for batch in batches:
            chosen = batch["labels"] != -100
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits[chosen].float()
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"][chosen], reduction="sum"))
            count += int(chosen.sum())
    model.set_attn_implementation(implementation)
    model.train(training)
    return total / count


def initialise_bias(model: Any, data: Data) -> None:
    """Set the decoder's bias to the log of the add-one-smoothed word frequencies."""
    import torch

    from bertpipe.data.shards import TokenShards

    counts = torch.from_numpy(TokenShards(data.shards, "train").unigrams).double() + 1
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_((counts / counts.sum()).log())


def trainer_run(connection: Any, task: Task) -> None:
    """Child process: Trainer at one learning rate."""
    import baseline
    import transformers as tr

    assert task.lr is not None
    setup = baseline.Setup(
        length=task.length,
        rows_per_step=task.tokens_per_step // task.length,
        device="cpu",
        precision=task.precision,
        steps=STEPS,
        lr=task.lr,
        warmup_steps=task.warmup_steps,
        schedule="constant_with_warmup",
    )
    watch = Watch(connection, task, freeze(task)[0])  # before the Trainer, whose own seed its masks are drawn from
    trainer, _, _ = baseline.set_up(task.config(), task.data, task.rows, setup, task.work)
    if task.bias:
        initialise_bias(trainer.model, task.data)

    class Boundaries(tr.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            watch.boundary(trainer.model, state.global_step)

    trainer.add_callback(Boundaries())
    trainer.train()


def bertpipe_run(connection: Any, task: Task) -> None:
    """Child process: the pretrain stage, watched where the loop asks for a step's batches."""
    from bertpipe.train import loop, pretrain

    fit = loop.fit

    class Watched:
        def __init__(self, objective: Any, source: Any):
            self.objective, self.source = objective, source
            self.watch = Watch(connection, task, freeze(task)[0])

        def slots(self, step: int, first: int, last: int) -> list[Any]:
            if step:
                self.watch.boundary(self.objective.model, step)
            else:
                self.watch.start()
            return self.source.slots(step, first, last)

    def watched(objective: Any, source: Any, *rest: Any, **more: Any) -> Any:
        if task.bias:
            initialise_bias(objective.model, task.data)
        return fit(objective, Watched(objective, source), *rest, **more)

    loop.fit = watched
    inputs = {"tokenizer": task.data.tokenizer, "shards": task.data.shards}
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        pretrain.run(task.config(), inputs, task.work, {})


def run(task: Task) -> dict[str, Any]:
    """Train in a process of its own; returns whether, when and at which step the loss was reached, and the curve."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=bertpipe_run if task.lr is None else trainer_run, args=(other, task))
    process.start()
    other.close()
    try:
        result = connection.recv()
    except EOFError:
        raise SystemExit(f"{task.name}: its process ended; what went wrong stands above") from None
    process.join()
    outcome = "reached" if result["reached"] else "stopped at"
    print(f"  {task.name:<34}{outcome:<11}{result['loss']:.3f} after {result['seconds']:.1f} s", flush=True)
    return result


def sweep(task: Task, rates: tuple[float, ...]) -> tuple[dict[str, Any], Task | None]:
    """Trainer at every rate; returns all results and the task that was fastest, None where none reached the loss."""
    results, fastest, cap = {}, None, task.cap_seconds
    for lr in rates:
        tried = dataclasses.replace(task, name=f"Trainer, learning rate {lr:g}", lr=lr, cap_seconds=cap)
        results[f"{lr:g}"] = result = run(dataclasses.replace(tried, work=task.work / f"lr-{lr:g}"))
        if result["reached"] and result["seconds"] < cap:
            fastest, cap = tried, result["seconds"]
    return results, fastest


def compare(task: Task, rates: tuple[float, ...], unigram: float) -> dict[str, Any]:
    """Everything, in turn: the sweep, bertpipe to the loss reached, both with the decoder's bias initialised."""
    results, fastest = sweep(task, rates)
    facts: dict[str, Any] = {"unigram_cross_entropy": unigram, "trainer": results}
    if fastest is None:
        print(f"Trainer did not come {unigram - task.target:.2f} nats below the unigram cross-entropy: more minutes?")
        return facts
    best = results[f"{fastest.lr:g}"]
    target = best["loss"]
    cap = 3 * task.cap_seconds
    ours = dataclasses.replace(task, name="bertpipe", lr=None, target=target, cap_seconds=cap, work=task.work / "ours")
    facts |= {"best_lr": fastest.lr, "target_loss": target, "trainer_seconds": best["seconds"], "bertpipe": run(ours)}
    biased = {
        "trainer": dataclasses.replace(fastest, name="Trainer, bias initialised", bias=True, target=target),
        "bertpipe": dataclasses.replace(ours, name="bertpipe, bias initialised", bias=True),
    }
    places = {name: task.work / f"bias-{name}" for name in biased}
    facts["bias_initialised"] = {n: run(dataclasses.replace(t, work=places[n])) for n, t in biased.items()}
    if facts["bertpipe"]["reached"]:
        key = f"ratio_{task.preset}_{task.length}_time_to_loss"
        facts[key] = round(best["seconds"] / facts["bertpipe"]["seconds"], 3)
        print(
            f"\nto {target:.3f} nats ({unigram - target:.2f} below the unigram cross-entropy of {unigram:.3f}): "
            f"Trainer {best['seconds']:.1f} s, bertpipe {facts['bertpipe']['seconds']:.1f} s: {facts[key]:.2f} x"
        )
    return facts


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument(
        "--quick", action="store_true", help="a small vocabulary, two rates, the plateau itself as goal"
    )
    reader.add_argument("--preset", default="bert-tiny", help="a file of configs/model/")
    reader.add_argument("--length", type=int, default=64)
    reader.add_argument("--tokens-per-step", type=int, default=2048)
    reader.add_argument("--vocab-size", type=int, default=2048)
    reader.add_argument("--wikipedia", action="store_true", help="text of BERTPIPE_DATA in place of docstrings")
    reader.add_argument("--characters", type=int, default=60_000_000, help="text to read")
    reader.add_argument("--margin", type=float, default=1.0, help="nats below the unigram cross-entropy to reach")
    reader.add_argument("--minutes", type=float, default=20.0, help="training time of one learning rate, at most")
    reader.add_argument("--eval-every", type=int, default=50)
    reader.add_argument("--eval-rows", type=int, default=400, help="rows of the hold-out that are scored")
    reader.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options, before = reader.parse_args(), machine()
    rates = RATES
    if options.quick:
        small = {"length": 32, "tokens_per_step": 1024, "vocab_size": 300, "characters": 600_000, "margin": 0.0}
        vars(options).update(small | {"minutes": 5.0, "eval_every": 10, "eval_rows": 64})
        rates = (4e-3, 2e-3)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryDirectory() as folder:
        task, unigram = make_task(options, Path(folder))
        print(f"text: {task.data.source}; unigram cross-entropy {unigram:.3f} nats, goal {task.target:.3f} or less")
        facts = compare(task, rates, unigram)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    write_result("time_to_loss", before, {"settings": settings, "text": task.data.source} | facts, options.out)


def make_task(options: argparse.Namespace, work: Path) -> tuple[Task, float]:
    """The data, and what all runs share; with the unigram cross-entropy of the hold-out."""
    import baseline
    import torch

    from bertpipe.train.place import choose_precision

    source = real_data() if options.wikipedia else None
    data = prepare(work / "data", source, options.characters, options.vocab_size)
    task = Task(
        name="",
        lr=None,
        target=-math.inf,
        cap_seconds=60 * options.minutes,
        bias=False,
        preset=options.preset,
        length=options.length,
        tokens_per_step=options.tokens_per_step,
        warmup_steps=100,
        eval_every=options.eval_every,
        threads=options.threads,
        precision=choose_precision("auto", torch.device("cpu")),
        data=data,
        rows=baseline.group(data, "train", options.length, work / "rows"),
        heldout=baseline.group(data, "holdout", options.length, work / "heldout", options.eval_rows),
        work=work / "runs",
    )
    unigram = freeze(task)[1]
    return dataclasses.replace(task, target=unigram - options.margin), unigram


if __name__ == "__main__":
    main()
