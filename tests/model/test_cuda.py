"""What only a GPU can show: torch's own kernels give what full precision gives, and a step compiles into one graph."""

import pytest
import torch
import transformers as tr

from bertpipe.model import attention, encoders, kernels
from bertpipe.model.cross_entropy import cross_entropy
from bertpipe.model.objectives import MaskedLM
from tests.model.test_attention import CONFIGS, LENGTHS, PADDED, PLUGGED, make
from tests.model.test_kernels import predicting, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def ampere():
    if torch.cuda.get_device_capability() < kernels.FLASH_CAPABILITY:
        pytest.skip("FlashAttention needs compute capability 8.0")


def objective(kind: str, kernel: str, precision: str) -> MaskedLM:
    """The same weights for each kernel and precision; no dropout."""
    config = CONFIGS[kind]()
    encoders.set_dropout(config, 0.0)
    torch.manual_seed(0)
    model = tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    return MaskedLM(encoders.make_packed(model, kernel=kernel), precision).to(CUDA).train()


def assert_close_to_bf16(found, expected):
    """Relative to the largest entry of each tensor: some roundings of 2**-8 one after another."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off = (found[name].float() - value.float()).abs().max() / value.float().abs().max().clamp(min=1e-3)
        assert off < 0.06, f"{name}: {off}"


@pytest.mark.parametrize("kind", PLUGGED)
def test_varlen_in_bf16_is_close_to_blocks_in_fp32(kind):
    batch = predicting(LENGTHS, 256).to(CUDA)
    exact, fast = objective(kind, attention.NAME, "fp32"), objective(kind, attention.VARLEN, "bf16")
    assert_close_to_bf16(step(fast, fast, batch), step(exact, exact, batch))


@pytest.mark.parametrize("kind", PLUGGED)
def test_a_compiled_step_is_one_graph_and_close_to_the_plain_one(kind):
    torch.compiler.reset()
    plain, compiled = objective(kind, attention.VARLEN, "bf16"), objective(kind, attention.VARLEN, "bf16")
    compiled.compile(fullgraph=True)
    for seed, lengths in enumerate(([17, 40, 1, 33], [100], LENGTHS)):
        batch = predicting(lengths, 256, seed).to(CUDA)
        assert_close_to_bf16(step(compiled, compiled, batch), step(plain, plain, batch))


@pytest.mark.parametrize("kind", PADDED)
def test_padded_blocks_in_bf16_are_close_to_fp32(kind):
    batch = predicting(LENGTHS, 256).to(CUDA)
    exact, fast = objective(kind, "padded", "fp32"), objective(kind, "padded", "bf16")
    assert_close_to_bf16(step(fast, fast, batch), step(exact, exact, batch))


def test_boundaries_keep_sequences_apart():
    batch = predicting(LENGTHS, 256).to(CUDA)
    changed = batch.map(torch.clone)
    changed.input_ids[0, : LENGTHS[0]] = 7
    model = objective("bert", attention.VARLEN, "bf16").eval().model
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before, after = encoders.encode(model, batch), encoders.encode(model, changed)
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])


def test_the_fast_kernel_is_chosen_and_dropout_prevents_it():
    config = make("bert").config
    encoders.set_dropout(config, 0.0)
    assert kernels.choose(config, CUDA, "bf16") == kernels.Kernel(attention.VARLEN)
    encoders.set_dropout(config, 0.1)
    slow = kernels.choose(config, CUDA, "bf16")
    assert slow.name == attention.NAME and "attention has 0.1" in slow.obstacle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_that_of_the_cpu(dtype):
    torch.manual_seed(0)
    logits, labels = (3 * torch.randn(3000, 30_522)).to(dtype), torch.randint(30_522, (3000,))
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        losses, right = cross_entropy(leaf, labels.to(device))
        losses.sum().backward()
        results.append([losses.detach().cpu(), right.cpu(), leaf.grad.cpu()])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=2 * torch.finfo(dtype).eps + 1e-5)
