"""How many tokens a second does pretraining take in, beside transformers.Trainer on the same machine?

    python benchmarks/pretrain_speed.py                          BERT-base@128, @512, BERT-mini@128
    python benchmarks/pretrain_speed.py bert-small@128 --family roberta --rounds 7

Three sides train the same stock model, from the same weights, on the same text and tokenizer, with the same sequence
length, mask rate, tokens a step, optimizer (fused AdamW, gradients clipped) and threads:

    run_mlm        Trainer as run_mlm sets it: fp32, dropout 0.1, scaled_dot_product_attention
    trainer_best   Trainer at its best: bf16, our dropout, eager or sdpa attention, compiled if faster (--compile)
    bertpipe       the pretrain stage itself: shards, order, masks, loop, record

The micro-batch of both Trainers is swept. Each side is a process of its own that holds still while the others are
measured; a round measures each in turn, from one finished optimizer step to another, data and update included. Real
tokens are counted: padding isn't, special tokens are (ours has two a sequence, run_mlm's rows two a document, so
`text_tokens_per_second`, in the file, is the harsher figure for us). A ratio is the median over the rounds of the two
sides' tokens/s within a round. Prints a table each, at last all ratios as Markdown for the README, and writes
results/pretrain_speed-<date>.json, with one key `ratio_<model>_<length>_vs_<side>` a ratio. Text: Wikipedia of
BERTPIPE_DATA, else the installed packages' docstrings.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Data, Held, machine, measured_run, prepare, real_data, spread, write_result

from bertpipe.config import Config, ModelConfig, RuntimeConfig
from bertpipe.config_files import read_preset

TABLES = ("bert-base@128", "bert-base@512", "bert-mini@128")
SIDES = ("run_mlm", "trainer_best", "bertpipe")
ROUNDS, LONG_ROUNDS = 5, 3  # the latter for a large model at length 512 or more, whose round takes 40 s on 2 cores
LARGE = 40e6  # encoder weights above which a measurement is one step of 4,096 tokens, not two of 8,192


@dataclass(frozen=True)
class Table:
    """One model at one length: what every side is given."""

    name: str
    model: ModelConfig
    length: int
    tokens_per_step: int
    slot_tokens: int
    steps: int
    warmup: int
    rounds: int
    dropout: float
    threads: int
    device: str
    precision: str
    compiling: bool
    data: Data
    rows: Path
    """The grouped data set of both Trainers."""
    work: Path

    @property
    def key(self) -> str:
        """Model and length as in the JSON's keys."""
        return f"{self.name}_{self.length}"

    def config(self, dropout: float) -> Config:
        """The settings of the pretrain stage, and of the model on every side."""
        return measured_run(
            self.model.model_copy(update={"dropout": dropout}),
            self.tokens_per_step,
            RuntimeConfig(root=str(self.work), threads=self.threads, device=self.device),  # type: ignore[arg-type]
            steps=self.warmup + self.rounds * self.steps + 1,
            sequence_length=self.length,
            slot_tokens=self.slot_tokens,
            precision=self.precision,
        )


class Gate:
    """Holds a training loop still between measurements, at the boundaries of optimizer steps.

    `totals` gives running counts: of places, tokens, text tokens and predicted positions at least. A measurement
    carries by how much each grew; the first message, after the warmup, carries `facts` and what the counts make of a
    step. `after` adds to a measurement when its clock has stopped.
    """

    def __init__(
        self,
        connection: Any,
        table: Table,
        totals: Callable[[], dict[str, float]],
        facts: dict[str, Any],
        after: Callable[[], dict[str, float]] = dict,
    ):
        self.connection, self.table, self.totals, self.facts, self.after = connection, table, totals, facts, after

    def boundary(self, done: int) -> None:
        """`done` optimizer steps are finished and no other has begun."""
        since = done - self.table.warmup
        if since < 0 or since % self.table.steps:
            return
        if self.table.device == "cuda":
            import torch

            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        totals = self.totals()
        if since == 0:
            message = self.facts | {"places_per_step": totals["places"] / done}
            message["fill"] = totals["tokens"] / totals["places"]
            message["mask_rate"] = totals["predicted"] / totals["text_tokens"]
        else:
            message = {"seconds": now - self.begun, "cpu_seconds": cpu - self.cpu}
            message |= {name: value - self.before[name] for name, value in totals.items()} | self.after()
        self.connection.send(message)
        if self.connection.recv() != "go":
            raise SystemExit(0)  # in the midst of a loop, which the steps asked for would go on with
        self.before = totals
        self.begun, self.cpu = time.perf_counter(), time.process_time()


