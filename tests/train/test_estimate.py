"""The estimate before step 1: memory against what a real step keeps, FLOPs against torch's counter."""

import pytest
import torch
import transformers as tr
from torch.utils.flop_counter import FlopCounterMode

from bertpipe import cli
from bertpipe.config import Config
from bertpipe.model import encoders
from bertpipe.model.objectives import MaskedLM
from bertpipe.train import estimate, pretrain
from bertpipe.train.optim import OPTIMIZERS, Optimizer
from bertpipe.train.reduction import Block, Tree

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}


def config(**sections) -> Config:
    tree = {
        "tokenizer": {"vocab_size": 600},
        "model": {"preset": "bert-tiny", "overrides": SMALL},
        "train": {"steps": 100, "sequence_length": 32, "slot_tokens": 256, "slots_per_step": 2, "precision": "fp32"},
    }
    return Config(**{name: tree.get(name, {}) | sections.get(name, {}) for name in {*tree, *sections}})


def build(cfg: Config):
    return encoders.build(cfg.model, 600, estimate.SPECIAL_IDS, cfg.train.sequence_length, 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_optimizer_take_what_a_real_step_leaves(name):
    cfg = config(optim={"name": name})
    model = build(cfg)
    optimizer = Optimizer(model, pretrain.recipe(cfg))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    meta = estimate.on_meta(cfg, 600)
    assert all(p.is_meta for p in meta.parameters())
    assert encoders.count_parameters(meta) == encoders.count_parameters(model)
    real = sum(t.numel() * t.element_size() for t in optimizer.state().values() if t.numel() > 1)
    assert estimate.optimizer_bytes(meta, pretrain.recipe(cfg)) == real


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 8, 32])
def test_exact_holds_as_many_gradients_as_its_tree_has_open_sums(slots):
    tree, most = Tree(), 0
    for slot in range(slots):
        most = max(most, len(tree.blocks) + 1)  # what is joined so far, and the slot's own
        tree.push(Block(slot, 1), [])
    assert estimate.held_gradients(slots, "exact") == most
    assert estimate.held_gradients(slots, "fast") == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_the_whole_model_keeps(precision):
    """Three layers and eight sequences from counts of one and two layers, two and four sequences; the logits apart."""
    cfg = config()
    counted = estimate.count_activations(estimate.on_meta(cfg, 600), precision, 32, 0.15)
    objective = MaskedLM(encoders.make_packed(build(cfg)), precision).train()
    real = estimate._kept_bytes(objective, estimate.random_batch(256, 32, 600))
    assert counted.of(256) - counted.logits(256) == pytest.approx(real, rel=0.1)
    assert counted.of(256, recomputed=True) < 0.8 * counted.of(256)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_logits_count_with_their_gradient(precision, size):
    """At a vocabulary of 30,522 they are most of what a small model keeps; the gradient is kept, the logits are not."""
    cfg = config(tokenizer={"vocab_size": 30_522})
    model = encoders.build(cfg.model, 30_522, estimate.SPECIAL_IDS, 32, 0)
    real = estimate._kept_bytes(
        MaskedLM(encoders.make_packed(model), precision).train(), estimate.random_batch(1024, 32, 30_522)
    )
    predicted = -(-1024 // 7)  # random_batch predicts every seventh
    counted = estimate.count_activations(estimate.on_meta(cfg, 30_522), precision, 32, 1 / 7)
    margin = size * estimate.BUDGET_SLACK * 30_522 * 2
    assert counted.of(1024) - margin == pytest.approx(real + size * predicted * 30_522, rel=0.1)


def test_flops_are_those_of_torchs_counter():
    cfg = config()
    model = build(cfg)
    counter = FlopCounterMode(display=False)
    ids = torch.randint(5, 600, (4, 32))
    with counter:
        model(input_ids=ids).logits.sum().backward()
    found = estimate.model_flops(estimate.on_meta(cfg, 600), 4 * 32, 32, 1.0)
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_albert_counts_its_one_layer_as_often_as_it_runs():
    fields = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "embedding_size": 16}
    model = tr.AlbertForMaskedLM(tr.AlbertConfig(vocab_size=100, num_hidden_layers=4, **fields))
    per_layer = 4 * 32 * 32 + 2 * 32 * 64
    expected = 6 * (4 * per_layer + 16 * 32) + 12 * 4 * 32 * 8
    assert estimate.model_flops(model, 1, 8, 0.0) == expected


def test_a_checkpoint_being_written_counts_where_training_is_in_the_same_memory():
    """Weights and AdamW's two moments, a second time; not on a GPU, where the copy is the host's."""
    cfg = config(optim={"name": "adamw"})
    model = estimate.on_meta(cfg, 600)
    cpu, gpu = (estimate.memory_of(cfg, model, "fp32", on_cpu) for on_cpu in (True, False))
    assert cpu.copies == 3 * 4 * encoders.count_parameters(model) and gpu.copies == 0
    assert cpu.peak - gpu.peak == cpu.copies and gpu.peak == 2 * gpu.weights + gpu.optimizer + gpu.activations


def test_the_command_answers_without_artifacts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--train.steps", "10", "--train.slots_per_step", "2", "--train.slot_tokens", "256", "--model.preset"]
    flags += ["bert-tiny", "--tokenizer.vocab_size", "600", "--runtime.threads", "1", "--runtime.device", "cpu"]
    assert cli.main(["estimate", *flags, "--measure"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["model", "memory", "tokens", "FLOPs", "hours"]
    assert "5,120: 10 steps x 2 slots x 256 tokens" in printed[2] and "s a slot of 256 (128)" in printed[4]
    assert not list(tmp_path.iterdir()), "nothing was made"
    assert cli.main(["estimate", "--train.slot_tokens", "16"]) == 2


def test_an_objective_of_pairs_is_estimated_with_its_pooler_and_head():
    """BertForPreTraining: as many parameters as BertForMaskedLM, a pooler, and two classes more."""
    pairs = config(train={"objective": "mlm_nsp"})
    alone, both = (estimate.on_meta(cfg, 600) for cfg in (config(), pairs))
    width = both.config.hidden_size
    more = width * width + width + 2 * width + 2
    assert encoders.count_parameters(both) == encoders.count_parameters(alone) + more
