"""The baseline: transformers.Trainer with DataCollatorForLanguageModeling on text grouped as run_mlm groups it.

Nothing here slows it down: its attention and its micro-batch are chosen by trial before it is timed, and it never sees
padding, because documents are strung together and cut to the full length.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers as tr
from common import Data

from bertpipe.config import Config
from bertpipe.data.corpus import read_documents
from bertpipe.data.shards import TokenShards
from bertpipe.model import encoders

MASK_PROBABILITY = 0.15
COLUMNS = ["input_ids", "special_tokens_mask"]  # all that a model and the collator need of a full row
TRIAL_SECONDS = 1.0  # a trial is repeated until it took so long
WORSE = 1.01  # a micro-batch this much slower than the best ends the climb


@dataclass(frozen=True)
class Setup:
    """How a Trainer is run."""

    length: int
    rows_per_step: int
    device: str
    precision: str
    attention: str = "sdpa"
    micro_batch: int = 8
    compiled: bool = False
    plain: bool = False
    """As run_mlm leaves it: unused columns dropped by Trainer, its NaN filter on."""
    steps: int = 10_000
    lr: float = 1e-4
    warmup_steps: int = 10
    schedule: str = "linear"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    seed: int = 0


def group(data: Data, split: str, length: int, target: Path, most: int | None = None) -> Path:
    """Tokenize, string together and cut into rows of `length`, as run_mlm's group_texts; `most` saved in `target`."""
    if target.is_dir():
        return target
    tokenizer = tr.AutoTokenizer.from_pretrained(data.tokenizer, model_max_length=10**9)
    columns: dict[str, list[np.ndarray]] = {}
    texts = read_documents(data.corpus, split)
    while some := list(itertools.islice(texts, 1000)):
        encoded = tokenizer(some, return_special_tokens_mask=True)
        for name, rows in encoded.items():
            columns.setdefault(name, []).extend(np.array(row, np.int32) for row in rows)
    joined = {name: np.concatenate(rows) for name, rows in columns.items()}
    cut = min(len(joined["input_ids"]) // length, most or 10**12)
    rows = {name: column[: cut * length].reshape(cut, length) for name, column in joined.items()}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({name: list(row) for name, row in rows.items()}).save_to_disk(target)
    return target


class CountingTrainer(tr.Trainer):
    """A stock Trainer that counts what it trains on: places, real tokens and predicted positions, as tensors."""

    places, tokens, predicted = 0, torch.zeros(()), torch.zeros(())

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **more: Any) -> torch.Tensor:
        """Of one micro-batch; nothing here waits for a GPU."""
        self.places += inputs["input_ids"].numel()
        self.tokens = self.tokens + inputs["attention_mask"].sum()
        self.predicted = self.predicted + (inputs["labels"] != -100).sum()
        return super().training_step(model, inputs, *rest, **more)


def make_collator(tokenizer: Any) -> Any:
    """The collator of run_mlm."""
    return tr.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_PROBABILITY)


def make_trainer(model: Any, dataset: Any, collator: Any, setup: Setup, folder: Path) -> CountingTrainer:
    """A Trainer that takes `rows_per_step` rows an optimizer step and writes nothing down."""
    assert setup.rows_per_step % setup.micro_batch == 0
    if not setup.plain:
        dataset = dataset.select_columns(COLUMNS)
    model.set_attn_implementation(setup.attention)
    arguments = tr.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=setup.micro_batch,
        gradient_accumulation_steps=setup.rows_per_step // setup.micro_batch,
        max_steps=setup.steps,
        learning_rate=setup.lr,
        lr_scheduler_type=setup.schedule,
        warmup_steps=setup.warmup_steps,
        weight_decay=setup.weight_decay,
        adam_beta1=setup.betas[0],
        adam_beta2=setup.betas[1],
        adam_epsilon=setup.eps,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=setup.precision == "bf16",
        use_cpu=setup.device == "cpu",
        torch_compile=setup.compiled,
        remove_unused_columns=setup.plain,
        logging_nan_inf_filter=setup.plain,
        dataloader_num_workers=4 if setup.device == "cuda" and not setup.plain else 0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=setup.seed,
    )
    return CountingTrainer(model, arguments, train_dataset=dataset, data_collator=collator)


