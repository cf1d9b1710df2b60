"""How much faster do two processes of one thread each pretrain than one process of one thread? What does exact cost?

    python benchmarks/processes_speed.py          BERT-mini@128, 65,536 tokens a step, 5 rounds: about 3 minutes
    python benchmarks/processes_speed.py --quick  a toy model; only to see that it runs

All sides are started by torchrun (gloo on CPU) and run the pretrain stage itself, on the same steps of the same order:
with two processes each has half of a step's slots, and their gradients are summed, by DistributedDataParallel
(`train.reduction: fast`) or in the fixed tree (`exact`). Each side holds still while another is measured, from one
finished optimizer step to another; a round measures all. Ratios are of two sides' seconds for the same steps; medians
over the rounds are `ratio_two_processes_vs_one` (fast; aim: 1.8) and `price_of_exact` (exact over fast, less 1; aim: at
most 0.15). Prints a table and writes results/processes_speed-<date>.json. Text: Wikipedia of BERTPIPE_DATA, else the
installed packages' docstrings. Wants two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from common import Data, machine, measured_run, prepare, real_data, spread, write_result

from bertpipe.config import Config, ModelConfig, RuntimeConfig

SIDES = {"one": (1, "fast"), "two": (2, "fast"), "exact": (2, "exact")}


class EnoughError(Exception):
    """All rounds are measured."""


def make_config(options: argparse.Namespace, work: Path, reduction: str) -> Config:
    """Settings of the pretrain stage on a side."""
    return measured_run(
        ModelConfig(preset=options.preset, dropout=0.0),
        options.tokens_per_step,
        RuntimeConfig(root=str(work), threads=1, device="cpu"),
        steps=options.warmup + options.rounds * options.steps + 1,
        sequence_length=options.length,
        slot_tokens=options.slot_tokens,
        reduction=reduction,
    )


def child(plan_file: Path) -> NoReturn:
    """One process of a side, which it ends: the pretrain stage, held where its loop asks for a step's batches."""
    import torch.distributed as dist

    from bertpipe.train import loop, pretrain

    plan = json.loads(plan_file.read_text())
    cfg, out = Config.model_validate(plan["config"]), Path(plan["out"])
    last = plan["warmup"] + plan["rounds"] * plan["steps"]
    main = os.environ["RANK"] == "0"
    if main:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(plan["socket"])
        lines = channel.makefile("rw")
    fit = loop.fit

    class Gated:
        """A StepSource that waits at the boundaries of measurements."""

        def __init__(self, source: Any):
            self.source, self.begun, self.cpu, self.before = source, 0.0, 0.0, 0

        def slots(self, step: int, first: int, last_slot: int) -> list[Any]:
            if step >= plan["warmup"] and (step - plan["warmup"]) % plan["steps"] == 0:
                if main:
                    self.report(step)
                if step == last:
                    raise EnoughError
                if dist.is_initialized():
                    dist.barrier()
            return self.source.slots(step, first, last_slot)

        def report(self, step: int) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            tokens = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]  # of all processes
            facts = {"seconds": now - self.begun, "cpu_seconds": cpu - self.cpu, "tokens": tokens - self.before}
            lines.write(json.dumps(facts) + "\n")
            lines.flush()
            if step < last:
                lines.readline()  # go
            self.before, self.begun, self.cpu = tokens, time.perf_counter(), time.process_time()

    def gated(objective: Any, source: Any, *rest: Any, **more: Any) -> Any:
        return fit(objective, Gated(source), *rest, **more)

    loop.fit = gated
    try:
        pretrain.run(cfg, {name: Path(path) for name, path in plan["inputs"].items()}, out, {})
    except EnoughError:
        os._exit(0)  # as cli.main does where there are several
    raise AssertionError("the run is longer than its measurements")


class Side:
    """A launch of some processes, as the measuring process sees it."""

    def __init__(self, name: str, options: argparse.Namespace, data: Data, work: Path):
        self.name, self.rounds = name, list[dict[str, float]]()
        folder = work / name
        folder.mkdir()
        plan = {key: getattr(options, key) for key in ("warmup", "rounds", "steps")}
        processes, reduction = SIDES[name]
        plan |= {"config": make_config(options, folder, reduction).model_dump(mode="json"), "out": str(folder / "run")}
        plan |= {"inputs": {"tokenizer": str(data.tokenizer), "shards": str(data.shards)}}
        plan["socket"] = str(folder / "s")
        (folder / "plan.json").write_text(json.dumps(plan))
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(plan["socket"])
        listening.listen(1)
        listening.settimeout(1.0)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*launch, __file__, "--child", str(folder / "plan.json")]
        self.process = subprocess.Popen(command, env=environment)
        while True:
            try:
                self.lines = listening.accept()[0].makefile("rw")
                break
            except TimeoutError:
                if self.process.poll() is not None:
                    raise SystemExit(f"{name}: its processes ended; what went wrong stands above") from None
        self._receive()  # warm

    def _receive(self) -> dict[str, float]:
        line = self.lines.readline()
        if not line:
            raise SystemExit(f"{self.name}: its processes ended; what went wrong stands above")
        return json.loads(line)

    def measure(self) -> None:
        """One measurement."""
        self.lines.write("go\n")
        self.lines.flush()
        self.rounds.append(self._receive())

    def stop(self) -> None:
        """See the processes end; they do after the last measurement."""
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()

    def summary(self, steps: int) -> dict[str, Any]:
        """What goes into the file."""
        return {
            "processes": SIDES[self.name][0],
            "reduction": SIDES[self.name][1],
            "tokens": [line["tokens"] for line in self.rounds],
            "tokens_per_second": spread([line["tokens"] / line["seconds"] for line in self.rounds]),
            "step_seconds": spread([line["seconds"] / steps for line in self.rounds]),
            "cpu_share": spread([line["cpu_seconds"] / line["seconds"] for line in self.rounds]),
        }


