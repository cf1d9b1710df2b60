"""Windows equal the stock tokenizer's, labels stand at the answer, and the best span of all windows is found."""

from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import BertTokenizer, ByT5Tokenizer, RobertaTokenizer

from bertpipe.config import Config
from bertpipe.data.batches import Examples
from bertpipe.downstream.tasks import spans
from bertpipe.downstream.tasks.kind import Outputs
from bertpipe.downstream.tasks.spans import decode, make_windows, place_labels, tokens_of
from bertpipe.errors import ConfigError, DataError

LETTERS = "abcdefg"


@cache
def tokenizer(kind):
    if kind == "bert":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS), "the", "cab"]
        return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "ab", "Ġa"]
    return RobertaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("a", "b"), ("Ġ", "a")])


def settings(**changes):
    return Config(finetune={"max_length": 24, **changes}).finetune


texts = st.text("abg é€ \n", max_size=60)


@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    st.sampled_from(["bert", "roberta"]),
    st.integers(16, 60),
    st.integers(0, 4) | st.none(),
)
def test_windows_are_those_of_the_stock_tokenizer(pairs, kind, max_length, stride):
    stock = tokenizer(kind)
    longest = max(len(ids) for ids in stock([q for q, _ in pairs], add_special_tokens=False)["input_ids"])
    assume(longest <= (max_length - 4) // 2)
    windows = make_windows(pairs, stock, settings(max_length=max_length, stride=stride))
    expected = stock(
        *([side[0] for side in pairs], [side[1] for side in pairs]),
        truncation="only_second",
        max_length=max_length,
        stride=max_length // 3 if stride is None else stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    assert [ids.tolist() for ids in windows.input_ids] == expected["input_ids"]
    assert [types.tolist() for types in windows.token_type_ids] == expected["token_type_ids"]
    assert windows.example.tolist() == expected["overflow_to_sample_mapping"]
    assert {x.dtype for x in (*windows.input_ids, *windows.token_type_ids)} == {np.dtype(np.int64)}
    for w, places in enumerate(expected["offset_mapping"]):
        shown = [place for place, text in zip(places, expected.sequence_ids(w), strict=True) if text == 1]
        first, size = windows.first[w], windows.size[w]
        assert list(map(tuple, windows.offsets[windows.example[w]][first : first + size])) == shown
        if size:
            assert expected.sequence_ids(w).index(1) == windows.begin[w]
    assert [w for row in windows.of_examples() for w in row] == list(range(len(windows.example)))


def test_a_window_by_hand():
    """Length 10, so that the question may have 3 tokens, and 4 of the context are shown, the last one again."""
    windows = make_windows([("a b c d e", "the cab g f e d")], tokenizer("bert"), settings(max_length=10, stride=1))
    shown = [tokenizer("bert").decode(ids) for ids in windows.input_ids]
    assert shown == ["[CLS] a b c [SEP] the cab g f [SEP]", "[CLS] a b c [SEP] f e d [SEP]"]
    assert windows.num_cut == 1 and windows.first.tolist() == [0, 3] and windows.size.tolist() == [4, 3]
    assert windows.token_type_ids[0].tolist() == [0] * 5 + [1] * 5
    pair = [("a b c d e", "the cab")]
    assert make_windows(pair, tokenizer("bert"), settings(max_query_length=2)).begin.tolist() == [4]
    assert make_windows(pair, tokenizer("bert"), settings(max_query_length=5)).num_cut == 0


@pytest.mark.parametrize("stride", [4, 24])
def test_a_stride_that_leaves_nothing_new_is_refused(stride):
    with pytest.raises(
        ConfigError, match=rf"windows of 4 tokens of text that share {stride} never advance; use at most"
    ):
        make_windows([("a", "b")], tokenizer("bert"), settings(max_length=10, stride=stride))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ConfigError, match="ByT5Tokenizer, doesn't say where in the text a token stands"):
        make_windows([("a", "b")], ByT5Tokenizer(), settings())


@given(
    st.lists(st.sampled_from(["the", "cab", "gé", "abcde", "f", "€"]), min_size=1, max_size=40),
    st.data(),
    st.sampled_from(["bert", "roberta"]),
)
def test_a_label_is_the_answer_in_every_window_that_shows_it(words, data, kind):
    start = data.draw(st.integers(0, len(words) - 1))
    stop = data.draw(st.integers(start + 1, min(len(words), start + 3)))
    context, answer = " ".join(words), " ".join(words[start:stop])
    begin = len(" ".join([*words[:start], ""]))
    windows = make_windows([("ab", context)], tokenizer(kind), settings(max_length=40, stride=12))
    (first, last), offsets = tokens_of(begin, begin + len(answer), windows.offsets[0]), windows.offsets[0]
    assert context[offsets[first, 0] : offsets[last, 1]].strip() == answer
    labels, num_unseen = place_labels(windows, [(begin, begin + len(answer))])
    whole = tokenizer(kind)(context, add_special_tokens=False)["input_ids"]
    seen = 0
    for w, (a, b) in enumerate(labels):
        if windows.first[w] <= first and last < windows.first[w] + windows.size[w]:
            assert windows.input_ids[w][a : b + 1].tolist() == whole[first : last + 1]
            seen += 1
        else:
            assert (a, b) == (0, 0)
    assert num_unseen == (seen == 0)


def test_what_has_no_answer_or_no_tokens_is_labelled_so():
    pairs = [("a", "cab"), ("a", "cab \u200b\u200b the"), ("a", "")]
    windows = make_windows(pairs, tokenizer("bert"), settings())
    labels, num_unseen = place_labels(windows, [None, (4, 6), None])
    assert labels.tolist() == [[0, 0]] * 3 and num_unseen == 1


# --- answers ----------------------------------------------------------------------------------------------------------


def outputs_of(windows, logits):
    lengths = [len(ids) for ids in windows.input_ids]
    return Outputs(np.asarray(logits, np.float32).reshape(-1, 2), np.append(0, np.cumsum(lengths)))


@given(st.lists(st.sampled_from(["the", "cab", "g", "abc"]), max_size=25), st.integers(1, 6), st.data())
def test_the_best_span_of_all_windows_is_found(words, longest, data):
    """Against trying every one; whole numbers, so that there are many ties."""
    context = " ".join(words)
    windows = make_windows([("a", context)], tokenizer("bert"), settings(max_answer_length=longest))
    size = sum(map(len, windows.input_ids))
    logits = data.draw(st.lists(st.integers(-3, 3), min_size=2 * size, max_size=2 * size))
    outputs = outputs_of(windows, logits)
    (answer,) = decode(windows, outputs, [context])
    found = []
    for w in range(len(windows.example)):
        starts, ends = outputs.of(w)[windows.begin[w] :].T
        for i in range(windows.size[w]):
            for j in range(i, min(i + longest, windows.size[w])):
                found.append((-float(starts[i] + ends[j]), int(windows.first[w]) + i, int(windows.first[w]) + j))
    null = min(float(outputs.of(w)[0].sum()) for w in range(len(windows.example)))
    if not found:
        assert (answer.text, answer.score, answer.odds) == ("", null - spans.NOTHING, spans.NOTHING)
        return
    score, first, last = min(found)
    places = windows.offsets[0]
    assert answer.text == context[places[first, 0] : places[last, 1]]
    assert answer.score == -score and answer.odds == null + score
    assert [s for _, s in answer.others] == sorted((s for _, s in answer.others), reverse=True)
    assert len({answer.text, *dict(answer.others)}) == 1 + len(answer.others) <= spans.KEPT


def test_question_and_special_tokens_are_no_answer():
    windows = make_windows([("cab", "the g")], tokenizer("bert"), settings())
    logits = np.zeros((len(windows.input_ids[0]), 2))
    logits[:2] = 50  # [CLS], cab
    logits[-1] = 50  # [SEP]
    (answer,) = decode(windows, outputs_of(windows, logits), ["the g"])
    assert answer.text == "the" and answer.odds == 100


def test_an_answer_is_written_as_in_the_text():
    """No token is joined back: case, accents and white space are the context's."""
    windows = make_windows([("a", "Gé \n the, (CAB)")], tokenizer("bert"), settings())
    logits = np.zeros((len(windows.input_ids[0]), 2))
    logits[windows.begin[0], 0] = logits[-3, 1] = 9
    (answer,) = decode(windows, outputs_of(windows, logits), ["Gé \n the, (CAB)"])
    assert answer.text == "Gé \n the, (CAB"


def test_diverged_logits_are_refused():
    windows = make_windows([("a", "b")], tokenizer("bert"), settings())
    with pytest.raises(DataError, match="a logit is not a finite number: training diverged"):
        decode(windows, outputs_of(windows, [[0, np.nan]] * len(windows.input_ids[0])), ["b"])


def test_windows_are_examples():
    windows = make_windows([("a", "the " * 40)], tokenizer("bert"), settings())
    labels, _ = place_labels(windows, [(0, 3)])
    assert Examples(windows.input_ids, windows.token_type_ids, labels).lengths.max() == 24
    assert labels[0].tolist() == [3, 3] and not labels[1:].any()
