"""Model FLOPs are what torch's counter counts, and what the papers' formulas give."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers as tr
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bertpipe.config_files import read_preset
from bertpipe.data.batches import pack
from bertpipe.model import encoders
from bertpipe.model.objectives import MaskedLM
from bertpipe.train import flops, loop
from bertpipe.train.optim import Optimizer
from bertpipe.train.tracking import Record
from tests.model.test_attention import CONFIGS
from tests.train.test_loop import ADAMW, bert, masked_slots, place

CPU = torch.device("cpu")


def slot(lengths, num_predictions, total=None, seed=0):
    """A slot with predicted positions; two more are fill."""
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(rng.choice(sum(lengths), num_predictions, replace=False))
    weight = torch.ones(num_predictions)
    ids = rng.integers(5, 97, sum(lengths))
    more = {"predict_index": index, "predict_labels": torch.from_numpy(ids)[index], "predict_weight": weight}
    return pack(ids, np.array(lengths), total or sum(lengths), 0, max(lengths), **more)


def counted_by_torch(model, batch):
    """Of a forward and backward; attention as plain products, the only kind that torch's counter sees on CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        MaskedLM(model, "fp32")(batch)["loss"].backward()
    return counter.get_total_flops()


H, N, L, BUCKETS = 32, 6, 32, 16  # width, sequences, their length, relative positions each way of deberta-v2
BEYOND = {  # what the stock code computes beyond the mathematics, in two layers
    # each way a product of all tokens with all 2 L relative positions, of which L are used, and their projection
    "deberta": 2 * (2 * 6 * H * N * L * (2 * L - L) + 2 * 6 * H * H * 2 * L),
    "deberta-v2": 2 * (2 * 6 * H * N * L * (2 * BUCKETS - L) + 2 * 6 * H * H * 2 * BUCKETS),
    "big_bird": 2 * H * H * N,  # a pooler that nothing is computed from, forward alone
}


@pytest.mark.parametrize("kind", encoders.FAMILIES)
def test_a_step_counts_what_torch_counts(kind):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    model = encoders.make_packed(tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager"))
    batch = slot([32] * 6, 28)
    counted = dataclasses.replace(flops.count(model), windows=(None,) * 2)  # whole products, then cut
    assert counted.slot(batch) + BEYOND.get(kind, 0) == counted_by_torch(model, batch)


def test_a_convolution_and_deberta_s_own_head_are_counted():
    torch.manual_seed(0)
    config = CONFIGS["deberta-v2"]()
    config.conv_kernel_size, config.legacy = 3, False
    model = encoders.make_packed(tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager"))
    batch = slot([32] * 6, 28)
    assert flops.count(model).slot(batch) + BEYOND["deberta-v2"] == counted_by_torch(model, batch)


def test_shared_layers_count_as_often_as_they_are_used():
    config = tr.AlbertConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=2, intermediate_size=64, embedding_size=16,
        num_hidden_layers=6, num_hidden_groups=2, inner_group_num=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = encoders.make_packed(tr.AutoModelForMaskedLM.from_config(config, attn_implementation="eager"))
    batch = slot([32] * 2, 9)
    assert flops.count(model).slot(batch) == counted_by_torch(model, batch)


def test_bert_base_by_hand():
    """Devlin et al. 2019: 12 layers of 4 H x H and 2 H x 4H, H = 768; the head H x H and H x V."""
    fields = read_preset("bert-base")
    config = tr.AutoConfig.for_model(fields.pop("model_type"), vocab_size=30_522, **fields)
    with torch.device("meta"):
        found = flops.count(tr.AutoModelForMaskedLM.from_config(config))
        whole = flops.count(tr.BertForPreTraining(config))
    assert found.per_token == 12 * 12 * 768 * 768
    assert found.per_prediction == 768 * 768 + 768 * 30_522
    assert (found.per_sequence, whole.per_sequence) == (0, 768 * 768 + 768 * 2)
    assert whole.per_prediction == found.per_prediction
    # Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T a token, of 64 sequences of 128 with 20 predicted each
    expected = 64 * 128 * (6 * found.per_token + 12 * 12 * 768 * 128) + 64 * 20 * 6 * found.per_prediction
    assert found.of(torch.full((64,), 128), 64 * 20) == expected


def test_padding_and_fill_count_nothing():
    model = tr.AutoModelForMaskedLM.from_config(CONFIGS["bert"]())
    counted, batch = flops.count(model), slot([20, 7, 1], 5)
    padded = slot([20, 7, 1], 5, total=90)
    weight = torch.cat([torch.ones(5), torch.zeros(3)])
    assert counted.slot(padded) == counted.slot(batch) > 0
    assert counted.slot(dataclasses.replace(padded, predict_weight=weight)) == counted.slot(batch)


def test_windows_are_counted_by_pairs():
    config = CONFIGS["modernbert"]()
    model = tr.AutoModelForMaskedLM.from_config(config)
    counted = flops.count(model)
    lengths, window = [5, 40, 9, 1], config.local_attention // 2 + 1
    local = sum(abs(i - j) < window for n in lengths for i in range(n) for j in range(n))
    pairs = {"full_attention": sum(n * n for n in lengths), "sliding_attention": local}
    attention = 12 * 32 * sum(pairs[kind] for kind in config.layer_types)
    assert "sliding_attention" in config.layer_types
    assert counted.of(torch.tensor(lengths), 0) == 6 * counted.per_token * sum(lengths) + attention


def test_the_matmul_is_timed_and_draws_nothing():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert 1e8 < flops.time_matmul(CPU, "bf16", seconds=0.0) < 1e16
    assert torch.equal(before, torch.get_rng_state())
    assert flops.datasheet(CPU, "bf16") is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA H20", None),
    ],
)  # fmt: skip
def test_cards_that_the_datasheet_table_knows(name, tera):
    assert flops.look_up(name) == (None if tera is None else tera * 1e12)


def test_a_run_records_its_utilisation_beside_the_speed(shards, tmp_path):
    model, source, steps = encoders.make_packed(bert(tr.AutoModelForMaskedLM)), masked_slots(shards), 6
    meter = flops.Meter(model, CPU, "fp32")
    settings = loop.LoopSettings(steps, 2, seed=0, eval_every=10**9, log_every=3, progress=False)
    with Record(tmp_path) as record:
        speed = loop.fit(
            MaskedLM(model), source, Optimizer(model, ADAMW), settings, place(), record, meter=meter
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    spent, before = [], 0.0
    for line in lines:
        assert line["mfu"] == pytest.approx(line["model_flops_per_second"] / line["matmul_flops_per_second"], abs=1e-4)
        spent.append(line["model_flops_per_second"] * (line["seconds"] - before))
        before = line["seconds"]
    expected = sum(meter.of(source.slots(step, 0, 2)) for step in range(steps))
    assert len(lines) == 2 and sum(spent) == pytest.approx(expected, rel=0.02)
    assert speed.all_flops == expected and 0 < speed.mfu < 1
    assert "flops" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_too_short_for_a_matmul_is_not_metered():
    model = bert(tr.AutoModelForMaskedLM)
    assert flops.make_meter(model, CPU, "fp32", tokens=1000) is None
