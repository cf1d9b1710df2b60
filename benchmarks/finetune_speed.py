"""How long does an epoch of fine-tuning take, beside transformers.Trainer on the same machine?

    python benchmarks/finetune_speed.py --model FOLDER --data FOLDER     SST-2, MRPC, RTE, WNUT-17, a share of each
    python benchmarks/finetune_speed.py --model FOLDER sst2 --sides trainer_best bertpipe     all of SST-2, two sides
    python benchmarks/finetune_speed.py --preset bert-base --model FOLDER mrpc@256            random weights

Three sides train the same stock model, from the same weights, on the same tokens of the same examples, 32 a step, with
the same optimizer (fused AdamW, gradients clipped), dropout and threads:

    run_glue       Trainer as run_glue sets it: every example padded to 128, fp32, examples at random
    trainer_best   Trainer at its best: padded to the longest of a batch, grouped by length, bf16, eager or sdpa
                   attention, whichever is faster, nothing logged
    bertpipe       fine-tuning itself (downstream/finetuning/training.py): its batches, loop and record

TASK@N takes N examples, drawn once for all sides; they are an epoch. Each side is a process of its own that holds still
while the others are measured; a round measures an epoch of each in turn: from asking for its first batch to its last
update. Loading, tokenising and a few steps of warmup come before, scoring the validation split after the last round,
each by itself (`eval_seconds`). A ratio is the median over the rounds of the two sides' seconds within a round.
Grouping by length needs many examples to choose from (Trainer sorts 50 batches at a time, or a quarter of an epoch):
beside trainer_best take as many as there is time for. Prints a table each, at last all ratios as Markdown for the
README, and writes results/finetune_speed-<date>.json, or adds to the one of today.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, Held, machine, spread, write_result

from bertpipe.config import Config, FinetuneConfig, RuntimeConfig

TABLES = ("sst2@1024", "mrpc@512", "rte@512", "wnut17@512")
ROUNDS = 3
TRIAL_STEPS = 6  # of each attention, the first of them to warm up


@dataclass(frozen=True)
class Table:
    """A task: what every side is given."""

    task: str
    num: int | None
    """Training examples; None: all."""
    config: Config
    precision: str
    rounds: int
    work: Path

    def job(self) -> Any:
        """The task's data, tokenized, with `num` training examples."""
        import finetune_baseline as baseline
        import transformers as tr

        from bertpipe.downstream.finetuning import training

        tr.logging.set_verbosity_error()
        tr.logging.disable_progress_bar()
        settings = self.config.finetune
        return baseline.shorten(training.prepare(self.task, settings, str(settings.model)), self.num)


class Gate:
    """Holds a training loop still between epochs, and measures them."""

    def __init__(self, connection: Any, facts: dict[str, Any]):
        self.connection, self.facts, self.word, self.counts = connection, facts, "", dict[str, float]()

    def begin(self) -> None:
        """An epoch is about to begin."""
        if not self.word:
            self.connection.send(self.facts)
        self.word = self.connection.recv()
        if self.word == "stop":
            raise SystemExit(0)  # in the midst of a loop, which the epochs asked for would go on with
        self.counts = dict.fromkeys(("steps", "examples", "tokens", "places"), 0.0)
        self.begun, self.cpu = time.perf_counter(), time.process_time()

    def add(self, examples: int, tokens: float, places: int) -> None:
        """A step's batch: its examples, real tokens, and tokens with padding."""
        for name, number in (("steps", 1), ("examples", examples), ("tokens", tokens), ("places", places)):
            self.counts[name] += number

    def end(self, evaluate: Callable[[], Any]) -> Any:
        """The epoch is over; scores validation if it was asked for."""
        message = self.counts | {"seconds": time.perf_counter() - self.begun}
        message |= {"cpu_seconds": time.process_time() - self.cpu}
        result = None
        if self.word == "evaluate":
            begun = time.perf_counter()
            result = evaluate()
            message["eval_seconds"] = time.perf_counter() - begun
        self.connection.send(message)
        return result


