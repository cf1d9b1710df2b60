"""The losses of whole sequences are those of the stock model, for each problem that its config can name."""

import numpy as np
import pytest
import torch
import transformers as tr

from bertpipe.data.batches import Examples, pack_examples
from bertpipe.model import encoders
from bertpipe.model.labelled import SequenceLabel
from tests.model.test_attention import CONFIGS

PROBLEMS = {
    "classes": ("single_label_classification", 3),
    "sets": ("multi_label_classification", 4),
    "sets of one": ("multi_label_classification", 1),
    "numbers": ("regression", 1),
}


def stock(kind: str, problem: str | None, labels: int):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_labels, config.problem_type = labels, problem
    return tr.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()


def examples(problem: str, labels: int, count: int = 6) -> Examples:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 97, n) for n in rng.integers(1, 40, count)]
    targets = {
        "single_label_classification": rng.integers(0, labels, count),
        "multi_label_classification": rng.integers(0, 2, (count, labels)).astype(np.float32),
        "regression": rng.normal(size=count).astype(np.float32),
    }
    return Examples(ids, [np.zeros(len(x), np.int64) for x in ids], targets[problem])


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "modernbert"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loss_is_the_stock_models(kind, name):
    """One example at a time: its loss, summed, with its gradients; and how many are right."""
    problem, num = PROBLEMS[name]
    data, model = examples(problem, num), stock(kind, problem, num)
    outputs = [
        model(input_ids=torch.from_numpy(ids)[None], labels=torch.from_numpy(data.labels[i : i + 1]))
        for i, ids in enumerate(data.input_ids)
    ]
    expected = sum(output.loss for output in outputs)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    out = SequenceLabel(encoders.make_packed(model))(pack_examples(data, np.arange(len(data)), 0))
    torch.testing.assert_close(out["loss"], expected, atol=1e-5, rtol=1e-5)
    logits = torch.cat([output.logits for output in outputs])
    torch.testing.assert_close(out["logits"], logits, atol=1e-5, rtol=1e-5)
    out["loss"].backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)
    right = {
        "single_label_classification": lambda: (logits.argmax(-1).numpy() == data.labels).sum(),
        "multi_label_classification": lambda: ((logits > 0).numpy() == (data.labels == 1)).all(1).sum(),
        "regression": lambda: 0,
    }
    assert out["correct"] == right[problem]()


def test_a_config_that_is_silent_means_what_the_stock_class_takes_it_for():
    for problem, num in (("regression", 1), ("single_label_classification", 3)):
        data = examples(problem, num)
        told, silent = (SequenceLabel(encoders.make_packed(stock("bert", p, num))) for p in (problem, None))
        batch = pack_examples(data, np.arange(len(data)), 0)
        assert told(batch)["loss"] == silent(batch)["loss"]
