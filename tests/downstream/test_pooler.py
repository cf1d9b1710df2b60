"""A checkpoint without a pooler: what the head stands on instead, said aloud, and stock in any case."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BigBirdConfig,
    BigBirdForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from bertpipe.downstream.finetuning import training
from bertpipe.model import encoders, kernels
from tests.downstream.conftest import write_tokenizer
from tests.downstream.tuning import config, scores, tune, write_task

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"initializer_range": 0.3, "embedding_size": 8, "max_position_embeddings": 72, "pad_token_id": 0}
FAMILIES = {
    "bert": (BertForMaskedLM, BertConfig, "bert.pooler.dense"),
    "albert": (AlbertForMaskedLM, AlbertConfig, "albert.pooler"),
    "deberta-v2": (DebertaV2ForMaskedLM, DebertaV2Config, "pooler.dense"),
    "roberta": (RobertaForMaskedLM, RobertaConfig, None),  # its head has a layer of its own
    "big_bird": (BigBirdForMaskedLM, BigBirdConfig, None),  # has one that no head stands on
}


def start(folder: Path, kind=BertForMaskedLM, settings=BertConfig, **more) -> Path:
    tokenizer = write_tokenizer(folder / "model")
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "embedding_size" or settings is AlbertConfig}
    kind(settings(vocab_size=len(tokenizer), **sizes | more)).save_pretrained(folder / "model")
    write_task(folder / "glue", "sst2")
    return folder


def build(folder: Path, pooler: str, seed: int = 1, say: bool = False):
    cfg = config(folder, folder / "runs", pooler=pooler)
    job = training.prepare("sst2", cfg.finetune, str(folder / "model"))
    return training.build(job, cfg.finetune, "model", seed, say)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_pooler_starts_as_asked(tmp_path, capsys, family):
    kind, settings, pooler = FAMILIES[family]
    folder = start(tmp_path, kind, settings)
    torch.manual_seed(1)
    stock = AutoModelForSequenceClassification.from_pretrained(folder / "model").state_dict()
    kernels.say_once.cache_clear()
    random, same = (build(folder, how, say=True).state_dict() for how in ("random", "identity"))
    told = [line for line in capsys.readouterr().out.splitlines() if "no pooler" in line]
    assert len(told) == (2 if pooler else 0)
    if pooler:
        assert "it starts random (finetune.pooler)" in told[0] and "as the identity" in told[1]
    for name, weight in stock.items():
        assert torch.equal(random[name], weight), "the very weights of the stock class, the same draws"
        if pooler and name.startswith(pooler):
            assert torch.equal(same[name], torch.eye(16) if weight.dim() == 2 else torch.zeros(16))
        else:
            assert torch.equal(same[name], weight)


def test_the_head_sees_what_was_pretrained(tmp_path):
    folder = start(tmp_path)
    model = build(folder, "identity").eval()
    encoder = AutoModel.from_pretrained(folder / "model").eval()
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    with torch.no_grad():
        first = encoder(ids).last_hidden_state[:, 0]
        torch.testing.assert_close(model(ids).logits, model.classifier(first.tanh()))


def test_a_pooler_that_is_there_stays(tmp_path, capsys):
    folder = start(tmp_path, BertModel)
    kernels.say_once.cache_clear()
    found = build(folder, "identity", say=True)
    kept = BertModel.from_pretrained(folder / "model").pooler.dense.weight
    assert torch.equal(found.bert.pooler.dense.weight, kept)
    assert "pooler" not in capsys.readouterr().out


def test_a_whole_run_says_so_and_saves_a_stock_folder(tmp_path, capsys):
    folder = start(tmp_path)
    kernels.say_once.cache_clear()
    made = {how: tune(folder, tmp_path / how, pooler=how, epochs=2) for how in ("random", "identity")}
    said = capsys.readouterr().out
    assert said.count("has no pooler; it starts random") == said.count("has no pooler; it starts as the identity") == 1
    assert all(0 <= scores(path)["sst2"]["summary"]["model"]["median"] <= 1 for path in made.values())
    model, info = transformers.BertForSequenceClassification.from_pretrained(
        made["identity"] / "sst2/model", output_loading_info=True
    )
    assert not info["missing_keys"] and not torch.equal(model.bert.pooler.dense.weight, torch.eye(16)), "it trains"


def test_a_warm_start_without_a_pooler(tmp_path):
    """From a checkpoint that has none, the body's pooler starts as asked too."""
    folder = start(tmp_path)
    cfg = config(folder, folder / "runs", pooler="identity")
    job = training.prepare("sst2", cfg.finetune, str(folder / "model"), True)
    model = training.build(job, cfg.finetune, "model", 1)
    assert torch.equal(model.bert.pooler.dense.weight, torch.eye(16))
    assert encoders.missing_poolers(model, {"bert.pooler.dense.weight", "classifier.weight"}) == [
        "bert.pooler.dense.weight"
    ]
