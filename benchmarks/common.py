"""What the benchmarks share: text and its artifacts, a spread of measurements, the machine, the dated file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bertpipe.artifact import environment, processor, write_json
from bertpipe.config import (
    Config,
    CorpusConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TokenizerConfig,
    TrainConfig,
)
from bertpipe.pipeline import Pipeline
from bertpipe.train import loop, pretrain

RESULTS = Path(__file__).parent / "results"
NEVER = 10**9  # steps between two of what must not happen while something is measured


class Data(NamedTuple):
    """Artifacts made of one text, which both sides read, and where the text came from."""

    corpus: Path
    tokenizer: Path
    shards: Path
    source: str


def real_data() -> Path | None:
    """The folder BERTPIPE_DATA names, if it has a corpus."""
    folder = os.environ.get("BERTPIPE_DATA")
    return Path(folder) if folder and list(Path(folder).glob("corpus/enwiki-train-*.parquet")) else None


def read_text(folder: Path | None) -> Iterator[str]:
    """Documents: Wikipedia's of `folder`, else the docstrings of the installed packages, those of a file together."""
    if folder is None:
        from bertpipe.data.docstrings import read_docstrings

        for _, docstrings in itertools.groupby(read_docstrings(), lambda docstring: docstring.file):
            yield "\n".join(docstring.text for docstring in docstrings)
        return
    import pyarrow.parquet as parquet

    for path in sorted(folder.glob("corpus/enwiki-train-*.parquet")):
        for group in parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
            yield from group.column(0).to_pylist()


def prepare(work: Path, folder: Path | None, characters: int, vocab_size: int | None = None) -> Data:
    """Corpus, tokenizer and shards of the first `characters` of the text of `folder`, by the stages of bertpipe.

    With `vocab_size` None the published vocabulary of BERT where `folder` has it, else one of 30,522 trained here.
    """
    text = work / "text.jsonl"
    published = folder / "vocab" / "bert-base-uncased-vocab.txt" if folder and vocab_size is None else None
    adopt = str(published) if published is not None and published.is_file() else None
    source = "English Wikipedia" if folder else "docstrings of the installed Python packages"
    cfg = Config(
        corpus=CorpusConfig(sources=str(text), holdout=0.05),
        tokenizer=TokenizerConfig(adopt=adopt, vocab_size=vocab_size or 30_522),
        runtime=RuntimeConfig(root=str(work / "runs"), progress=False),
    )
    if not text.is_file():
        work.mkdir(parents=True, exist_ok=True)
        room, documents = characters, read_text(folder)
        with text.with_suffix(".part").open("w", encoding="utf-8") as file:
            while room > 0 and (document := next(documents, None)) is not None:
                file.write(json.dumps({"text": document}) + "\n")
                room -= len(document)
        text.with_suffix(".part").rename(text)
    pipeline = Pipeline(cfg)
    for stage in ("corpus", "tokenizer", "shards"):
        pipeline.run(stage)
    return Data(*(pipeline.locate(stage) for stage in ("corpus", "tokenizer", "shards")), source)


