"""Steps that must not be taken, and weights that must not differ: what every process decides alike.

A step whose loss or gradient norm is not finite is skipped: weights and moments stay as they were, to the bit. The
figures judged are sums over all processes, so all judge alike. `train.spike_deviations` also skips losses far above
their running mean (PaLM, Chowdhery et al. 2022, section 5.1, met some 20 spikes that were not the data's fault).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from bertpipe.errors import DivergedError, RunError
from bertpipe.train.place import Place

DECAY = 0.98  # of the running mean and variance of the loss: about the last 50 steps
FIRST = 50  # steps before a spike can be told from the noise


class Guard:
    """Judges steps; what it remembers is a few numbers, saved with the checkpoints."""

    def __init__(self, max_skipped: int, spike_deviations: float, remembered: dict[str, Any]):
        self.max_skipped, self.deviations = max_skipped, spike_deviations
        self.state = {"skipped": 0, "in_a_row": 0, "seen": 0, "mean": 0.0, "variance": 0.0} | remembered

    def judge(self, step: int, loss: float, norm: float, losses: list[float]) -> str | None:
        """Why step `step` (from 1) must be skipped, or None.

        `losses` are those of its slots. Raises DivergedError when `max_skipped` steps in a row were not finite.
        """
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._skip()
            if self.state["in_a_row"] >= self.max_skipped:
                bad = [str(number) for number, value in enumerate(losses) if not math.isfinite(value)]
                where = f" (of slots {', '.join(bad[:8])}{', ...' if len(bad) > 8 else ''})" if bad else ""
                raise DivergedError(
                    f"step {step}: loss {loss}{where}, gradient norm {norm}; {self.state['in_a_row']} step(s) in a row "
                    "could not be taken: diverged; lower the learning rate. `bertpipe replay "
                    f"--step {step}` with the same config rebuilds its batch"
                )
            return f"loss {loss}, gradient norm {norm}"
        if self._spikes(loss) and self.state["in_a_row"] < self.max_skipped:
            self._skip()
            return f"loss {loss:.4g} is a spike above {self.state['mean']:.4g}"
        self.state["in_a_row"] = 0
        self._learn(loss)
        return None

    def _skip(self) -> None:
        self.state["skipped"] += 1
        self.state["in_a_row"] += 1

    def _spikes(self, loss: float) -> bool:
        if not self.deviations or self.state["seen"] < FIRST:
            return False
        return loss > self.state["mean"] + self.deviations * math.sqrt(self.state["variance"])

    def _learn(self, loss: float) -> None:
        """Exponentially weighted mean and variance of the losses of steps that were taken."""
        seen, mean = self.state["seen"], self.state["mean"]
        weight = max(1 - DECAY, 1 / (seen + 1))
        change = loss - mean
        self.state["mean"] = mean + weight * change
        self.state["variance"] = (1 - weight) * (self.state["variance"] + weight * change * change)
        self.state["seen"] = seen + 1


def hash_weights(parameters: Iterable[torch.Tensor]) -> int:
    """48 bits that a single flipped bit of any parameter changes."""
    integers = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    sums = [p.detach().view(integers[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    values = torch.stack(sums).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(values, digest_size=6).digest(), "big")


def compare_weights(step: int, parameters: Iterable[torch.Tensor], place: Place) -> None:
    """RunError naming the processes whose weights are not those of most others."""
    own = [0.0] * place.world
    own[place.rank] = float(hash_weights(parameters))  # 48 bits, exact in float64
    hashes = place.sum(own)
    usual = max(hashes, key=hashes.count)
    strays = [str(rank) for rank, value in enumerate(hashes) if value != usual]
    if strays:
        raise RunError(
            f"step {step}: the weights of rank {', '.join(strays)} of {place.world} differ from the others' (a "
            "fault of memory or of the network?); the same command goes on from the last checkpoint, where they agreed"
        )
