"""Pairs of text segments, for next-sentence and sentence-order prediction: which, and in which slot of which step.

A document is a row of sentences. From its start on, sentences are collected until they hold as many tokens as the
longest pair, or in one of ten cases a random smaller number; the chunk is cut at a random sentence into A and B.
Next sentence (Devlin et al. 2019, A.2): in half of the cases, and wherever the chunk is one sentence, B comes from
another document instead, and the document goes on behind A, so that no sentence is left out. Sentence order (Lan et al.
2020, 3.1): in half of the cases A and B change places. What is too long is cut token by token from the longer segment,
at its front or its end. (google-research/bert, create_pretraining_data.py, builds them so.)

Every draw is a hash of (seed, epoch, the place of A's first token), so pairs are drawn anew each epoch and are the same
for any processes and workers. Unlike there, a sentence longer than a whole pair is first cut into even parts of at most
half a pair, or most of it would never be seen; and the pair that meets the end of a slot is cut to what fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bertpipe.data import keyed
from bertpipe.data.order import Cursor, Order, Pieces, Window
from bertpipe.data.shards import TokenShards
from bertpipe.errors import DataError

SPECIALS = 3  # [CLS] A [SEP] B [SEP]
SHORT = 0.1  # share of the pairs that aim at a random smaller length
MIN_PAIR = 16  # a smaller room at a slot's end, special tokens included, stays padding
KINDS = ("nsp", "sop")
_NO_PAIRS = Pieces(*(np.zeros(0, np.int64) for _ in range(4)))


class PairOrder(Order):
    """The order of a run on pairs: as Order, but its slots hold pairs (`Pieces.labels` is set).

    Labels are those of the stock classes. nsp: 0 where B follows A, 1 where it is from another document; sop: 0 where A
    stands before B in the document, 1 where they have changed places.

    Raises DataError when there are no two documents to take pairs from.
    """

    def __init__(self, kind: str, shards: TokenShards, *arguments: Any, **more: Any):
        assert kind in KINDS
        super().__init__(shards, *arguments, **more)
        if shards.num_documents < 2:
            raise DataError(f"{shards.folder}: {shards.split} holds one document; pairs need two at least")
        self.kind = kind

    def __reduce__(self):
        return PairOrder, (self.kind, *super().__reduce__()[1])

    def slots(self, step: int) -> list[Pieces]:
        """The `slots_per_step` slots of a step of the run; in an epoch's last step they may be short or empty."""
        return [pieces if pieces.labels is not None else _NO_PAIRS for pieces in super().slots(step)]

    def _group_shards(self, epoch: int) -> list[np.ndarray]:
        """As for segments, but every window has two documents at least."""
        windows: list[np.ndarray] = []
        for group in super()._group_shards(epoch):
            if windows and self._documents(windows[-1], epoch) < 2:
                windows[-1] = np.concatenate([windows[-1], group])
            else:
                windows.append(group)
        if len(windows) > 1 and self._documents(windows[-1], epoch) < 2:
            last = windows.pop()
            windows[-1] = np.concatenate([windows[-1], last])
        return windows

    def _documents(self, group: np.ndarray, epoch: int) -> int:
        """Different documents that an epoch visits in some shards: a later visit has none that the first has not."""
        most: dict[int, int] = {}
        for shard in map(int, group):
            visited = self._visited(shard, epoch)
            count = len(self.shards.documents(shard)) - 1 if visited is None else int(visited.sum())
            text = int(self.shards.text_place[shard])
            most[text] = max(count, most.get(text, 0))
        return sum(most.values())

    def _build_window(self, epoch: int, window: int) -> Window:
        shards = self._windows(epoch)[window]
        visited = [self._visited(int(shard), epoch) for shard in shards]
        text = Text.read(self.shards, shards, self.sequence_length - SPECIALS, visited)
        pairs = draw_pairs(
            text, self.kind, self.sequence_length - SPECIALS, keyed.key(self.seed, "pairs", epoch, *self._phase_key)
        )
        order = keyed.permutation(keyed.key(self.seed, "segments", epoch, window, *self._phase_key), len(pairs.label))
        start, length = pairs.start[order], pairs.length[order]
        shard, start = text.locate(start.ravel())
        pieces = Pieces(shard, start, length.ravel(), pairs.label[order])
        return Window(pieces, np.cumsum(length.sum(1) + SPECIALS))

    def _fill(self, epoch: int, cursor: Cursor) -> tuple[list[tuple[int, int, int, int, int]], Cursor]:
        """As for segments, but what is cut from the pair at the slot's end is left out."""
        taken, room, last = [], self.slot_tokens, len(self._windows(epoch))
        while cursor[0] < last:
            window, first, _ = cursor
            ends = self._window(epoch, window).ends
            before = int(ends[first - 1]) if first else 0
            end = int(np.searchsorted(ends, before + room, side="right"))
            room -= int(ends[end - 1]) - before if end > first else 0
            cut = room - SPECIALS if end < len(ends) and room >= MIN_PAIR else 0
            if end > first or cut:
                taken.append((window, first, 0, end, cut))
            end += cut > 0
            cursor = (window, end, 0) if end < len(ends) else (window + 1, 0, 0)
            if room < MIN_PAIR or cut:
                break
        return taken, cursor

    def _take(self, epoch: int, window: int, first: int, offset: int, end: int, cut: int) -> Pieces:
        pieces, stop = self._window(epoch, window).pieces, end + (cut > 0)
        assert pieces.labels is not None
        chosen = slice(2 * first, 2 * stop)
        start, length = pieces.start[chosen].copy(), pieces.length[chosen].copy()
        if cut:
            place = pieces.start[chosen][-2:-1] + self.shards.first_token[pieces.shard[chosen][-2:-1]]
            key = keyed.key(self.seed, "cut", epoch, *self._phase_key)
            moved, short = truncate(start[None, -2:], length[None, -2:], cut, key, place)
            start[-2:], length[-2:] = moved[0], short[0]
        return Pieces(pieces.shard[chosen], start, length, pieces.labels[first:stop])


