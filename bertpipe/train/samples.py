"""What a pretraining run trains on: the order of its slots, and their masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bertpipe.config import Config
from bertpipe.data import phases
from bertpipe.data.batches import MaskedSlots, StepSource
from bertpipe.data.masking import Masking, Rate, Vocabulary
from bertpipe.data.order import Order
from bertpipe.data.pairs import PairOrder
from bertpipe.data.phases import PhasedOrder
from bertpipe.data.shards import TokenShards
from bertpipe.model.objectives import Row
from bertpipe.train.place import Place


def open_source(
    cfg: Config, row: Row, shards: TokenShards, plans: Path, place: Place
) -> tuple[Order | PhasedOrder, StepSource]:
    """The order of the run and its batches; the main process writes the plans, the others wait for them."""
    order = phases.make_order(shards, cfg.train, plans, ORDERS[row.order])
    source = MaskedSlots(order, draw_masks(cfg, shards), cfg.train.seed)
    if place.is_main:
        order.prepare(cfg.train.steps)
    place.barrier()
    return order, phases.Ramped(source, order) if cfg.train.batch_warmup else source


def read_vocabulary(shards: TokenShards) -> Vocabulary:
    """What masking has to know of the vocabulary of `shards`."""
    special = np.zeros(shards.vocab_size, bool)
    special[list(shards.all_special_ids)] = True
    return Vocabulary(shards.special_ids["mask"], special, np.asarray(shards.continuations))


def draw_masks(cfg: Config, shards: TokenShards) -> Masking:
    """The masks of the run, drawn anew each epoch."""
    m = cfg.masking
    rate = Rate(m.schedule, m.probability, m.final_probability or m.probability, cfg.train.steps)
    return Masking(m.strategy, m.probability, m.mask_share, m.random_share, read_vocabulary(shards), rate)


ORDERS: dict[str, Callable[..., Order]] = {
    "segments": Order,
    "nsp": functools.partial(PairOrder, "nsp"),
    "sop": functools.partial(PairOrder, "sop"),
}
