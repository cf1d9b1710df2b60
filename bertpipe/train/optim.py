"""Parameter groups, optimizers and learning-rate schedules.

Learning rates are a pure function of the step, and optimizer states are plain tensors under their parameter's name, so
a checkpoint needs no optimizer object to be read. LAMB and StableAdamW come from pytorch-optimizer (extra `[optim]`).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bertpipe.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """Settings of an optimizer and its schedule."""

    name: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    schedule: str
    warmup_steps: int
    steps: int
    max_grad_norm: float
    muon_lr: float = 0.02
    momentum: float = 0.95
    decay_share: float = 0.2
    cooldown: str = "1-sqrt"


def check_names(optimizer: str, schedule: str) -> None:
    """ConfigError for an optimizer or schedule that isn't there, or whose library isn't."""
    for setting, name, table in (("name", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
        if name not in table:
            raise ConfigError(f"optim.{setting}: {name!r} is not one of {', '.join(table)}")
    if optimizer in FROM_LIBRARY and importlib.util.find_spec("pytorch_optimizer") is None:
        raise ConfigError(f"optim.name: {optimizer} needs pytorch-optimizer; pip install 'bertpipe[optim]'")


def check_schedule(recipe: Recipe) -> None:
    """ConfigError for settings that the schedule can't be drawn with."""
    if recipe.schedule == "inverse_sqrt" and recipe.warmup_steps == 0:
        raise ConfigError("optim.warmup_steps: inverse_sqrt falls on the scale of its warmup; give it at least 1 step")
    if recipe.schedule == "wsd" and recipe.warmup_steps + decay_steps(recipe) > recipe.steps:
        raise ConfigError(
            f"optim.warmup_steps: {recipe.warmup_steps} steps of warmup and {decay_steps(recipe)} of cooldown "
            f"(optim.decay_share) exceed the {recipe.steps} steps of the run"
        )


class Optimizer:
    """One or more torch optimizers over the named parameters of a model, stepped as one."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        check_names(recipe.name, recipe.schedule)
        check_schedule(recipe)
        self.recipe = recipe
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts = OPTIMIZERS[recipe.name](model, self.parameters, recipe)
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def set_lr(self, step: int) -> float:
        """Set the rates of a step (from 0); returns AdamW's."""
        recipe = self.recipe
        factor = SCHEDULES[recipe.schedule](step, recipe)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        return recipe.lr * factor

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping."""
        norm = self.clip()
        self.update()
        return norm

    def clip(self) -> float:
        """Clip the gradients; returns their norm before that."""
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.max_grad_norm))

    def update(self) -> None:
        """Change the weights by the gradients and clear those."""
        for part in self.parts:
            part.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Every state tensor as `parameter name//state name`; a group's step count stands with its first parameter."""
        names = {id(p): name for name, p in self.parameters.items()}
        tensors = {
            f"{names[id(p)]}//{key}": value
            for part in self.parts
            for p, entries in part.state.items()
            for key, value in entries.items()
            if isinstance(value, torch.Tensor) and key not in RECOMPUTED
        }
        groups = [group for part in self.parts for group in part.param_groups if "step" in group and group["params"]]
        return tensors | {f"{names[id(g['params'][0])]}//{GROUP_STEP}": torch.tensor(g["step"]) for g in groups}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave, on each parameter's device."""
        owner = {id(p): (part, group) for part in self.parts for group in part.param_groups for p in group["params"]}
        for name, tensor in tensors.items():
            parameter, key = name.split("//")
            p = self.parameters[parameter]
            part, group = owner[id(p)]
            if key == GROUP_STEP:
                group["step"] = int(tensor)
            else:
                part.state[p][key] = tensor if key == "step" else tensor.to(p.device)


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups, as BERT's released code has them: biases and norms without weight decay, the rest with it."""
    plain = [p for p in parameters.values() if p.ndim < 2]
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(model: nn.Module, parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019), fused."""
    groups = decay_groups(parameters, recipe.weight_decay)
    return [torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)]


def muon(model: nn.Module, parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) on the matrices of the encoder's layers, AdamW on all the rest."""
    in_layer = re.compile(r"[._]layers?\.")
    matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and in_layer.search(n) and "embedding" not in n}
    if not matrices:
        raise ConfigError("optim.name: muon finds no layer matrices in this model; use adamw")
    others = {n: p for n, p in parameters.items() if n not in matrices}
    matrix_part = torch.optim.Muon(
        matrices.values(), lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )
    return [matrix_part, *adamw(model, others, recipe)]


