"""Stock `transformers` encoders: built from a preset, or taken from a checkpoint; encoded packed.

A preset is a file of configs/model/ that names a `model_type` and fields of its stock config. A family is one row of
FAMILIES: where its masked-LM head and its position numbers differ from BERT's, and why it runs padded if its attention
can't be plugged (model/padded.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from bertpipe import outside
from bertpipe.config import ModelConfig
from bertpipe.config_files import read_preset
from bertpipe.errors import ConfigError
from bertpipe.model import attention, grow, loaded, padded
from bertpipe.model.dropout import replace_dropout
from bertpipe.model.loaded import Loaded

UNUSABLE = (ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError)  # what a wrong config can raise
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "classifier_dropout"),
    *("embedding_dropout", "mlp_dropout", "classifier_dropout_prob", "seq_classif_dropout", "summary_last_dropout"),
    *("pooler_dropout", "cls_dropout"),
)
FULL_ATTENTION = "original_full"  # of big_bird


@dataclass(frozen=True)
class Family:
    """What differs between stock encoder families."""

    mlm_head: Callable[[Any, torch.Tensor], torch.Tensor]
    """(masked-LM model, hidden [P, H]) -> logits [P, V]"""
    first_position: Callable[[Any], int] = lambda config: 0
    """Position number of a sequence's first token."""
    token_types: bool = True
    """Whether the model takes token_type_ids."""
    padded: str = ""
    """Why its attention can't be plugged, so that it runs on padded blocks; empty where it can."""
    autocast: bool = True
    """Whether the stock encoder runs under bf16 autocast; otherwise it computes in fp32."""
    undeclared: tuple[str, ...] = ()
    """Fields that the stock class reads but its config class doesn't list."""
    unused: tuple[str, ...] = ()
    """Modules of the stock encoder that nothing here is computed from; frozen, because DDP waits for gradients."""


def _deberta_head(m: Any, h: torch.Tensor) -> torch.Tensor:
    """BERT's head under the names of transformers (`legacy`, the default), or of DeBERTa's own code."""
    return m.cls(h) if m.legacy else m.lm_predictions(h, m.get_input_embeddings())


def _roberta_first(config: Any) -> int:
    return config.pad_token_id + 1


FAMILIES: dict[str, Family] = {
    "bert": Family(lambda m, h: m.cls(h)),
    "roberta": Family(lambda m, h: m.lm_head(h), _roberta_first),
    "camembert": Family(lambda m, h: m.lm_head(h), _roberta_first),
    "xlm-roberta": Family(lambda m, h: m.lm_head(h), _roberta_first),
    "albert": Family(lambda m, h: m.predictions(h)),
    "electra": Family(lambda m, h: m.generator_lm_head(m.generator_predictions(h))),
    "distilbert": Family(
        lambda m, h: m.vocab_projector(m.vocab_layer_norm(m.activation(m.vocab_transform(h)))), token_types=False
    ),
    "modernbert": Family(lambda m, h: m.decoder(m.head(h)), token_types=False),
    "eurobert": Family(lambda m, h: m.lm_head(h), token_types=False),
    "deberta": Family(
        _deberta_head,
        padded="its layers add relative positions to the scores themselves",
        autocast=False,  # masks bf16 scores with the least fp32 number, which torch refuses
        undeclared=("talking_head", "cls_dropout"),
    ),
    "deberta-v2": Family(
        _deberta_head,
        padded="its layers add relative positions to the scores themselves",
        undeclared=(
            *("position_buckets", "share_att_key", "norm_rel_ebd", "attention_head_size", "cls_dropout"),
            *("conv_kernel_size", "conv_act", "conv_groups"),
        ),
    ),
    "big_bird": Family(
        lambda m, h: m.cls(h),
        padded=f"its layers compute attention themselves, every token seeing all (attention_type {FULL_ATTENTION})",
        unused=("pooler",),
    ),
}


