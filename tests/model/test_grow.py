"""Grown checkpoints: old entries and positions stay what they were, new ones are what the old model would say."""

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import ModelConfig
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, grow
from tests.model.test_attention import CONFIGS

SPECIAL_IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
PIECES = [[5, 6], [7], [8, 8, 9], [96, 1, 50, 51]]
V = 97
RELATIVE = ("deberta", "deberta-v2")  # relative positions alone


def make(kind: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A small stock masked-LM model, weights random everywhere, biases too."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def build(init, vocab_size=V, added=(), length=32, **options):
    return encoders.build(ModelConfig(init=init, **options), vocab_size, SPECIAL_IDS, length, 0, added=added)


def logits(model, ids, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **more).logits[0]


# --- vocabulary ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_entry_scores_the_mean_of_its_pieces(kind, tied, tmp_path):
    old = make(kind, tie_word_embeddings=tied)
    new = build(save(old, tmp_path / "old"), V + len(PIECES), PIECES)
    assert new.config.vocab_size == V + 4 and new.get_input_embeddings().weight.shape[0] == V + 4
    text = [5, 60, 7, 8, 9, 50]
    before, after = logits(old, text), logits(new, text)
    torch.testing.assert_close(after[:, :V], before, atol=1e-5, rtol=1e-5)
    expected = torch.stack([before[:, ids].mean(1) for ids in PIECES], 1)
    torch.testing.assert_close(after[:, V:], expected, atol=1e-5, rtol=1e-5)
    embeddings = new.get_input_embeddings().weight
    assert torch.equal(embeddings[:V], old.get_input_embeddings().weight)
    torch.testing.assert_close(embeddings[V], (embeddings[5] + embeddings[6]) / 2)
    assert torch.equal(new.get_output_embeddings().weight[:V], old.get_output_embeddings().weight)
    assert (new.get_output_embeddings().weight is embeddings) == tied
    old_bias, bias = old.get_output_embeddings().bias, new.get_output_embeddings().bias
    assert bias is None if old_bias is None else torch.equal(bias[:V], old_bias)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_grown_model_saves_as_a_stock_one(kind, tmp_path):
    new = build(save(make(kind), tmp_path / "old"), V + 4, PIECES)
    encoders.save(encoders.make_packed(new), tmp_path / "new")
    loaded, info = tr.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "new", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {name: t.shape for name, t in loaded.state_dict().items()} == {
        name: t.shape for name, t in new.state_dict().items()
    }
    new.set_attn_implementation("eager")
    ids = [V, V + 1, V + 2, V + 3, 5]
    assert torch.equal(logits(loaded.eval(), ids), logits(new.eval(), ids))


def test_everything_but_the_vocabulary_stays_bit_for_bit(tmp_path):
    old = make("bert")
    new = build(save(old, tmp_path / "old"), V + 4, PIECES).state_dict()
    for name, tensor in old.state_dict().items():
        assert torch.equal(new[name][: len(tensor)], tensor), name
    changed = {name for name, tensor in old.state_dict().items() if new[name].shape != tensor.shape}
    head = {f"cls.predictions.{name}" for name in ("bias", "decoder.bias", "decoder.weight")}
    assert changed == {"bert.embeddings.word_embeddings.weight", *head}


def test_spare_rows_are_used_first(tmp_path):
    """A checkpoint padded to 97 rows with a tokenizer of 95: two entries fit, three need one row more."""
    folder = save(make("bert"), tmp_path)
    for added, rows in ((PIECES[:2], 97), (PIECES[:3], 98)):
        new = build(folder, 95 + len(added), added)
        weight = new.get_input_embeddings().weight
        assert weight.shape[0] == new.config.vocab_size == rows
        assert torch.equal(weight[96], weight[7])
        torch.testing.assert_close(weight[95], weight[[5, 6]].mean(0))


def test_a_checkpoint_with_fewer_rows_than_its_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.init: .*has 99 entries but its model only 97 rows"):
        build(save(make("bert"), tmp_path), 100, [[5]])


def test_entries_of_unknown_origin_are_refused_as_before(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.init: the tokenizer has 98 entries but the model only 97 rows"):
        build(save(make("bert"), tmp_path), 98)


def test_a_grown_model_trains(tmp_path):
    """Gradients reach the new rows, through one shared tensor where the head is tied."""
    new = build(save(make("bert"), tmp_path), V + 4, PIECES)
    new(input_ids=torch.tensor([[V, 5, V + 3]]), labels=torch.tensor([[V, 5, V + 3]])).loss.backward()
    assert (new.get_input_embeddings().weight.grad[V:].abs().sum(1) > 0).all()
    assert encoders.count_parameters(new) == encoders.count_parameters(make("bert")) + 4 * (32 + 1)


# --- positions ---

LEARNT = ["bert", "roberta", "camembert", "xlm-roberta", "albert", "electra", "distilbert"]


def table(model) -> torch.Tensor:
    (weight,) = (t for name, t in model.state_dict().items() if name.endswith("position_embeddings.weight"))
    return weight


@pytest.mark.parametrize("kind", LEARNT)
def test_learnt_positions_are_interpolated(kind, tmp_path):
    first = 2 if "roberta" in kind or kind == "camembert" else 0
    old = make(kind, max_position_embeddings=32 + first)
    new = build(save(old, tmp_path / "old"), length=128, max_positions=128)
    assert new.config.max_position_embeddings == 128 + first
    before, after = table(old), table(new)
    assert after.shape[0] == 128 + first and torch.equal(after[:first], before[:first])
    assert torch.equal(after[first], before[first]) and torch.equal(after[-1], before[-1])
    for position in (1, 50, 126):  # by hand: place i of 128 is place i x 31 / 127 of 32
        place = position * 31 / 127
        low, share = int(place), place - int(place)
        expected = before[first + low] * (1 - share) + before[first + low + 1] * share
        torch.testing.assert_close(after[first + position], expected)
    for name, tensor in old.state_dict().items():
        assert name.endswith("position_embeddings.weight") or torch.equal(new.state_dict()[name], tensor), name


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 99))
def test_interpolation_keeps_ends_and_stays_between_neighbours(old, more, seed):
    before = torch.randn(old, 3, generator=torch.Generator().manual_seed(seed))
    after = grow.interpolate(before, old + more)
    assert torch.equal(after[0], before[0]) and torch.equal(after[-1], before[-1])
    assert after.min() >= before.min() and after.max() <= before.max()
    line = grow.interpolate(torch.arange(old, dtype=torch.float32)[:, None], old + more)[:, 0]
    torch.testing.assert_close(line, torch.linspace(0, old - 1, old + more))
    assert torch.equal(grow.interpolate(before, old), before)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in RELATIVE])
