"""A finished checkpoint with the head that it has, and what that head is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bertpipe import outside
from bertpipe.downstream.finetuning.start_checks import load_tokenizer_of
from bertpipe.downstream.tasks.kinds import KINDS
from bertpipe.errors import ConfigError
from bertpipe.model import encoders
from bertpipe.model.labelled import HEADS_OF

ENCODER = "feature-extraction"
_TUNED = {HEADS_OF[kind.head].auto_class: kind.pipeline for kind in KINDS.values()}
USES = {
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForPreTraining": ("AutoModelForMaskedLM", "fill-mask"),
    **{auto_class.removeprefix("AutoModel"): (auto_class, task) for auto_class, task in _TUNED.items()},
    "Model": ("AutoModel", ENCODER),
}
"""How the name of a stock class ends: the auto class that loads it, and the Hub's word for what it does."""


@dataclass(frozen=True)
class Finished:
    """A checkpoint, loaded: fp32, on the CPU, no dropout."""

    name: str
    model: Any
    tokenizer: Any
    task: str
    """The Hub's word for what its head does."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest input, special ones included."""
        return encoders.longest(self.model, self.tokenizer.model_max_length)


def load(name: str) -> Finished:
    """The checkpoint in a folder or under a Hub id; ConfigError where its head is of no known form, or not whole."""
    import transformers

    tokenizer = load_tokenizer_of(name, "--model")
    config = outside.read_json(name, "config.json", "--model")[1] or {}
    own = str(next(iter(config.get("architectures") or ["Model"])))
    form = next((form for ending, form in USES.items() if own.endswith(ending)), None)
    if own.endswith("LMHeadModel"):  # a decoder, which isn't the encoder that AutoModel would make of it
        form = None
    if form is None:
        raise ConfigError(f"--model: {name}: a {own}; of use here are classes that end in {', '.join(USES)}")
    auto_class, task = form
    if task == ENCODER:
        return Finished(name, encoders.load_bare(name, "--model").eval(), tokenizer, task)
    model, missing, resized = encoders.load_with_missing(getattr(transformers, auto_class), name, "--model")
    if missing or resized:
        what = sorted(missing)[0] if missing else resized[0]
        raise ConfigError(f"--model: {name}: its head is not whole ({what}); save the checkpoint again, or train it")
    return Finished(name, model.eval(), tokenizer, task)
