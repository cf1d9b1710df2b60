"""How fast are batches made: order, packing and masking alone, in one process with one thread?

    python benchmarks/loader_speed.py [--tokens N] [--repeats N]

bertpipe makes masked, packed slots from memory-mapped shards: the permutation of the epoch and the plan are made anew
in every run and counted in. The baseline is what run_mlm does: transformers' DataCollatorForLanguageModeling, given the
same sequences, cut beforehand and held in memory as lists, as many at a time as make a slot (reading them from a
`datasets` table would come on top). The text is drawn at random: a log-normal law of document lengths (median 330
tokens, mean 540) over a vocabulary of 30,522, three in ten pieces continuing a word. Real tokens are counted, padding
is not. Runs alternate; a figure is the median. Prints a table and writes results/loader_speed-<date>.json.
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
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import numpy as np
import torch
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

from bertpipe.artifact import environment
from bertpipe.data.batches import MaskedSlots
from bertpipe.data.masking import MASKINGS, Masking, Vocabulary
from bertpipe.data.order import Order, cut_documents
from bertpipe.data.shards import ShardWriter, TokenShards, write_index

VOCAB_SIZE, SLOT_TOKENS, SLOTS_PER_STEP = 30_522, 8192, 4
SPECIAL_IDS = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
FIRST_WORD = 999
LENGTHS = (128, 512)
BASELINE_TOKENS = 400_000  # of one run: it is slower


def write_shards(folder: Path, tokens: int) -> TokenShards:
    """Shards of random text of about so many tokens."""
    rng = np.random.default_rng(0)
    documents = np.maximum(4, rng.lognormal(5.8, 1.0, max(1, tokens // 544))).astype(np.int64)
    writer = ShardWriter(folder, "train", VOCAB_SIZE, 32_000_000)
    ids = rng.integers(FIRST_WORD, VOCAB_SIZE, int(documents.sum()))
    writer.add(ids, documents, np.stack([documents // 2, documents - documents // 2], 1).ravel())
    continues = rng.random(VOCAB_SIZE) < 0.3
    continues[:FIRST_WORD] = False
    write_index(folder, {"train": writer.close()}, continues, SPECIAL_IDS, sorted(SPECIAL_IDS.values()))
    return TokenShards(folder, "train")


def ours(shards: TokenShards, strategy: str, length: int) -> Callable[[], int]:
    """A run over one epoch; returns its real tokens."""
    special = np.zeros(VOCAB_SIZE, bool)
    special[shards.all_special_ids] = True
    masking = Masking(strategy, 0.15, 0.8, 0.1, Vocabulary(SPECIAL_IDS["mask"], special, shards.continuations))

    def run() -> int:
        order = Order(shards, 0, length, SLOT_TOKENS, SLOTS_PER_STEP)
        source = MaskedSlots(order, masking, 0)
        steps = order.steps_in(0)
        return sum(slot.num_tokens for step in range(steps) for slot in source.slots(step, 0, SLOTS_PER_STEP))

    return run


def write_tokenizer(folder: Path, continues: np.ndarray) -> BertTokenizerFast:
    """A WordPiece tokenizer with that vocabulary."""
    words = [f"##{n}" if continues[n] else f"w{n}" for n in range(VOCAB_SIZE)]
    for name, number in SPECIAL_IDS.items():
        words[number] = f"[{name.upper()}]"
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    return BertTokenizerFast(vocab=str(vocabulary))


def make_examples(shards: TokenShards, length: int, whole_words: bool) -> list[list[dict[str, Any]]]:
    """Batches of sequences as a data set gives them to a collator, each of a slot's length with its padding."""
    pieces = cut_documents(shards, 0, length)
    chosen = np.random.default_rng(1).permutation(len(pieces.length))
    chosen = chosen[: np.searchsorted(np.cumsum(pieces.length[chosen] + 2), BASELINE_TOKENS)]
    text, size = shards.tokens(0), SLOT_TOKENS // length
    batches = []
    for first in range(0, len(chosen), size):
        part = chosen[first : first + size]
        longest = int(pieces.length[part].max()) + 2
        batches.append([])
        for piece in part:
            ids = text[pieces.start[piece] : pieces.start[piece] + pieces.length[piece]].astype(np.int64)
            example: dict[str, Any] = {"input_ids": [SPECIAL_IDS["cls"], *ids.tolist(), SPECIAL_IDS["sep"]]}
            example["special_tokens_mask"] = [1, *[0] * len(ids), 1]
            if whole_words:  # the collator tells words by gaps between offsets
                begins = np.cumsum(1 + ~shards.continuations[ids])
                offsets = [[0, 0], *np.stack([begins, begins + 1], 1).tolist()]
                example["offset_mapping"] = offsets + [[0, 0]] * (longest - len(offsets))
            batches[-1].append(example)
    return batches


def theirs(tokenizer: BertTokenizerFast, shards: TokenShards, strategy: str, length: int) -> Callable[[], int]:
    """A run over some batches; returns its real tokens."""
    whole_words = strategy == "whole_word"
    batches = make_examples(shards, length, whole_words)
    with warnings.catch_warnings():  # it can't show random tokens for whole words, and says so
        warnings.simplefilter("ignore")
        collator = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=whole_words, mlm_probability=0.15)

    def run() -> int:
        return sum(int(collator(batch)["attention_mask"].sum()) for batch in batches)

    return run


def measure(runs: dict[str, Callable[[], int]], repeats: int) -> dict[str, Any]:
    """Tokens/s of each, runs alternating: the median and all values; one run of each goes before."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            tokens = run()
            if number:
                values[name].append(tokens / (time.perf_counter() - started))
    return {name: {"median": statistics.median(rates), "values": rates} for name, rates in values.items()}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--tokens", type=int, default=8_000_000, help="text of an epoch, about")
    reader.add_argument("--repeats", type=int, default=5)
    options = reader.parse_args()
    torch.set_num_threads(1)
    load, rates = os.getloadavg(), {}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), options.tokens)
        tokenizer = write_tokenizer(Path(folder), shards.continuations)
        print(f"{'':<16} {'bertpipe':>14} {'collator':>14}   tokens/s")
        for length in LENGTHS:
            for strategy in MASKINGS:
                runs = {"bertpipe": ours(shards, strategy, length)}
                if strategy != "span":  # the collator has none
                    runs["collator"] = theirs(tokenizer, shards, strategy, length)
                row: dict[str, Any] = measure(runs, options.repeats)
                print(f"{strategy:<10} @{length:<4} " + " ".join(f"{row[name]['median']:>14,.0f}" for name in runs))
                rates[f"{strategy}_{length}"] = row
    machine = {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "load": load}
    today = datetime.date.today().isoformat()
    result = {"date": today, "machine": machine, "versions": environment(), "tokens_per_second": rates}
    result |= {
        f"ratio_{name}_vs_collator": row["bertpipe"]["median"] / row["collator"]["median"]
        for name, row in rates.items()
        if "collator" in row
    }
    target = Path(__file__).parent / "results" / f"loader_speed-{today}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
