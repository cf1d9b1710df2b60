"""The loop is right: its losses are those of transformers.Trainer on the same batches, and slots change nothing."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.config import RuntimeConfig
from bertpipe.data.batches import Examples, ExampleSlots, MaskedSlots
from bertpipe.data.masking import Masking, Vocabulary
from bertpipe.data.order import Order
from bertpipe.model import encoders, objectives
from bertpipe.model.cross_entropy import summed_cross_entropy
from bertpipe.model.labelled import SequenceLabel
from bertpipe.model.objectives import MaskedLM
from bertpipe.train import loop
from bertpipe.train.optim import Optimizer, Recipe
from bertpipe.train.place import Place
from bertpipe.train.reduction import Fast
from bertpipe.train.tracking import Record
from tests.conftest import SPECIAL_IDS, VOCAB_SIZE
from tests.model.test_attention import CONFIGS

STEPS = 50
ADAMW = Recipe("adamw", 3e-3, 0.01, (0.9, 0.999), 1e-8, "linear", 5, STEPS, 1.0)


def bert(auto_class, dropout=0.0, seed=0, **more):
    torch.manual_seed(seed)
    config = tr.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **more,
    )
    return auto_class.from_config(config, attn_implementation="eager")


def place():
    return Place(RuntimeConfig(device="cpu", threads=1), "fp32")


def masked_slots(shards, slots_per_step=2, seed=1):
    special = np.zeros(VOCAB_SIZE, bool)
    special[list(SPECIAL_IDS.values())] = True
    masking = Masking("token", 0.15, 0.8, 0.1, Vocabulary(4, special, shards.continuations))
    return MaskedSlots(Order(shards, 0, 48, 384, slots_per_step), masking, seed)


def fit(objective, source, folder, recipe=ADAMW, slots_per_step=2):
    """Losses of our loop, fp32."""
    settings = loop.LoopSettings(recipe.steps, slots_per_step, seed=0, eval_every=10**9, progress=False)
    encoders.make_packed(objective.model)
    with Record(folder) as record:
        loop.fit(objective, source, Optimizer(objective.model, recipe), settings, place(), record)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def as_padded(slots, labels_of):
    """The same sequences as a padded batch for a stock model."""
    rows = [
        (slot, n, int(slot.cu_seqlens[n]), int(slot.cu_seqlens[n + 1]))
        for slot in slots
        for n in range(slot.num_sequences)
    ]
    longest = max(last - first for _, _, first, last in rows)
    batch = {k: torch.zeros(len(rows), longest, dtype=torch.int64) for k in ("input_ids", "attention_mask")}
    for i, (slot, _, first, last) in enumerate(rows):
        batch["input_ids"][i, : last - first] = slot.input_ids[0, first:last]
        batch["attention_mask"][i, : last - first] = 1
    return batch | {"labels": labels_of(rows, longest)}


def token_labels(rows, longest):
    labels = torch.full((len(rows), longest), -100)
    for i, (slot, _, first, last) in enumerate(rows):
        real = slot.predict_weight > 0
        index, wanted = slot.predict_index[real], slot.predict_labels[real]
        inside = (index >= first) & (index < last)
        labels[i, index[inside] - first] = wanted[inside]
    return labels


def sequence_labels(rows, longest):
    return torch.stack([slot.sequence_labels[n] for slot, n, _, _ in rows])


class Recorder(tr.Trainer):
    """A stock Trainer that is given its batches and writes down its losses unrounded."""

    def get_train_dataloader(self):
        return self.train_dataset

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss


def trainer_losses(model, batches, folder, recipe=ADAMW):
    arguments = tr.TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_epsilon=recipe.eps,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Recorder(model, arguments, train_dataset=batches)
    trainer.losses = []
    trainer.train()
    return trainer.losses


def test_pretraining_losses_are_those_of_trainer(shards, tmp_path):
    source = masked_slots(shards)
    assert 2 * source.order.steps_in(0) < STEPS, "two epochs and more"
    batches = [as_padded(source.slots(step, 0, 2), token_labels) for step in range(STEPS)]
    expected = trainer_losses(bert(tr.AutoModelForMaskedLM), batches, tmp_path / "trainer")
    found = fit(MaskedLM(bert(tr.AutoModelForMaskedLM)), source, tmp_path / "ours")
    assert np.mean(expected[-5:]) < np.mean(expected[:5]) - 0.02, "it learnt something"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_finetuning_losses_are_those_of_trainer(kind, tmp_path):
    rng = np.random.default_rng(0)
    ids = [np.concatenate([[2], rng.integers(5, VOCAB_SIZE, n), [3]]) for n in rng.integers(1, 40, 100)]
    classes = np.array([int(x[1] > 100) for x in ids])
    labels = classes.astype(np.int64) if kind == "classification" else (classes * 2.5).astype(np.float32)
    examples = Examples(ids, [np.zeros(len(x), np.int64) for x in ids], labels)
    source = ExampleSlots(examples, 16, 2, seed=0, pad_id=0)
    more = {"num_labels": 2 if kind == "classification" else 1}
    batches = [as_padded(source.slots(step, 0, 2), sequence_labels) for step in range(STEPS)]
    expected = trainer_losses(bert(tr.AutoModelForSequenceClassification, **more), batches, tmp_path / "trainer")
    found = fit(SequenceLabel(bert(tr.AutoModelForSequenceClassification, **more)), source, tmp_path / "ours")
    assert np.mean(expected[-5:]) < np.mean(expected[:5])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_how_a_batch_is_cut_into_slots_changes_nothing(optimizer, tmp_path):
    """The global count divides: 1, 2 or 5 slots (some of them empty) give the same run."""
    rng = np.random.default_rng(0)
    ids = [np.concatenate([[2], rng.integers(5, VOCAB_SIZE, n), [3]]) for n in rng.integers(1, 40, 31)]
    labels = np.array([int(x[1] > 100) for x in ids])
    examples = Examples(ids, [np.zeros(len(x), np.int64) for x in ids], labels)
    recipe = Recipe(optimizer, 1e-3, 0.01, (0.9, 0.999), 1e-8, "linear", 2, 12, 1.0)
    losses = []
    for slots in (1, 2, 5):
        source = ExampleSlots(examples, 4, slots, seed=0, pad_id=0)
        objective = SequenceLabel(bert(tr.AutoModelForSequenceClassification))
        losses.append(fit(objective, source, tmp_path / str(slots), recipe, slots))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=0, atol=1e-5)


def test_the_same_run_twice_gives_the_same_bits_with_dropout(shards, tmp_path):
    runs = []
    for name in ("a", "b"):
        objective = MaskedLM(bert(tr.AutoModelForMaskedLM, dropout=0.1))
        torch.rand(7)  # whatever random state a process is in
        fit(objective, masked_slots(shards), tmp_path / name)
        runs.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert runs[0] == runs[1]


def test_loader_workers_are_gone_when_a_run_is_stopped(shards, tmp_path):
    """A process may end without the interpreter's tidying up (cli.py), so nothing can be left to it."""
    objective = MaskedLM(bert(tr.AutoModelForMaskedLM))
    encoders.make_packed(objective.model)
    seen = []

    def evaluate():
        seen.append(len(multiprocessing.active_children()))
        raise KeyboardInterrupt

    settings = loop.LoopSettings(STEPS, 2, seed=0, eval_every=2, loader_workers=1, progress=False)
    with Record(tmp_path) as record, pytest.raises(KeyboardInterrupt) as held:
        loop.fit(
            objective, masked_slots(shards), Optimizer(objective.model, ADAMW), settings, place(), record, evaluate
        )
    assert held.traceback and seen == [1] and not multiprocessing.active_children()


