"""Checkpoints that are not whole: of an encoder nothing starts random, and nothing is left out, in silence."""

import io
from logging import StreamHandler
from pathlib import Path

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from bertpipe.config import ModelConfig
from bertpipe.errors import ConfigError
from bertpipe.model import encoders

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"max_position_embeddings": 32}
FAMILIES = {
    "bert": (tr.BertForMaskedLM, tr.BertConfig, "bert.encoder.layer.1.output.dense.weight"),
    "headless": (tr.BertModel, tr.BertConfig, "encoder.layer.1.output.dense.weight"),
    "roberta": (tr.RobertaForMaskedLM, tr.RobertaConfig, "roberta.encoder.layer.0.output.dense.bias"),
    "modernbert": (tr.ModernBertForMaskedLM, tr.ModernBertConfig, "model.layers.1.mlp.Wi.weight"),
    "distilbert": (tr.DistilBertForMaskedLM, tr.DistilBertConfig, "distilbert.transformer.layer.1.ffn.lin1.weight"),
    "deberta-v2": (tr.DebertaV2ForMaskedLM, tr.DebertaV2Config, "deberta.encoder.layer.1.output.dense.weight"),
}
CLASSES = (tr.AutoModel, tr.AutoModelForMaskedLM, tr.AutoModelForSequenceClassification)


def write(folder: Path, family: str = "bert", **more) -> Path:
    kind, config, _ = FAMILIES[family]
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(0)
    kind(config(**SIZES | (special if family == "modernbert" else {"pad_token_id": 0}) | more)).save_pretrained(folder)
    return folder


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, kind=tr.AutoModelForSequenceClassification, **changes):
    return encoders.load_with_missing(kind, str(folder), "finetune.model", None, **changes)


@pytest.fixture
def told():
    """What transformers logs."""
    stream, before = io.StringIO(), logging.get_verbosity()
    handler = StreamHandler(stream)
    logging.add_handler(handler)
    logging.set_verbosity_warning()
    yield stream
    logging.remove_handler(handler)
    logging.set_verbosity(before)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_and_pooler_are_no_news_and_a_lost_weight_is_refused(tmp_path, told, family, kind):
    folder, name = write(tmp_path / "m", family), FAMILIES[family][2]
    missing = load(folder, kind).missing
    assert told.getvalue() == "" and logging.get_verbosity() == logging.WARNING
    assert not any("layer" in key.split(".") or "embeddings" in key for key in missing)
    change(folder, lambda weights: weights.pop(name))
    bare = name.split(".", 1)[1] if family != "headless" else name
    with pytest.raises(
        ConfigError, match=rf"finetune\.model: '.*m' lacks 1 weights of its encoder, .*{bare} among them"
    ):
        load(folder, kind)


def test_an_encoder_of_another_size_is_refused(tmp_path):
    folder = write(tmp_path / "m")
    change(folder, lambda weights: weights.update({"bert.encoder.layer.0.output.dense.bias": torch.zeros(8)}))
    with pytest.raises(ConfigError, match=r"not those of its config\.json: bert\..*dense\.bias \[8\], here \[16\]"):
        load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_not_left_out_unless_asked_for(tmp_path, family):
    folder = write(tmp_path / "m", family)
    path = folder / "config.json"
    whole = path.read_text()
    shorter = ModelConfig(init=str(folder), overrides={"num_hidden_layers": 1}).overrides
    if family not in ("modernbert", "distilbert"):  # whose config lists its layers, or calls their number otherwise
        assert load(folder, **shorter).model.config.num_hidden_layers == 1
    stock = tr.AutoConfig.from_pretrained(folder)
    stock.num_hidden_layers = 1
    if family == "modernbert":
        stock.layer_types = stock.layer_types[:1]
    stock.save_pretrained(folder)
    assert path.read_text() != whole
    with pytest.raises(ConfigError, match=r"weights of layers that its config\.json doesn't know"):
        load(folder)


def test_a_head_for_other_labels_is_new_and_told(tmp_path):
    config = tr.BertConfig(**SIZES, num_labels=3)
    tr.BertForSequenceClassification(config).save_pretrained(tmp_path)
    found = load(tmp_path, num_labels=2)
    assert found.resized == ["classifier.bias [3], here [2]", "classifier.weight [3, 16], here [2, 16]"]
    assert found.missing == {"classifier.bias", "classifier.weight"} and found.model.classifier.out_features == 2
    with pytest.raises(ConfigError, match=r"model\.init: .* not those of its config\.json: classifier\.bias \[3\]"):
        encoders.load(tr.AutoModelForSequenceClassification, str(tmp_path), "model.init", num_labels=2)
