"""The kernel is chosen by what it can do, and the one of CUDA gives what each sequence gives alone, in one graph."""

import json

import numpy as np
import pytest
import torch
import transformers as tr
from torch._dynamo.testing import CompileCounter

from bertpipe.errors import ConfigError
from bertpipe.model import attention, encoders, kernels
from bertpipe.model.objectives import MaskedLM
from tests.model import varlen_reference  # noqa: F401  (gives torch's operators CPU kernels)
from tests.model.gradients import assert_gradients
from tests.model.test_attention import CONFIGS, LENGTHS, PLUGGED, alone, gradients, make, packed_batch, together

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", PLUGGED)
def test_varlen_equals_alone_in_logits_and_gradients(kind):
    model, batch = make(kind), packed_batch(LENGTHS, total=sum(LENGTHS) + 150, longest=128)
    expected = alone(model, kind, batch)
    expected_gradients = gradients(model, expected)
    encoders.make_packed(model, kernel=attention.VARLEN)
    logits = together(model, batch)[: batch.num_tokens]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    found = gradients(model, logits)
    assert_gradients(found, expected_gradients)


@pytest.mark.parametrize("kernel", [attention.NAME, attention.VARLEN])
def test_heads_of_keys_shared_by_several_of_queries(kernel):
    torch.manual_seed(0)
    config = CONFIGS["eurobert"]()
    config.num_key_value_heads = 1
    model = tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    batch = packed_batch(LENGTHS)
    expected = alone(model, "eurobert", batch)
    expected_gradients = gradients(model, expected)
    encoders.make_packed(model, kernel=kernel)
    logits = together(model, batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    found = gradients(model, logits)
    assert_gradients(found, expected_gradients)


def predicting(lengths, total, seed=0):
    """A slot with 20 positions to predict, the last two of them fill."""
    rng = np.random.default_rng(seed)
    batch = packed_batch(lengths, total, 128, seed)
    object.__setattr__(batch, "predict_index", torch.from_numpy(rng.integers(0, sum(lengths), 20)))
    object.__setattr__(batch, "predict_labels", torch.from_numpy(rng.integers(5, 97, 20)))
    object.__setattr__(batch, "predict_weight", (torch.arange(20) < 18).float())
    return batch


def step(module, objective, batch):
    objective.zero_grad()
    out = module(batch)
    out["loss"].backward()
    return {k: v.detach() for k, v in out.items()} | {
        n: p.grad.clone() for n, p in objective.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    "kind", [k if k in ("bert", "modernbert") else pytest.param(k, marks=pytest.mark.slow) for k in PLUGGED]
)
def test_forward_and_loss_are_one_graph_for_any_number_of_sequences(kind):
    """No graph break, and no compilation after the second: only the number of boundaries changes between slots."""
    torch.compiler.reset()
    config = CONFIGS[kind]()
    encoders.set_dropout(config, 0.0)
    model = tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    objective = MaskedLM(encoders.make_packed(model, kernel=attention.VARLEN)).train()
    counter = CompileCounter()
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    for seed, lengths in enumerate(([17, 40, 1, 33], [100], [5] * 12, LENGTHS)):
        batch = predicting(lengths, 256, seed)
        torch.testing.assert_close(step(compiled, objective, batch), step(objective, objective, batch))
    assert counter.frame_count <= 2


def test_what_keeps_flash_attention_from_being_used():
    assert kernels.flash_obstacle("bf16", 0.0, 64, (8, 0)) == ""
    assert kernels.flash_obstacle("bf16", 0.0, 128, (9, 0)) == ""
    assert "built without" in kernels.flash_obstacle("bf16", 0.0, 64, None)
    assert "this card has 7.5" in kernels.flash_obstacle("bf16", 0.0, 64, (7, 5))
    assert "the precision is fp32" in kernels.flash_obstacle("fp32", 0.0, 64, (8, 0))
    assert "attention has 0.1" in kernels.flash_obstacle("bf16", 0.1, 64, (8, 0))
    assert "the model's have 36" in kernels.flash_obstacle("bf16", 0.0, 36, (8, 0))
    assert "the model's have 256" in kernels.flash_obstacle("bf16", 0.0, 256, (8, 0))


@pytest.mark.parametrize("kind", encoders.FAMILIES)
def test_dropout_and_head_size_are_found_in_every_config(kind):
    config = CONFIGS[kind]()
    encoders.set_dropout(config, 0.25)
    assert kernels.attention_dropout(config) == 0.25
    assert kernels.head_size(config) == 16


def test_a_cpu_takes_blocks_and_misses_nothing():
    kernel = kernels.choose(CONFIGS["bert"](), CPU, "bf16")
    assert kernel == kernels.Kernel(attention.NAME, "")
    kernels.settle(kernel, required=True, say=True)


def test_a_slow_kernel_is_refused_where_a_fast_one_is_required_and_said_aloud_once_elsewhere(capsys):
    slow = kernels.Kernel(attention.NAME, "this card is made of wood")
    with pytest.raises(ConfigError, match=r"runtime\.require_fast_attention: this card is made of wood"):
        kernels.settle(slow, required=True, say=True)
    for say in (False, True, True):
        kernels.settle(slow, required=False, say=say)
    out = capsys.readouterr().out
    assert out == "note: attention runs on the slower kernel bertpipe_packed: this card is made of wood\n"


def test_only_what_is_one_graph_is_compiled():
    blocks, varlen = kernels.Kernel(attention.NAME), kernels.Kernel(attention.VARLEN)
    cuda = torch.device("cuda")
    assert kernels.compiles(varlen, cuda, "auto") and kernels.compiles(varlen, cuda, True)
    assert not kernels.compiles(varlen, cuda, False) and not kernels.compiles(blocks, cuda, "auto")
    assert not kernels.compiles(blocks, CPU, "auto")
    with pytest.raises(ConfigError, match=r"runtime\.compile: with the attention kernel bertpipe_packed"):
        kernels.compiles(blocks, CPU, True)


def test_varlen_refuses_dropout_rather_than_leave_it_out():
    model = encoders.make_packed(make("bert").train(), kernel=attention.VARLEN)
    with pytest.raises(ValueError, match=r"bertpipe_varlen has no dropout, 0\.1 was asked for"):
        together(model, packed_batch([3, 4]))


def test_no_kernel_is_named_in_what_is_saved(tmp_path):
    model = encoders.make_packed(make("bert"), kernel=attention.VARLEN)
    encoders.save(model, tmp_path)
    assert "bertpipe" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"
    assert model.config._attn_implementation == attention.VARLEN