def trainer_side(connection: Any, table: Table, side: str) -> None:
    """Child process: a Trainer, tuned, then stepped through the gate."""
    import baseline
    import torch
    import transformers as tr

    from bertpipe.model import encoders

    plain = side == "run_mlm"
    cfg = table.config(0.1 if plain else table.dropout)
    setup = baseline.Setup(
        length=table.length,
        rows_per_step=table.tokens_per_step // table.length,
        device=table.device,
        precision="fp32" if plain else table.precision,
        plain=plain,
        steps=cfg.train.steps,
    )
    attentions = ("sdpa",) if plain else ("sdpa", "eager")
    compiling = table.compiling and not plain
    trainer, setup, trials = baseline.set_up(
        cfg, table.data, table.rows, setup, table.work / side, attentions, compiling
    )
    text = 1 - float(trainer.train_dataset.with_format("numpy")[:]["special_tokens_mask"].mean())

    def totals() -> dict[str, float]:
        tokens, predicted = float(trainer.tokens), float(trainer.predicted)
        return {"places": trainer.places, "tokens": tokens, "text_tokens": tokens * text, "predicted": predicted}

    facts = dataclasses.asdict(setup) | {"trials": trials, "threads": torch.get_num_threads()}
    gate = Gate(connection, table, totals, facts | {"parameters": encoders.count_parameters(trainer.model)})

    class Boundaries(tr.TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            gate.boundary(state.global_step)

    trainer.add_callback(Boundaries())
    trainer.train()


def bertpipe_side(connection: Any, table: Table, side: str) -> None:
    """Child process: the pretrain stage; the gate stands where the loop asks for a step's batches."""
    import torch

    from bertpipe.model import encoders
    from bertpipe.train import flops, loop, pretrain

    assert side == "bertpipe"
    cfg, fit = table.config(table.dropout), loop.fit

    class Gated:
        """A StepSource that counts, and waits at the gate."""

        def __init__(self, objective: Any, source: Any):
            self.source, self.counted = source, flops.count(objective.model)
            names = ("tokens", "text_tokens", "predicted", "places", "model_flops", "data_seconds")
            self.totals = dict.fromkeys(names, 0.0)
            device = torch.device(table.device)
            facts = {
                "slot_tokens": table.slot_tokens,
                "precision": table.precision,
                "threads": torch.get_num_threads(),
                "parameters": encoders.count_parameters(objective.model),
                "vocab_size": objective.model.config.vocab_size,
                "datasheet_flops_per_second": flops.datasheet(device, table.precision),
            }
            self.gate = Gate(connection, table, lambda: dict(self.totals), facts, self.time_matmul)

        def time_matmul(self) -> dict[str, float]:
            device = torch.device(table.device)
            return {"matmul_flops_per_second": flops.time_matmul(device, table.precision, 0.3)}

        def slots(self, step: int, first: int, last: int) -> list[Any]:
            totals = self.totals
            if step:
                self.gate.boundary(step)
            begun = time.perf_counter()
            made = self.source.slots(step, first, last)
            totals["data_seconds"] += time.perf_counter() - begun
            for slot in made:
                totals["tokens"] += slot.num_tokens
                totals["text_tokens"] += slot.num_tokens - 2 * slot.num_sequences
                totals["predicted"] += float(slot.predict_weight.sum())
                totals["places"] += slot.input_ids.numel()
                totals["model_flops"] += self.counted.slot(slot)
            return made

    def gated(objective: Any, source: Any, *rest: Any, **more: Any) -> Any:
        return fit(objective, Gated(objective, source), *rest, **more)

    loop.fit = gated
    inputs = {"tokenizer": table.data.tokenizer, "shards": table.data.shards}
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        pretrain.run(cfg, inputs, table.work / side, {})


class Side(Held):
    """A side's process, as the measuring process sees it."""

    def __init__(self, table: Table, name: str):
        super().__init__(name, bertpipe_side if name == "bertpipe" else trainer_side, table, name)
        print(f"  {name} ready: {_settled(self.facts)}", flush=True)

    def rates(self, count: str = "tokens") -> list[float]:
        """Tokens/s, one a round."""
        return [line[count] / line["seconds"] for line in self.rounds]

    def summary(self, table: Table) -> dict[str, Any]:
        """What goes into the file."""
        facts = self.facts | {"tokens_per_second": spread(self.rates())}
        facts["text_tokens_per_second"] = spread(self.rates("text_tokens"))
        facts["step_seconds"] = spread([line["seconds"] / table.steps for line in self.rounds])
        # 1 where every thread had a core to itself all the time: less means a busy machine (or waiting threads)
        busy = [line["cpu_seconds"] / line["seconds"] / facts["threads"] for line in self.rounds]
        facts["cpu_share"] = spread(busy)
        if "model_flops" in self.rounds[0]:
            rates = self.rates("model_flops")
            share = [rate / line["matmul_flops_per_second"] for rate, line in zip(rates, self.rounds, strict=True)]
            facts["model_flops_per_second"] = spread(rates)
            facts["matmul_flops_per_second"] = spread([line["matmul_flops_per_second"] for line in self.rounds])
            facts["share_of_matmul"] = spread(share)
            if facts["datasheet_flops_per_second"]:
                facts["share_of_datasheet"] = spread([rate / facts["datasheet_flops_per_second"] for rate in rates])
            facts["data_share"] = spread([line["data_seconds"] / line["seconds"] for line in self.rounds])
        return facts


def _settled(facts: dict[str, Any]) -> str:
    names = ("precision", "attention", "micro_batch", "slot_tokens", "compiled", "threads")
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)


