"""Does fine-tuning here give the losses that transformers.Trainer gives? Every head, by 50 losses.

    python benchmarks/finetune_losses.py                     on a tiny BERT
    python benchmarks/finetune_losses.py --model FOLDER      from a checkpoint's weights

Both sides in fp32, without dropout, from the same weights and on the same batches, which the stock collators
pad for Trainer. Prints the largest difference of 50 losses, for each head; the aim is 1e-5. A stock model for spans
has its softmax run over the padding as well, so the examples of that head are all of one length. AdamW divides a
gradient that is nothing but rounding by its own size, so at high rates equal losses drift apart: with 3e-3 in place of
1e-3, multiple choice is equal to 2e-7 for 15 steps and 8e-3 apart in the 46th.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune_baseline as baseline
import numpy as np
import torch
import transformers as tr
from common import machine, write_result

from bertpipe.config import RuntimeConfig
from bertpipe.data.batches import Examples, ExampleSlots
from bertpipe.model import encoders
from bertpipe.model.labelled import HEADS_OF
from bertpipe.train import loop
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place
from bertpipe.train.tracking import Record

STEPS, BATCH, SLOTS = 50, 16, 2
BOUND = 1e-5
VOCAB_SIZE = 200  # of the tiny BERT
ORDINARY = 5  # the first id that isn't a special token's, of the tiny BERT


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
    batches = [collate([dict(made[i]) for i in chosen]) for chosen in baseline.orders(source, range(steps), SLOTS)]
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


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--model", help="a checkpoint's folder")
    reader.add_argument("--heads", nargs="+", choices=ROWS)
    reader.add_argument("--steps", type=int, default=STEPS)
    reader.add_argument("--lr", type=float, help="peak learning rate")
    reader.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options = reader.parse_args()
    baseline.settle(options.threads)
    raise SystemExit(0 if run_losses(options) else 1)


if __name__ == "__main__":
    main()
