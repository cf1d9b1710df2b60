"""Schedules and optimizers against their papers, worked out here by other means, and schedules against transformers."""

import math
import sys

import numpy as np
import pytest
import torch
import transformers as tr
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from bertpipe.errors import ConfigError
from bertpipe.train.optim import OPTIMIZERS, SCHEDULES, Optimizer, Recipe, check_names, check_schedule, decay_steps

BASE = {
    "name": "adamw",
    "lr": 1e-2,
    "weight_decay": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "schedule": "constant",
    "warmup_steps": 0,
    "steps": 100,
    "max_grad_norm": 1e9,
}


def recipe(**changes) -> Recipe:
    return Recipe(**(BASE | changes))


def curve(**changes) -> list[float]:
    made = recipe(**changes)
    return [SCHEDULES[made.schedule](step, made) for step in range(made.steps + 1)]


def test_cosine_is_the_papers():
    """Loshchilov & Hutter 2017, equation 5, eta_min = 0, at the quarters of 80 steps after 20 of warmup."""
    found = curve(schedule="cosine", warmup_steps=20)
    assert found[:21] == pytest.approx([step / 20 for step in range(21)])
    expected = {20: 1.0, 40: (1 + math.sqrt(0.5)) / 2, 60: 0.5, 80: (1 - math.sqrt(0.5)) / 2, 100: 0.0}
    assert {step: found[step] for step in expected} == pytest.approx(expected, abs=1e-15)


def test_inverse_sqrt_is_the_papers():
    """Vaswani et al. 2017, equation 3, over its own peak: min(step^-0.5, step * warmup^-1.5) / warmup^-0.5."""
    found = curve(schedule="inverse_sqrt", warmup_steps=16, steps=400)
    steps = np.arange(1, 401)
    paper = np.minimum(steps**-0.5, steps * 16**-1.5) / 16**-0.5
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], paper, rtol=1e-12)
    assert (found[64], found[400]) == pytest.approx((0.5, 0.2))


def test_wsd_is_the_papers():
    """Hägele et al. 2024, equations 1 and 2: N = 200, N_decay = 40, f = 1 - sqrt((n - (N - N_decay)) / N_decay)."""
    root = curve(schedule="wsd", warmup_steps=10, steps=200, decay_share=0.2)
    line = curve(schedule="wsd", warmup_steps=10, steps=200, decay_share=0.2, cooldown="linear")
    assert root[10:161] == line[10:161] == [1.0] * 151
    assert [root[n] for n in (5, 170, 200)] == pytest.approx([0.5, 0.5, 0.0])
    assert root[196] == pytest.approx(1 - math.sqrt(0.9))
    assert [line[n] for n in (5, 170, 180, 190, 200)] == pytest.approx([0.5, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("warmup", [1, 7])
@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"schedule": "linear"}, lambda o, w: tr.get_linear_schedule_with_warmup(o, w, 60)),
        ({"schedule": "constant"}, lambda o, w: tr.get_constant_schedule_with_warmup(o, w)),
        ({"schedule": "cosine"}, lambda o, w: tr.get_cosine_schedule_with_warmup(o, w, 60)),
        ({"schedule": "inverse_sqrt"}, lambda o, w: tr.get_inverse_sqrt_schedule(o, w)),
        *(
            (
                {"schedule": "wsd", "decay_share": 0.25, "cooldown": shape},
                lambda o, w, shape=shape: tr.get_wsd_schedule(o, w, 15, 60, decay_type=shape),
            )
            for shape in ("1-sqrt", "linear")
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_schedules_are_those_of_transformers(changes, theirs, warmup):
    stock = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = theirs(stock, warmup)
    expected = []
    for _ in range(61):
        expected.append(stock.param_groups[0]["lr"])
        stock.step()
        schedule.step()
    np.testing.assert_allclose(curve(steps=60, warmup_steps=warmup, **changes), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@given(steps=st.integers(1, 300), warmup=st.integers(1, 60), share=st.floats(0, 1))
def test_a_rate_is_a_share_of_the_peak_and_grows_in_the_warmup_alone(name, steps, warmup, share):
    made = recipe(schedule=name, steps=steps, warmup_steps=warmup, decay_share=share)
    try:
        check_schedule(made)
    except ConfigError:
        assert warmup + decay_steps(made) > steps
        return
    rates = np.array([SCHEDULES[name](step, made) for step in range(steps)])
    assert (rates >= 0).all() and (rates <= 1).all()
    assert (np.diff(rates[warmup:]) <= 1e-12).all() and (np.diff(rates[: warmup + 1]) >= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "inverse_sqrt"}, r"optim.warmup_steps: inverse_sqrt .* at least 1 step"),
        ({"schedule": "wsd", "warmup_steps": 90}, r"optim.warmup_steps: 90 steps of warmup and 20 of cooldown"),
    ],
)
def test_a_schedule_that_can_not_be_drawn_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Optimizer(small(), recipe(**changes))