def run_table(table: Table) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure all sides; returns the table's facts and its ratios by key."""
    shape = f"{table.tokens_per_step:,} tokens a step, {table.threads} threads, medians of {table.rounds} rounds"
    print(f"\n{table.name}@{table.length}, {shape}", flush=True)
    sides = list[Side]()
    try:
        for name in SIDES:  # each tunes and warms up with the machine to itself
            sides.append(Side(table, name))
        for number in range(table.rounds):
            for side in sides:
                side.measure()
            rates = ", ".join(f"{side.name} {side.rates()[-1]:,.0f}" for side in sides)
            print(f"  round {number + 1}/{table.rounds}, tokens/s: {rates}", flush=True)
    finally:
        for side in sides:
            side.stop()
    _check_equal_work(table, sides)
    ours, ratios = sides[-1], {}
    for side in sides[:-1]:
        pairs = [mine / theirs for mine, theirs in zip(ours.rates(), side.rates(), strict=True)]
        ratios[f"ratio_{table.key}_vs_{side.name}"] = spread(pairs)
    facts = {"tokens_per_step": table.tokens_per_step, "steps": table.steps, "rounds": table.rounds}
    facts |= {"dropout": table.dropout, "sides": {side.name: side.summary(table) for side in sides}}
    _show(table, facts, ratios)
    return facts, ratios


