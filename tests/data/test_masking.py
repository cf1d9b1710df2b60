"""Properties of the masks (M1-M9): which positions, what is shown, and that nothing but the token's place decides."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bertpipe.data import keyed
from bertpipe.data.masking import MASKINGS, Masking, Rate, Tokens, Vocabulary, check, check_rate, span_lengths
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
@given(st.sampled_from(["whole_word", "span"]), lengths_lists, st.integers(0, 9), st.floats(0.05, 0.5))
def test_whole_words_are_taken_whole(strategy, lengths, seed, probability):
    """M8, and the count comes within half a word of the budget."""
    drawn = tokens(lengths, seed)
    positions, _ = masking(strategy, probability).draw(drawn, seed, 0)
    begins = ~CONTINUES[drawn.ids]
    begins[np.cumsum(lengths) - lengths] = True
    word = np.cumsum(begins)
    chosen = np.isin(np.arange(len(drawn.ids)), positions)
    for number in np.unique(word):
        assert len(set(chosen[word == number])) == 1
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    for number, length in enumerate(lengths):
        longest = np.bincount(word[sequence == number]).max()
        count, budget = chosen[sequence == number].sum(), length * probability
        assert np.floor(budget) - longest / 2 <= count <= max(np.ceil(budget) + longest / 2, longest)


@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_whole_words_keep_to_the_share(strategy):
    drawn = tokens([100] * 10_000)
    positions, shown = masking(strategy).draw(drawn, 0, 0)
    assert abs(len(positions) / len(drawn.ids) - 0.15) < 0.005
    assert abs(np.mean(shown == MASK) - 0.8) < 0.01 and abs(np.mean(shown == drawn.ids[positions]) - 0.1) < 0.01


def test_span_lengths_are_those_of_the_paper():
    """Joshi et al. 2020, 3.1: geometric with p = 0.2, no longer than 10 words, 3.8 in the mean."""
    lengths = span_lengths(keyed.key(1), np.arange(200_000))
    share = 0.2 * 0.8 ** np.arange(10)
    assert stats.chisquare(np.bincount(lengths)[1:], 200_000 * share / share.sum()).pvalue > 1e-9
    assert abs(lengths.mean() - 3.8) < 0.03


def test_masked_runs_are_about_as_long_as_spans():
    """With few masks in long sequences spans seldom touch, so that runs of masked words are spans."""
    alone = np.flatnonzero(~SPECIAL & ~CONTINUES)  # words of one token
    n = 2_000 * 300
    drawn = Tokens(np.random.default_rng(0).choice(alone, n), np.arange(n), np.full(300, 2_000))
    positions, _ = masking("span", 0.02).draw(drawn, 0, 0)
    runs = np.diff(np.flatnonzero(np.append(np.diff(positions, prepend=-9) > 1, True)))
    assert 3.4 < runs.mean() < 3.9  # the last of about eleven spans a sequence is cut, some touch
    share = 0.2 * 0.8 ** np.arange(10)
    found = np.bincount(runs, minlength=11)[1:11] / len(runs)
    assert np.abs(found - share / share.sum()).max() < 0.03
    assert stats.chisquare(np.bincount(positions % 2_000 // 100, minlength=20)).statistic < 19 * 10  # anywhere


def lay_spans(drawn, chosen, seed):
    """Spans of one sequence laid one after another: for each its first token and the tokens it masks."""
    key = keyed.key(seed, "mask", 0)
    n = len(drawn.ids)
    budget = max(
        1, int(np.floor(n * chosen.probability + keyed.uniform(keyed.key(key, "budget"), drawn.places[:1])[0]))
    )
    begins = [i for i in range(n) if i == 0 or not CONTINUES[drawn.ids[i]]]
    words = [range(a, b) for a, b in zip(begins, [*begins[1:], n], strict=True)]
    turns = keyed.bits(key, drawn.places[begins])
    lengths = span_lengths(key, drawn.places[begins])
    masked, spans = set(), []
    for start in np.argsort(turns):
        spans.append((words[start][0], []))
        for word in words[start : start + lengths[start]]:
            if word[0] in masked:
                continue
            if masked and len(masked) + len(word) / 2 > budget:
                return spans
            masked |= set(word)
            spans[-1][1].extend(word)
    return spans


@settings(deadline=None)
@given(st.integers(1, 120), st.integers(0, 99), st.floats(0.05, 0.9))
def test_spans_are_those_laid_one_after_another_and_shown_alike(length, seed, probability):
    drawn, chosen = tokens([length], seed, first_place=seed * 1000), masking("span", probability, 0.4, 0.3)
    positions, shown = chosen.draw(drawn, seed, 0)
    spans = lay_spans(drawn, chosen, seed)
    assert sorted(i for _, span in spans for i in span) == positions.tolist()
    visible = dict(zip(positions.tolist(), shown.tolist(), strict=True))
    for start, span in spans:
        fate = keyed.uniform(keyed.key(seed, "show", 0), drawn.places[[start]])[0]
        assert all((visible[i] == MASK) == (fate < 0.4) for i in span)
        assert fate < 0.7 or all(visible[i] == drawn.ids[i] for i in span)


def test_masks_are_fixed_for_ever():
    """Golden values: other bits would change every run."""
    drawn = tokens(np.random.default_rng(0).integers(1, 126, 200).tolist(), low=0)
    found = {}
    for strategy in MASKINGS:
        arrays = masking(strategy, 0.3).draw(drawn, 7, 2)
        found[strategy] = hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()[:16]
    assert found == {"token": "527e9c334999c861", "whole_word": "46ff9162678d68e2", "span": "9d44a642d932f05b"}


def test_draws_that_are_alike_keep_the_budget():
    """Two tokens with one place, so one draw: the earlier one is taken first, and no token too many."""
    drawn = Tokens(np.arange(10, 50), np.zeros(40, np.int64), np.array([40]))
    for strategy in MASKINGS:
        positions, _ = masking(strategy, 0.25).draw(drawn, 0, 0)
        assert positions.tolist() == list(range(len(positions))) and 10 <= len(positions) <= 11


def test_the_rate_falls_in_a_line():
    rate = Rate("linear", 0.3, 0.15, 4)
    np.testing.assert_allclose([rate(step) for step in range(4)], [0.3, 0.25, 0.2, 0.15])
    assert rate.highest == 0.3 and Rate("linear", 0.1, 0.4, 9).highest == 0.4
    assert [Rate("constant", 0.15, 0.15, 4)(step) for step in (0, 3)] == [0.15, 0.15]
    assert Rate("linear", 0.3, 0.15, 1)(0) == 0.3


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"masking.strategy: 'words' is not one of token, whole_word"):
        check("words", 0.8, 0.1)
    with pytest.raises(ConfigError, match="exceed 1"):
        check("token", 0.8, 0.3)
    with pytest.raises(ConfigError, match=r"masking.schedule: 'cosine' is not one of constant, linear"):
        check_rate("cosine", None)
    with pytest.raises(ConfigError, match=r"masking.final_probability: set it"):
        check_rate("linear", None)
    with pytest.raises(ConfigError, match=r"masking.final_probability: .* has no use for it"):
        check_rate("constant", 0.15)
