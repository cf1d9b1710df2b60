"""Stage: token shards -> a pretrained checkpoint.

pretrain-<fingerprint>/
    model/          stock folder: from_pretrained loads it, tokenizer included
    metrics.jsonl   the record of the recipe (see tracking.py)
    speed.jsonl     the record of the machine
    checkpoints/    the newest ones, with optimizer tensors
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe import artifact
from bertpipe.config import Config, read_preset
from bertpipe.data import masking
from bertpipe.data.batches import MaskedSlots, PackedBatch, StepSource, masked_batch
from bertpipe.data.masking import Masking, Rate, Vocabulary
from bertpipe.data.order import Order, fixed_slots
from bertpipe.data.pairs import PairOrder
from bertpipe.data.shards import TokenShards
from bertpipe.errors import ConfigError
from bertpipe.model import attention, encoders
from bertpipe.model.objectives import OBJECTIVES, Objective, SentencePairs
from bertpipe.train import loop
from bertpipe.train.checkpoint import Checkpoints, save_model
from bertpipe.train.optim import Optimizer, Recipe, check_names
from bertpipe.train.place import Place
from bertpipe.train.tracking import Record, Wandb

EVAL_PROBABILITY = 0.15  # hold-out masks are frozen at this, whatever training uses
EVAL_SEED = 0


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Pretrain; every process calls it, the main one writes into `out`."""
    check(cfg)
    place = Place(cfg.runtime, cfg.train.precision)
    place.share(cfg.train.slots_per_step, "train.slots_per_step")
    tokenizer = load_tokenizer(inputs["tokenizer"])
    if cfg.model.init:
        check_tokenizer(cfg.model.init, tokenizer)
    train = TokenShards(inputs["shards"], "train")
    row = OBJECTIVES[cfg.train.objective]
    model = encoders.build(
        cfg.model, train.vocab_size, train.special_ids, cfg.train.sequence_length, cfg.train.seed, row.auto_class
    )
    encoders.make_packed(model, cfg.runtime.gradient_checkpointing)
    objective = row.module(model, place.precision)
    optimizer = Optimizer(objective.to(place.device).model, recipe(cfg))
    order = make_order(cfg, train, out / "plans")
    source = SAMPLERS[row.sampler](cfg, order, train)
    if place.is_main:
        order.prepare(cfg.train.steps)
        _introduce(cfg, place, model, order)
    place.barrier()  # the plans stand now
    evaluation = Evaluation(cfg, inputs["shards"], objective, place)
    record = open_record(cfg, place, out)
    checkpoints = Checkpoints(out / "checkpoints", cfg.runtime.keep_checkpoints, tokenizer)
    with record:
        speed = loop.fit(
            objective,
            source,
            optimizer,
            settings(cfg),
            place,
            record,
            evaluation if evaluation.slots else None,
            checkpoints,
            lambda step: order.locate(step)[0],
        )
    if evaluation.slots and not evaluation.last:  # an earlier sitting came to the end but not to the publishing
        evaluation()
    if place.is_main:
        artifact.discard(out / "plans")
        for leftover in (out / "checkpoints").glob(f"*{artifact.PARTIAL}"):
            artifact.discard(leftover)
        save_model(model, tokenizer, out / "model")
        counts |= {
            "parameters": encoders.count_parameters(model),
            "steps": cfg.train.steps,
            "epochs": order.locate(cfg.train.steps - 1)[0] + 1,
            "train_seconds": round(speed.seconds, 1),
            "attention": attention.NAME,
            **place.facts(),
            **evaluation.last,
        }
    place.barrier()


