"""Which steps are skipped: those that are not finite, and spikes; the same after any resume."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.errors import RunError
from bertpipe.train.guard import DECAY, FIRST, Guard, hash_weights

LOSSES = st.lists(st.one_of(st.floats(0.1, 10), st.sampled_from([math.nan, math.inf, 1e4])), max_size=120)


def judge(guard: Guard, losses: list[float], first: int = 1) -> list[bool | str]:
    """For each loss whether its step is skipped; "stop" where the run ends."""
    found: list[bool | str] = []
    for step, loss in enumerate(losses, first):
        try:
            found.append(guard.judge(step, loss, 1.0, [loss]) is not None)
        except RunError:
            return [*found, "stop"]
    return found


@given(LOSSES, st.integers(0, 120), st.integers(1, 4), st.sampled_from([0.0, 3.0, 6.0]))
def test_a_resumed_guard_judges_as_one_that_was_never_interrupted(losses, cut, most, deviations):
    whole = judge(Guard(most, deviations, {}), losses)
    first = Guard(most, deviations, {})
    before = judge(first, losses[:cut])
    if "stop" not in before:
        before += judge(Guard(most, deviations, json.loads(json.dumps(first.state))), losses[cut:], cut + 1)
    assert before == whole


@given(LOSSES, st.integers(1, 4))
def test_without_spikes_only_what_is_not_finite_is_skipped_and_so_many_in_a_row_end_the_run(losses, most):
    found = judge(Guard(most, 0.0, {}), losses)
    bad = [not math.isfinite(loss) for loss in losses]
    ends = [i for i in range(len(bad)) if i + 1 >= most and all(bad[i + 1 - most : i + 1])]
    assert found == ([*bad[: ends[0]], "stop"] if ends else bad)


def test_a_norm_that_is_not_finite_skips_too():
    guard = Guard(5, 0.0, {})
    assert guard.judge(1, 2.0, math.inf, [2.0]) == "loss 2.0, gradient norm inf"
    assert guard.state["skipped"] == 1


def test_a_spike_is_skipped_and_a_loss_that_stays_high_is_not():
    rng = np.random.default_rng(0)
    losses = list(2.0 + 0.1 * rng.standard_normal(FIRST + 20))
    guard = Guard(3, 6.0, {})
    assert not any(judge(guard, losses))
    weights = DECAY ** np.arange(len(losses))[::-1]  # the mean of those that were taken, late ones weighing most
    assert guard.state["mean"] == pytest.approx(np.average(losses, weights=weights), abs=0.05)
    assert math.sqrt(guard.state["variance"]) == pytest.approx(0.1, rel=0.3)
    assert judge(guard, [20.0, 2.0, 20.0, 20.0, 20.0, 20.0, 2.0]) == [True, False, True, True, True, False, False]
    assert judge(Guard(3, 0.0, {}), [*losses, 20.0])[-1] is False
    assert judge(Guard(3, 6.0, {}), [2.0, 20.0]) == [False, False], "too early to tell"


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_flipped_bit_changes_the_hash(seed, dtype):
    rng = np.random.default_rng(seed)
    parameters = [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype) for shape in ((3, 4), (7,))]
    before = hash_weights(parameters)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    chosen = parameters[int(rng.integers(2))].view(-1).view(kind)
    chosen[int(rng.integers(len(chosen)))] ^= 1 << int(rng.integers(31 if dtype == torch.float32 else 15))
    assert hash_weights(parameters) != before
    assert before < 2**48
