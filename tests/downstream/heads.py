"""Small stock checkpoints with a head of each kind, random weights, beside the tokenizer of TEXT's words."""

from pathlib import Path

import torch
import transformers as tr

from tests.downstream.conftest import write_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TAGS = ("O", "B-place", "I-place", "B-name", "I-name")
HEADS = {
    "fill-mask": ("BertForMaskedLM", {}),
    "text-classification": ("BertForSequenceClassification", {"id2label": dict(enumerate(("bad", "so so", "good")))}),
    "multi-label": (
        "BertForSequenceClassification",
        {"id2label": dict(enumerate("abcd")), "problem_type": "multi_label_classification"},
    ),
    "one label": (
        "BertForSequenceClassification",
        {"num_labels": 1, "problem_type": "multi_label_classification"},
    ),
    "regression": ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}),
    "token-classification": ("BertForTokenClassification", {"id2label": dict(enumerate(TAGS))}),
    "question-answering": ("BertForQuestionAnswering", {}),
    "multiple-choice": ("BertForMultipleChoice", {}),
    "feature-extraction": ("BertModel", {}),
}


def write_head(folder: Path, head: str) -> Path:
    """A checkpoint with one of HEADS."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    kind, fields = HEADS[head]
    config = tr.BertConfig(
        vocab_size=len(tokenizer), initializer_range=0.5, max_position_embeddings=64, **SIZES, **fields
    )
    getattr(tr, kind)(config).save_pretrained(folder)
    return folder
