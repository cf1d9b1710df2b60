"""Each offered question-answering head gives every packed sequence the logits and the loss that it has alone."""

import numpy as np
import pytest
import torch
import transformers as tr
from torch.nn import functional

from bertpipe.data.batches import Examples, pack, pack_examples
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.labelled import AnswerSpan
from bertpipe.model.span_heads import HEADS
from tests.model.gradients import assert_gradients, take_gradients
from tests.model.test_attention import CONFIGS

SEP = 66  # big_bird looks for it


def examples(count=7):
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, SEP, n) for n in (1, *rng.integers(3, 40, count - 1))]
    for row in ids:
        row[len(row) // 3] = SEP
    types = [np.arange(len(x)) * 2 // len(x) for x in ids]
    labels = np.array([np.sort(rng.integers(0, len(x), 2)) for x in ids])
    labels[2] = 0
    return Examples(ids, types, labels)


def stock(kind):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.sep_token_id = SEP
    return tr.AutoModelForQuestionAnswering.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", HEADS)
def test_packed_heads_equal_stock_ones_in_logits_loss_and_gradients(kind):
    data, model = examples(), stock(kind)
    typed = encoders.FAMILIES[kind].token_types
    rows, loss = [], 0
    for ids, types, (start, end) in zip(data.input_ids, data.token_type_ids, data.labels, strict=True):
        given = {"token_type_ids": torch.from_numpy(types)[None]} if typed else {}
        given |= {"start_positions": torch.tensor([start]), "end_positions": torch.tensor([end])}
        out = model(input_ids=torch.from_numpy(ids)[None], **given)
        rows.append(torch.stack([out.start_logits[0], out.end_logits[0]], 1))
        loss = loss + out.loss
    loss.backward()
    gradients = take_gradients(model)

    objective = AnswerSpan(encoders.make_packed(model))
    assert objective.num_rows(data).tolist() == [len(row) for row in rows]
    out = objective(pack_examples(data, np.arange(len(data)), 0))
    torch.testing.assert_close(out["logits"], torch.cat(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["loss"], loss, atol=1e-5, rtol=1e-5)
    assert out["count"] == objective.count(pack_examples(data, np.arange(len(data)), 0)) == len(data)
    likeliest = [row.argmax(0).tolist() == label.tolist() for row, label in zip(rows, data.labels, strict=True)]
    assert out["correct"] == sum(likeliest) and any(likeliest)
    out["loss"].backward()
    assert_gradients(take_gradients(model), gradients)


def test_padding_and_large_logits_change_nothing():
    """Tail padding takes no part; a softmax of logits in the thousands stays finite."""
    data, model = examples(), stock("bert")
    model.qa_outputs.weight.data *= 1e5
    objective = AnswerSpan(encoders.make_packed(model))
    expected = objective(pack_examples(data, np.arange(len(data)), 0))
    assert expected["logits"].abs().max() > 1e3 and expected["loss"].isfinite()
    lengths = np.array([len(ids) for ids in data.input_ids])
    ids, types = np.concatenate(data.input_ids), np.concatenate(data.token_type_ids)
    labels = torch.from_numpy(data.labels)
    padded = objective(pack(ids, lengths, len(ids) + 50, 0, 40, types, sequence_labels=labels))
    torch.testing.assert_close(padded["loss"], expected["loss"])
    torch.testing.assert_close(padded["logits"], expected["logits"], rtol=1e-4, atol=1e-2)


def test_logits_are_not_rounded_to_bf16():
    """Eight bits would make ties of the best spans; the encoder still runs in bf16."""
    data, objective = examples(), AnswerSpan(encoders.make_packed(stock("bert")), "bf16")
    full = AnswerSpan(objective.model)(pack_examples(data, np.arange(len(data)), 0))["logits"]
    logits = objective(pack_examples(data, np.arange(len(data)), 0))["logits"]
    assert (logits.bfloat16() != logits).float().mean() > 0.9
    assert 0 < (logits - full).abs().max() < 0.05 * full.abs().max()


def test_a_padded_batch_of_the_stock_model_has_another_loss():
    """Which is why there is nothing to equal but sequences one at a time: its softmax runs over the padding."""
    data, model = examples(), stock("bert")
    ids, start = torch.from_numpy(data.input_ids[3])[None], torch.tensor([1])
    mask = torch.arange(60)[None] < ids.shape[1]
    padded = functional.pad(ids, (0, 60 - ids.shape[1]))
    alone = model(input_ids=ids, start_positions=start, end_positions=start).loss
    beside = model(input_ids=padded, attention_mask=mask.long(), start_positions=start, end_positions=start).loss
    assert beside > alone + 0.1


@pytest.mark.parametrize("kind", ["bert", "modernbert", "big_bird"])
def test_every_parameter_has_a_gradient_even_from_an_empty_slot(kind):
    """DDP waits for all of them."""
    objective = AnswerSpan(encoders.make_packed(stock(kind)))
    out = objective(pack_examples(examples(), np.zeros(0, np.int64), 0))
    out["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters() if p.requires_grad)
    assert out["count"] == 0 and out["logits"].shape == (0, 2)


def test_a_family_without_a_head_is_refused_by_name(monkeypatch):
    model = stock("electra")
    AnswerSpan.check(model)
    monkeypatch.delitem(HEADS, "electra")
    with pytest.raises(ConfigError, match="no question-answering head is offered for electra models; offered are bert"):
        AnswerSpan.check(model)