def set_up(
    cfg: Config,
    data: Data,
    rows: Path,
    setup: Setup,
    folder: Path,
    attentions: tuple[str, ...] = ("sdpa", "eager"),
    compiling: bool = False,
) -> tuple[CountingTrainer, Setup, list[dict[str, Any]]]:
    """In a process of its own: a tuned Trainer of the model that `cfg` describes, on grouped `rows`.

    Returns it with what `tune` settled and tried.
    """
    tr.logging.set_verbosity_error()
    assert cfg.runtime.threads is not None
    torch.set_num_threads(cfg.runtime.threads)
    shards = TokenShards(data.shards, "train")
    model = encoders.build(cfg.model, shards.vocab_size, shards.special_ids, setup.length, cfg.train.seed)
    dataset = datasets.load_from_disk(rows)
    collator = make_collator(tr.AutoTokenizer.from_pretrained(data.tokenizer))
    setup, trials = tune(model, dataset, collator, setup, attentions, compiling)
    return make_trainer(model, dataset, collator, setup, folder), setup, trials


def tune(
    model: Any, dataset: Any, collator: Any, setup: Setup, attentions: tuple[str, ...], compiling: bool
) -> tuple[Setup, list[dict[str, Any]]]:
    """The fastest attention, then the fastest micro-batch, then compiled or not; and every trial made.

    A trial is a forward and backward of one micro-batch, warm. Micro-batches are a quarter of the step (on a GPU a
    sixteenth), its half, the whole; the climb ends where a larger one is slower or doesn't fit.
    """
    parts = (1, 2, 4) if setup.device == "cpu" else (1, 2, 4, 8, 16)
    sizes = sorted({setup.rows_per_step // part for part in parts if setup.rows_per_step % part == 0})
    trials: list[dict[str, Any]] = []

    def best() -> dict[str, Any]:
        return max(trials, key=lambda trial: trial["tokens_per_second"])

    def attempt(attention: str, size: int, compiled: bool, warm: bool) -> None:
        tried = dataclasses.replace(setup, attention=attention, micro_batch=size, compiled=compiled)
        rate = size * setup.length / _time(model, dataset, collator, tried, warm)
        made = {"attention": attention, "micro_batch": size, "compiled": compiled}
        trials.append(made | {"tokens_per_second": round(rate, 1)})

    for attention in attentions:
        attempt(attention, sizes[0], False, warm=False)
    for size in sizes[1:]:
        try:
            attempt(best()["attention"], size, False, warm=setup.device == "cpu")
        except torch.OutOfMemoryError:
            break
        if trials[-1]["tokens_per_second"] * WORSE < best()["tokens_per_second"]:
            break
    if compiling:
        attempt(best()["attention"], best()["micro_batch"], True, warm=False)
    picked = {name: best()[name] for name in ("attention", "micro_batch", "compiled")}
    return dataclasses.replace(setup, **picked), trials


def _time(model: Any, dataset: Any, collator: Any, setup: Setup, warm: bool) -> float:
    """Seconds of the fastest of some forwards and backwards of a micro-batch, after one to warm up unless `warm`."""
    model.set_attn_implementation(setup.attention)
    model.to(setup.device).train()
    module = torch.compile(model) if setup.compiled else model
    batch = collator([{key: dataset[row][key] for key in COLUMNS} for row in range(setup.micro_batch)])
    batch = {key: value.to(setup.device) for key, value in batch.items()}
    times: list[float] = []
    while not times or (len(times) < 5 and sum(times) < TRIAL_SECONDS):
        begun = time.perf_counter()
        with torch.autocast(setup.device, torch.bfloat16, enabled=setup.precision == "bf16"):
            loss = module(**batch).loss
        loss.backward()
        model.zero_grad()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        if warm:
            times.append(time.perf_counter() - begun)
        warm = True
    return min(times)
