"""The baseline of fine-tuning: transformers.Trainer on the very tokens, labels and model that bertpipe trains on.

What a form of task needs for that is a row of FORMS: examples as Trainer wants them, the stock collator, and the logits
that it predicts laid out as bertpipe's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tr

from bertpipe.data.batches import Examples, ExampleSlots
from bertpipe.downstream.finetuning import training
from bertpipe.downstream.tasks.kind import Outputs
from bertpipe.model.labelled import Labelled
from bertpipe.train.optim import Recipe

Feature = dict[str, Any]
IGNORED = -100  # the label that stock losses pass over


def _sequence(examples: Examples, i: int) -> Feature:
    feature = _tokens(examples, i)
    if examples.labels is not None:
        feature["labels"] = np.asarray(examples.labels[i]).tolist()
    return feature


def _labelled_tokens(examples: Examples, i: int) -> Feature:
    feature = _tokens(examples, i)
    assert examples.positions is not None
    if examples.labels is not None:
        labels = np.full(len(examples.input_ids[i]), IGNORED)
        labels[examples.positions[i]] = examples.labels[i]
        feature["labels"] = labels.tolist()
    return feature


def _span(examples: Examples, i: int) -> Feature:
    feature = _tokens(examples, i)
    if examples.labels is not None:
        feature["start_positions"], feature["end_positions"] = np.asarray(examples.labels[i]).tolist()
    return feature


def _choices(examples: Examples, i: int) -> Feature:
    rows = [_tokens(examples, i * examples.choices + choice) for choice in range(examples.choices)]
    feature: Feature = {name: [row[name] for row in rows] for name in rows[0]}
    feature["labels"] = 0 if examples.labels is None else int(examples.labels[i])
    return feature


def _tokens(examples: Examples, sequence: int) -> Feature:
    ids = examples.input_ids[sequence].tolist()
    return {
        "input_ids": ids,
        "token_type_ids": examples.token_type_ids[sequence].tolist(),
        "attention_mask": [1] * len(ids),
    }


def _at_positions(logits: Any, examples: Examples) -> list[np.ndarray]:
    assert examples.positions is not None
    return [row[positions] for row, positions in zip(logits, examples.positions, strict=True)]


def _both_ends(logits: Any, examples: Examples) -> list[np.ndarray]:
    rows = np.stack(logits, -1)
    return [row[: len(ids)] for row, ids in zip(rows, examples.input_ids, strict=True)]


@dataclass(frozen=True)
class Form:
    """How Trainer is given the examples of a head."""

    feature: Callable[[Examples, int], Feature]
    """An example, not padded."""
    collator: Callable[[Any], Any]
    """The stock collator, from a tokenizer."""
    rows: Callable[[Any, Examples], list[np.ndarray]]
    """Trainer's predictions -> of each example its rows of logits [rows, L]."""


FORMS: dict[str, Form] = {
    "sequence": Form(_sequence, tr.DataCollatorWithPadding, lambda logits, _: list(logits[:, None])),
    "token": Form(_labelled_tokens, tr.DataCollatorForTokenClassification, _at_positions),
    "span": Form(_span, tr.DataCollatorWithPadding, _both_ends),
    "choice": Form(_choices, tr.DataCollatorForMultipleChoice, lambda logits, _: list(logits[:, :, None])),
}
"""Keys are those of HEADS_OF (bertpipe/model/labelled.py)."""


def features(head: str, examples: Examples) -> list[Feature]:
    """All examples as a Trainer's data set."""
    return [FORMS[head].feature(examples, i) for i in range(len(examples))]


def outputs(head: str, logits: Any, examples: Examples, objective: type[Labelled]) -> Outputs:
    """What Trainer predicted, as `Kind.decide` wants it."""
    first = np.append(0, np.cumsum(objective.num_rows(examples)))
    rows = np.concatenate(FORMS[head].rows(logits, examples)).astype(np.float32)
    assert len(rows) == first[-1]
    return Outputs(rows, first)


def find_data(task: str, folders: Sequence[Path]) -> Path:
    """The one of `folders` that holds `task`/; by default those below the folder BERTPIPE_DATA."""
    home = os.environ.get("BERTPIPE_DATA")
    searched = list(folders) or (sorted(p for p in Path(home).iterdir() if p.is_dir()) if home else [])
    for folder in searched:
        if (folder / task).is_dir():
            return folder
    raise SystemExit(f"{task}: no folder {task}/ in {', '.join(map(str, searched)) or 'any; give --data FOLDER'}")


def shorten(job: training.Job, num: int | None, seed: int = 0) -> training.Job:
    """The same task with the first `num` of its training examples, in an order drawn from `seed`; None: with all."""
    encoded = job.encoded["train"]
    if num is None or num >= len(encoded.examples):
        return job
    chosen = np.random.default_rng(seed).permutation(len(encoded.examples))[:num]
    some = dataclasses.replace(encoded, examples=take(encoded.examples, chosen))
    return dataclasses.replace(job, encoded=job.encoded | {"train": some})


def take(examples: Examples, chosen: np.ndarray) -> Examples:
    """Some of the examples, in the order of `chosen`."""
    sequences = [int(i) * examples.choices + choice for i in chosen for choice in range(examples.choices)]
    labels = examples.labels
    if labels is not None:
        labels = labels[chosen] if isinstance(labels, np.ndarray) else [labels[i] for i in chosen]
    return Examples(
        [examples.input_ids[i] for i in sequences],
        [examples.token_type_ids[i] for i in sequences],
        labels,
        None if examples.positions is None else [examples.positions[i] for i in sequences],
        examples.choices,
    )


def arguments(recipe: Recipe, batch_size: int, folder: Path, **more: Any) -> tr.TrainingArguments:
    """A Trainer's, with the optimizer of `recipe`; it writes nothing down."""
    assert recipe.name == "adamw"
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "adam_epsilon": recipe.eps,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return tr.TrainingArguments(**(given | more))


def orders(source: ExampleSlots, steps: range, slots: int) -> Iterator[list[int]]:
    """The examples of each step in bertpipe's order."""
    for step in steps:
        ids = torch.cat([slot.example_ids for slot in source.slots(step, 0, slots)])
        yield torch.unique_consecutive(ids).tolist()


def settle(threads: int) -> None:
    """Settings of this process that both sides share: offline, without the libraries' talk, so many threads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    tr.logging.set_verbosity_error()
    tr.logging.disable_progress_bar()
