"""The forms that a task can have, one file each; KINDS is the table."""

from bertpipe.downstream.kind import Kind
from bertpipe.downstream.kinds.answers import Answers
from bertpipe.downstream.kinds.choices import Choices
from bertpipe.downstream.kinds.multi_label import MultiLabel
from bertpipe.downstream.kinds.sequences import Classification, Regression
from bertpipe.downstream.kinds.tokens import Tokens

KINDS: dict[str, Kind] = {
    "classification": Classification(),
    "regression": Regression(),
    "choices": Choices(),
    "tokens": Tokens(),
    "answers": Answers(),
    "multi_label": MultiLabel(),
}
