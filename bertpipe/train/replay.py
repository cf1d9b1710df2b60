"""The very batch of a step, again: what `bertpipe replay --step K` shows and writes down.

The run's checkpoint nearest before the step is loaded and trained on up to it, as the run did (its folder is only
read), then the step's slots are shown with their losses and gradient norms, and their text is written to a file. In the
same number of threads, and with `train.reduction: exact` for whatever number of processes the run had, all figures are
the run's own.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.data import keyed
from bertpipe.data.batches import PackedBatch
from bertpipe.data.mixture import open_train
from bertpipe.errors import ArtifactError, ConfigError
from bertpipe.model.objectives import OBJECTIVES, Objective
from bertpipe.train import budget, loop, pretrain
from bertpipe.train.checkpoint import Checkpoints
from bertpipe.train.optim import Optimizer
from bertpipe.train.place import Place
from bertpipe.train.reduction import REDUCTIONS
from bertpipe.train.samples import open_source
from bertpipe.train.tracking import Record


class _Before(Checkpoints):
    """A run's checkpoints of fewer than `step` steps, to read alone."""

    step = 0

    def _visible(self) -> list[Path]:
        return [path for path in super()._visible() if int(path.name.removeprefix("step-")) < self.step]

    def save(self, *_: Any) -> None:
        """Nothing: the run's folder is not ours."""


def replay(cfg: Config, inputs: dict[str, Path], run: Path, step: int, out: Path) -> Iterator[str]:
    """Lines about step `step` (from 1) of the run in folder `run`; its text goes to `out`, a .jsonl file.

    ConfigError for a step the run doesn't have, ArtifactError for a run that has not begun.
    """
    if not run.is_dir():
        raise ArtifactError(f"{run}: no such run; replay takes the config that the run was started with")
    if cfg.train.budget is not None:
        cfg = budget.frozen(cfg, run)
    if not 1 <= step <= cfg.train.steps:
        raise ConfigError(f"--step: the run has steps 1 to {cfg.train.steps}, not {step}")
    place = Place(cfg.runtime, cfg.train.precision)
    tokenizer = pretrain.load_tokenizer(inputs["tokenizer"])
    added = pretrain.check_tokenizer(cfg.model.init, tokenizer) if cfg.model.init else []
    shards, row = open_train(inputs["shards"], cfg.train.source_weights), OBJECTIVES[cfg.train.objective]
    objective, _ = pretrain.make_objective(cfg, row, shards, added, place)
    optimizer = Optimizer(objective.model, pretrain.recipe(cfg))
    checkpoints = _Before(run / "checkpoints", 2, tokenizer)
    checkpoints.step = step
    begun = checkpoints.newest()
    with tempfile.TemporaryDirectory() as plans:
        order, source = open_source(cfg, row, shards, Path(plans), place)
        settings = pretrain.settings(cfg, steps=step - 1)
        loop.fit(objective, source, optimizer, settings, place, Record(None), checkpoints=checkpoints)
        slots = [slot.to(place.device) for slot in source.slots(step - 1, 0, cfg.train.slots_per_step)]
    counts = [float(sum(part)) for part in zip(*map(objective.counts, slots), strict=True)]
    yield (
        f"step {step} (epoch {order.locate(step - 1)[0]}), from {begun.name if begun else 'the initial weights'}: "
        f"{len(slots)} slots, {sum(s.num_sequences for s in slots)} sequences, {sum(s.num_tokens for s in slots)} "
        f"tokens, {counts[0]:.0f} positions to predict; sha256 of the batch {_digest(slots)}"
    )
    for number, slot in enumerate(slots):
        loss, norm = _measure(objective, slot, keyed.key(cfg.train.seed, "dropout", step - 1, number), counts)
        yield f"slot {number}: loss {loss:.6g}, its part of the gradient has norm {norm:.6g}"
    reduction = REDUCTIONS[cfg.train.reduction](objective, place)
    sums, _ = loop._backward(reduction, slots, settings, place, step - 1, counts)
    figures = loop.means(objective.parts, sums.sum(0).tolist(), counts)
    yield f"the step: loss {figures['loss']!r}, gradient norm {optimizer.clip()!r}"
    _write(slots, tokenizer, out)
    yield f"its text: {out}"


def _measure(objective: Objective, slot: PackedBatch, seed: int, counts: list[float]) -> tuple[float, float]:
    """Loss of a slot by its own counts, and the norm of its part of the step's gradient."""
    torch.manual_seed(seed)
    own = torch.tensor([max(1, n) for n in objective.counts(slot)], device=slot.input_ids.device)
    weights = torch.tensor([1 / max(1.0, count) for count in counts], device=slot.input_ids.device)
    losses = objective(slot, weights)["loss"].reshape(-1)
    (losses * weights).sum().backward()
    parameters = [p for p in objective.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return float((losses.detach() / own).sum()), float(norm)


def _digest(slots: list[PackedBatch]) -> str:
    tensors = [getattr(s, name) for s in slots for name in ("input_ids", "cu_seqlens", "predict_index")]
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()


def _write(slots: list[PackedBatch], tokenizer: Any, out: Path) -> None:
    """A line a sequence: where it stood, what was shown, what was to be predicted where (positions within it)."""
    temporary = out.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as file:
        for number, slot in enumerate(slots):
            assert slot.predict_index is not None and slot.predict_weight is not None
            assert slot.predict_labels is not None
            kept = slot.predict_weight > 0
            predicted = dict(zip(slot.predict_index[kept].tolist(), slot.predict_labels[kept].tolist(), strict=True))
            for sequence in range(slot.num_sequences):
                first, last = slot.cu_seqlens[sequence : sequence + 2].tolist()
                shown = tokenizer.convert_ids_to_tokens(slot.input_ids[0, first:last].tolist())
                places = [place for place in range(first, last) if place in predicted]
                gold = {place - first: tokenizer.convert_ids_to_tokens(predicted[place]) for place in places}
                line = {"slot": number, "sequence": sequence, "shown": " ".join(shown), "predict": gold}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    temporary.replace(out)
    artifact.fsync(out.parent)
