"""Cross-entropy in chunks gives the values and gradients of torch's own, and holds no wide copy of the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bertpipe.model import cross_entropy as module
from bertpipe.model.cross_entropy import cross_entropy, summed_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three rows a chunk at 40 columns, so that small cases have several, the last one short."""
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 3 * 4 * 40)


def case(rows=11, columns=40, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    return logits, torch.randint(columns, (rows,), generator=generator)


def with_gradient(function, logits, weights):
    leaf = logits.clone().requires_grad_()
    losses = function(leaf)
    (losses * weights).sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_value_and_gradient_are_those_of_torch_in_fp32(rows):
    logits, labels = case(rows)
    weights = torch.linspace(0, 1, rows)
    expected = with_gradient(lambda x: F.cross_entropy(x, labels, reduction="none"), logits, weights)
    found = with_gradient(lambda x: cross_entropy(x, labels)[0], logits, weights)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_full_precision_losses_and_a_gradient_rounded_once(dtype):
    logits, labels = case(dtype=dtype)
    weights = torch.linspace(0, 1, 11)
    expected, gradient = with_gradient(lambda x: F.cross_entropy(x, labels, reduction="none"), logits.float(), weights)
    losses, found = with_gradient(lambda x: cross_entropy(x, labels)[0], logits, weights)
    assert losses.dtype == torch.float32 and found.dtype == dtype
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    # one rounding is half a unit in the last place, eps / 2; denormals of fp16 are apart by 2**-24
    torch.testing.assert_close(found.float(), gradient, atol=2**-24, rtol=0.51 * torch.finfo(dtype).eps)


def test_gradient_by_finite_differences():
    logits, labels = case(5, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels)[0], logits.requires_grad_())


def test_large_logits_stay_finite():
    logits, labels = torch.tensor([[3e4, -3e4, 0.0]]).repeat(3, 1), torch.tensor([0, 1, 2])
    losses, gradient = with_gradient(lambda x: cross_entropy(x, labels)[0], logits, torch.ones(3))
    assert losses.tolist() == [0, 6e4, 3e4]
    assert gradient.tolist() == [[0, 0, 0], [1, -1, 0], [1, 0, -1]]


ROWS = st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_right_is_argmax_with_ties_going_to_the_first(rows, label, dtype):
    logits, labels = torch.tensor(rows, dtype=dtype), torch.full((len(rows),), label)
    before = logits.clone()
    assert torch.equal(cross_entropy(logits, labels)[1], logits.argmax(-1) == labels)
    assert torch.equal(logits, before), "the logits are left as they were"


def test_nothing_to_predict_is_no_rows():
    losses, right = cross_entropy(torch.zeros(0, 5, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.int64))
    assert (losses.shape, losses.dtype, right.shape, right.dtype) == ((0,), torch.float32, (0,), torch.bool)


class Largest(TorchDispatchMode):
    """Notes the most elements that any fp32 tensor has that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_fp32_tensor_is_larger_than_a_chunk():
    logits, labels = case(60, dtype=torch.bfloat16)
    leaf = logits.requires_grad_()
    with Largest() as mode:
        losses, _ = cross_entropy(leaf, labels)
        losses.sum().backward()
    assert mode.elements == 3 * 40
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [1.0, 1 / 613, 7.0])
def test_the_sum_has_the_gradient_of_the_single_losses(dtype, told):
    """Bit for bit where the factor was told; with another one it is rounded once more."""
    logits, labels = case(dtype=dtype)
    weights, factor = (torch.arange(11) < 9).float(), torch.tensor(1 / 613)
    losses, expected = with_gradient(lambda x: cross_entropy(x, labels)[0], logits, weights * factor)
    leaf = logits.clone().requires_grad_()
    total, right = summed_cross_entropy(leaf, labels, weights, torch.tensor(told))
    (total * factor).backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.detach(), (losses * weights).sum(), atol=1e-5, rtol=1e-6)
    assert torch.equal(right, logits.argmax(-1) == labels)
    if told == 1 / 613:
        assert torch.equal(leaf.grad, expected)
    else:
        torch.testing.assert_close(leaf.grad, expected, atol=1e-9, rtol=1.02 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_leaves_the_logits_alone_and_holds_nothing_wide(dtype):
    logits, labels = case(60, dtype=dtype)
    before = logits.clone()
    with Largest() as mode:
        total, _ = summed_cross_entropy(logits.requires_grad_(), labels, torch.ones(60))
        total.backward()
    assert torch.equal(logits.detach(), before)
    assert dtype == torch.float32 or mode.elements == 3 * 40
    with torch.no_grad():
        again, right = summed_cross_entropy(logits, labels, torch.ones(60))
    assert torch.equal(again, total.detach()) and not again.requires_grad and not right.requires_grad


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_right_of_the_sum_breaks_ties_alike(rows, label, dtype):
    logits, labels = torch.tensor(rows, dtype=dtype), torch.full((len(rows),), label)
    _, right = summed_cross_entropy(logits, labels, torch.ones(len(rows)))
    assert torch.equal(right, logits.argmax(-1) == labels)


def test_the_sum_of_extreme_and_of_no_rows():
    logits, labels = torch.tensor([[3e4, -3e4, 0.0]]).repeat(3, 1), torch.tensor([0, 1, 2])
    for number, loss in enumerate((0, 6e4, 3e4)):
        assert summed_cross_entropy(logits, labels, F.one_hot(torch.tensor(number), 3).float())[0] == loss
    nothing = torch.zeros(0, 5, requires_grad=True)
    total, right = summed_cross_entropy(nothing, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    total.backward()
    assert total == 0 and len(right) == 0 and nothing.grad.shape == (0, 5)


def test_it_compiles_in_one_graph():
    logits, labels = case(dtype=torch.bfloat16)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="eager")
    expected = with_gradient(lambda x: cross_entropy(x, labels)[0], logits, torch.ones(11))
    found = with_gradient(lambda x: compiled(x, labels)[0], logits, torch.ones(11))
    torch.testing.assert_close(found, expected)
    assert torch.equal(compiled(logits, labels)[1], logits.argmax(-1) == labels)
