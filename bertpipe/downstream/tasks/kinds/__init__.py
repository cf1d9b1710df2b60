"""The forms that a task can have, one file each; KINDS is the table."""

from bertpipe.downstream.tasks.kind import Kind
from bertpipe.downstream.tasks.kinds.answers import Answers
from bertpipe.downstream.tasks.kinds.choices import Choices
from bertpipe.downstream.tasks.kinds.multi_label import MultiLabel
from bertpipe.downstream.tasks.kinds.sequences import Classification, Regression
from bertpipe.downstream.tasks.kinds.tokens import Tokens

KINDS: dict[str, Kind] = {
    "classification": Classification(),
    "regression": Regression(),
    "choices": Choices(),
    "tokens": Tokens(),
    "answers": Answers(),
    "multi_label": MultiLabel(),
}
