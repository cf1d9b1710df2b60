"""Models and tokenizers from outside: whatever could run code is refused in one line that names file and key."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertTokenizer

from bertpipe.config import Config
from bertpipe.data import tokenizer
from bertpipe.downstream.finetuning import start_checks
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.train import estimate, pretrain

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A small stock checkpoint with its tokenizer, as published ones are: keys of older versions included."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=len(PIECES), max_position_embeddings=16, **shape)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    change(folder / "config.json", LEGACY)
    return folder


LEGACY = {
    "_name_or_path": "bert-base-uncased",
    "_num_labels": 2,
    "gradient_checkpointing": False,
    "position_embedding_type": "absolute",
    "output_past": True,
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "torch_dtype": "float32",
    "task_specific_params": {"summarization": {"length": 3}},
    "tokenizer_class": "BertTokenizer",
    "trust_remote_code": False,
    "finetuning_task": None,
}


def change(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(stock, tmp_path) -> Path:
    return Path(shutil.copytree(stock, tmp_path / "model"))


def init(folder: Path) -> None:
    """As `model.init`: the tokenizer first, then the weights."""
    pretrain.check_tokenizer(str(folder), pretrain.load_tokenizer(folder))


def build(folder: Path) -> None:
    encoders.load(AutoModelForMaskedLM, str(folder), "model.init")


def plan(folder: Path) -> None:
    estimate.on_meta(Config(model={"init": str(folder)}, train={"sequence_length": 16}), len(PIECES))


def finetuned(folder: Path) -> None:
    """As `finetune.model`."""
    start_checks.load_tokenizer_of(str(folder))


def adopt(folder: Path) -> None:
    """As `tokenizer.adopt`."""
    tokenizer.adopt(Config(tokenizer={"adopt": str(folder)}).tokenizer)


WAYS = {"model.init": [build, plan], "finetune.model": [finetuned], "tokenizer.adopt": [adopt]}


def test_a_published_folder_loads_every_way(stock):
    for ways in ([init], *WAYS.values()):
        for load in ways:
            load(stock)


CONFIGS = [
    {"_attn_implementation_internal": "kernels-community/flash-attn"},
    {"_experts_implementation_internal": "evil/kernel"},
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel@main:run"},
    {"auto_map": {"AutoModelForMaskedLM": "modeling_evil.Evil"}},
    {"auto_map": {"AutoConfig": "evil/repo--configuration_evil.Evil"}},
    {"trust_remote_code": True},
    {"text_config": {"model_type": "bert", "auto_map": {"AutoModel": "modeling_evil.Evil"}}},
    {"task_specific_params": {"summarization": {"trust_remote_code": True}}},
    {"custom_pipelines": {"evil": {"impl": "evil.Pipeline"}}},
    {"configuration_files": ["config.4.0.0.json"]},
    {"quantization_config": {"quant_method": "gptq"}},
    {"_post_init_done": True},
    {"to_dict": "shadow"},
    {"fusion_config": {"patch": "evil"}},
    {"tokenizer_class": "EvilTokenizer"},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=json.dumps)
@pytest.mark.parametrize("setting", WAYS)
def test_a_config_that_asks_for_more_than_stock_classes_is_refused(setting, changes, copied):
    change(copied / "config.json", changes)
    (copied / "modeling_evil.py").write_text("raise SystemExit('ran')")
    nested = {"text_config": "auto_map", "task_specific_params": "trust_remote_code"}
    key = next(nested.get(key, key) for key in changes)
    for load in WAYS[setting]:
        with pytest.raises(ConfigError) as refused:
            load(copied)
        message = str(refused.value)
        assert message.startswith(f"{setting}: {copied / 'config.json'}: {key} ") and "\n" not in message, message


TOKENIZERS = [
    {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}},
    {"auto_map": ["evil/repo--tokenization_evil.Evil", None]},
    {"trust_remote_code": True},
    {"tokenizer_class": "EvilTokenizer"},
    {"tokenizer_class": ["BertTokenizer"]},
]


@pytest.mark.parametrize("changes", TOKENIZERS, ids=json.dumps)
@pytest.mark.parametrize("setting", WAYS)
def test_a_tokenizer_of_its_own_code_is_refused(setting, changes, copied):
    change(copied / "tokenizer_config.json", changes)
    (copied / "tokenization_evil.py").write_text("raise SystemExit('ran')")
    for load in WAYS[setting]:
        with pytest.raises(ConfigError, match="^" + setting) as refused:
            load(copied)
        assert str(refused.value).startswith(f"{setting}: {copied / 'tokenizer_config.json'}: {next(iter(changes))} ")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_named_and_never_read(name, copied):
    (copied / "model.safetensors").rename(copied / name)
    for setting, load in (("model.init", build), ("finetune.model", finetuned)):
        with pytest.raises(ConfigError, match=f"^{setting}: {copied / name}: pickled weights .* safetensors$"):
            load(copied)
    adopt(copied)  # which needs no weights


def test_safetensors_beside_a_pickle_are_what_is_read(copied):
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    build(copied)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_that_points_out_of_its_folder_is_refused(shard, copied):
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": shard}}))
    with pytest.raises(ConfigError, match="is no file of this folder"):
        build(copied)


def test_an_adapter_is_refused(copied):
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/repo"}))
    with pytest.raises(ConfigError, match=r"adapter_config.json: an adapter"):
        build(copied)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object_is_one_line(text, copied):
    (copied / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"^model.init: .*config.json: not (readable as JSON|a JSON object)"):
        build(copied)


def test_a_hub_id_is_checked_at_its_revision(stock, tmp_path, monkeypatch):
    """From a local cache laid out as huggingface_hub's, offline: the commit asked for is the one that is judged."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--model"
    good, bad = "a" * 40, "b" * 40
    for commit in (good, bad):
        shutil.copytree(stock, repo / "snapshots" / commit)
    change(repo / "snapshots" / bad / "config.json", {"auto_map": {"AutoModel": "evil.Evil"}})
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(good)
    (repo / "refs" / "v2").write_text(bad)
    from bertpipe import outside

    for revision in (None, good, "main"):
        outside.check("someone/model", "tokenizer.adopt", revision)
    for revision in (bad, "v2"):
        with pytest.raises(
            ConfigError, match=r"^tokenizer.adopt: someone/model: config.json: auto_map names Python code"
        ):
            outside.check("someone/model", "tokenizer.adopt", revision)
    outside.check("no-one/no-model", "model.init")  # the loader says what is wrong
