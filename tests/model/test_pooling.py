"""Each offered classification head gives every packed sequence the logits it has alone."""

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.data.batches import Examples, pack_examples
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.labelled import SequenceLabel
from bertpipe.model.pooling import HEADS, check_head
from tests.model.gradients import assert_gradients, take_gradients
from tests.model.test_attention import CONFIGS


def examples(count=7):
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 97, n) for n in rng.integers(1, 40, count)]
    types = [np.arange(len(x)) * 2 // len(x) for x in ids]
    return Examples(ids, types, rng.integers(0, 3, count))


def stock(kind, pooling="first"):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_labels = 3
    if pooling != "first":
        config.classifier_pooling = pooling
    return tr.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(("kind", "pooling"), [(kind, how) for kind, head in HEADS.items() for how in head.poolings])
def test_packed_heads_equal_stock_ones_in_logits_and_gradients(kind, pooling):
    data, model = examples(), stock(kind, pooling)
    typed = encoders.FAMILIES[kind].token_types
    rows = []
    for ids, types in zip(data.input_ids, data.token_type_ids, strict=True):
        given = {"token_type_ids": torch.from_numpy(types)[None]} if typed else {}
        rows.append(model(input_ids=torch.from_numpy(ids)[None], **given).logits)
    expected = torch.cat(rows)
    torch.nn.functional.cross_entropy(expected, torch.from_numpy(data.labels), reduction="sum").backward()
    gradients = take_gradients(model)

    objective = SequenceLabel(encoders.make_packed(model))
    out = objective(pack_examples(data, np.arange(len(data.input_ids)), 0))
    torch.testing.assert_close(out["logits"], expected, atol=1e-5, rtol=1e-5)
    out["loss"].backward()
    assert_gradients(take_gradients(model), gradients)


def test_the_poolings_of_a_family_differ():
    """Otherwise the equality above could hold by pooling alike whatever the config says."""
    data, logits = examples(), []
    for how in HEADS["eurobert"].poolings:
        objective = SequenceLabel(encoders.make_packed(stock("eurobert", how)))
        logits.append(objective(pack_examples(data, np.arange(7), 0))["logits"])
    assert all((logits[i] - logits[j]).abs().max() > 1e-4 for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("kind", ["bert", "eurobert"])
def test_every_parameter_has_a_gradient_even_from_an_empty_slot(kind):
    """DDP waits for all of them."""
    data = examples()
    objective = SequenceLabel(encoders.make_packed(stock(kind)))
    out = objective(pack_examples(data, np.zeros(0, np.int64), 0))
    out["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert out["count"] == 0 and out["logits"].shape == (0, 3)


def test_a_family_without_a_head_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(HEADS, "eurobert")
    objective = SequenceLabel(encoders.make_packed(stock("eurobert")))
    with pytest.raises(ConfigError, match="no classification head is offered for eurobert models; offered are bert"):
        objective(pack_examples(examples(), np.arange(3), 0))


def test_a_pooling_that_is_not_offered_is_refused_by_name():
    """The stock class would take any other word without a murmur and fail later."""
    with pytest.raises(ConfigError, match="classifier_pooling 'max' is not offered for eurobert models; offered are"):
        check_head(stock("eurobert", "max"))
