"""Each offered classification head gives every packed sequence the logits it has alone."""

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.data.batches import Examples, pack_examples
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.objectives import SequenceLabel
from bertpipe.model.pooling import HEADS
from tests.model.test_attention import CONFIGS


def examples(count=7):
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 97, n) for n in rng.integers(1, 40, count)]
    types = [np.arange(len(x)) * 2 // len(x) for x in ids]
    return Examples(ids, types, rng.integers(0, 3, count))


def stock(kind, **more):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_labels = 3
    return tr.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", **more).eval()


@pytest.mark.parametrize("kind", HEADS)
def test_packed_heads_equal_stock_ones_in_logits_and_gradients(kind):
    data, model = examples(), stock(kind)
    typed = encoders.FAMILIES[kind].token_types
    rows = []
    for ids, types in zip(data.input_ids, data.token_type_ids, strict=True):
        given = {"token_type_ids": torch.from_numpy(types)[None]} if typed else {}
        rows.append(model(input_ids=torch.from_numpy(ids)[None], **given).logits)
    expected = torch.cat(rows)
    torch.nn.functional.cross_entropy(expected, torch.from_numpy(data.labels), reduction="sum").backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    objective = SequenceLabel(encoders.make_packed(model))
    out = objective(pack_examples(data, np.arange(len(data.input_ids)), 0))
    torch.testing.assert_close(out["logits"], expected, atol=1e-5, rtol=1e-5)
    out["loss"].backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


def test_every_parameter_has_a_gradient_even_from_an_empty_slot():
    """DDP waits for all of them."""
    data = examples()
    objective = SequenceLabel(encoders.make_packed(stock("bert")))
    out = objective(pack_examples(data, np.zeros(0, np.int64), 0))
    out["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert out["count"] == 0 and out["logits"].shape == (0, 3)


def test_a_family_without_a_head_is_refused_by_name():
    data = examples()
    objective = SequenceLabel(encoders.make_packed(stock("eurobert")))
    with pytest.raises(ConfigError, match="no classification head is offered for eurobert models; offered are bert"):
        objective(pack_examples(data, np.arange(3), 0))