def test_a_step_without_anything_to_predict_is_harmless(tmp_path):
    """An epoch's last step may have empty slots: loss 0, finite gradients."""
    examples = Examples([np.array([2, 9, 3])], [np.zeros(3, np.int64)], np.array([1]))
    source = ExampleSlots(examples, 4, 3, seed=0, pad_id=0)
    recipe = Recipe("adamw", 1e-3, 0.01, (0.9, 0.999), 1e-8, "constant", 0, 3, 1.0)
    losses = fit(SequenceLabel(bert(tr.AutoModelForSequenceClassification)), source, tmp_path, recipe, 3)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_the_loop_tells_the_factor_it_multiplies_with_and_the_fill_is_left_out(shards, monkeypatch):
    """The cross-entropy gets the predicted positions alone, and the gradient of its sum is the factor it was told."""
    module, slots = MaskedLM(encoders.make_packed(bert(tr.AutoModelForMaskedLM))), masked_slots(shards).slots(0, 0, 2)
    told, given, rows = [], [], []

    def watch(logits, labels, weights, factor):
        total, right = summed_cross_entropy(logits, labels, weights, factor)
        told.append(float(factor))
        rows.append(len(logits))
        total.register_hook(lambda gradient: given.append(float(gradient)))
        return total, right

    monkeypatch.setattr(objectives, "summed_cross_entropy", watch)
    count = sum(map(module.count, slots))
    loop._backward(Fast(module, place()), slots, loop.LoopSettings(1, 2, 0, 1), place(), 0, [float(count)])
    assert told == given == [float(torch.tensor(1 / count))] * 2
    assert rows == [module.count(slot) for slot in slots] and rows[0] < len(slots[0].predict_index)


def test_no_decay_for_biases_and_norms():
    model = bert(tr.AutoModelForMaskedLM)
    optimizer = Optimizer(model, ADAMW)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in optimizer.parts[0].param_groups)
    assert all("bias" in n or "LayerNorm" in n for n in plain) and not any("LayerNorm" in n for n in decayed)
    assert decayed | plain == set(names.values())


def test_muon_takes_the_matrices_of_the_layers():
    model = bert(tr.AutoModelForMaskedLM)
    matrices, others = Optimizer(model, Recipe(**(vars(ADAMW) | {"name": "muon"}))).parts
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for g in matrices.param_groups for p in g["params"]}
    assert len(taken) == 2 * 6 and all(".layer." in n and n.endswith("weight") for n in taken)
    assert len(taken) + sum(len(g["params"]) for g in others.param_groups) == len(names)


@pytest.mark.parametrize("kind", encoders.FAMILIES)
def test_muon_finds_the_matrices_of_every_family(kind):
    torch.manual_seed(0)
    model = tr.AutoModelForMaskedLM.from_config(CONFIGS[kind](), attn_implementation="eager")
    matrices, _ = Optimizer(model, Recipe(**(vars(ADAMW) | {"name": "muon"}))).parts
    assert len([p for g in matrices.param_groups for p in g["params"]]) >= 4
