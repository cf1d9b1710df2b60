"""One form for equal texts; the hold-out decided by the text alone."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpipe.data.cleaning import clean, content_hash, in_holdout

TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\r\n\x00\x0b\x0c\x85\u2028\u3000é\u0301\ufeff")
    )
)


@pytest.mark.parametrize(
    ("given_text", "cleaned"),
    [
        ("a  b\t c\u00a0d\u3000e", "a b c d e"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("\n\n first \n \n\n\nsecond\n\n", "first\n\nsecond"),
        ("e\u0301", "\u00e9"),
        ("\ufeffbe\x00ll\x07\x7f", "bell"),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),  # a joiner that Hindi needs
        (" \n\t ", ""),
    ],
)
def test_examples(given_text, cleaned):
    assert clean(given_text) == cleaned


@given(TEXT)
def test_what_is_clean_stays_and_holds_no_control_characters(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) == "Cc" and c != "\n"]
    assert "  " not in cleaned and "\n\n\n" not in cleaned and cleaned == cleaned.strip()


@given(TEXT)
def test_cleaning_drops_nothing_but_controls_and_white_space(text):
    def letters(value: str) -> str:
        kept = (c for c in value if not (c.isspace() or unicodedata.category(c) == "Cc" or c == "\ufeff"))
        return unicodedata.normalize("NFC", "".join(kept))

    assert letters(clean(text)) == letters(text)


def test_the_holdout_is_the_stated_share_and_grows_with_it():
    digests = [content_hash(f"document {number}".encode()) for number in range(20_000)]
    held = {share: {d for d in digests if in_holdout(d, share)} for share in (0.0, 0.01, 0.1)}
    assert not held[0.0]
    assert 130 < len(held[0.01]) < 270 and 1_700 < len(held[0.1]) < 2_300  # five standard deviations
    assert held[0.01] < held[0.1]


def test_hash_and_side_of_a_text_never_change():
    digest = content_hash(b"The parrot is no more.")
    assert digest.hex() == "7249b34244adb5b0c77d5c2906a1002a"
    assert (in_holdout(digest, 0.164), in_holdout(digest, 0.165)) == (False, True)
