"""Losses of the objectives on pairs are those of the stock classes on one big padded batch, however it is cut."""

import json

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.objectives import OBJECTIVES, PAIR_HEADS, MaskedLM, NextSentence, SentenceOrder
from bertpipe.train import loop
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.reduction import Fast
from tests.conftest import VOCAB_SIZE
from tests.data.test_pairs import some_documents, source, write
from tests.model.test_attention import CONFIGS
from tests.train.test_loop import ADAMW, as_padded, fit, place, token_labels

LABELS = {"bert": "next_sentence_label", "albert": "sentence_order_label"}


def stock(kind="bert", auto_class=tr.AutoModelForPreTraining, seed=0):
    """A small stock model without dropout."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.vocab_size = VOCAB_SIZE
    encoders.set_dropout(config, 0.0)
    return auto_class.from_config(config, attn_implementation="eager")


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs", some_documents())


def padded(slots):
    batch = as_padded(slots, token_labels)
    types = torch.zeros_like(batch["input_ids"])
    rows = [(s, s.cu_seqlens[n], s.cu_seqlens[n + 1]) for s in slots for n in range(s.num_sequences)]
    for i, (slot, first, last) in enumerate(rows):
        types[i, : last - first] = slot.token_type_ids[0, first:last]
    return batch | {"token_type_ids": types}, torch.cat([slot.sequence_labels for slot in slots])


@pytest.mark.parametrize("kind", PAIR_HEADS)
@pytest.mark.parametrize("objective", [NextSentence, SentenceOrder])
def test_loss_and_gradients_are_the_stock_class_s_on_one_padded_batch(kind, objective, pairs):
    model = stock(kind)
    slots = source(pairs, objective.parts[1]).slots(0, 0, 4)
    batch, labels = padded(slots)
    assert 0 < labels.float().mean() < 1
    expected = model(**batch, **{LABELS[kind]: labels}).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert any("pooler" in name for name in gradients)
    module = objective(encoders.make_packed(model))
    counts = [float(sum(part)) for part in zip(*map(module.counts, slots), strict=True)]
    settings, here = loop.LoopSettings(1, 4, seed=0, eval_every=1), place()
    for share in (1, 2, 4):  # slots that one process has
        model.zero_grad()
        sums = sum(
            loop._backward(Fast(module, here), slots[first : first + share], settings, here, 0, counts)[0].sum(0)
            for first in range(0, 4, share)
        )
        found = loop.means(objective.parts, sums.tolist(), counts)
        assert found["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
        assert found["loss"] == pytest.approx(found["mlm_loss"] + found[f"{objective.parts[1]}_loss"])
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


def test_a_run_on_pairs_is_the_stock_class_s_for_any_slots(pairs, tmp_path):
    """20 steps of AdamW: bertpipe with the batch in 4 slots, and a plain loop on the padded batch."""
    recipe = Recipe(**(vars(ADAMW) | {"steps": 20}))
    made = source(pairs)
    found = fit(NextSentence(stock()), made, tmp_path / "run", recipe, 4)
    model = stock().train()
    optimizer, expected = Optimizer(model, recipe), []
    for step in range(recipe.steps):
        batch, labels = padded(made.slots(step, 0, 4))
        optimizer.set_lr(step)
        loss = model(**batch, next_sentence_label=labels).loss
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == line["mlm_loss"] + line["nsp_loss"] and 0 <= line["nsp_accuracy"] <= 1


def test_every_parameter_has_a_gradient_even_from_an_empty_slot(tmp_path):
    """DDP waits for all of them."""
    empty = source(write(tmp_path / "few", [[5, 5]] * 3)).slots(0, 3, 4)[0]
    assert empty.num_sequences == 0
    module = NextSentence(encoders.make_packed(stock()))
    out = module(empty)
    out["loss"].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert out["count"].tolist() == [0, 0] == module.counts(empty)


@pytest.mark.parametrize("auto_class", ["AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("kind", PAIR_HEADS)
def test_the_saved_folder_gives_other_classes_the_trained_weights(kind, auto_class, tmp_path):
    """A classifier starts from the trained pooler; a masked LM from the trained head."""
    model = stock(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    encoders.save(encoders.make_packed(model), tmp_path)
    loaded, info = getattr(tr, auto_class).from_pretrained(tmp_path, output_loading_info=True)
    trained = model.state_dict()
    common = {n: p for n, p in loaded.state_dict().items() if n in trained}
    assert all(torch.equal(p, trained[n]) for n, p in common.items())
    missing = {name.partition(".")[0] for name in info["missing_keys"]}
    if auto_class == "AutoModelForSequenceClassification":
        assert any("pooler" in n and n.endswith("weight") for n in common) and missing <= {"classifier"}
    else:
        assert not missing and any("predictions" in n for n in common)


def test_families_without_both_heads_are_refused_by_name():
    with pytest.raises(ConfigError, match="mlm_nsp trains bert and albert models, not roberta; take mlm"):
        NextSentence(stock("roberta"))
    one_type = stock()
    one_type.config.type_vocab_size = 1
    with pytest.raises(ConfigError, match="two token types"):
        NextSentence(one_type)


def test_one_part_stays_a_plain_mean():
    assert loop.means(MaskedLM.parts, [6.0, 2.0], [4.0]) == {"loss": 1.5, "accuracy": 0.5}
    figures = loop.means(("mlm", "nsp"), [6.0, 3.0, 2.0, 1.0], [4.0, 3.0])
    assert figures["loss"] == figures["mlm_loss"] + figures["nsp_loss"] == 1.5 + 1
    assert figures["accuracy"] == figures["mlm_accuracy"] == 0.5 and figures["nsp_accuracy"] == 1 / 3
    assert set(OBJECTIVES) == {"mlm", "mlm_nsp", "mlm_sop"}
