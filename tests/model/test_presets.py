"""Presets of families other than BERT (its own are in tests/test_project.py) have the sizes that were published."""

import pytest
import torch
import yaml
from transformers import AutoConfig

from bertpipe.config import ModelConfig
from bertpipe.config_files import preset_folder, read_preset
from bertpipe.model import encoders

SPECIAL_IDS = {"pad": 1, "unk": 3, "cls": 0, "sep": 2, "mask": 4}
PRESETS = {  # published vocabulary; parameters with the masked-LM head; published size of the encoder, in millions
    "roberta-base": (50_265, 124_697_433, 125),  # github.com/facebookresearch/fairseq, examples/roberta
    "albert-base": (30_000, 11_221_680, 11),  # huggingface.co/albert/albert-base-v2; 12M in Lan et al. 2020, table 1
    "electra-base": (30_522, 109_514_298, 110),  # Clark et al. 2020, table 1
    "distilbert-base": (30_522, 66_985_530, 66),  # Sanh et al. 2019, table 3
    "modernbert-base": (50_368, 149_655_232, 149),  # Warner et al. 2024, section 2.1.3
    "modernbert-mini": (30_522, 11_074_362, 11.0),  # not published: as large as Turc et al.'s BERT-mini
    # github.com/microsoft/DeBERTa: 100 and 86 beside the embeddings, which are 50,265 and 128,100 x 768
    "deberta-base": (50_265, 139_244_121, 100 + 38.6),
    "deberta-v3-base": (128_100, 184_551_780, 86 + 98.4),
    # roberta-base's 125 without its pooler, with 4,096 positions for 514
    "bigbird-base": (50_358, 127_520_694, 125 - 0.6 + 2.75),
    "eurobert-210m": (128_256, 310_266_624, 210),  # Boizard et al. 2025; the head has as many rows as the embeddings
}
PUBLISHED = {"roberta-base": {"type_vocab_size": 1}}  # where the preset differs, and says so


def test_every_preset_is_known_here():
    others = {path.stem for path in preset_folder().glob("*.yaml") if not path.stem.startswith("bert-")}
    assert others == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_published_size(name):
    vocab_size, parameters, millions = PRESETS[name]
    config = ModelConfig(preset=name, overrides=PUBLISHED.get(name, {}))
    with torch.device("meta"):
        model = encoders.build(config, vocab_size, SPECIAL_IDS, 512, 0)
    assert encoders.count_parameters(model) == parameters
    encoder = encoders.count_parameters(model.base_model)
    assert encoder == pytest.approx(millions * 1e6, rel=0.011)
    assert f"# {parameters:,} parameters" in (preset_folder() / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_fields_of_its_stock_config(name):
    fields = read_preset(name)
    kind = fields["model_type"]
    assert set(fields) <= {*AutoConfig.for_model(kind).to_dict(), *encoders.FAMILIES[kind].undeclared}
    assert yaml.safe_load((preset_folder() / f"{name}.yaml").read_text(encoding="utf-8")) == fields


@pytest.mark.parametrize("name", PRESETS)
def test_special_tokens_are_the_tokenizer_s(name):
    """No id of the published vocabulary is left behind, where a small one may have no such entry."""
    with torch.device("meta"):
        config = encoders.build(ModelConfig(preset=name), 500, SPECIAL_IDS, 128, 0).config
    assert config.pad_token_id == 1
    for field, value in config.to_dict().items():
        if field.endswith("_token_id"):
            assert value is None or value < 500, field
