"""What the tests of heads and attention compare: the gradients of a model that was run in two ways."""

from collections.abc import Mapping

import torch
from torch import nn


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients by parameter, of those that have one; the model has none afterwards."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Those of every parameter that is expected to have one."""
    assert found.keys() >= expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
