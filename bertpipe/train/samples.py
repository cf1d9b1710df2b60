"""What a pretraining run trains on: the order of its slots, and their masks."""

from __future__ import annotations

import copy
import functools
import threading
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
    cfg: Config, row: Row, shards: TokenShards, plans: Path, place: Place, begun: int = 0
) -> tuple[Order | PhasedOrder, StepSource]:
    """The order of the run and its batches, to be read from step `begun` on.

    The main process writes the plans as far as that, the others wait for them; for later ones see Epochs.
    """
    order = phases.make_order(shards, cfg.train, plans, ORDERS[row.order])
    source = MaskedSlots(order, draw_masks(cfg, shards), cfg.train.seed)
    if place.is_main:
        order.prepare(min(begun + 1, cfg.train.steps))
    place.barrier()
    return order, phases.Ramped(source, order) if cfg.train.batch_warmup else source


class Epochs:
    """Which epoch a step is in; meanwhile, in the process that is to, the plan of the epoch to come is made.

    A thread makes it, from the epoch's first step on. Whoever needs a plan that isn't there makes it by itself: the
    same, only later.
    """

    def __init__(self, order: Order | PhasedOrder, steps: int, plans_ahead: bool):
        self.order, self.steps = order, steps
        self._ahead = copy.deepcopy(order) if plans_ahead else None  # its caches are the thread's own
        self._epoch = -1
        self._thread: threading.Thread | None = None

    def __call__(self, step: int) -> int:
        """The epoch of a step, from 0."""
        epoch, _ = self.order.locate(step)
        idle = self._thread is None or not self._thread.is_alive()
        if self._ahead is not None and epoch != self._epoch and idle:
            self._epoch = epoch
            if (following := self.order.next_epoch(step)) < self.steps:
                self._thread = threading.Thread(target=self._ahead.prepare, args=(following + 1,), daemon=True)
                self._thread.start()
        return epoch

    def wait(self) -> None:
        """Until no plan is being made."""
        if self._thread is not None:
            self._thread.join()


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
