"""The hold-out under frozen masks, and what a model scores there that knows nothing but word frequencies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from bertpipe.config import Config
from bertpipe.data.batches import MaskedSlots, PackedBatch, masked_batch
from bertpipe.data.masking import Masking
from bertpipe.data.order import fixed_slots
from bertpipe.data.pairs import PairOrder
from bertpipe.data.shards import TokenShards
from bertpipe.model.objectives import Objective
from bertpipe.train.place import Place
from bertpipe.train.samples import read_vocabulary

EVAL_PROBABILITY = 0.15  # hold-out masks are frozen at this, whatever training uses
EVAL_SEED = 0


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
        frozen = Masking("token", EVAL_PROBABILITY, 0.8, 0.1, read_vocabulary(shards))
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
        """Evaluate; each process takes every world-th slot, and the figures don't depend on how many there are."""
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
        """Loss, correct and count of a part of the objective, over all processes, added up slot by slot.

        Raises Stopped on all processes when any was asked to stop.
        """
        rank, world = self.place.rank, self.place.world
        sums = torch.zeros(len(slots), 3, dtype=torch.float64, device=self.place.device)
        with torch.no_grad():
            for first in range(0, len(slots), world):
                self.place.check_stop()
                if first + rank < len(slots):
                    out = self.objective(slots[first + rank].to(self.place.device))
                    figures = [out[name].reshape(-1)[part] for name in ("loss", "correct", "count")]
                    sums[first + rank] = torch.stack(figures).double()
        return torch.tensor(self.place.sum(sums), dtype=torch.float64).sum(0).tolist()


def unigram_cross_entropy(counts: np.ndarray, slots: list[PackedBatch]) -> float:
    """Mean of -log q over the predicted labels of `slots`, q the add-one-smoothed frequencies `counts` [V]; nats."""
    log_q = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    total, count = 0.0, 0
    for slot in slots:
        assert slot.predict_labels is not None and slot.predict_weight is not None
        labels = slot.predict_labels[slot.predict_weight > 0].numpy()
        total, count = total - float(log_q[labels].sum()), count + len(labels)
    return total / count
