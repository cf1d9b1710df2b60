"""A model small enough to be saved some thousand times, its optimizer with a step taken, and its checkpoints."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from bertpipe.train.checkpoint import Checkpoints
from bertpipe.train.optim import Optimizer, Recipe

RUN = "run-of-this-test"
TENSORS = ("model/model.safetensors", "optimizer.safetensors")
RECIPE = Recipe(
    name="adamw",
    lr=1e-3,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    eps=1e-6,
    schedule="constant",
    warmup_steps=0,
    steps=100,
    max_grad_norm=1.0,
)


def make_model(hidden: int = 8) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    return BertForMaskedLM(config)


def make_tokenizer(folder: Path) -> Any:
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(15))]))
    return BertTokenizer(vocab=str(vocab))


def advance(model: Any, optimizer: Optimizer, step: int) -> None:
    """A step with gradients that only `step` decides, so that its weights and moments are known."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.set_lr(step)
    optimizer.step()


def make(folder: Path, **settings: Any) -> tuple[Checkpoints, Any, Optimizer]:
    """Checkpoints of a new model in folder/checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model()
    optimizer = Optimizer(model, RECIPE)
    settings = {"keep": 2, "tokenizer": make_tokenizer(folder), "run": RUN} | settings
    return Checkpoints(folder / "checkpoints", **settings), model, optimizer


def state(step: int) -> dict[str, Any]:
    return {"tokens": step * 100, "seconds": 1.5 * step, "positions": {"metrics": step}, "place": {"world_size": 1}}


def save_steps(checkpoints: Checkpoints, model: Any, optimizer: Optimizer, *steps: int) -> None:
    """Train up to each of `steps` (from 1) and save there."""
    for step in range(1, max(steps) + 1):
        advance(model, optimizer, step)
        if step in steps:
            checkpoints.save(step, model, optimizer, state(step))
    checkpoints.wait()


def tensors(model: Any, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return copy.deepcopy({**model.state_dict(), **optimizer.state()})


def oracle(*steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """Weights and moments after each of `steps`, from a run that saves nothing."""
    model = make_model()
    optimizer = Optimizer(model, RECIPE)
    found = {}
    for step in range(1, max(steps) + 1):
        advance(model, optimizer, step)
        if step in steps:
            found[step] = tensors(model, optimizer)
    return found


def restored(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(step, weights and moments) of a checkpoint, through `restore` into a new model."""
    model = make_model()
    optimizer = Optimizer(model, RECIPE)
    found = Checkpoints.restore(path, model, optimizer)
    assert found == state(found["step"]) | {"step": found["step"]}
    return found["step"], tensors(model, optimizer)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())
