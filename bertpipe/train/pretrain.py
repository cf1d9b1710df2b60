"""Stage: token shards -> a pretrained checkpoint.

pretrain-<fingerprint>/
    model/          stock folder: from_pretrained loads it, tokenizer included
    metrics.jsonl   the record of the recipe (see tracking.py)
    speed.jsonl     the record of the machine
    profile/        with runtime.profile: a trace of a few steps and their costs
    checkpoints/    the newest ones, with optimizer tensors
    budget.json     with `train.budget`: the number of steps it came to
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertpipe import artifact
from bertpipe.config import Config, read_preset
from bertpipe.data import masking, phases
from bertpipe.data.batches import MaskedSlots, PackedBatch, StepSource, masked_batch
from bertpipe.data.masking import Masking, Rate, Vocabulary
from bertpipe.data.new_words import split_added
from bertpipe.data.order import Order, fixed_slots
from bertpipe.data.pairs import PairOrder
from bertpipe.data.phases import PhasedOrder
from bertpipe.data.shards import TokenShards
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, kernels
from bertpipe.model.objectives import OBJECTIVES, Objective, Row, SentencePairs
from bertpipe.train import budget, extend, flops, loop
from bertpipe.train.checkpoint import Checkpoints, save_model
from bertpipe.train.optim import Optimizer, Recipe, check_names, check_schedule
from bertpipe.train.place import Place
from bertpipe.train.profile import Trace
from bertpipe.train.tracking import Record, Wandb

EVAL_PROBABILITY = 0.15  # hold-out masks are frozen at this, whatever training uses
EVAL_SEED = 0


def run(cfg: Config, inputs: dict[str, Path], out: Path, counts: dict[str, Any]) -> None:
    """Pretrain; every process calls it, the main one writes into `out`."""
    started = time.monotonic()
    check(cfg)
    place = Place(cfg.runtime, cfg.train.precision)
    place.share(*phases.smallest_step(cfg.train))
    tokenizer = load_tokenizer(inputs["tokenizer"])
    added = check_tokenizer(cfg.model.init, tokenizer) if cfg.model.init else []
    if cfg.model.max_positions:
        tokenizer.model_max_length = cfg.model.max_positions
    train = TokenShards(inputs["shards"], "train")
    row = OBJECTIVES[cfg.train.objective]
    length, seed = cfg.train.sequence_length, cfg.train.seed
    model = encoders.build(cfg.model, train.vocab_size, train.special_ids, length, seed, row.auto_class, added)
    kernel = kernels.choose(model.config, place.device, place.precision)
    kernels.settle(kernel, cfg.runtime.require_fast_attention, say=place.is_main)
    encoders.make_packed(model, cfg.runtime.gradient_checkpointing, kernel.name)
    objective = row.module(model, place.precision)
    compiled = kernels.compiles(kernel, place.device, cfg.runtime.compile)
    if compiled:
        objective.compile()
    evaluation = Evaluation(cfg, inputs["shards"], objective.to(place.device), place)
    begun = _begin(cfg, inputs, out, place) if cfg.train.extend_from else 0
    budgeted: dict[str, Any] = {}
    if cfg.train.budget is not None:

        def cost() -> budget.Cost:
            def probe(cfg: Config, plans: Path) -> StepSource:
                return _open_source(cfg, row, train, plans, place)[1]

            evaluate = evaluation if evaluation.slots else None
            return budget.measure(cfg, objective, recipe(cfg), probe, evaluate, tokenizer, place, out)

        cfg, budgeted = budget.freeze(cfg, out, started, begun, place, cost)
        evaluation.last = {}
    optimizer = Optimizer(objective.model, recipe(cfg))
    order, source = _open_source(cfg, row, train, out / "plans", place)
    if place.is_main:
        _introduce(cfg, place, model, order, kernel.name + ", compiled" * compiled)
    tokens = phases.total_tokens(cfg.train)
    meter = flops.make_meter(model, place.device, place.precision, tokens // place.world, place.world)
    trace = Trace(out / "profile", cfg.runtime.profile) if cfg.runtime.profile and place.is_main else None
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
            meter,
            trace,
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
            **({"budget": budgeted} if budgeted else {}),
            **({"extended_after": begun} if begun else {}),
            "attention": kernel.name,
            "compiled": compiled,
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
    phases.check(cfg.train)
    masking.check(cfg.masking.strategy, cfg.masking.mask_share, cfg.masking.random_share)
    masking.check_rate(cfg.masking.schedule, cfg.masking.final_probability)
    module = OBJECTIVES[cfg.train.objective].module
    if issubclass(module, SentencePairs) and not cfg.model.init:
        module.check_family(read_preset(cfg.model.preset)["model_type"])
    check_names(cfg.optim.name, cfg.optim.schedule)
    if cfg.train.budget is None:
        check_schedule(recipe(cfg))
    else:  # the number of steps is yet to be found
        budget.seconds_of(cfg.train.budget)
    extend.check(cfg)


def _begin(cfg: Config, inputs: dict[str, Path], out: Path, place: Place) -> int:
    """Begin where the run that `train.extend_from` names ended; its steps, alike on all processes."""
    begun = extend.begin(cfg, inputs, out) if place.is_main else 0
    return int(place.sum([float(begun)])[0])


def _open_source(
    cfg: Config, row: Row, shards: TokenShards, plans: Path, place: Place
) -> tuple[Order | PhasedOrder, StepSource]:
    """The order of the run and its batches; the main process writes the plans, the others wait for them."""
    order = phases.make_order(shards, cfg.train, plans, ORDERS[row.order])
    source = MaskedSlots(order, _drawn(cfg, shards), cfg.train.seed)
    if place.is_main:
        order.prepare(cfg.train.steps)
    place.barrier()
    return order, phases.Ramped(source, order) if cfg.train.batch_warmup else source


def check_tokenizer(init: str, tokenizer: Any) -> list[list[int]]:
    """For each entry `tokenizer` adds to the checkpoint's vocabulary, the checkpoint's ids for it; none if they agree.

    ConfigError when the checkpoint `init` has a tokenizer of its own with another vocabulary that this one's doesn't
    begin with.
    """
    try:
        own = load_tokenizer(init)
    except (OSError, ValueError):
        return []
    if len(own) <= len(own.all_special_ids) or own.get_vocab() == tokenizer.get_vocab():
        return []
    added = split_added(own.backend_tokenizer, tokenizer.backend_tokenizer) if own.is_fast else None
    if added is None:
        raise ConfigError(
            f"model.init: {init} has another vocabulary than this run's tokenizer; adopt it: --tokenizer.adopt {init}"
        )
    return added


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


def _introduce(cfg: Config, place: Place, model: Any, order: Order | PhasedOrder, kernel: str) -> None:
    facts = place.facts()
    train = cfg.train
    lengths = " then ".join(f"{p.slot_tokens} ({p.sequence_length} a sequence)" for p in phases.parts(train))
    lengths = lengths if train.phases else str(train.slot_tokens)
    first = "".join(f"{ramp.slots} for {ramp.steps}, then " for ramp in train.batch_warmup)
    shape = f"{train.steps} steps x {first}{train.slots_per_step} slots x {lengths}"
    size = f"{encoders.count_parameters(model):,} parameters"
    print(
        f"pretrain: {facts['world_size']} process(es) x {facts['threads']} thread(s), {facts['device']}, "
        f"{facts['precision']}, {kernel} | {model.config.model_type}, {size} | "
        f"{shape} = {phases.total_tokens(train):,} tokens, "
        f"{order.steps_in(0)} steps an epoch",
        flush=True,
    )


ORDERS: dict[str, Callable[..., Order]] = {
    "segments": Order,
    "nsp": functools.partial(PairOrder, "nsp"),
    "sop": functools.partial(PairOrder, "sop"),
}
