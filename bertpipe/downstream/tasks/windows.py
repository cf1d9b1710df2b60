"""Overlapping windows over a text that is longer than the model's input, and which of them answers for a word."""

from __future__ import annotations

import numpy as np

from bertpipe.errors import ConfigError


def shared(stride: int | None, max_length: int, room: int) -> int:
    """Tokens that neighbouring windows of `room` tokens have in common, at least; ConfigError if there's no way on."""
    wanted = max_length // 3 if stride is None else stride
    if wanted >= room:
        raise ConfigError(
            f"finetune.stride: windows of {room} tokens of text that share {wanted} never advance; "
            f"use at most {room - 1}, or a larger finetune.max_length ({max_length})"
        )
    return wanted


def starts(length: int, room: int, shared: int) -> np.ndarray:
    """First token of each window, int64 [windows]: as few as share `shared` tokens or more, evenly spread.

    Each has `room` tokens, the one window of a shorter text all of them.
    """
    if length <= room:
        return np.zeros(1, np.int64)
    steps = -(-(length - room) // (room - shared))
    return np.arange(steps + 1) * (length - room) // steps


def best(starts: np.ndarray, room: int, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The window in which a word has the most context on its poorer side; of equal ones the first.

    Args:
        starts: int64 [windows], ascending.
        room: tokens of a window.
        first: int64 [words], each word's first token; ascending.
        end: int64 [words], one behind its last.

    Returns:
        int64 [words], ascending; each word's first token is in its window.
    """
    # context left + right is the same in all windows, so the poorer side is richest where the two are most alike:
    # first - start against start + room - end
    wanted = first + end - room  # of twice the start
    after = np.searchsorted(2 * starts, wanted)
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(starts) - 1)
    nearest = np.where(np.abs(2 * starts[before] - wanted) <= np.abs(2 * starts[after] - wanted), before, after)
    lowest = np.searchsorted(starts, first - room, side="right")
    highest = np.searchsorted(starts, first, side="right") - 1
    return np.clip(nearest, lowest, highest)
