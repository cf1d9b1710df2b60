"""Windows cover a text, share what they should, and each word is answered for where it has most context."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.downstream.tasks import windows
from bertpipe.errors import ConfigError


@st.composite
def texts(draw):
    """Room and shared tokens of windows, and the pieces of each word."""
    room = draw(st.integers(1, 30))
    return room, draw(st.integers(0, room - 1)), draw(st.lists(st.integers(1, 40), min_size=1, max_size=40))


@given(texts())
def test_windows_cover_the_text_and_share_enough(text):
    room, shared, sizes = text
    length = sum(sizes)
    starts = windows.starts(length, room, shared)
    assert starts[0] == 0 and starts[-1] == max(0, length - room), "all are full, or there is one"
    assert (np.diff(starts) > 0).all() and (np.diff(starts) <= room - shared).all()
    fewest = 1 + max(0, -(-(length - room) // (room - shared)))
    assert len(starts) == fewest


@given(texts())
def test_a_word_is_answered_for_where_its_poorer_side_is_richest(text):
    room, shared, sizes = text
    end = np.cumsum(sizes)
    first = end - sizes
    starts = windows.starts(int(end[-1]), room, shared)
    chosen = windows.best(starts, room, first, end)
    assert (np.diff(chosen) >= 0).all(), "words follow one another from window to window"
    for word, window in enumerate(chosen):
        context = {
            number: min(first[word] - start, start + room - end[word])
            for number, start in enumerate(starts)
            if start <= first[word] < start + room
        }
        assert window == min(number for number, size in context.items() if size == max(context.values()))


def test_by_hand():
    assert windows.starts(10, 10, 3).tolist() == [0]
    assert windows.starts(11, 10, 3).tolist() == [0, 1]
    assert windows.starts(25, 10, 3).tolist() == [0, 5, 10, 15], "0, 7, 14 would end at 24"
    word, counted = np.arange(25), [8, 5, 5, 7]  # word 7 stands 2 from an edge in both windows: the first has it
    owner = windows.best(windows.starts(25, 10, 3), 10, word, word + 1)
    assert owner.tolist() == np.repeat([0, 1, 2, 3], counted).tolist()


def test_windows_that_never_advance_are_refused():
    assert windows.shared(None, 128, 126) == 42 and windows.shared(0, 8, 6) == 0
    with pytest.raises(ConfigError, match=r"finetune.stride: windows of 6 tokens of text that share 6 never advance"):
        windows.shared(6, 8, 6)