def _check_equal_work(table: Table, sides: list[Side]) -> None:
    """Same parameters, places a step, threads and mask rate, or the ratio would mean nothing."""
    for name in ("parameters", "places_per_step", "threads"):
        values = {side.name: side.facts[name] for side in sides}
        assert len(set(values.values())) == 1, f"{name} differ: {values}"
    predicted = 0.15 * table.tokens_per_step * table.warmup
    slack = 0.004 + 5 * math.sqrt(0.1275 / predicted * 0.15)  # Trainer draws each position by itself
    for side in sides:
        assert abs(side.facts["mask_rate"] - 0.15) < slack, f"{side.name} masks {side.facts['mask_rate']:.3f}"


def _show(table: Table, facts: dict[str, Any], ratios: dict[str, Any]) -> None:
    print(f"\n  {'side':<14}{'tokens/s':>9}{'min - max':>18}{'step s':>8}{'masked':>8}{'CPU':>6}  bertpipe is")
    for name, side in facts["sides"].items():
        rate, ratio = side["tokens_per_second"], ratios.get(f"ratio_{table.key}_vs_{name}")
        line = f"  {name:<14}{rate['median']:>9,.0f}{rate['min']:>9,.0f} - {rate['max']:<6,.0f}"
        line += f"{side['step_seconds']['median']:>8.2f}{side['mask_rate']:>8.1%}{side['cpu_share']['median']:>6.0%}"
        print(line + (f"  {ratio['median']:.2f} x ({ratio['min']:.2f} - {ratio['max']:.2f})" if ratio else ""))
    ours = facts["sides"]["bertpipe"]
    flops, matmul = ours["model_flops_per_second"]["median"] / 1e9, ours["matmul_flops_per_second"]["median"] / 1e9
    card = f" and {ours['share_of_datasheet']['median']:.1%} of the datasheet's" if "share_of_datasheet" in ours else ""
    print(
        f"  bertpipe: {flops:,.1f} G model FLOPs/s, {ours['share_of_matmul']['median']:.1%} of a {ours['precision']} "
        f"matmul's {matmul:,.1f} G{card}; fill {ours['fill']:.2%}, data {ours['data_share']['median']:.2%} of the time",
        flush=True,
    )


