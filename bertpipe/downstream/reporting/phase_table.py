"""The phases of a pretraining run, from its record: lengths that change along the run (data/phases.py)."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bertpipe.config import TrainConfig
from bertpipe.data import phases
from bertpipe.downstream.reporting.record import is_number, mean, median

LAST_STEPS = 50
"""Steps at the end of a phase over which its training loss is averaged; fewer in a phase under 500 steps."""


def phase_rows(
    settings: dict[str, Any], steps: int | None, train: list[dict], held: list[dict], speed: list[dict]
) -> list[dict[str, Any]]:
    """A row for each phase that the record has reached; empty for a run without phases, or with settings of another
    version.

    Args:
        settings: the section `train`.
        steps: of the whole run, where a budget came to another number than the settings say.
        train, held, speed: the lines of steps, of evaluations and of speed.jsonl.
    """
    try:
        config = TrainConfig.model_validate(settings | ({"steps": steps} if steps else {}))
    except ValidationError:
        return []
    if not config.phases:
        return []
    parts = [part for part in phases.parts(config) if part.last > part.first]
    return [row for part in parts if (row := _row(config, part, train, held, speed))["reached"]]


def _row(config: TrainConfig, part: phases.Part, train: list, held: list, speed: list) -> dict[str, Any]:
    """What a phase was to be, and what came of it so far."""
    rows, evaluated, timed = (
        [row for row in kind if part.first < row["step"] <= part.last] for kind in (train, held, speed)
    )
    tokens = [0] + [row["tokens"] for row in train if row["step"] <= part.first and is_number(row.get("tokens"))]
    seen = [row["tokens"] for row in rows if is_number(row.get("tokens"))]
    slots = [_slots(config, step) for step in (part.first, part.last - 1)]
    last = rows[-max(1, min(LAST_STEPS, len(rows) // 10)) :]
    return {
        "first": part.first + 1,
        "last": part.last,
        "reached": rows[-1]["step"] if rows else None,
        "sequence_length": part.sequence_length,
        "slot_tokens": part.slot_tokens,
        "slots": slots,
        "tokens": seen[-1] - tokens[-1] if seen else None,
        "loss": mean(last, "mlm_loss") if rows and "mlm_loss" in rows[-1] else mean(last, "loss"),
        "eval_loss": evaluated[-1].get("eval_loss") if evaluated else None,
        "fill": mean(rows, "fill"),
        "tokens_per_second": median(timed, "tokens_per_second"),
        "mfu": median(timed, "mfu"),
    }


def _slots(config: TrainConfig, step: int) -> int:
    """Slots of a step, counted from 0, as batch-size warmup has them."""
    for stage in config.batch_warmup:
        if step < stage.steps:
            return stage.slots
        step -= stage.steps
    return config.slots_per_step
