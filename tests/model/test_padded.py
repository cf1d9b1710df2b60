"""Families whose attention can't be plugged: padded blocks of the stock model give what each sequence gives alone."""

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpipe.config import ModelConfig
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, kernels, padded
from bertpipe.model.attention import NAME, VARLEN
from bertpipe.model.objectives import MaskedLM
from tests.conftest import SPECIAL_IDS
from tests.model.gradients import assert_gradients
from tests.model.test_attention import CONFIGS, LENGTHS, PADDED, alone, gradients, make, packed_batch, together
from tests.model.test_kernels import predicting

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def variant(kind: str, **changes) -> torch.nn.Module:
    """A small stock model of a family with some fields of its config changed."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    return tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()


def assert_equal_alone(model: torch.nn.Module, kind: str, batch) -> None:
    """Logits and gradients of each sequence are those of the sequence run by itself through the stock model."""
    expected = alone(model, kind, batch)
    expected_gradients = gradients(model, expected)
    logits = together(encoders.make_packed(model), batch)[: batch.num_tokens]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    found = gradients(model, logits)
    assert found.keys() == expected_gradients.keys()
    assert_gradients(found, expected_gradients)


@pytest.mark.parametrize("kind", PADDED)
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=7), st.integers(0, 300), st.integers(0, 9))
def test_any_lengths_and_any_padding(kind, lengths, padding, seed):
    assert_equal_alone(make(kind), kind, packed_batch(lengths, sum(lengths) + padding, 150, seed))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deberta", {"legacy": False}),
        ("deberta", {"position_biased_input": True, "pos_att_type": ["c2p"]}),
        ("deberta", {"talking_head": True, "max_relative_positions": 20}),  # sequences longer than that
        ("deberta-v2", {"legacy": False}),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),  # reaches over the end of a sequence
        ("deberta-v2", {"share_att_key": False, "position_buckets": -1, "norm_rel_ebd": "none"}),
    ],
)
def test_what_published_checkpoints_differ_in(kind, changes):
    assert_equal_alone(variant(kind, **changes), kind, packed_batch([17, 40, 1, 33], 100, 40))


@pytest.mark.parametrize("kind", PADDED)
def test_a_slot_runs_as_few_blocks_of_like_lengths(kind):
    """Bucketed, not padded to the longest: each block's length is that of its longest sequence."""
    model, batch, seen = encoders.make_packed(make(kind)), packed_batch(LENGTHS), []

    def look(_module, _arguments, given):
        seen.append(given["attention_mask"])

    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        together(model, batch)
    assert [tuple(mask.shape) for mask in seen] == [(4, 17), (2, 40), (1, 128)]
    assert sum(int(mask.sum()) for mask in seen) == sum(LENGTHS)