def family(model: Any) -> Family:
    """The row of a model's family; ConfigError for one that isn't offered."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ConfigError(f"model: {kind} models can't be packed; offered are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def build(
    config: ModelConfig,
    vocab_size: int,
    special_ids: dict[str, int],
    sequence_length: int,
    seed: int,
    auto_class: str = "AutoModelForMaskedLM",
    added: Sequence[Sequence[int]] = (),
) -> Any:
    """A model with a masked-LM head, of `auto_class`, for `vocab_size` ids and sequences of `sequence_length`.

    With `config.init`, the checkpoint's weights (a missing masked-LM head starts random, from `seed`), grown for the
    last entries if `added` gives the old ids of each; otherwise random weights from `seed`. Fails with ConfigError
    where vocabulary or positions don't fit.
    """
    import transformers

    stock_class = getattr(transformers, auto_class)
    torch.manual_seed(seed)
    if config.init:
        model = load(stock_class, config.init, "model.init", config.dropout, **config.overrides)
        if added:
            model = grow.grow_vocabulary(model, vocab_size, added)
        if config.max_positions:
            model = grow.lengthen(model, config.max_positions, family(model).first_position(model.config))
    else:
        model = _from_preset(stock_class, config, vocab_size, special_ids)
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ConfigError(
            f"{'model.init' if config.init else 'model.preset'}: the tokenizer has {vocab_size} entries but the model "
            f"only {rows} rows; adopt the model's own tokenizer (tokenizer.adopt) or train one of at most {rows}"
        )
    check_length(model, sequence_length, "train.sequence_length")
    return settle(model)


def settle(model: Any) -> Any:
    """Freeze what is unused in a stock model and turn big_bird to full attention, in place.

    A head for multiple choice is the one that takes the pooler of any family.
    Block-sparse attention would not last: the stock class leaves it for good at the first short batch.
    """
    for name in () if type(model).__name__.endswith("ForMultipleChoice") else family(model).unused:
        module = getattr(model.base_model, name, None)
        if module is not None:
            module.requires_grad_(False)
    if getattr(model.config, "attention_type", FULL_ATTENTION) != FULL_ATTENTION:
        model.base_model.set_attention_type(FULL_ATTENTION)
        model.config.attention_type = FULL_ATTENTION
    return model


def _from_preset(stock_class: Any, config: ModelConfig, vocab_size: int, special_ids: dict[str, int]) -> Any:
    """A model with random weights; ConfigError for overrides that its stock config doesn't take."""
    from transformers import AutoConfig

    fields = read_preset(config.preset)
    kind = fields.pop("model_type")
    fields |= {"vocab_size": vocab_size, "pad_token_id": special_ids["pad"]}
    if kind in ("modernbert", "eurobert"):
        fields |= {"cls_token_id": special_ids["cls"], "sep_token_id": special_ids["sep"]}
        fields |= {"bos_token_id": special_ids["cls"], "eos_token_id": special_ids["sep"]}
    if kind == "eurobert":
        fields |= {"mask_token_id": special_ids["mask"]}
    if kind == "big_bird":
        fields |= {"bos_token_id": special_ids["cls"], "eos_token_id": special_ids["sep"]}
        fields |= {"sep_token_id": special_ids["sep"]}
    check_overrides(config.overrides, kind)
    try:
        stock = AutoConfig.for_model(kind, **(fields | config.overrides))
        set_dropout(stock, config.dropout)
        if config.max_positions:
            stock.max_position_embeddings = config.max_positions + FAMILIES[kind].first_position(stock)
        return stock_class.from_config(stock, attn_implementation="eager", dtype=torch.float32)
    except UNUSABLE as error:
        raise ConfigError(f"model.overrides: {config.overrides} make no {kind} model: {_first_line(error)}") from error


def load(auto_class: Any, name: str, setting: str, dropout: float | None = None, **changes: Any) -> Any:
    """`auto_class.from_pretrained(name)` from safetensors, fp32, without remote code; ConfigError names `setting`.

    A head that the checkpoint hasn't got starts random; one of another size is refused.
    """
    model, _, resized = load_with_missing(auto_class, name, setting, dropout, **changes)
    if resized:
        raise ConfigError(f"{setting}: {name!r}: its weights are not those of its config.json: {resized[0]}")
    return model


def missing_poolers(model: Any, missing: set[str]) -> list[str]:
    """Of the weights that a checkpoint hasn't got, those of a pooler that a head of `model` stands on."""
    unused = family(model).unused
    return sorted(name for name in missing if "pooler" in name.split(".") and "pooler" not in unused)


def make_identity(model: nn.Module, names: Sequence[str]) -> None:
    """Turn linear layers, given as the names of their weights (square) and biases, into the identity, in place."""
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            nn.init.eye_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)


def load_bare(name: str, setting: str) -> Any:
    """The encoder of a checkpoint alone; without a pooler, where the checkpoint has none."""
    import transformers

    model, missing, _ = load_with_missing(transformers.AutoModel, name, setting)
    if any(key.startswith("pooler.") for key in missing):
        model.pooler = None  # the stock classes take that, too
    return model