def summarise(results: dict[str, Any], ratios: dict[str, Any]) -> str:
    """All ratios as a Markdown table, the one of the README: medians of the rounds (lowest - highest)."""
    lines = ["| | rounds | Trainer as run_mlm sets it | Trainer at its best |", "|---|---:|---:|---:|"]
    for name, table in results.items():
        found = [ratios[f"ratio_{name.replace('@', '_')}_vs_{side}"] for side in SIDES[:-1]]
        cells = [f"{ratio['median']:.1f} x ({ratio['min']:.1f} - {ratio['max']:.1f})" for ratio in found]
        lines.append(f"| {name} | {table['rounds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_family(family: str, preset: str, data: Data, length: int, folder: Path) -> Path:
    """A checkpoint of another family with random weights and the size of a BERT preset; returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from bertpipe.data.shards import TokenShards

    fields, shards = read_preset(preset), TokenShards(data.shards, "train")
    ids, kind = shards.special_ids, type(AutoConfig.for_model(family))
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    given = {kind.attribute_map.get(name, name): fields[name] for name in names}
    if family == "distilbert":
        given["hidden_dim"] = given.pop("intermediate_size")
    special = {"pad_token_id": ids["pad"], "cls_token_id": ids["cls"], "sep_token_id": ids["sep"]}
    special |= {"bos_token_id": ids["cls"], "eos_token_id": ids["sep"]}
    if family == "eurobert":
        special["mask_token_id"] = ids["mask"]
    positions = max(512, length) + ids["pad"] + 1  # roberta counts from the padding's id
    given |= special | {"vocab_size": shards.vocab_size, "max_position_embeddings": positions}
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **given)).save_pretrained(folder)
    return folder


def tables(options: argparse.Namespace, data: Data, work: Path) -> Iterator[Table]:
    """The tables asked for; models and grouped texts are made on the way."""
    import baseline
    import torch
    from transformers import AutoConfig

    from bertpipe.train.place import choose_precision

    device = torch.device(options.device)
    precision = choose_precision(options.precision or "auto", device)
    for number, wanted in enumerate(options.tables):
        preset, _, text = wanted.partition("@")
        fields, length = read_preset(preset), int(text or 128)
        stock = AutoConfig.for_model(**fields)
        large = 12 * stock.num_hidden_layers * stock.hidden_size**2 > LARGE
        tokens = options.tokens_per_step or (4096 if large else 8192)
        slot = options.slot_tokens or min(tokens, 4096)
        if tokens % length or tokens % slot or slot < length:
            raise SystemExit(f"{wanted}: {tokens} tokens a step are no multiple of the length and of slots of {slot}")
        name, model = preset, ModelConfig(preset=preset)
        if options.family not in (None, "bert"):
            if fields["model_type"] != "bert":
                raise SystemExit(f"--family gives a BERT preset's sizes to another family, and {preset} is none")
            name = f"{options.family}-{preset.removeprefix('bert-')}"
            folder = make_family(options.family, preset, data, length, work / name)
            model = ModelConfig(init=str(folder))
        yield Table(
            name=name,
            model=model,
            length=length,
            tokens_per_step=tokens,
            slot_tokens=slot,
            steps=options.steps or (1 if large else 2),
            warmup=options.warmup,
            rounds=options.rounds or (LONG_ROUNDS if large and length >= 512 else ROUNDS),
            dropout=options.dropout,
            threads=options.threads,
            device=options.device,
            precision=precision,
            compiling=options.compile,
            data=data,
            rows=baseline.group(data, "train", length, work / f"rows-{length}"),
            work=work / f"table-{number}",
        )


def read_options() -> argparse.Namespace:
    """The command line."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("tables", nargs="*", default=TABLES, help="PRESET@LENGTH ...: a file of configs/model/")
    reader.add_argument("--family", help="another model family with the sizes of the BERT preset, e.g. roberta")
    reader.add_argument("--rounds", type=int, help=f"{ROUNDS}; {LONG_ROUNDS} for a large model at length 512 or more")
    reader.add_argument("--steps", type=int, help="optimizer steps of one measurement")
    reader.add_argument("--warmup", type=int, default=1, help="optimizer steps of each side before the first round")
    reader.add_argument("--tokens-per-step", type=int, help="4,096 for base and large, else 8,192")
    reader.add_argument("--slot-tokens", type=int, help="of bertpipe; at most 4,096 unless given")
    reader.add_argument("--dropout", type=float, default=0.0, help="of bertpipe and trainer_best")
    reader.add_argument("--precision", choices=("bf16", "fp32"), help="of both; default: bf16 where it is fast")
    reader.add_argument("--compile", action="store_true", help="try torch.compile for trainer_best, too")
    reader.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    reader.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    reader.add_argument("--characters", type=int, default=8_000_000, help="text to read")
    reader.add_argument("--vocab-size", type=int, help="train a vocabulary of this size on it")
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    return reader.parse_args()


def main() -> None:
    options, before, started = read_options(), machine(), time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    results: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder) / "data", real_data(), options.characters, options.vocab_size)
        print(f"text: {data.source}")
        for table in tables(options, data, Path(folder)):
            results[f"{table.name}@{table.length}"], found = run_table(table)
            ratios |= found
    print(f"\n{summarise(results, ratios)}")
    facts = {"threads": options.threads, "device": options.device, "text": data.source}
    facts |= {key: ratio["median"] for key, ratio in ratios.items()}
    facts |= {"ratio_spreads": ratios, "tables": results, "wall_seconds": round(time.monotonic() - started, 1)}
    busy = statistics.median(table["sides"]["bertpipe"]["cpu_share"]["median"] for table in results.values())
    if busy < 0.8:
        print(f"\nnote: our threads had their cores {busy:.0%} of the time; measure on an idle machine")
    write_result("pretrain_speed", before, facts, options.out)


if __name__ == "__main__":
    main()