@pytest.mark.parametrize("kind", PADDED)
def test_gradient_checkpointing_changes_memory_alone(kind):
    """Dropout too is drawn again as it was."""
    batch, found, runs = predicting([17, 40, 1, 33], 128), [], []
    for recompute in (False, True):
        objective = MaskedLM(encoders.make_packed(make(kind), gradient_checkpointing=recompute)).train()
        attention = objective.model.base_model.encoder.layer[0].attention.self
        attention.register_forward_hook(lambda *_, recompute=recompute: runs.append(recompute))
        torch.manual_seed(3)
        out = objective(batch)
        out["loss"].backward()
        found.append([out["loss"].detach(), *(p.grad for p in objective.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)
    assert runs.count(True) == 2 * runs.count(False), "a layer runs once more in the backward pass"


@pytest.mark.parametrize("kind", PADDED)
def test_a_step_in_bf16_is_close_to_full_precision_and_every_parameter_has_a_gradient(kind):
    """A stock DeBERTa does not run under bf16 autocast at all. DDP waits for all gradients."""
    batch, losses, widths = predicting(LENGTHS, 256), [], []
    for precision in ("fp32", "bf16"):
        objective = MaskedLM(encoders.make_packed(make(kind)), precision)
        inner = objective.model.base_model.encoder.layer[0].intermediate.dense
        inner.register_forward_hook(lambda _m, _a, out: widths.append(out.dtype))
        out = objective(batch)
        out["loss"].backward()
        losses.append(float(out["loss"].detach()))
        assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    narrow = torch.float32 if kind == "deberta" else torch.bfloat16
    assert widths == [torch.float32] * 3 + [narrow] * 3
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


def test_block_sparse_attention_turns_to_full_and_stays_so(tmp_path, caplog):
    """Of a checkpoint by itself, with the same weights; as an override it is refused."""
    old = variant("big_bird", attention_type="block_sparse", block_size=4, num_random_blocks=1)
    old.save_pretrained(tmp_path)
    model = encoders.build(ModelConfig(init=str(tmp_path)), 97, SPECIAL_IDS, 160, 0).eval()
    assert model.config.attention_type == "original_full"
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in old.state_dict().items()}
    assert_equal_alone(model, "big_bird", packed_batch([150, 3, 40]))
    assert "Changing attention type" not in caplog.text
    for preset_or_init in ({"preset": "bigbird-base"}, {"init": str(tmp_path)}):
        config = ModelConfig(overrides={"attention_type": "block_sparse"}, **preset_or_init)
        with pytest.raises(ConfigError, match=r"^model\.overrides: attention_type must be original_full on a big_bird"):
            encoders.build(config, 97, SPECIAL_IDS, 160, 0)


def test_fields_that_stock_configs_do_not_list_can_be_set_and_no_others():
    config = ModelConfig(preset="deberta-v3-base", overrides=SMALL | {"position_buckets": 8, "conv_kernel_size": 3})
    model = encoders.build(config, 97, SPECIAL_IDS, 64, 0)
    assert model.base_model.encoder.rel_embeddings.weight.shape == (16, 32)
    assert model.base_model.encoder.conv is not None
    with pytest.raises(ConfigError, match="'position_bucket' can't be set on a deberta-v2 model"):
        encoders.check_overrides({"position_bucket": 8}, "deberta-v2")


@pytest.mark.parametrize("preset", ["deberta-base", "deberta-v3-base", "bigbird-base"])
def test_a_built_model_loads_as_a_stock_one_with_the_same_logits(preset, tmp_path):
    model = encoders.build(ModelConfig(preset=preset, overrides=SMALL, dropout=0.0), 97, SPECIAL_IDS, 64, 0)
    batch = packed_batch([9, 30])
    with torch.no_grad():
        logits = together(encoders.make_packed(model), batch)
    encoders.save(model, tmp_path)
    loaded, info = tr.AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(alone(loaded.eval(), model.config.model_type, batch), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PADDED)
def test_running_padded_is_said_once_or_refused_and_not_compiled(kind, capsys):
    config = CONFIGS[kind]()
    for device in (CPU, torch.device("cuda")):
        kernel = kernels.choose(config, device, "fp32")
        assert kernel.name == padded.NAME
        assert not kernels.compiles(kernel, device, "auto")
    with pytest.raises(ConfigError, match=rf"^runtime\.require_fast_attention: {kind} runs padded, bucketed by length"):
        kernels.settle(kernel, required=True, say=True)
    with pytest.raises(ConfigError, match=r"^runtime\.compile: with the attention kernel padded"):
        kernels.compiles(kernel, CPU, True)
    kernels.say_once.cache_clear()
    for say in (False, True, True):
        kernels.settle(kernel, required=False, say=say)
    out = capsys.readouterr().out
    assert out.startswith(f"note: {kind} runs padded, bucketed by length: its layers") and out.count("\n") == 1
    narrow = kernels.choose(config, CPU, "bf16").obstacle.removeprefix(kernel.obstacle)
    assert narrow == ("; its encoder computes in fp32, not bf16" if kind == "deberta" else "")


def test_a_family_that_runs_padded_keeps_its_own_attention():
    for kernel in (NAME, VARLEN, padded.NAME):
        assert encoders.make_packed(make("deberta"), kernel=kernel).config._attn_implementation == "eager"
