"""Each offered token-classification head gives every labelled token of a packed row the logits it has alone."""

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.data.batches import Examples, pack_examples
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.labelled import TokenLabel
from bertpipe.model.token_heads import HEADS
from tests.model.gradients import assert_gradients, take_gradients
from tests.model.test_attention import CONFIGS

LABELS = 5


def examples(count=7):
    """Sequences of 1 to 39 tokens, about half of them labelled; one without any."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 97, n) for n in rng.integers(1, 40, count)]
    types = [np.arange(len(x)) * 2 // len(x) for x in ids]
    positions = [np.flatnonzero(rng.random(len(x)) < 0.5) for x in ids]
    positions[2] = positions[2][:0]
    return Examples(ids, types, [rng.integers(0, LABELS, len(x)) for x in positions], positions)


def stock(kind):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_labels = LABELS
    return tr.AutoModelForTokenClassification.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", HEADS)
def test_packed_heads_equal_stock_ones_in_logits_and_gradients(kind):
    data, model = examples(), stock(kind)
    typed = encoders.FAMILIES[kind].token_types
    rows, loss = [], 0
    for ids, types, labels, positions in zip(
        data.input_ids, data.token_type_ids, data.labels, data.positions, strict=True
    ):
        wanted = torch.full((1, len(ids)), -100)
        wanted[0, positions] = torch.from_numpy(labels)
        given = {"token_type_ids": torch.from_numpy(types)[None]} if typed else {}
        out = model(input_ids=torch.from_numpy(ids)[None], labels=wanted, **given)
        rows.append(out.logits[0, positions])
        loss = loss + out.loss.nan_to_num(0) * len(positions)  # the stock loss is a mean, of nothing: nan
    expected = torch.cat(rows)
    loss.backward()
    gradients = take_gradients(model)

    objective = TokenLabel(encoders.make_packed(model))
    batch = pack_examples(data, np.arange(len(data)), 0)
    out = objective(batch)
    torch.testing.assert_close(out["logits"], expected, atol=1e-5, rtol=1e-5)
    assert out["count"] == objective.count(batch) == len(expected)
    assert out["correct"] == (expected.argmax(-1) == torch.from_numpy(np.concatenate(data.labels))).sum()
    torch.testing.assert_close(out["loss"], loss, atol=1e-4, rtol=1e-5)
    out["loss"].backward()
    assert_gradients(take_gradients(model), gradients)


def test_every_family_that_has_a_stock_class_is_offered():
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as STOCK

    assert HEADS.keys() == encoders.FAMILIES.keys() & STOCK.keys()


def test_without_labels_the_logits_are_the_same():
    data, objective = examples(), TokenLabel(encoders.make_packed(stock("bert")))
    chosen = np.array([4, 2, 0])
    with_labels = objective(pack_examples(data, chosen, 0))["logits"]
    out = objective(pack_examples(data, chosen, 0, labelled=False))
    assert torch.equal(out["logits"], with_labels) and out["loss"] == 0
    assert len(out["logits"]) == objective.num_rows(data)[chosen].sum()


@pytest.mark.parametrize("chosen", [[], [2]])
def test_every_parameter_has_a_gradient_even_from_a_slot_without_labels(chosen):
    """DDP waits for all of them."""
    objective = TokenLabel(encoders.make_packed(stock("bert")))
    out = objective(pack_examples(examples(), np.array(chosen, np.int64), 0))
    out["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert out["count"] == 0 and out["logits"].shape == (0, LABELS)


def test_a_family_without_a_head_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(HEADS, "eurobert")
    with pytest.raises(ConfigError, match="no token-classification head is offered for eurobert models; offered are"):
        TokenLabel.check(stock("eurobert"))