def test_a_lengthened_checkpoint_takes_long_texts_from_stock_classes(kind, tmp_path):
    old = make(kind, max_position_embeddings=34)
    first = encoders.FAMILIES[kind].first_position(old.config)
    new = build(save(old, tmp_path / "old"), V + 4, PIECES, length=128, max_positions=128)
    encoders.save(encoders.make_packed(new), tmp_path / "new")
    loaded = tr.AutoModelForMaskedLM.from_pretrained(tmp_path / "new", attn_implementation="eager").eval()
    assert loaded.config.max_position_embeddings == 128 + first
    new.set_attn_implementation("eager")
    ids = torch.arange(128).remainder(V + 4).clamp(min=5).tolist()
    found = logits(loaded, ids)
    assert found.shape == (128, V + 4) and found.isfinite().all()
    assert torch.equal(found, logits(new.eval(), ids))


def test_rotary_positions_are_scaled(tmp_path):
    """Every fourth position of the lengthened model is a position of the old one."""
    old = make("eurobert", max_position_embeddings=32)
    new = build(save(old, tmp_path), length=128, max_positions=128).eval()
    assert new.config.rope_parameters == {**old.config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    ids = list(range(5, 25))
    apart = logits(new, ids, position_ids=torch.arange(0, 80, 4)[None])
    torch.testing.assert_close(apart, logits(old, ids), atol=1e-5, rtol=1e-5)
    assert (logits(new, ids) - logits(old, ids)).abs().max() > 1e-3


def test_of_modernbert_only_the_layers_that_see_everything_are_scaled(tmp_path):
    old = make("modernbert", max_position_embeddings=32)
    assert old.config.layer_types == ["full_attention", "sliding_attention"]
    new = build(save(old, tmp_path), length=128, max_positions=128).eval()
    rope, before = new.model.rotary_emb, old.model.rotary_emb
    torch.testing.assert_close(rope.full_attention_inv_freq, before.full_attention_inv_freq / 4)
    assert torch.equal(rope.sliding_attention_inv_freq, before.sliding_attention_inv_freq)
    assert new.config.rope_parameters["sliding_attention"] == old.config.rope_parameters["sliding_attention"]


def test_rotary_positions_are_scaled_again(tmp_path):
    once = build(save(make("eurobert", max_position_embeddings=32), tmp_path / "a"), max_positions=64)
    twice = build(save(once, tmp_path / "b"), max_positions=96)
    assert twice.config.rope_parameters["factor"] == pytest.approx(3.0)


def test_what_can_not_be_lengthened_is_said(tmp_path):
    folder = save(make("bert", max_position_embeddings=32), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"^model\.max_positions: 16 is less than the checkpoint's 32"):
        build(folder, max_positions=16, length=16)
    same = build(folder, max_positions=32)
    assert torch.equal(table(same), table(tr.AutoModelForMaskedLM.from_pretrained(folder)))
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    folder = save(make("eurobert", max_position_embeddings=32, rope_parameters=rope), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"eurobert model are of type 'yarn'"):
        build(folder, max_positions=64)


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_are_not_lengthened(kind, tmp_path):
    with pytest.raises(ConfigError, match=f"{kind} models have no positions that could be lengthened"):
        build(save(make(kind), tmp_path), max_positions=300)


def test_a_model_without_positions_is_refused_by_name():
    torch.manual_seed(0)
    config = tr.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ConfigError, match="t5 models have no positions that could be lengthened"):
        grow.lengthen(tr.T5EncoderModel(config), 64)


def test_a_preset_takes_its_length_too():
    config = ModelConfig(preset="bert-tiny", max_positions=1024)
    model = encoders.build(config, V, SPECIAL_IDS, 1000, 0)
    assert model.config.max_position_embeddings == 1024