@dataclass(frozen=True)
class Text:
    """The text of some shards as one line of tokens, numbered from 0; it is made of N stretches of shards."""

    sentences: np.ndarray
    """int64 [S + 1]: where each sentence, or part of a long one, begins, and where the last ends."""
    documents: np.ndarray
    """int64 [D + 1]: the first sentence of each document, and S."""
    shards: np.ndarray
    """int64 [N]: their shards, in the order of the line."""
    bases: np.ndarray
    """int64 [N]: where each begins in the line."""
    starts: np.ndarray
    """int64 [N]: where each begins in its shard."""
    first_token: np.ndarray
    """int64 [N]: the place in the corpus of each shard's first token."""
    names: np.ndarray
    """int64 [D]: a number for each document, alike for two visits of one."""

    @staticmethod
    def read(shards: TokenShards, numbers: np.ndarray, longest: int, visited: Sequence[np.ndarray | None] = ()) -> Text:
        """The text of the shards `numbers`; sentences over `longest` tokens in parts of at most half of that.

        `visited` says of which documents of each shard, bool [D]; None of all.
        """
        of_sentences, of_documents, names, stretches = [], [], [], []  # lengths; and (shard, start, length)
        for number, chosen in zip(numbers, visited or [None] * len(numbers), strict=True):
            ends, edges = np.asarray(shards.sentences(int(number))), np.asarray(shards.documents(int(number)))
            sentences, documents = np.diff(ends), np.diff(edges)
            first = edges[:-1]
            stretch = np.array([number]), edges[:1], edges[-1:]
            if chosen is not None:
                sentences = sentences[chosen[np.searchsorted(edges, ends[:-1], side="right") - 1]]
                documents, first = documents[chosen], first[chosen]
                stretch = np.full(len(documents), number), first, documents
            of_sentences.append(sentences)
            of_documents.append(documents)
            names.append(first + shards.text_place[number])
            stretches.append(stretch)
        of_shard, starts, sizes = (np.concatenate(parts) for parts in zip(*stretches, strict=True))
        sentences, documents = (np.cumsum(np.concatenate([[0], *x])) for x in (of_sentences, of_documents))
        lengths = np.diff(sentences)
        counts = np.where(lengths > longest, -(-lengths // (longest // 2)), 1)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        parts = np.repeat(sentences[:-1], counts) + within * np.repeat(lengths, counts) // np.repeat(counts, counts)
        sentences = np.append(parts, sentences[-1])
        first_token = np.asarray(shards.first_token)[of_shard]
        bases = np.cumsum(sizes) - sizes
        first_sentence = np.searchsorted(sentences, documents)
        return Text(sentences, first_sentence, of_shard, bases, starts, first_token, np.concatenate(names))

    def locate(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard, and place within it, of `tokens` [n]; int64 [n] each."""
        index = np.searchsorted(self.bases, tokens, side="right") - 1
        return self.shards[index], tokens - self.bases[index] + self.starts[index]

    def places(self, tokens: np.ndarray) -> np.ndarray:
        """Place in the corpus, int64 [n], of `tokens` [n]."""
        index = np.searchsorted(self.bases, tokens, side="right") - 1
        return tokens - self.bases[index] + self.starts[index] + self.first_token[index]


@dataclass(frozen=True)
class Pairs:
    """N pairs of segments of a Text, in the order in which they are shown."""

    start: np.ndarray
    """int64 [N, 2]: first token of each segment."""
    length: np.ndarray
    """int64 [N, 2]: its tokens, at least 1."""
    label: np.ndarray
    """int64 [N]"""


def draw_pairs(text: Text, kind: str, longest: int, key: int) -> Pairs:
    """The pairs of an epoch, of at most `longest` tokens each; no two begin at one token.

    Documents go on side by side: a round draws the next pair of each that has sentences left.
    """
    document = np.arange(len(text.documents) - 1)
    sentence = text.documents[:-1]
    rounds = []
    while len(document):
        draw = _Draw(text, longest, key, document, sentence)
        pairs, following = draw.next_sentence() if kind == "nsp" else draw.sentence_order()
        rounds.append(pairs)
        going = following < text.documents[document + 1]
        document, sentence = document[going], following[going]
    start, length, label = (np.concatenate([getattr(r, name) for r in rounds]) for name in ("start", "length", "label"))
    return Pairs(start, length, label)


class _Draw:
    """One round: the next pair of each of some documents, from the sentences at which they stand."""

    def __init__(self, text: Text, longest: int, key: int, document: np.ndarray, sentence: np.ndarray):
        self.text, self.longest, self.key, self.document, self.sentence = text, longest, key, document, sentence
        self.start = text.sentences[sentence]
        self.places = text.places(self.start)
        short = 2 + self._below("length", longest - 1)
        self.target = np.where(self._uniform("short") < SHORT, short, longest)
        self.chunk_end = self._until(sentence, self.target, document)  # a sentence, as all ends here
        count = self.chunk_end - sentence
        self.one = count == 1
        self.cut = sentence + 1 + self._below("cut", np.maximum(count - 1, 1)) * ~self.one

    def _uniform(self, name: str) -> np.ndarray:
        return keyed.uniform(keyed.key(self.key, name), self.places)

    def _below(self, name: str, bound: np.ndarray | int) -> np.ndarray:
        """int64: a number from 0 to `bound` - 1."""
        return (self._uniform(name) * bound).astype(np.int64)

    def _until(self, sentence: np.ndarray, tokens: np.ndarray, document: np.ndarray) -> np.ndarray:
        """The end of the fewest sentences, at least one, that hold `tokens`, or the end of the document."""
        ends = np.searchsorted(self.text.sentences, self.text.sentences[sentence] + tokens)
        return np.minimum(np.maximum(ends, sentence + 1), self.text.documents[document + 1])

    def _other_document(self) -> np.ndarray:
        """int64: another document for each; a second visit of the same one is passed over for the next."""
        names = self.text.names
        other = self._below("document", len(names) - 1)
        other += other >= self.document
        while (same := names[other] == names[self.document]).any():
            other[same] = (other[same] + 1) % len(names)
        return other

    def next_sentence(self) -> tuple[Pairs, np.ndarray]:
        """The pairs, and the sentence at which each document goes on."""
        sentences, documents = self.text.sentences, self.text.documents
        alone = (self.text.names == self.text.names[0]).all()  # of a mixture, an epoch may visit one document only
        random = (self.one | (self._uniform("next") < 0.5)) & ~alone
        other = self.document if alone else self._other_document()
        first = documents[other] + self._below("sentence", documents[other + 1] - documents[other])
        wanted = self.target - (sentences[self.cut] - self.start)
        start = np.where(random, first, self.cut)
        end = np.where(random, self._until(first, wanted, other), self.chunk_end)
        pairs = self._pairs(sentences[self.cut], sentences[start], sentences[end], random)
        following = np.where(random, self.cut, self.chunk_end)
        if alone:  # and a chunk of one sentence has nothing to follow it
            pairs = Pairs(*(x[~self.one] for x in (pairs.start, pairs.length, pairs.label)))
        return pairs, following

    def sentence_order(self) -> tuple[Pairs, np.ndarray]:
        """The same; a single sentence is cut in two at a random token, and one of a single token left out."""
        sentences = self.text.sentences
        end = sentences[self.chunk_end]
        inside = self.start + 1 + self._below("inside", np.maximum(end - self.start - 1, 1))
        cut = np.where(self.one, inside, sentences[self.cut])
        pairs = self._pairs(cut, cut, end, np.zeros(len(cut), bool))
        swapped = self._uniform("swap") < 0.5
        order = np.stack([swapped, ~swapped], 1).astype(np.int64)
        kept = end - self.start > 1
        start, length = (np.take_along_axis(x, order, 1)[kept] for x in (pairs.start, pairs.length))
        return Pairs(start, length, swapped[kept].astype(np.int64)), self.chunk_end

    def _pairs(self, first_end: np.ndarray, start: np.ndarray, end: np.ndarray, label: np.ndarray) -> Pairs:
        """A up to the token `first_end` and B from token `start` to `end`, cut to the longest length."""
        starts = np.stack([self.start, start], 1)
        lengths = np.stack([first_end, end], 1) - starts
        return Pairs(*truncate(starts, lengths, self.longest, self.key, self.places), label.astype(np.int64))


def truncate(
    start: np.ndarray, length: np.ndarray, longest: int, key: int, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut pairs to `longest` tokens, token by token from the longer segment (the second if both are alike).

    Each token is taken from the front or the end, a coin each. `start` and `length` are int64 [N, 2], as is what is
    returned; `places` [N] are the counters of the coins.
    """
    first = np.minimum(length[:, 0], np.maximum(longest - length[:, 1], (longest + 1) // 2))
    short = np.stack([first, np.minimum(length[:, 1], longest - first)], 1)
    front = np.stack(
        [_heads(length[:, n] - short[:, n], keyed.key(key, "front", n), places) for n in range(2)],
        1,
    )
    return start + front, short


def _heads(tosses: np.ndarray, key: int, places: np.ndarray) -> np.ndarray:
    """int64 [N]: heads among so many coins."""
    heads = np.zeros(len(tosses), np.int64)
    for done in range(0, int(tosses.max(initial=0)), 64):
        left = np.flatnonzero(tosses > done)
        coins = np.minimum(tosses[left] - done, 64).astype(np.uint64)
        heads[left] += np.bitwise_count(keyed.bits(keyed.key(key, done), places[left]) >> (np.uint64(64) - coins))
    return heads
