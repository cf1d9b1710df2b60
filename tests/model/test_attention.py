"""A packed row gives every sequence the logits and gradients it has alone; for each family that is offered."""

import numpy as np
import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.data.batches import pack
from bertpipe.model import attention, encoders
from tests.model.gradients import assert_gradients

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
CONFIGS = {
    "bert": lambda: tr.BertConfig(**SMALL),
    "roberta": lambda: tr.RobertaConfig(**SMALL, pad_token_id=1),
    "camembert": lambda: tr.CamembertConfig(**SMALL, pad_token_id=1),
    "xlm-roberta": lambda: tr.XLMRobertaConfig(**SMALL, pad_token_id=1),
    "albert": lambda: tr.AlbertConfig(**SMALL, embedding_size=16),
    "electra": lambda: tr.ElectraConfig(**SMALL, embedding_size=16),
    "distilbert": lambda: tr.DistilBertConfig(
        vocab_size=97, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=160
    ),
    "modernbert": lambda: tr.ModernBertConfig(**SMALL, **IDS, local_attention=16),
    "eurobert": lambda: tr.EuroBertConfig(
        **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3, num_key_value_heads=2
    ),
    "deberta": lambda: tr.DebertaConfig(**SMALL, **RELATIVE, type_vocab_size=2),
    "deberta-v2": lambda: tr.DebertaV2Config(
        **SMALL, **RELATIVE, position_buckets=16, share_att_key=True, norm_rel_ebd="layer_norm"
    ),
    "big_bird": lambda: tr.BigBirdConfig(**SMALL, attention_type="original_full"),
}
PADDED = [kind for kind, row in encoders.FAMILIES.items() if row.padded]
PLUGGED = [kind for kind, row in encoders.FAMILIES.items() if not row.padded]
LENGTHS = [17, 40, 1, 33, 1, 128, 5]  # single tokens among them


def make(kind: str) -> torch.nn.Module:
    """A small stock masked-LM model with random weights."""
    torch.manual_seed(0)
    return tr.AutoModelForMaskedLM.from_config(CONFIGS[kind](), attn_implementation="eager").eval()


def packed_batch(lengths, total=None, longest=None, seed=0):
    rng = np.random.default_rng(seed)
    ids, types = rng.integers(5, 97, sum(lengths)), rng.integers(0, 2, sum(lengths))
    return pack(ids, np.array(lengths), total or sum(lengths), 0, longest or max(lengths), types)


def alone(model, kind, batch):
    """Logits [real tokens, V] of each sequence run by itself through the stock model."""
    logits = []
    for n in range(batch.num_sequences):
        part = slice(int(batch.cu_seqlens[n]), int(batch.cu_seqlens[n + 1]))
        types = {"token_type_ids": batch.token_type_ids[:, part]} if encoders.FAMILIES[kind].token_types else {}
        logits.append(model(input_ids=batch.input_ids[:, part], **types).logits[0])
    return torch.cat(logits)


def together(model, batch):
    """Logits [T, V] of the packed row."""
    return encoders.family(model).mlm_head(model, encoders.encode(model, batch))


def gradients(model, logits):
    model.zero_grad()
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits.softmax(-1) * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", encoders.FAMILIES)
def test_packed_equals_alone_in_logits_and_gradients(kind):
    model, batch = make(kind), packed_batch(LENGTHS, total=sum(LENGTHS) + 150, longest=128)
    expected = alone(model, kind, batch)
    expected_gradients = gradients(model, expected)
    encoders.make_packed(model)
    logits = together(model, batch)[: batch.num_tokens]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    found = gradients(model, logits)
    assert_gradients(found, expected_gradients)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=9), st.integers(0, 300), st.integers(0, 9))
def test_any_lengths_and_any_padding(lengths, padding, seed):
    model, batch = make("bert"), packed_batch(lengths, sum(lengths) + padding, 150, seed)
    with torch.no_grad():
        expected = alone(model, "bert", batch)
        encoders.make_packed(model)
        torch.testing.assert_close(together(model, batch)[: batch.num_tokens], expected, atol=1e-5, rtol=1e-5)


def test_short_blocks_in_bf16_agree_with_full_precision():
    model, batch = make("bert"), packed_batch(LENGTHS)
    encoders.make_packed(model)
    with torch.no_grad():
        full = together(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = together(model, batch).float()
    assert (full - half).abs().max() < 0.05 * full.abs().max()


def test_dropping_the_boundaries_is_noticed():
    """The equality above has teeth: one long sequence in place of many gives other logits."""
    model, batch = make("bert"), packed_batch(LENGTHS)
    with torch.no_grad():
        expected = alone(model, "bert", batch)
        encoders.make_packed(model)
        merged = pack(batch.input_ids[0].numpy(), np.array([batch.num_tokens]), batch.num_tokens, 0, batch.num_tokens)
        merged = merged.map(lambda t: t)
        object.__setattr__(merged, "position_ids", batch.position_ids)
        object.__setattr__(merged, "token_type_ids", batch.token_type_ids)
        found = together(model, merged)
    assert (found - expected).abs().max() > 1e-3


def test_each_head_dimension_mixes_only_its_own_sequence():
    """Changing one sequence changes no other, bit for bit."""
    model, batch = make("bert"), packed_batch(LENGTHS)
    encoders.make_packed(model)
    changed = batch.map(torch.clone)
    changed.input_ids[0, : LENGTHS[0]] = 7
    with torch.no_grad():
        before, after = together(model, batch), together(model, changed)
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])


def test_layout_covers_every_token_once():
    cu = torch.tensor([0, 3, 4, 40, 168, 169], dtype=torch.int32)
    plan = attention.layout(cu)
    assert torch.equal(plan.spread[plan.gather], torch.arange(169))
    assert sum(block.num * block.length for block in plan.blocks) == len(plan.spread)


def test_sequences_that_need_no_mask_stand_apart_where_they_are_most():
    ends = torch.tensor([128] * 5 + [100, 118, 64, 64, 60, 90, 91]).cumsum(0)
    plan = attention.layout(torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int())
    found = [(block.num, block.length, block.hidden is not None) for block in plan.blocks]
    assert found == [(1, 60, False), (2, 64, False), (2, 91, True), (2, 118, True), (5, 128, False)]
    assert torch.equal(plan.spread[plan.gather], torch.arange(int(ends[-1])))


@pytest.mark.parametrize("length", [attention.PLAIN_LENGTH, attention.PLAIN_LENGTH + 1])
def test_attention_in_bf16_is_that_of_full_precision_at_either_kernel(length):
    """Outputs and gradients, with padding hidden, within the error of bf16's 8 bits."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(2, 2, length, 16, generator=generator) for _ in range(4))
    hidden = (torch.arange(length) >= torch.tensor([[length], [length - 9]]))[:, None, None]

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention._attend(*leaves, hidden, 0.25, 0.0)
        (out * weights).sum().backward()
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    for half, full in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert (half - full).norm() < 0.02 * full.norm()


def test_without_boundaries_it_refuses():
    model = make("bert")
    encoders.make_packed(model)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
