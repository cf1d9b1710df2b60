"""Several sources mixed by weight: `train.source_weights`.

An epoch has about as many tokens as the sources together. Of those, a source has the share that its weight has of the
weights' sum, so its text is visited v = share x (tokens of all) / (its own tokens) times an epoch: often, or in part.
Document d is visited floor(u + (e + 1) v) - floor(u + e v) times in epoch e, where u in [0, 1) is a hash of (seed, d):
over any n epochs floor(n v) or one more times, none left out for long, and nothing that depends on processes. The
phases of a run draw anew. In pairs the shares are rough: a next sentence from elsewhere is drawn by document, whatever
its source, and what is too long is cut.
(Systematic sampling: Madow & Madow 1944, "On the theory of systematic sampling".)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bertpipe.data import keyed
from bertpipe.data.shards import INDEX, TokenShards
from bertpipe.errors import ArtifactError, ConfigError

FEWEST, MOST = 1e-6, 1000  # visits of a document in an epoch


class Share(NamedTuple):
    """What a source is of the mixture."""

    source: str
    text: float
    """Its share of the tokens there are."""
    epoch: float
    """Its share of the tokens of an epoch."""
    visits: float
    """How often an epoch visits each document, on average."""


class MixedShards(TokenShards):
    """A split whose every visit of a shard is a shard of its own, numbered from 0.

    So a text that is visited twice in an epoch has two places there, and is masked in two ways.

    Args:
        folder: a shards artifact.
        split: which split of it.
        weights: of the sources, in the order of `corpus.sources`; 0 leaves one out.

    Raises ConfigError for weights that don't fit the sources.
    """

    def __init__(self, folder: Path, split: str, weights: Sequence[float]):
        super().__init__(folder, split)
        self.weights = tuple(weights)
        self.mixture = self._mix()
        visits = np.array([share.visits for share in self.mixture])[self.source]
        times = np.ceil(visits).astype(np.int64)
        base = np.repeat(np.arange(self.num_shards), times)
        self._nth = np.arange(len(base)) - np.repeat(np.cumsum(times) - times, times)
        self._visits = visits[base]
        self.text_place = self.first_token[:-1][base]
        counts = np.array([len(documents) - 1 for documents in self._documents])
        self.num_documents = int(counts[times > 0].sum())
        sizes = np.diff(self.first_token)[base]
        for arrays in (self._tokens, self._documents, self._sentences):
            arrays[:] = [arrays[shard] for shard in base]
        self.source = self.source[base]
        self.num_shards = len(base)
        self.first_token = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self.sizes = (sizes * np.clip(self._visits - self._nth, 0, 1)).astype(np.int64)

    def __reduce__(self):
        return MixedShards, (self.folder, self.split, self.weights)

    def visited(self, shard: int, key: int, epoch: int) -> np.ndarray | None:
        """As of TokenShards."""
        visits, nth = self._visits[shard], self._nth[shard]
        if visits == np.floor(visits):
            return None
        uniform = keyed.uniform(key, np.asarray(self.documents(shard))[:-1] + self.text_place[shard])
        return np.floor(uniform + (epoch + 1) * visits) - np.floor(uniform + epoch * visits) > nth

    def _mix(self) -> list[Share]:
        """The sources' shares; checks the weights."""
        if not self.sources:
            raise ArtifactError(
                f"{self.folder / INDEX}: says nothing of sources; it was made by an earlier bertpipe. Delete it and "
                "its corpus, and run `bertpipe corpus` and what follows again"
            )
        weights = np.array(self.weights)
        if len(weights) != len(self.sources):
            raise ConfigError(
                f"train.source_weights: {len(weights)} weights for the {len(self.sources)} entries of corpus.sources: "
                f"{', '.join(self.sources)}"
            )
        tokens = np.bincount(self.source, np.diff(self.first_token), len(self.sources))
        for name, weight, count in zip(self.sources, weights, tokens, strict=True):
            if weight and not count:
                raise ConfigError(f"train.source_weights: {name} has weight {weight:g} and no text; give it weight 0")
        total = tokens[weights > 0].sum()
        relative = weights / weights.max()  # whose sum is finite
        shares = relative / relative.sum()
        visits = np.round(shares * total / np.maximum(tokens, 1), 9)
        for name, weight, times in zip(self.sources, weights, visits, strict=True):
            if weight and not FEWEST <= times <= MOST:
                wanted = "larger weight, or 0" if times < FEWEST else "smaller weight"
                raise ConfigError(
                    f"train.source_weights: an epoch would visit each document of {name} {times:g} times, "
                    f"{FEWEST:g} to {MOST} are possible; give it a {wanted}"
                )
        return [Share(*row) for row in zip(self.sources, tokens / tokens.sum(), shares, visits, strict=True)]


def open_train(folder: Path, weights: Sequence[float]) -> TokenShards:
    """The training split of a shards artifact, mixed where there are weights."""
    return MixedShards(folder, "train", weights) if weights else TokenShards(folder, "train")


def describe(shards: TokenShards) -> list[str]:
    """A line for each source of a mixture."""
    mixture = shards.mixture if isinstance(shards, MixedShards) else []
    return [
        f"{share.source}: {share.text:.1%} of the text, by weight {share.epoch:.1%} of an epoch, which visits each of "
        f"its documents {share.visits:.3g} times on average"
        for share in mixture
    ]