def measure(options: argparse.Namespace, data: Data, work: Path) -> dict[str, Any]:
    """All sides in turns; their figures and ratios."""
    sides = list[Side]()
    try:
        for name in SIDES:  # each warms up with the machine to itself
            sides.append(Side(name, options, data, work))
        for number in range(options.rounds):
            for side in sides:
                side.measure()
            rates = ", ".join(
                f"{side.name} {s['tokens'] / s['seconds']:,.0f}" for side in sides for s in side.rounds[-1:]
            )
            print(f"  round {number + 1}/{options.rounds}, tokens/s: {rates}", flush=True)
    except BaseException:
        for side in sides:
            side.process.terminate()
        raise
    finally:
        for side in sides:
            side.stop()
    tokens = [[line["tokens"] for line in side.rounds] for side in sides]
    assert tokens[0] == tokens[1] == tokens[2], f"not the same steps: {tokens}"
    one, two, exact = ([line["seconds"] for line in side.rounds] for side in sides)
    ratio = spread([a / b for a, b in zip(one, two, strict=True)])
    price = spread([c / b - 1 for b, c in zip(two, exact, strict=True)])
    facts = {"ratio_two_processes_vs_one": ratio["median"], "ratio_spread": ratio}
    facts |= {"price_of_exact": price["median"], "price_spread": price}
    return facts | {"sides": {side.name: side.summary(options.steps) for side in sides}}


def show(facts: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{'processes':<18}{'tokens/s':>9}{'min - max':>18}{'step s':>9}{'CPU':>7}")
    for side in facts["sides"].values():
        rate = side["tokens_per_second"]
        name = f"{side['processes']}, {side['reduction']}"
        line = f"{name:<18}{rate['median']:>9,.0f}{rate['min']:>9,.0f} - {rate['max']:<6,.0f}"
        print(line + f"{side['step_seconds']['median']:>9.2f}{side['cpu_share']['median']:>7.0%}")
    ratio = facts["ratio_spread"]
    busy = min(side["cpu_share"]["median"] for side in facts["sides"].values())
    if busy < 0.8:
        print(f"note: a process had its core {busy:.0%} of the time; measure on an idle machine")
    print(f"two processes are {ratio['median']:.2f} x one ({ratio['min']:.2f} - {ratio['max']:.2f})")
    price = facts["price_spread"]
    print(f"exact costs {price['median']:+.1%} of a step of two ({price['min']:+.1%} to {price['max']:+.1%})")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--quick", action="store_true", help="a toy model and two rounds")
    reader.add_argument("--preset", default="bert-mini", help="a file of configs/model/")
    reader.add_argument("--length", type=int, default=128)
    reader.add_argument("--tokens-per-step", type=int, default=65_536)
    reader.add_argument("--slot-tokens", type=int, default=8_192)
    reader.add_argument("--rounds", type=int, default=5)
    reader.add_argument("--steps", type=int, default=1, help="optimizer steps of one measurement")
    reader.add_argument("--warmup", type=int, default=1, help="optimizer steps of each side before the first round")
    reader.add_argument("--characters", type=int, default=4_000_000, help="text to read")
    reader.add_argument("--vocab-size", type=int, help="train a vocabulary of this size on it")
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    reader.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options, before, started = reader.parse_args(), machine(), time.monotonic()
    if options.child:
        child(options.child)
    if options.quick:
        small = {"preset": "bert-tiny", "length": 32, "tokens_per_step": 2048, "slot_tokens": 256, "rounds": 2}
        vars(options).update(small | {"characters": 600_000, "vocab_size": 300})
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder) / "data", real_data(), options.characters, options.vocab_size)
        print(f"text: {data.source}; {options.preset}@{options.length}, {options.tokens_per_step:,} tokens a step")
        facts = measure(options, data, Path(folder))
    show(facts)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "child")}
    facts = {"settings": settings, "text": data.source} | facts
    write_result("processes_speed", before, facts | {"wall_seconds": round(time.monotonic() - started, 1)}, options.out)


if __name__ == "__main__":
    main()