def check(cfg: Config) -> None:
    """ConfigError for settings that can't be trained with; before anything is loaded."""
    if cfg.train.objective not in OBJECTIVES:
        raise ConfigError(f"train.objective: {cfg.train.objective!r} is not one of {', '.join(OBJECTIVES)}")
    if cfg.train.slot_tokens < cfg.train.sequence_length:
        raise ConfigError(
            f"train.slot_tokens: {cfg.train.slot_tokens} is less than train.sequence_length {cfg.train.sequence_length}"
        )
    masking.check(cfg.masking.strategy, cfg.masking.mask_share, cfg.masking.random_share)
    masking.check_rate(cfg.masking.schedule, cfg.masking.final_probability)
    module = OBJECTIVES[cfg.train.objective].module
    if issubclass(module, SentencePairs) and not cfg.model.init:
        module.check_family(read_preset(cfg.model.preset)["model_type"])
    check_names(cfg.optim.name, cfg.optim.schedule)


def check_tokenizer(init: str, tokenizer: Any) -> None:
    """ConfigError when the checkpoint `init` has a tokenizer of its own with another vocabulary."""
    try:
        own = load_tokenizer(init)
    except (OSError, ValueError):
        return
    if len(own) > len(own.all_special_ids) and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"model.init: {init} has another vocabulary than this run's tokenizer; adopt it: --tokenizer.adopt {init}"
        )


def load_tokenizer(folder: Path | str) -> Any:
    """The stock tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def recipe(cfg: Config) -> Recipe:
    """The optimizer's settings."""
    fields = cfg.optim.model_dump()
    return Recipe(**fields, steps=cfg.train.steps)


def settings(cfg: Config) -> loop.LoopSettings:
    """The loop's settings."""
    return loop.LoopSettings(
        steps=cfg.train.steps,
        slots_per_step=cfg.train.slots_per_step,
        seed=cfg.train.seed,
        eval_every=cfg.train.eval_every,
        checkpoint_every=cfg.runtime.checkpoint_every,
        log_every=cfg.runtime.log_every,
        loader_workers=cfg.runtime.loader_workers,
        progress=cfg.runtime.progress,
    )


def make_order(cfg: Config, shards: TokenShards, plans: Path | None) -> Order:
    """The order of the run, its plans kept in `plans`."""
    train, make = cfg.train, ORDERS[OBJECTIVES[cfg.train.objective].order]
    return make(shards, train.seed, train.sequence_length, train.slot_tokens, train.slots_per_step, plans)


def make_masking(cfg: Config, shards: TokenShards, probability: float, strategy: str) -> Masking:
    """Masks over the vocabulary of `shards`."""
    special = np.zeros(shards.vocab_size, bool)
    special[list(shards.all_special_ids)] = True
    vocabulary = Vocabulary(shards.special_ids["mask"], special, np.asarray(shards.continuations))
    return Masking(strategy, probability, cfg.masking.mask_share, cfg.masking.random_share, vocabulary)


def _drawn(cfg: Config, shards: TokenShards) -> Masking:
    """The masks of the run, drawn anew each epoch."""
    drawn = make_masking(cfg, shards, cfg.masking.probability, cfg.masking.strategy)
    last = cfg.masking.final_probability or cfg.masking.probability
    rate = Rate(cfg.masking.schedule, cfg.masking.probability, last, cfg.train.steps)
    return dataclasses.replace(drawn, rate=rate)


def _masked(cfg: Config, order: Order, shards: TokenShards) -> StepSource:
    return MaskedSlots(order, _drawn(cfg, shards), cfg.train.seed)


