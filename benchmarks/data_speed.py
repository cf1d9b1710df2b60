"""How fast is the shards stage against tokenizers' encode_batch_fast on the same text?

    python benchmarks/data_speed.py [--characters N] [--repeats N]

The stage reads the corpus (parquet), splits sentences, tokenizes, and writes tokens, documents, sentences and unigrams,
on all cores. The baseline is `Tokenizer.encode_batch_fast` alone, on all cores (its own threads), on the same cleaned
documents, 1,000 at a time, already in memory; what it returns is thrown away. The text is English Wikipedia where
BERTPIPE_DATA names it, with BERT's published vocabulary; else the documentation of the installed Python packages, with
a vocabulary trained on it. Both give the same tokens, and that is checked. Runs alternate; a figure is the median.
Prints a table and writes results/data_speed-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bertpipe.artifact import environment
from bertpipe.config import Config, CorpusConfig, RuntimeConfig, TokenizerConfig
from bertpipe.data import shards
from bertpipe.data.corpus import SPLITS, list_parts
from bertpipe.data.tokenizer import load
from bertpipe.pipeline import Pipeline


def write_text(target: Path, folder: Path, characters: int) -> None:
    """The first so many characters of the training files below `folder`, a JSON line a document."""
    import pyarrow.parquet as pq

    with target.open("w", encoding="utf-8") as file:
        for path in sorted(folder.glob("corpus/enwiki-train-*.parquet")):
            for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
                file.write(json.dumps({"text": text}) + "\n")
                characters -= len(text)
                if characters <= 0:
                    return


def make_config(work: Path, characters: int) -> tuple[Config, str]:
    """Settings of the stages, and what the text is."""
    runtime = RuntimeConfig(root=str(work / "runs"), progress=False)
    real = os.environ.get("BERTPIPE_DATA")
    if not real:
        return Config(runtime=runtime), "documentation of the installed Python packages"
    write_text(work / "text.jsonl", Path(real), characters)
    corpus = CorpusConfig(sources=str(work / "text.jsonl"))
    tokenizer = TokenizerConfig(adopt=str(Path(real) / "vocab" / "bert-base-uncased-vocab.txt"))
    return Config(corpus=corpus, tokenizer=tokenizer, runtime=runtime), "English Wikipedia"


def read_documents(corpus: Path) -> list[str]:
    """Every document, as the stage reads them."""
    import pyarrow.parquet as pq

    parts = [part for split in SPLITS for part in list_parts(corpus, split)]
    return [text for part in parts for text in pq.read_table(part, columns=["text"])["text"].to_pylist()]


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--characters", type=int, default=40_000_000, help="of Wikipedia, about")
    reader.add_argument("--repeats", type=int, default=5)
    options = reader.parse_args()
    load_before = os.getloadavg()
    seconds: dict[str, list[float]] = {"shards_stage": [], "encode_batch_fast": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cfg, source = make_config(work, options.characters)
        pipeline = Pipeline(cfg)
        for stage in ("corpus", "tokenizer"):
            pipeline.run(stage)
        inputs = {name: pipeline.locate(name) for name in ("corpus", "tokenizer")}
        texts, tokenizer = read_documents(inputs["corpus"]), load(inputs["tokenizer"])
        size = sum(len(text.encode()) for text in texts)
        tokens: dict[str, int] = {}
        for number in range(options.repeats):
            (work / str(number)).mkdir()
            counts: dict[str, Any] = {}
            started = time.perf_counter()
            shards.run(cfg, inputs, work / str(number), counts)
            seconds["shards_stage"].append(time.perf_counter() - started)
            tokens["shards_stage"] = sum(counts[split]["tokens"] for split in SPLITS)
            started = time.perf_counter()
            tokens["encode_batch_fast"] = 0
            for first in range(0, len(texts), 1000):
                encoded = tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
                tokens["encode_batch_fast"] += sum(map(len, encoded))
            seconds["encode_batch_fast"].append(time.perf_counter() - started)
    assert tokens["shards_stage"] == tokens["encode_batch_fast"], tokens
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<18} {size / median / 1e6:>6.2f} MB/s {tokens[name] / median:>12,.0f} tokens/s")
    ratio = medians["encode_batch_fast"] / medians["shards_stage"]
    print(f"the stage runs at {ratio:.2f} of the speed of encode_batch_fast")
    machine = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "load": load_before}
    today = datetime.date.today().isoformat()
    result = {"date": today, "machine": machine, "versions": environment(), "text": source, "bytes": size}
    result |= {"tokens": tokens["shards_stage"], "seconds": seconds, "ratio_shards_stage_vs_encode_batch_fast": ratio}
    target = Path(__file__).parent / "results" / f"data_speed-{today}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