def load_with_missing(auto_class: Any, name: str, setting: str, dropout: float | None = None, **changes: Any) -> Loaded:
    """What `load` gives, and the names of the weights that start random: of a head or a pooler alone.

    ConfigError where the checkpoint hasn't got the whole encoder, or one of more layers than its config.json says.
    """
    from transformers import AutoConfig

    outside.check(name, setting)
    try:
        check_overrides(changes, AutoConfig.from_pretrained(name).model_type)
        stock = AutoConfig.from_pretrained(name, **changes)
        check_class(auto_class, stock, setting)
        set_dropout(stock, dropout)
        settled = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
        with loaded.without_load_report():
            model, info = auto_class.from_pretrained(
                name, config=stock, use_safetensors=True, ignore_mismatched_sizes=True, **settled
            )
        found = loaded.started_random(model, info, f"{setting}: {name!r}")
        if loaded.num_layers(stock) == loaded.num_layers(AutoConfig.from_pretrained(name)):
            loaded.check_layers(model, info["unexpected_keys"], f"{setting}: {name!r}")
        return found
    except (OSError, *UNUSABLE) as error:
        raise ConfigError(f"{setting}: no checkpoint can be loaded from {name!r}: {_first_line(error)}") from error


def check_class(auto_class: Any, stock: Any, setting: str) -> None:
    """ConfigError for a family of which `transformers` has no class of this kind."""
    from transformers import AutoConfig

    classes = auto_class._model_mapping
    if type(stock) not in classes:
        offered = [kind for kind in FAMILIES if type(AutoConfig.for_model(kind)) in classes]
        raise ConfigError(
            f"{setting}: transformers has no {auto_class.__name__} for {stock.model_type} models; "
            f"offered are {', '.join(offered)}"
        )


def check_overrides(overrides: dict[str, Any], kind: str) -> None:
    """ConfigError for fields that a stock config hasn't got, or that follow from the tokenizer."""
    from transformers import AutoConfig

    known = set(AutoConfig.for_model(kind).to_dict()) | {"num_labels"}
    known |= set(FAMILIES[kind].undeclared) if kind in FAMILIES else set()
    for key in overrides:
        if key in ("model_type", "vocab_size", "pad_token_id") or key not in known:
            raise ConfigError(f"model.overrides: {key!r} can't be set on a {kind} model")
    if kind == "big_bird" and overrides.get("attention_type", FULL_ATTENTION) != FULL_ATTENTION:
        raise ConfigError(
            f"model.overrides: attention_type must be {FULL_ATTENTION} on a {kind} model; the stock class leaves "
            f"block_sparse for good at the first batch of short sequences"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def set_dropout(stock: Any, dropout: float | None) -> None:
    """Set every dropout of a stock config, if `dropout` is given; one left unset (None) stays so."""
    if dropout is not None:
        for field in DROPOUTS:
            if getattr(stock, field, None) is not None:
                setattr(stock, field, dropout)


def longest(model: Any, length: int) -> int:
    """The longest sequence of at most `length` tokens that the model has positions for."""
    config = model.config
    return min(length, getattr(config, "max_position_embeddings", length) - family(model).first_position(config))


def check_length(model: Any, length: int, setting: str) -> None:
    """ConfigError when the model has fewer positions than `length`."""
    positions = longest(model, length)
    if length > positions:
        raise ConfigError(f"{setting}: {length} exceeds the model's {positions} positions; use at most {positions}")


def make_packed(model: Any, gradient_checkpointing: bool = False, kernel: str = attention.NAME) -> Any:
    """Switch a stock model to packed attention by `kernel` (model/kernels.py) and to our dropout, in place.

    A family that runs padded keeps its own attention.
    """
    settle(model).set_attn_implementation("eager" if family(model).padded else kernel)
    replace_dropout(model)
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def encode(model: Any, batch: Any) -> torch.Tensor:
    """Hidden states [T, H] of a PackedBatch, from a stock model with or without a head."""
    kind = family(model)
    if kind.padded:
        first = kind.first_position(model.config)
        return padded.encode(model, batch, first, kind.token_types, kind.autocast)
    types = {"token_type_ids": batch.token_type_ids} if kind.token_types else {}
    whole = model.config._attn_implementation == attention.VARLEN
    output = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids + kind.first_position(model.config),
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        packed_layout=None if whole else attention.plan(batch.cu_seqlens),
        **types,
    )
    return output.last_hidden_state[0]


def save(model: nn.Module, folder: Path) -> None:
    """Write a stock folder that `from_pretrained` loads anywhere: safetensors, no trace of us."""
    stock: Any = model
    packed = stock.config._attn_implementation
    stock.set_attn_implementation("eager")
    try:
        stock.save_pretrained(folder)
    finally:
        stock.set_attn_implementation(packed)


def stock_copy(model: nn.Module) -> Any:
    """A copy that saves as `save` does while the original trains: its config is its own, its weights are not copied."""
    stock: Any = copy.copy(model)
    stock.config = copy.deepcopy(stock.config)
    stock.config._attn_implementation = "eager"
    return stock


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