class Evaluation:
    """Loss, accuracy and perplexity on the hold-out under frozen masks, beside the unigram cross-entropy.

    The masked-LM figures are taken on single segments whatever is trained, so that runs of all objectives compare; an
    objective of pairs is also given frozen pairs, for the loss and accuracy of its second part.
    The unigram cross-entropy is what a model scores that knows nothing but the training text's word frequencies
    (add-one smoothed), in nats, at the very positions that are evaluated.
    """

    def __init__(self, cfg: Config, folder: Path, objective: Objective, place: Place):
        self.objective, self.place = objective, place
        self.last: dict[str, float] = {}
        self.slots: list[PackedBatch] = []
        shards = TokenShards(folder, "holdout")
        if not shards.num_tokens:
            return
        length, total = cfg.train.sequence_length, cfg.train.slot_tokens
        frozen = Masking("token", EVAL_PROBABILITY, 0.8, 0.1, make_masking(cfg, shards, 0.15, "token").vocabulary)
        every = fixed_slots(shards, length, total, cfg.train.eval_tokens)
        self.slots = [masked_batch(shards, p, frozen, EVAL_SEED, 0, min(total, p.num_tokens), length) for p in every]
        self.pairs: list[PackedBatch] = []
        if len(objective.parts) > 1 and shards.num_documents > 1:
            order = PairOrder(objective.parts[1], shards, EVAL_SEED, length, total, 1)
            source = MaskedSlots(order, frozen, EVAL_SEED)
            steps = min(order.steps_in(0), -(-cfg.train.eval_tokens // total))
            self.pairs = [slot for step in range(steps) for slot in source.slots(step, 0, 1)]
        self.unigram = unigram_cross_entropy(TokenShards(folder, "train").unigrams, self.slots)

    def __call__(self) -> dict[str, float]:
        """Evaluate; each process takes every world-th slot."""
        self.objective.eval()
        loss, correct, count = self._sums(self.slots, 0)
        self.last = {
            "eval_loss": loss / count,
            "eval_accuracy": correct / count,
            "eval_perplexity": math.exp(min(700.0, loss / count)),
            "eval_unigram_cross_entropy": self.unigram,
        }
        if self.pairs:
            part, (loss, correct, count) = self.objective.parts[1], self._sums(self.pairs, 1)
            self.last |= {f"eval_{part}_loss": loss / count, f"eval_{part}_accuracy": correct / count}
        return self.last

    def _sums(self, slots: list[PackedBatch], part: int) -> list[float]:
        """Loss, correct and count of a part of the objective, over all processes."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        with torch.no_grad():
            for slot in slots[self.place.rank :: self.place.world]:
                out = self.objective(slot.to(self.place.device))
                sums += torch.stack([out[name].reshape(-1)[part] for name in ("loss", "correct", "count")]).double()
        return self.place.sum(sums)


def unigram_cross_entropy(counts: np.ndarray, slots: list[PackedBatch]) -> float:
    """Mean of -log q over the predicted labels of `slots`, q the add-one-smoothed frequencies `counts` [V]; nats."""
    log_q = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    total, count = 0.0, 0
    for slot in slots:
        assert slot.predict_labels is not None and slot.predict_weight is not None
        labels = slot.predict_labels[slot.predict_weight > 0].numpy()
        total, count = total - float(log_q[labels].sum()), count + len(labels)
    return total / count


def open_record(cfg: Config, place: Place, out: Path) -> Record:
    """The run's record; trackers as asked for."""
    if not place.is_main:
        return Record(None)
    tracker = None
    if cfg.runtime.wandb:
        name = out.name.removesuffix(artifact.PARTIAL)
        tracker = Wandb(cfg.runtime.wandb, Path(cfg.runtime.root), cfg.model_dump(mode="json"), name)
    return Record(out, cfg.runtime.log_every, tracker)


def _introduce(cfg: Config, place: Place, model: Any, order: Order) -> None:
    facts = place.facts()
    tokens = cfg.train.steps * cfg.train.slots_per_step * cfg.train.slot_tokens
    size = f"{encoders.count_parameters(model):,} parameters"
    print(
        f"pretrain: {facts['world_size']} process(es) x {facts['threads']} thread(s), {facts['device']}, "
        f"{facts['precision']}, {attention.NAME} | {model.config.model_type}, {size} | "
        f"{cfg.train.steps} steps x {cfg.train.slots_per_step} slots x {cfg.train.slot_tokens} = {tokens:,} tokens, "
        f"{order.steps_in(0)} steps an epoch",
        flush=True,
    )


ORDERS: dict[str, Callable[..., Order]] = {
    "segments": Order,
    "nsp": functools.partial(PairOrder, "nsp"),
    "sop": functools.partial(PairOrder, "sop"),
}

SAMPLERS: dict[str, Callable[[Config, Order, TokenShards], StepSource]] = {"masked": _masked}
