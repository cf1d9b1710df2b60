"""The forms that a task can have, one file each; KINDS is the table."""

from bertpipe.downstream.kind import Kind
from bertpipe.downstream.kinds.choices import Choices
from bertpipe.downstream.kinds.multi_label import MultiLabel
from bertpipe.downstream.kinds.sequences import Classification, Regression

KINDS: dict[str, Kind] = {
    "classification": Classification(),
    "regression": Regression(),
    "choices": Choices(),
    "multi_label": MultiLabel(),
}