def trainer_side(connection: Any, table: Table, side: str) -> None:
    """Child process: a Trainer, stepped through the gate."""
    import datasets
    import finetune_baseline as baseline
    import torch
    import transformers as tr

    from bertpipe.downstream.finetuning import training
    from bertpipe.model import encoders

    plain, settings = side == "run_glue", table.config.finetune
    torch.set_num_threads(table.config.runtime.threads or 1)
    job = table.job()
    form, parts = baseline.FORMS[job.kind.head], {}
    for split in ("train", job.task.validation):
        parts[split] = baseline.features(job.kind.head, job.encoded[split].examples)
        if plain:  # once, as run_glue's `map` does
            pad = form.collator(job.tokenizer, padding="max_length", max_length=settings.max_length)
            padded = ({name: tensor[0].tolist() for name, tensor in pad([row]).items()} for row in parts[split])
            parts[split] = datasets.Dataset.from_list(list(padded))
    model = training.build(job, settings, "model", 1)
    facts = {"precision": "fp32" if plain else table.precision, "threads": torch.get_num_threads()}
    gate = Gate(connection, facts | {"parameters": encoders.count_parameters(model)})
    recipe = training.recipe(settings, 10**6)
    collate = tr.default_data_collator if plain else form.collator(job.tokenizer)
    more = {} if plain else {"train_sampling_strategy": "group_by_length", "logging_nan_inf_filter": False}

    class Counting(tr.Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **others: Any) -> Any:
            mask = inputs["attention_mask"]
            if gate.word:
                gate.add(len(mask), float(mask.sum()), mask.numel())
            return super().training_step(model, inputs, *rest, **others)

    def run(attention: str, steps: int, callback: tr.TrainerCallback) -> Counting:
        model.set_attn_implementation(attention)
        given = baseline.arguments(
            *(recipe, settings.batch_size, table.work / side),
            max_steps=steps,
            num_train_epochs=table.rounds + 1,
            bf16=not plain and table.precision == "bf16",
            per_device_eval_batch_size=8 if plain else settings.batch_size,
            seed=1,
            **more,
        )
        trainer = Counting(model, given, collate, train_dataset=parts["train"], callbacks=[callback])
        trainer.remove_callback(tr.PrinterCallback)
        callback.trainer = trainer
        trainer.train()
        return trainer

    class Times(tr.TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    class Epochs(tr.TrainerCallback):
        trainer: Any

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            gate.end(lambda: self.trainer.evaluate(parts[job.task.validation]))

    trials = {}
    for attention in ("sdpa",) if plain else ("sdpa", "eager"):
        times = Times()
        run(attention, 2 if plain else TRIAL_STEPS, times)
        trials[attention] = times.ends[-1] - times.ends[0]
    attention = min(trials, key=trials.__getitem__)
    gate.facts |= {"attention": attention, "trials": trials}
    run(attention, -1, Epochs())


def bertpipe_side(connection: Any, table: Table, side: str) -> None:
    """Child process: fine-tuning as the stage does it; the gate stands around the loop's batches and evaluation."""
    import torch

    from bertpipe.downstream.finetuning import training
    from bertpipe.model import encoders
    from bertpipe.train import loop
    from bertpipe.train.place import Place

    assert side == "bertpipe"
    job, fit = table.job(), loop.fit
    place = Place(table.config.runtime, table.precision)

    class Gated:
        """A StepSource that counts, and waits at the gate before each epoch."""

        def __init__(self, source: Any, gate: Gate):
            self.source, self.gate = source, gate

        def slots(self, step: int, first: int, last: int) -> list[Any]:
            if step % self.source.steps_per_epoch == 0:
                self.gate.begin()
            slots = self.source.slots(step, first, last)
            examples = sum(len(slot.example_ids.unique()) for slot in slots)
            self.gate.add(examples, sum(s.num_tokens for s in slots), sum(s.input_ids.numel() for s in slots))
            return slots

    def gated(
        objective: Any, source: Any, optimizer: Any, settings: Any, place: Any, record: Any, evaluate: Any, **more: Any
    ) -> Any:
        facts = {"precision": place.precision, "threads": torch.get_num_threads()}
        gate = Gate(connection, facts | {"parameters": encoders.count_parameters(objective.model)})
        warmup = dataclasses.replace(settings, steps=2, eval_every=10**9)
        fit(objective, source, optimizer, warmup, place, record)
        source = Gated(source, gate)
        fit(*(objective, source, optimizer, settings, place, record), lambda: gate.end(evaluate) or {}, **more)

    loop.fit = gated
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        training.train(table.config, place, job, "model", 1, table.work / side)


SIDES: dict[str, Callable[..., None]] = {
    "run_glue": trainer_side,
    "trainer_best": trainer_side,
    "bertpipe": bertpipe_side,
}


class Side(Held):
    """A side's process, as the measuring process sees it."""

    def __init__(self, table: Table, name: str):
        super().__init__(name, SIDES[name], table, name)
        settled = ", ".join(f"{fact} {self.facts[fact]}" for fact in ("precision", "attention") if fact in self.facts)
        print(f"  {name} ready: {settled}", flush=True)

    def seconds(self) -> list[float]:
        """Of training, one a round."""
        return [line["seconds"] for line in self.rounds]

    def summary(self) -> dict[str, Any]:
        """What goes into the file."""
        last = self.rounds[-1]
        facts = self.facts | {"epoch_seconds": spread(self.seconds())}
        facts |= {name: last[name] for name in ("steps", "examples", "tokens", "eval_seconds")}
        facts["fill"] = last["tokens"] / last["places"]
        # 1 where every thread had a core to itself all the time: less means a busy machine (or waiting threads)
        busy = [line["cpu_seconds"] / line["seconds"] / facts["threads"] for line in self.rounds]
        return facts | {"cpu_share": spread(busy)}


def run_table(table: Table, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the sides; returns the table's facts, and bertpipe's ratios to the others by name."""
    print(f"\n{table.task}, {table.config.runtime.threads} threads, medians of {table.rounds} rounds", flush=True)
    sides = list[Side]()
    try:
        for name in names:  # each warms up with the machine to itself
            sides.append(Side(table, name))
        for number in range(table.rounds):
            for side in sides:
                side.measure("evaluate" if number + 1 == table.rounds else "go")
            seconds = ", ".join(f"{side.name} {side.seconds()[-1]:,.1f}" for side in sides)
            print(f"  round {number + 1}/{table.rounds}, seconds: {seconds}", flush=True)
    finally:
        for side in sides:
            side.stop()
    for name in ("parameters", "threads", "steps", "examples", "tokens"):  # or the ratio would mean nothing
        values = {side.name: (side.facts | side.rounds[-1])[name] for side in sides}
        assert len(set(values.values())) == 1, f"{name} differ: {values}"
    ours, ratios = next(side for side in sides if side.name == "bertpipe"), {}
    for side in sides:
        if side is not ours:
            pairs = [theirs / mine for mine, theirs in zip(ours.seconds(), side.seconds(), strict=True)]
            ratios[side.name] = spread(pairs)
    facts = {"rounds": table.rounds, "sides": {side.name: side.summary() for side in sides}, "ratios": ratios}
    _show(facts)
    return facts, ratios


def _show(facts: dict[str, Any]) -> None:
    ours = facts["sides"]["bertpipe"]
    print(f"\n  an epoch of {ours['examples']:,.0f} examples, {ours['tokens'] / ours['examples']:.1f} tokens each")
    print(f"  {'side':<14}{'seconds':>9}{'min - max':>18}{'fill':>7}{'CPU':>6}{'scoring s':>11}  bertpipe is")
    for name, side in facts["sides"].items():
        took, ratio = side["epoch_seconds"], facts["ratios"].get(name)
        line = f"  {name:<14}{took['median']:>9,.1f}{took['min']:>9,.1f} - {took['max']:<6,.1f}{side['fill']:>7.0%}"
        line += f"{side['cpu_share']['median']:>6.0%}{side['eval_seconds']:>11,.1f}"
        print(line + (f"  {ratio['median']:.2f} x ({ratio['min']:.2f} - {ratio['max']:.2f})" if ratio else ""))


def summarise(tables: dict[str, Any]) -> str:
    """All ratios as a Markdown table, the one of the README: medians of the rounds (lowest - highest)."""
    lines = ["| | rounds | Trainer as run_glue sets it | Trainer at its best |", "|---|---:|---:|---:|"]
    for name, table in tables.items():
        found = [table["ratios"].get(side) for side in ("run_glue", "trainer_best")]
        cells = [f"{r['median']:.1f} x ({r['min']:.1f} - {r['max']:.1f})" if r else "" for r in found]
        lines.append(f"| {name} | {table['rounds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_checkpoint(preset: str, model: str, folder: Path) -> str:
    """A model of a preset with random weights, beside the tokenizer of another checkpoint; returns its folder."""
    import torch
    import transformers as tr

    from bertpipe.config_files import read_preset

    tokenizer = tr.AutoTokenizer.from_pretrained(model)
    fields = read_preset(preset) | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    tr.AutoModel.from_config(tr.AutoConfig.for_model(**fields)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_options() -> argparse.Namespace:
    """The command line."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("tables", nargs="*", default=TABLES, help="TASK or TASK@EXAMPLES")
    reader.add_argument("--model", required=True, help="a checkpoint's folder")
    reader.add_argument("--preset", help="in place of its weights random ones of this preset; its tokenizer stays")
    reader.add_argument(
        "--data", type=Path, nargs="+", default=[], help="folders with TASK/; else those below BERTPIPE_DATA"
    )
    reader.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    reader.add_argument("--rounds", type=int, default=ROUNDS)
    reader.add_argument("--batch-size", type=int, default=32)
    reader.add_argument("--max-length", type=int, default=128)
    reader.add_argument("--dropout", type=float, help="of all sides; default: the checkpoint's")
    reader.add_argument("--precision", choices=("bf16", "fp32"), help="of the last two; default: bf16 where it is fast")
    reader.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options = reader.parse_args()
    if "bertpipe" not in options.sides:
        reader.error("--sides: one of them is bertpipe")
    return options


def main() -> None:
    options, before, started = read_options(), machine(), time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    import finetune_baseline as baseline
    import torch

    from bertpipe.train.place import choose_precision

    precision = choose_precision(options.precision or "auto", torch.device("cpu"))
    today = (options.out or RESULTS) / f"finetune_speed-{datetime.date.today().isoformat()}.json"
    tables: dict[str, Any] = json.loads(today.read_text())["tables"] if today.is_file() else {}
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_checkpoint(options.preset, options.model, work / "model") if options.preset else options.model
        for number, wanted in enumerate(options.tables):
            task, _, num = wanted.partition("@")
            settings = FinetuneConfig(
                tasks=task,
                model=model,
                data=str(baseline.find_data(task, options.data)),
                epochs=options.rounds + 1,
                batch_size=options.batch_size,
                max_length=options.max_length,
                dropout=options.dropout,
            )
            runtime = RuntimeConfig(device="cpu", threads=options.threads, progress=False)
            config = Config(finetune=settings, runtime=runtime)
            table = Table(task, int(num) if num else None, config, precision, options.rounds, work / str(number))
            name = f"{options.preset or Path(options.model).name} {wanted}"
            tables[name], _ = run_table(table, options.sides)
            tables[name] |= {"load": os.getloadavg(), "dropout": options.dropout, "batch_size": options.batch_size}
            measured.append(tables[name])
    print(f"\n{summarise(tables)}")
    busy = statistics.median(table["sides"]["bertpipe"]["cpu_share"]["median"] for table in measured)
    if busy < 0.8:
        print(f"\nnote: our threads had their cores {busy:.0%} of the time; measure on an idle machine")
    facts = {f"ratio_{name}_vs_{side}": r["median"] for name, t in tables.items() for side, r in t["ratios"].items()}
    facts |= {"tables": tables, "wall_seconds": round(time.monotonic() - started, 1)}
    write_result("finetune_speed", before, facts, options.out)


if __name__ == "__main__":
    main()
