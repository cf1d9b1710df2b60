"""What the settings in config.py are made of: the base of a section, kinds of numbers, and some sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Decay = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=0)]


def listed(value: str | list[str]) -> list[str]:
    """A setting that is one name or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


class Section(BaseModel):
    """A group of settings: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class Phase(Section):
    """A part of the pretraining run with a sequence length of its own."""

    share: float = Field(gt=0, le=1)
    """Share of the run's steps."""
    sequence_length: int = Field(ge=8)
    """Longest sequence of the phase in tokens, [CLS] and [SEP] included; at most train.sequence_length."""
    slot_tokens: int | None = Field(default=None, ge=8)
    """Tokens of one slot in the phase; unset takes train.slot_tokens."""


class Ramp(Section):
    """A stretch at the start of the run with fewer slots a step."""

    steps: int = Field(ge=1)
    """Its steps."""
    slots: int = Field(ge=1)
    """Slots of each of them."""


class ReportConfig(Section):
    """The HTML page."""

    title: str = "bertpipe run"
    """Heading of the page."""
    fill_mask: str | list[str] = Field(default_factory=lambda: ["The [MASK] of a function is returned to the caller."])
    """Sentences with one [MASK] each, filled in by the pretrained model."""


class PublishConfig(Section):
    """The folder and model card for the Hub."""

    repo: str = "bertpipe-model"
    """Repository name, with or without the owner; to push, OWNER/NAME."""
    language: str = "en"
    """Language tag of the card."""
    license: str = "apache-2.0"
    """Licence tag of the card."""
    task: str | None = None
    """Publish this task's fine-tuned model; unset publishes the pretrained one."""
    tokenizer: bool = False
    """Publish the tokenizer alone."""
    revisions: bool = False
    """With the pretrained model, also the run's checkpoints, `from_pretrained(..., revision="step-500")`; step-0 is the
    initial weights. runtime.keep_checkpoints says how many a run keeps."""
    push: bool = False
    """Upload it, in one commit; without it (--push for short) nothing leaves this machine. The token is HF_TOKEN's or
    that of `hf auth login`."""
    private: bool = True
    """Make a new repository private, and refuse to push into a public one."""