def small(seed: int = 0) -> nn.Module:
    """A matrix, a bias that starts at 0 and a norm."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).double()
    nn.init.zeros_(model[0].bias)
    return model


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[dict[str, np.ndarray]]:
    """Step on random gradients; the gradients, and the weights after each step (first entry: before)."""
    weights = [{n: p.detach().numpy().copy() for n, p in model.named_parameters()}]
    for step in steps:
        optimizer.set_lr(step)
        for p in model.parameters():
            p.grad = gradient(p, step)
        optimizer.step()
        weights.append({n: p.detach().numpy().copy() for n, p in model.named_parameters()})
    return weights


def gradient(p: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + p.numel())
    return torch.randn(p.shape, dtype=p.dtype, generator=generator) * 10.0 ** (step % 3 - 1)


def lamb_of_the_paper(x, grads, lr, betas, eps, decay):
    """You et al. 2020, Algorithm 2, phi(z) = z, one layer; a norm of 0 makes the ratio 1."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        r = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        u = r + decay * x
        size = np.linalg.norm(x)
        ratio = size / np.linalg.norm(u) if size else 1.0
        x = x - lr * ratio * u
        yield x


def stableadamw_of_the_paper(x, grads, lr, betas, eps, decay):
    """Wortsman et al. 2023, Algorithm 2."""
    v, u = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        first, second = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
        v = first * v + (1 - first) * g
        u = second * u + (1 - second) * g * g
        rms = np.sqrt(np.mean(g * g / np.maximum(u, eps * eps)))
        rate = lr / max(1.0, rms)
        x = x - rate * decay * x - rate * v / (np.sqrt(u) + eps)
        yield x


@pytest.mark.parametrize(("name", "paper"), [("lamb", lamb_of_the_paper), ("stableadamw", stableadamw_of_the_paper)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_steps_are_the_papers(name, paper, scale):
    """A weight of norm above 10 too, where the library's LAMB would clip its norm."""
    model = small()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    weights = train(model, Optimizer(model, recipe(name=name)), range(6))
    for key, p in model.named_parameters():
        decay = 0.1 if p.ndim == 2 else 0.0
        grads = [gradient(p, step).numpy() for step in range(6)]
        expected = list(paper(weights[0][key], grads, 1e-2, (0.9, 0.99), 1e-6, decay))
        for step, wanted in enumerate(expected):
            np.testing.assert_allclose(weights[step + 1][key], wanted, rtol=1e-5, atol=1e-9, err_msg=f"{key} {step}")


class Encoder(nn.Module):
    """Names as an encoder has them, so that Muon finds matrices."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_with_the_same_bits(name):
    """Through safetensors, as in a checkpoint, into a fresh optimizer, under a schedule."""
    made = recipe(name=name, schedule="cosine", warmup_steps=2, steps=12)
    torch.manual_seed(0)
    whole, again = Encoder(), Encoder()
    optimizer = Optimizer(whole, made)
    train(whole, optimizer, range(5))
    again.load_state_dict(whole.state_dict())
    saved = save({key: tensor.detach().contiguous() for key, tensor in optimizer.state().items()})
    resumed = Optimizer(again, made)
    resumed.load_state(load(saved))
    assert resumed.state().keys() == optimizer.state().keys()
    train(whole, optimizer, range(5, 12))
    train(again, resumed, range(5, 12))
    for (key, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), key
    for key, tensor in optimizer.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    check_names("adamw", "linear")
    for name in ("lamb", "stableadamw"):
        with pytest.raises(ConfigError, match=rf"optim.name: {name} needs .* pip install 'bertpipe\[optim\]'"):
            check_names(name, "linear")