def measured_run(model: ModelConfig, tokens_per_step: int, runtime: RuntimeConfig, **train: Any) -> Config:
    """The pretrain stage as speed is measured on it: AdamW, 15 % masked, the least of evaluations."""
    slots = tokens_per_step // train["slot_tokens"]
    return Config(
        model=model,
        masking=MaskingConfig(probability=0.15),
        optim=OptimConfig(name="adamw", lr=1e-4, warmup_steps=10),
        train=TrainConfig(slots_per_step=slots, eval_tokens=train["sequence_length"], **train),
        runtime=runtime.model_copy(update={"checkpoint_every": NEVER, "progress": False}),
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves, to six digits."""
    short = [float(f"{value:.6g}") for value in values]
    return {"median": statistics.median(short), "min": min(short), "max": max(short), "values": short}


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    cores = len(os.sched_getaffinity(0))
    return {"system": platform.platform(), "processor": processor(), "cores": cores, "load": os.getloadavg()}


class EnoughError(Exception):
    """All rounds are measured."""


class Windows:
    """A StepSource that cuts a run's steps into windows of equal length and times them.

    In one of each pair of neighbours, by turns the first and the second, something is done beside training: `begin`,
    called with the step and whether it is this one, starts it, and `end` waits for what it left, so that its cost stays
    in its window; also before the first.
    """

    def __init__(self, source: Any, options: Any, begin: Callable[[int, bool], None], end: Callable[[], None]):
        """`options`: `warmup` steps before the first window, `steps` of a window, `rounds` of pairs."""
        self.source, self.options, self.begin, self.end = source, options, begin, end
        self.begun, self.doing = 0.0, False
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def slots(self, step: int, first: int, last: int) -> list[Any]:
        """The batch of a step; whatever came before it is finished."""
        window, within = divmod(step - self.options.warmup, self.options.steps)
        if window >= 0 and within == 0:
            self._turn(step, window)
        return self.source.slots(step, first, last)

    def _turn(self, step: int, window: int) -> None:
        """End a window, begin the next."""
        self.end()
        if window > 0:
            self.seconds[self.doing].append(time.perf_counter() - self.begun)
            if window % 2 == 0:
                cost = self.seconds[True][-1] - self.seconds[False][-1]
                print(f"  round {window // 2}/{self.options.rounds}: {cost:+.2f} s", flush=True)
        if window == 2 * self.options.rounds:
            raise EnoughError
        self.doing = window % 4 in (0, 3)
        self.begun = time.perf_counter()
        self.begin(step, self.doing)

    def costs(self) -> list[float]:
        """Seconds that the deed took off training, of each pair."""
        return [done - plain for done, plain in zip(self.seconds[True], self.seconds[False], strict=True)]


def window_options(about: str | None, preset: str, sizes: dict[str, int], quick: dict[str, int]) -> argparse.Namespace:
    """What the command line says of a run in windows: `sizes` are the defaults of --slot-tokens, --tokens-per-step,
    --steps and --warmup, `quick` those that --quick has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=preset)
    parser.add_argument("--length", type=int, default=128)
    for name, what in (
        ("slot_tokens", "of a slot"),
        ("tokens_per_step", "of a step"),
        ("steps", "steps of a window"),
        ("warmup", "steps before the first window"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=sizes[name], help=what)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of windows")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--characters", type=int, default=2_000_000)
    parser.add_argument("--vocab-size", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="bert-tiny, small steps, 2 rounds")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file instead of results/")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.length, options.rounds = "bert-tiny", 32, 2
        options.characters, options.vocab_size = 600_000, 300
        vars(options).update(quick)
    return options


def num_steps(options: Any) -> int:
    """Steps of a run in windows."""
    return options.warmup + 2 * options.rounds * options.steps + 1


def pretrain_by(fit: Callable[..., Any], cfg: Config, data: Data, out: Path) -> None:
    """The pretrain stage with `fit` in place of the loop's, until it ends or has enough."""
    original = loop.fit
    loop.fit = fit
    try:
        with contextlib.suppress(EnoughError):
            pretrain.run(cfg, {"tokenizer": data.tokenizer, "shards": data.shards}, out, {})
    finally:
        loop.fit = original


class Held:
    """A process that holds still while others are measured: it sends facts when it is ready, then a measurement each
    time it is told to go."""

    def __init__(self, name: str, target: Callable[..., None], *given: Any):
        context = multiprocessing.get_context("spawn")
        self.name, self.rounds = name, list[dict[str, Any]]()
        self.connection, other = context.Pipe()
        self.process = context.Process(target=target, args=(other, *given))
        self.process.start()
        other.close()
        self.facts = self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: its process ended; what went wrong stands above") from None

    def measure(self, word: str = "go") -> None:
        """One measurement, asked for with `word`."""
        self.connection.send(word)
        self.rounds.append(self._receive())

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send("stop")
        self.process.join()


def write_result(name: str, before: dict[str, Any], facts: dict[str, Any], folder: Path | None = None) -> Path:
    """Write <name>-<date>.json with machine and versions; `before` is `machine()` at the start, `folder` results/."""
    today = datetime.date.today().isoformat()
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{today}.json"
    facts = {"date": today, "machine": before | {"load_after": os.getloadavg()}, "versions": environment()} | facts
    write_json(target, facts)
    print(f"written: {target}")
    return target
