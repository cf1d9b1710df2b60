"""Multiple choice: of several texts, the one that goes with a first one.

`Split.texts`: the first text, then the choices, as many for each example as the task has label names. `Split.labels`:
int64 [examples], the number of the right choice, from 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bertpipe.data.batches import Examples
from bertpipe.downstream.tasks.encode import encode_texts
from bertpipe.downstream.tasks.kind import Encoded, Outputs, Split, counted, name_fields
from bertpipe.downstream.tasks.kinds.sequences import Sequences

if TYPE_CHECKING:
    from bertpipe.config import FinetuneConfig


class Choices(Sequences):
    """One of C texts; each example is C sequences."""

    head = "choice"
    pipeline = "multiple-choice"

    def encode(self, split: Split, tokenizer: Any, settings: FinetuneConfig) -> Encoded:
        """[CLS] first text [SEP] choice [SEP] for each choice, each cut to `finetune.max_length`."""
        num = len(split.texts[0]) - 1
        pairs = [(first, choice) for first, *choices in split.texts for choice in choices]
        tokens = encode_texts(pairs, tokenizer, settings.max_length)
        examples = Examples(tokens.input_ids, tokens.token_type_ids, split.labels, choices=num)
        return Encoded(examples, counted(cut_to_max_length=len({row // num for row in tokens.truncated})))

    def model_fields(self, split: Split) -> dict[str, Any]:
        """One output: the stock head gives each choice a number."""
        return name_fields(None)

    def decide(self, split: Split, encoded: Encoded, outputs: Outputs) -> np.ndarray:
        """The choice with the highest logit, int64 [examples]."""
        return outputs.logits.reshape(-1, encoded.examples.choices).argmax(-1)

    def line(self, split: Split, encoded: Encoded, outputs: Outputs, predicted: Any, row: int) -> dict[str, Any]:
        """Numbers of the choices, and the logit of each."""
        line: dict[str, Any] = {"prediction": int(predicted[row])}
        if split.labels is not None:
            line["label"] = int(split.labels[row])
        return line | {"logits": [round(float(x), 5) for x in outputs.of(row)[:, 0]]}
