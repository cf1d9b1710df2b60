"""Parameter groups, optimizers and learning-rate schedules.

Learning rates are a pure function of the step, and optimizer states are plain tensors under their parameter's name, so
a checkpoint needs no optimizer object to be read.
"""

from __future__ import annotations

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


def check_names(optimizer: str, schedule: str) -> None:
    """ConfigError for an optimizer or schedule that isn't there."""
    for setting, name, table in (("name", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
        if name not in table:
            raise ConfigError(f"optim.{setting}: {name!r} is not one of {', '.join(table)}")


class Optimizer:
    """One or more torch optimizers over the named parameters of a model, stepped as one."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        check_names(recipe.name, recipe.schedule)
        self.recipe = recipe
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parts = OPTIMIZERS[recipe.name](model, self.parameters, recipe)
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def set_lr(self, step: int) -> float:
        """Set the rates of a step (from 0); returns AdamW's."""
        recipe = self.recipe
        factor = SCHEDULES[recipe.schedule](step, recipe.steps, recipe.warmup_steps)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        return recipe.lr * factor

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.max_grad_norm)
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """Every state tensor as `parameter name//state name`."""
        names = {id(p): name for name, p in self.parameters.items()}
        return {
            f"{names[id(p)]}//{key}": value
            for part in self.parts
            for p, entries in part.state.items()
            for key, value in entries.items()
        }

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave, on each parameter's device."""
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for name, tensor in tensors.items():
            parameter, key = name.split("//")
            p = self.parameters[parameter]
            owner[id(p)].state[p][key] = tensor if key == "step" else tensor.to(p.device)


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


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, step / max(1, warmup_steps)) if warmup_steps else 1.0


def linear(step: int, steps: int, warmup_steps: int) -> float:
    """Up to 1 over the warmup, then down to 0 at `steps`: transformers' linear schedule."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def constant(step: int, steps: int, warmup_steps: int) -> float:
    """Up to 1 over the warmup, then 1."""
    return _warmup(step, warmup_steps)


OPTIMIZERS: dict[str, Callable[[nn.Module, dict[str, nn.Parameter], Recipe], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}

SCHEDULES: dict[str, Callable[[int, int, int], float]] = {"linear": linear, "constant": constant}
