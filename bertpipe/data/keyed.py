"""Counter-based randomness: a draw is a hash of integers, so there is no state to save, share or skip.

The mixer is SplitMix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"),
in plain uint64 arithmetic: the same bits on every platform and NumPy version.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def key(*parts: int | str) -> int:
    """Fold integers (0 or more) and short names into one 64-bit key; the order of the parts matters."""
    state = 0
    for part in parts:
        number = int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
        while True:  # 64 bits at a time, so that long names count whole
            state = _mix((state + _GOLDEN + (number & _MASK)) & _MASK)
            number >>= 64
            if number <= 0:
                break
        state = _mix((state + _GOLDEN) & _MASK)
    return state


def bits(key: int, counters: np.ndarray) -> np.ndarray:
    """uint64 random bits, one for each counter (any integer dtype, >= 0, any shape)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(key: int, counters: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one for each counter: the top 53 bits of `bits`."""
    return (bits(key, counters) >> np.uint64(11)) * 2.0**-53


def permutation(key: int, size: int) -> np.ndarray:
    """int64 [size]: the numbers 0 .. size - 1 in an order that depends on `key` alone."""
    return np.argsort(bits(key, np.arange(size)), kind="stable")
