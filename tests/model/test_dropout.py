"""Our dropout does what torch's does: the rate, the scale, the gradient, the seed."""

import pytest
import torch
import transformers as tr
from torch import nn

from bertpipe.model import encoders
from bertpipe.model.dropout import Dropout, draw_mask, dropout, replace_dropout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_is_0_or_the_scale_at_the_rate_asked_for(dtype, p):
    torch.manual_seed(0)
    mask = draw_mask((1000, 403), p, dtype)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    dropped = (mask == 0).double()
    error = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(dropped.mean() - p) < error
    lanes = dropped.flatten()[: 4 * (mask.numel() // 4)].view(-1, 4)
    assert (lanes.mean(0) - p).abs().max() < 2 * error, "each quarter of the 64 bits"
    assert abs(torch.corrcoef(lanes.T).fill_diagonal_(0)).max() < 0.02, "one tells nothing of its neighbours"


def test_every_16_bit_number_is_about_as_likely():
    """A rate of k / 65,536 is that of the k lowest numbers; a small one shows that all of them occur."""
    torch.manual_seed(0)
    rates = [float((draw_mask((4_000_000,), k / 65_536, torch.float32) == 0).double().mean()) for k in (1, 64, 65_472)]
    assert rates == pytest.approx([1 / 65_536, 64 / 65_536, 65_472 / 65_536], rel=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_has_no_gradient_and_the_rest_is_scaled(dtype):
    x = torch.ones(50, 7, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.5)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach()) and set(out.unique().tolist()) == {0.0, 2.0}


def test_the_seed_decides_and_evaluation_drops_nothing():
    x, module = torch.randn(64, 64), Dropout(0.3)
    torch.manual_seed(7)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(7)
    assert torch.equal(first, module(x))
    assert torch.equal(module.eval()(x), x) and torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any() and dropout(torch.zeros(0, 3), 0.1).shape == (0, 3)


def test_other_devices_and_dtypes_have_torchs(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: seen.append((x.device.type, x.dtype)) or x)
    dropout(torch.ones(3, device="meta"), 0.1)
    dropout(torch.ones(3, dtype=torch.float64), 0.1)
    assert seen == [("meta", torch.float32), ("cpu", torch.float64)]


def test_a_model_keeps_its_weights_their_names_and_what_it_computes():
    config = tr.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    model = tr.BertForSequenceClassification(config).eval()
    ids = torch.randint(5, 100, (2, 9))
    before, names = model(ids).logits, list(model.state_dict())
    count = sum(type(module) is nn.Dropout for module in model.modules())
    assert replace_dropout(model) is model
    assert sum(type(module) is Dropout and not module.training for module in model.modules()) == count > 4
    assert not any(type(module) is nn.Dropout for module in model.modules())
    assert torch.equal(model(ids).logits, before) and list(model.state_dict()) == names
    assert not torch.equal(model.train()(ids).logits, before)


def test_packed_and_padded_models_have_it():
    for model in (
        tr.BertModel(tr.BertConfig(num_hidden_layers=1)),
        tr.DebertaModel(tr.DebertaConfig(num_hidden_layers=1)),
    ):
        assert any(type(module) is Dropout for module in encoders.make_packed(model).modules())