def lamb(model: nn.Module, parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """LAMB (You et al. 2020, Algorithm 2), phi the identity; a weight or update of norm 0 has trust ratio 1.

    pytorch-optimizer's class leaves the bias corrections out. They scale m / (sqrt(v) + eps) by a number c that the
    trust ratio takes out again, all but its part in the sum with the weight decay and in eps; so both are set before
    each step to what gives the paper's update.
    """
    from pytorch_optimizer import Lamb

    part = Lamb(
        decay_groups(parameters, recipe.weight_decay),
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decouple=False,  # the decay is part of what the trust ratio scales
        adam_debias=True,  # the step is not divided by 1 - beta1^t once more
    )
    part.clamp = math.inf
    decays = [group["weight_decay"] for group in part.param_groups]

    def correct(*_: object) -> None:
        for group, decay in zip(part.param_groups, decays, strict=True):
            first, second = (1 - beta ** (group.get("step", 0) + 1) for beta in recipe.betas)
            group["eps"] = recipe.eps * math.sqrt(second)
            group["weight_decay"] = decay * first / math.sqrt(second)

    part.register_step_pre_hook(correct)
    return [part]


def stableadamw(model: nn.Module, parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """StableAdamW (Wortsman et al. 2023, Algorithm 2): AdamW whose rate falls where its second moment lags behind."""
    from pytorch_optimizer import StableAdamW

    groups = decay_groups(parameters, recipe.weight_decay)
    return [StableAdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, kahan_sum=False)]


def _warmup(step: int, recipe: Recipe) -> float:
    return min(1.0, step / recipe.warmup_steps) if recipe.warmup_steps else 1.0


def _progress(step: int, recipe: Recipe) -> float:
    """How much of the way from the warmup's end to the run's end is gone, at most 1."""
    return min(1.0, (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps))


def decay_steps(recipe: Recipe) -> int:
    """Steps of the cooldown of `wsd`."""
    return round(recipe.decay_share * recipe.steps)


def linear(step: int, recipe: Recipe) -> float:
    """Up to 1 over the warmup, then down to 0 at the end: transformers' linear schedule."""
    if step < recipe.warmup_steps:
        return _warmup(step, recipe)
    return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup_steps))


def constant(step: int, recipe: Recipe) -> float:
    """Up to 1 over the warmup, then 1."""
    return _warmup(step, recipe)


def cosine(step: int, recipe: Recipe) -> float:
    """Up to 1 over the warmup, then half a cosine down to 0 at the end (Loshchilov & Hutter 2017, equation 5)."""
    if step < recipe.warmup_steps:
        return _warmup(step, recipe)
    return 0.5 * (1.0 + math.cos(math.pi * _progress(step, recipe)))


def inverse_sqrt(step: int, recipe: Recipe) -> float:
    """Up to 1 over the warmup, then as 1 / sqrt(step), whenever the end is (Vaswani et al. 2017, section 5.3)."""
    if step < recipe.warmup_steps:
        return _warmup(step, recipe)
    return math.sqrt(recipe.warmup_steps / step)


def wsd(step: int, recipe: Recipe) -> float:
    """Warmup, a plateau at 1, and a cooldown to 0 over the last `decay_share` of the steps (Hu et al. 2024, section 4).

    The cooldown falls as a line or as 1 - sqrt (Hägele et al. 2024, equations 1 and 2).
    """
    cooling = decay_steps(recipe)
    passed = step - (recipe.steps - cooling)
    if passed < 0 or step < recipe.warmup_steps:
        return _warmup(step, recipe)
    done = min(1.0, passed / max(1, cooling))
    return 1.0 - (math.sqrt(done) if recipe.cooldown == "1-sqrt" else done)


GROUP_STEP = "group_step"  # pytorch-optimizer counts steps in its groups, not at each parameter
RECOMPUTED = ("weight_norm", "adam_norm", "trust_ratio")  # LAMB's figures of the last step, which no later one reads
FROM_LIBRARY = ("lamb", "stableadamw")

OPTIMIZERS: dict[str, Callable[[nn.Module, dict[str, nn.Parameter], Recipe], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
    "lamb": lamb,
    "stableadamw": stableadamw,
}

SCHEDULES: dict[str, Callable[[int, Recipe], float]] = {
    "linear": linear,
    "constant": constant,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}
