"""Properties of the masks (M1-M9): which positions, what is shown, and that nothing but the token's place decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bertpipe.data.masking import MASKINGS, Masking, Tokens, Vocabulary, check
from bertpipe.errors import ConfigError

V, MASK = 300, 4
SPECIAL = np.arange(V) < 5
CONTINUES = np.zeros(V, bool)
CONTINUES[150:] = True


def masking(strategy="token", probability=0.15, mask_share=0.8, random_share=0.1):
    return Masking(strategy, probability, mask_share, random_share, Vocabulary(MASK, SPECIAL, CONTINUES))


def tokens(lengths, seed=0, low=5, first_place=0):
    n = sum(lengths)
    ids = np.random.default_rng(seed).integers(low, V, n)
    return Tokens(ids, np.arange(first_place, first_place + n), np.array(lengths, np.int64))


lengths_lists = st.lists(st.integers(1, 80), min_size=1, max_size=20)
strategies = st.sampled_from(sorted(MASKINGS))


@settings(deadline=None)
@given(lengths_lists, strategies, st.floats(0.05, 0.6), st.integers(0, 5), st.integers(0, 3), st.integers(0, 9))
def test_what_holds_for_any_input(lengths, strategy, probability, low, epoch, seed):
    drawn = tokens(lengths, seed, low)  # low < 5: special tokens stand in the text, too
    positions, shown = masking(strategy, probability).draw(drawn, seed, epoch)
    assert np.array_equal(positions, np.unique(positions)) and len(shown) == len(positions)
    assert not SPECIAL[drawn.ids[positions]].any()  # M2
    assert ((shown == MASK) | ~SPECIAL[shown]).all() and shown.max(initial=0) < V  # M6
    visible = drawn.ids.copy()
    visible[positions] = shown
    labels = np.full(len(visible), -100)
    labels[positions] = drawn.ids[positions]
    assert np.array_equal(np.where(labels != -100, labels, visible), drawn.ids)  # M1, M3
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    maskable = np.bincount(sequence[~SPECIAL[drawn.ids]], minlength=len(lengths))
    chosen = np.bincount(sequence[positions], minlength=len(lengths))
    assert (chosen[maskable > 0] >= 1).all() and (chosen <= maskable).all()  # M7
    if strategy == "token":
        assert (np.abs(chosen - maskable * probability)[maskable * probability >= 1] < 1).all()  # exact budget
    again = masking(strategy, probability).draw(drawn, seed, epoch)
    assert np.array_equal(positions, again[0]) and np.array_equal(shown, again[1])  # M9


@settings(deadline=None)
@given(lengths_lists, lengths_lists, strategies, st.integers(0, 9))
def test_a_sequence_is_masked_the_same_in_any_company(before, after, strategy, seed):
    """M4: alone, or behind and before others, in any order."""
    alone = tokens([23], seed, first_place=10_000)
    others_before, others_after = tokens(before, 1, first_place=0), tokens(after, 2, first_place=20_000)
    parts = [others_before, alone, others_after]
    mixed = Tokens(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("ids", "places", "lengths")))
    positions, shown = masking(strategy).draw(alone, seed, 1)
    mixed_positions, mixed_shown = masking(strategy).draw(mixed, seed, 1)
    inside = (mixed_positions >= sum(before)) & (mixed_positions < sum(before) + 23)
    assert np.array_equal(mixed_positions[inside] - sum(before), positions)
    assert np.array_equal(mixed_shown[inside], shown)


@pytest.mark.parametrize("probability", [0.15, 0.3])
def test_shares_over_a_million_tokens(probability):
    """M5: within binomial bounds that raise one false alarm in a thousand million."""
    drawn = tokens(np.random.default_rng(0).integers(10, 126, 16_000).tolist())
    n = len(drawn.ids)
    assert n > 1_000_000
    positions, shown = masking(probability=probability).draw(drawn, 1, 0)

    def within(count, total, share):
        low, high = stats.binom.interval(1 - 1e-9, total, share)
        return low <= count <= high

    assert within(len(positions), n, probability)
    original = drawn.ids[positions]
    masked, kept = shown == MASK, shown == original
    regular = (~SPECIAL).sum()
    assert within(masked.sum(), len(positions), 0.8)
    assert within(kept.sum(), len(positions), 0.1 + 0.1 / regular)  # a random token may be the right one
    assert within((~masked & ~kept).sum(), len(positions), 0.1 * (1 - 1 / regular))
    replaced = shown[~masked & ~kept]
    assert stats.chisquare(np.bincount(replaced, minlength=V)[~SPECIAL]).pvalue > 1e-9  # uniform over the vocabulary


def test_every_place_in_a_sequence_is_as_likely():
    drawn = tokens([20] * 20_000)
    positions, _ = masking().draw(drawn, 3, 0)
    assert stats.chisquare(np.bincount(positions % 20, minlength=20)).pvalue > 1e-9


def test_epochs_and_seeds_differ():
    """M9"""
    drawn = tokens([60] * 20)
    first = masking().draw(drawn, 0, 0)[0]
    assert not np.array_equal(first, masking().draw(drawn, 0, 1)[0])
    assert not np.array_equal(first, masking().draw(drawn, 1, 0)[0])


@settings(deadline=None)
@given(lengths_lists, st.integers(0, 9), st.floats(0.05, 0.5))
def test_whole_words_are_taken_whole(lengths, seed, probability):
    """M8, and the count comes within half a word of the budget."""
    drawn = tokens(lengths, seed)
    positions, _ = masking("whole_word", probability).draw(drawn, seed, 0)
    begins = ~CONTINUES[drawn.ids]
    begins[np.cumsum(lengths) - lengths] = True
    word = np.cumsum(begins)
    chosen = np.isin(np.arange(len(drawn.ids)), positions)
    for number in np.unique(word):
        assert len(set(chosen[word == number])) == 1


def test_whole_words_keep_to_the_share():
    drawn = tokens([100] * 10_000)
    positions, _ = masking("whole_word").draw(drawn, 0, 0)
    assert abs(len(positions) / len(drawn.ids) - 0.15) < 0.005


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"masking.strategy: 'words' is not one of token, whole_word"):
        check("words", 0.8, 0.1)
    with pytest.raises(ConfigError, match="exceed 1"):
        check("token", 0.8, 0.3)
