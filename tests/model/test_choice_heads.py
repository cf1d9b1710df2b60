"""Multiple choice: packed heads equal stock ones, and the choices of an example stay together."""

import numpy as np
import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.data.batches import Examples, ExampleSlots, pack_examples
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.labelled import Choice
from bertpipe.model.pooling import CHOICE_HEADS, check_head
from tests.model.gradients import assert_gradients, take_gradients
from tests.model.test_attention import CONFIGS


def examples(count=5, choices=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, 97, n) for n in rng.integers(2, 40, count * choices)]
    types = [np.arange(len(x)) * 2 // len(x) for x in ids]
    return Examples(ids, types, rng.integers(0, choices, count), choices=choices)


def stock(kind, **fields):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    for name, value in fields.items():
        setattr(config, name, value)
    return tr.AutoModelForMultipleChoice.from_config(config, attn_implementation="eager").eval()


def alone(model, data, kind):
    """Logits [examples, choices] of the stock model, one example at a time, its choices padded to the longest."""
    rows = []
    for first in range(0, len(data.input_ids), data.choices):
        sides = [data.input_ids, data.token_type_ids, [np.ones_like(ids) for ids in data.input_ids]]
        fill = (model.config.pad_token_id or 0, 0, 0)
        padded = [
            torch.nn.utils.rnn.pad_sequence(
                [torch.from_numpy(row) for row in side[first : first + data.choices]], True, value
            )[None]
            for side, value in zip(sides, fill, strict=True)
        ]
        typed = {"token_type_ids": padded[1]} if encoders.FAMILIES[kind].token_types else {}
        rows.append(model(input_ids=padded[0], attention_mask=padded[2], **typed).logits)
    return torch.cat(rows)


@pytest.mark.parametrize(("kind", "pooling"), [(kind, how) for kind, h in CHOICE_HEADS.items() for how in h.poolings])
def test_packed_choices_equal_stock_ones_in_logits_loss_and_gradients(kind, pooling):
    data = examples()
    model = stock(kind, **({} if pooling == "first" else {"classifier_pooling": pooling}))
    expected = alone(model, data, kind)
    loss = torch.nn.functional.cross_entropy(expected, torch.from_numpy(data.labels), reduction="sum")
    loss.backward()
    gradients = take_gradients(model)

    objective = Choice(encoders.make_packed(model))
    batch = pack_examples(data, np.arange(len(data)), 0)
    out = objective(batch)
    torch.testing.assert_close(out["logits"].view(-1, data.choices), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["loss"], loss, atol=1e-5, rtol=1e-5)
    assert out["count"] == objective.count(batch) == len(data) == 5
    assert out["correct"] == int((expected.argmax(-1).numpy() == data.labels).sum())
    out["loss"].backward()
    assert_gradients(take_gradients(model), gradients)


@pytest.mark.parametrize("kind", CHOICE_HEADS)
def test_every_parameter_has_a_gradient_even_from_an_empty_slot(kind):
    """DDP waits for all of them; big_bird's pooler, which no other head takes, is among them."""
    objective = Choice(encoders.make_packed(stock(kind)))
    batch = pack_examples(examples(), np.zeros(0, np.int64), 0)
    out = objective(batch)
    out["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert out["count"] == objective.count(batch) == 0 and out["logits"].shape == (0, 1)


def test_without_labels_there_are_logits():
    data, objective = examples(), Choice(encoders.make_packed(stock("bert")))
    part = np.array([3, 1])
    with torch.no_grad():
        labelled, secret = objective(pack_examples(data, part, 0)), objective(pack_examples(data, part, 0, False))
    assert torch.equal(labelled["logits"], secret["logits"]) and secret["loss"] == 0
    assert objective.num_rows(data).tolist() == [3] * 5


def test_every_family_with_a_stock_class_is_offered_and_the_others_are_refused_by_name():
    for kind in encoders.FAMILIES:
        if kind in CHOICE_HEADS:
            encoders.check_class(tr.AutoModelForMultipleChoice, CONFIGS[kind](), "finetune.model")
        else:
            wanted = (
                f"finetune.model: transformers has no AutoModelForMultipleChoice for {kind} models; offered are bert"
            )
            with pytest.raises(ConfigError, match=wanted):
                encoders.check_class(tr.AutoModelForMultipleChoice, CONFIGS[kind](), "finetune.model")
    assert set(encoders.FAMILIES) - set(CHOICE_HEADS) == {"eurobert", "deberta"}


def test_a_checkpoint_of_a_family_without_the_class_is_refused(tmp_path):
    tr.EuroBertModel(CONFIGS["eurobert"]()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no AutoModelForMultipleChoice for eurobert models"):
        encoders.load(tr.AutoModelForMultipleChoice, str(tmp_path), "finetune.model")


def test_a_pooling_that_is_not_offered_is_refused_by_name():
    with pytest.raises(ConfigError, match="summary_type 'mean' is not offered for electra models; offered are first"):
        Choice.check(stock("electra", summary_type="mean"))
    check_head(tr.AutoModelForSequenceClassification.from_config(stock("electra", summary_type="mean").config))


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(2, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_the_choices_of_an_example_stay_together_in_one_slot(count, choices, batch_size, slots, seed):
    data = examples(count, choices, seed)
    source, seen = ExampleSlots(data, batch_size, slots, seed, 0), []
    for step in range(source.steps_per_epoch):
        for slot in source.slots(step, 0, slots):
            groups = slot.example_ids.numpy().reshape(-1, choices)
            assert (groups == groups[:, :1]).all()
            assert slot.group_ids.tolist() == [n for n in range(len(groups)) for _ in range(choices)]
            assert slot.sequence_labels.tolist() == data.labels[groups[:, 0]].tolist()
            starts = slot.cu_seqlens.tolist()
            for place, example in enumerate(groups[:, 0].tolist()):
                for choice in range(choices):
                    first, last = starts[place * choices + choice : place * choices + choice + 2]
                    wanted = data.input_ids[example * choices + choice]
                    assert slot.input_ids[0, first:last].tolist() == wanted.tolist()
            seen += groups[:, 0].tolist()
    assert sorted(seen) == list(range(count)), "each example once an epoch"


def test_slots_change_neither_loss_nor_count():
    data, objective = examples(7, 4), Choice(encoders.make_packed(stock("bert")))
    sums = []
    for slots in (1, 3, 9):
        source = ExampleSlots(data, 7, slots, 0, 0)
        with torch.no_grad():
            outs = [objective(slot) for slot in source.slots(0, 0, slots)]
        sums.append([sum(out[key].item() for out in outs) for key in ("loss", "correct", "count")])
    assert sums[1] == pytest.approx(sums[0], rel=1e-6) and sums[2] == pytest.approx(sums[0], rel=1e-6)
    assert sums[0][2] == 7
