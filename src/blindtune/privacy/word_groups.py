"""Word groups: a coarser vocabulary that hides which word of a group a text had.

Every word of the vocabulary belongs to one group, by public data alone; before anything else a
text's tokens are replaced by the representatives of their groups. It is what k-anonymity calls
generalisation, and near to CusText (arXiv 2207.09193), which sends a random word of a small set;
here it is a fixed one, because a random member tells an adversary as much as the group itself, and
the model less.

Guarantee: words of one group are perfectly indistinguishable, whatever the adversary knows and
computes: everything that leaves is the same function of both. Between groups there is none by
itself; with a mechanism of `metric_dp` on top, d_chi holds with the distance of two words taken
between their representatives, which is 0 inside a group.

Not covered: which group a token is of, hence topics, and sentences told by many words; a guess of
the word from its group, its frequency and its context (`best_guess_share` counts the frequency
alone); words that are a group of their own. Groups must be made of public
data: made from private texts, they would tell about them.

How groups are made: words that mean the same and words that matter little are joined first. The
most frequent words start alone. A joining of groups a and b costs d(a, b)^2 w_a w_b / (w_a + w_b)
(Ward 1963) and gains min(s_a, s_b): w is frequency times importance, s the frequency of the group's
most frequent word, which is what guessing it wins. The joinings of the least cost for their gain
are made, until guessing by frequency is wrong often enough. Importance is (pivot / (pivot + p))^2,
the square of the smooth inverse frequency (Arora et al. 2017): frequent words carry little. Rare
words are grouped among themselves, by k-means.

Shapes: V vocabulary, D width of a word's vector, W frequent words, G groups, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blindtune.atomic import atomic_file
from blindtune.errors import ConfigError, DataError

MERGED_SHARE = 0.08  # of the groups, at most, in one round of joinings
ROUNDS = 8  # of k-means
PORTION = 4096  # words whose distances to all groups are held at once


@dataclass(frozen=True, kw_only=True)
class GroupingConfig:
    """How coarse the vocabulary becomes. Everything here changes privacy."""

    wrong_guesses: float = 0.75
    """Share of frequent tokens for which a guess by frequency alone shall be wrong. At the default
    an attacker with a language model gets as many words wrong as of d_chi in token mode at eta 80,
    or more (docs/split-results.md)."""
    frequent: int = 6000
    """Words that are joined by cost and gain, the most frequent ones; the others are rare."""
    rare_size: float | None = None
    """Mean size of a group of rare words; 1: they stay alone, and nothing hides them. None: as
    coarse as frequent words, 4 where `wrong_guesses` is 0.75; never under 2, which it is at 0.6."""
    pivot: float = 1e-3
    """Frequency (share of all tokens) from which on a word matters little."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.wrong_guesses < 1:
            raise ConfigError(f"expected wrong_guesses between 0 and 1, got {self.wrong_guesses}")
        given = self.rare_size is None or self.rare_size >= 1
        if self.frequent < 2 or not given or not 0 < self.pivot <= 1:
            raise ConfigError(
                "expected frequent >= 2, rare_size >= 1 and pivot in (0, 1], got "
                f"{self.frequent}, {self.rare_size}, {self.pivot}"
            )

    @property
    def words_of_a_rare_group(self) -> float:
        """`rare_size`, or what follows from `wrong_guesses`: 2, doubled for each 0.15 above 0.6."""
        if self.rare_size is not None:
            return self.rare_size
        return math.exp2(max(1.0, round((self.wrong_guesses - 0.45) / 0.15, 6)))


@final
@dataclass(frozen=True, eq=False)
class WordGroups:
    """Which word stands for each word."""

    representative_V: Tensor
    """int64 [V]: the most frequent word of each word's group; itself for representatives."""

    def __post_init__(self) -> None:
        """Refuse a map that is none of groups; DataError."""
        found = self.representative_V
        size = len(found)
        if (
            found.ndim != 1
            or found.dtype != torch.int64
            or not size
            or not 0 <= int(found.min()) <= int(found.max()) < size
            or not torch.equal(found[found], found)
        ):
            raise DataError(
                "expected for every word one that stands for itself, got another map: make the "
                "groups again"
            )

    @property
    def representatives(self) -> Tensor:
        """int64 [G]: the words that stand for groups, ascending."""
        words_G: Tensor = self.representative_V.unique()
        return words_G

    def alone(self, ids: Tensor) -> Tensor:
        """bool, same shape: whether a token's word is its group's only one, which hides nothing."""
        size_V = torch.bincount(self.representative_V, minlength=len(self.representative_V))
        found: Tensor = size_V[self.apply(ids)] == 1
        return found

    def apply(self, ids: Tensor, kept: Tensor | None = None) -> Tensor:
        """The representatives of tokens, same shape; DataError for ids of another vocabulary.

        Args:
            ids: token ids.
            kept: bool, tokens that stay as they are; None: none does.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.representative_V):
            raise DataError(
                f"expected ids below {len(self.representative_V)}: groups and tokenizer do not "
                "belong together"
            )
        representative: Tensor = self.representative_V.to(ids.device)[ids]
        return representative if kept is None else torch.where(kept, ids, representative)

    def best_guesses(self, count_V: Tensor) -> Tensor:
        """int64 [V]: for every word the most frequent of its group by an adversary's counts [V].

        Applied to a text, it is the context-free guess that is right most often.
        """
        return _most_frequent(self.representative_V, count_V)

    def best_guess_share(self, count_V: Tensor) -> float:
        """Share of tokens, so distributed, that the best guess by frequency gets right."""
        return float((count_V[self.best_guesses(count_V).unique()].sum() / count_V.sum()).item())

    def save(self, path: str | Path) -> None:
        """Write the groups; they are public."""
        with atomic_file(path) as partial:
            save_file({"representative_V": self.representative_V}, partial)

    @staticmethod
    def load(path: str | Path) -> WordGroups:
        """Read what `save` wrote; DataError if that is not possible."""
        try:
            return WordGroups(load_file(path)["representative_V"])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path}: expected word groups, cannot read them") from error


@torch.no_grad()
def group_words(
    vector_VD: Tensor,
    count_V: Tensor,
    special_ids: Sequence[int] = (),
    config: GroupingConfig | None = None,
) -> WordGroups:
    """Make groups from public data.

    Cost: some tens of matmuls of W x W x D, and of rare words x their groups x D.

    Args:
        vector_VD: what a word means, near where words mean the same
            (`split.customer.word_vectors`, or the embedding table).
        count_V: how often each word occurs in public text of the kind that the private texts are.
        special_ids: tokens that stay alone, and are sent as they are wherever they occur: never
            those that another party's tokenizer calls special (`models.margins`).
        config: how coarse.

    Raises:
        DataError: vectors that are not finite, other counts than vectors, no text.
    """
    config = config or GroupingConfig()
    if vector_VD.ndim != 2 or not bool(vector_VD.isfinite().all()):
        raise DataError("expected finite vectors [vocabulary, width] of the words")
    if count_V.shape != vector_VD.shape[:1] or not int(count_V.sum()) or int(count_V.min()) < 0:
        raise DataError(
            f"expected counts of {len(vector_VD)} words in a public text, got "
            f"{list(count_V.shape)} that sum to {int(count_V.sum())}"
        )
    alone_V = torch.zeros(len(count_V), dtype=torch.bool)
    alone_V[torch.tensor(sorted(set(special_ids)), dtype=torch.int64)] = True
    order = count_V.argsort(descending=True, stable=True)
    order = order[~alone_V[order]]
    frequent, rare = order[: config.frequent], order[config.frequent :]
    group_V = torch.arange(len(count_V))
    vector_VD, share_V = vector_VD.float(), count_V.float() / count_V.sum()
    for words, find in ((frequent, _join_frequent), (rare, _join_rare)):
        if len(words) > 1:
            group_V[words] = words[find(vector_VD[words], share_V[words], config)]
    return WordGroups(_most_frequent(group_V, count_V))


def _most_frequent(group_V: Tensor, count_V: Tensor) -> Tensor:
    """For every word the most frequent of its group, the lowest id where equal."""
    order = count_V.argsort(descending=True, stable=True)
    order = order[group_V[order].argsort(stable=True)]
    group = group_V[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    leader_V = torch.empty_like(group_V)
    leader_V[group[first]] = order[first]
    return leader_V[group_V]


def _join_frequent(vector_WD: Tensor, share_W: Tensor, config: GroupingConfig) -> Tensor:
    """For each frequent word an index that its group shares [W]; see the module's docstring.

    A group goes by the index of one of its words; one that was joined to another keeps its row, at
    an infinite price. Only prices of groups that grew are computed anew.
    """
    group_W = torch.arange(len(vector_WD))
    groups = _Joinable(
        centre_WD=vector_WD.clone(),
        weight_W=share_W * (config.pivot / (config.pivot + share_W)).square() + 1e-12,
        won_W=share_W / share_W.sum(),
        left_W=torch.ones(len(vector_WD), dtype=torch.bool),
    )
    price_WW = groups.prices(group_W)
    while (left := int(groups.left_W.sum())) > 1 and groups.wrong < config.wrong_guesses:
        keeps, goes = _cheapest(price_WW, max(1, int(MERGED_SHARE * left)))
        won_W = groups.won_W
        wrong_P = groups.wrong + torch.minimum(won_W[keeps], won_W[goes]).cumsum(0)
        enough = int((wrong_P < config.wrong_guesses).sum()) + 1
        keeps, goes = keeps[:enough], goes[:enough]
        groups.join(keeps, goes)
        joined_W = torch.arange(len(group_W))
        joined_W[goes] = keeps
        group_W = joined_W[group_W]
        price_WW[goes], price_WW[:, goes] = torch.inf, torch.inf
        price_WW[keeps] = grown_PW = groups.prices(keeps)
        price_WW[:, keeps] = grown_PW.T
    return group_W


@dataclass(frozen=True, eq=False)
class _Joinable:
    """Groups of frequent words, each under the index of one of its words."""

    centre_WD: Tensor
    weight_W: Tensor
    won_W: Tensor
    """Share of all tokens that a guess by frequency gets right in the group."""
    left_W: Tensor
    """Whether the group is there still, and not part of another."""

    @property
    def wrong(self) -> float:
        """Share of tokens that a guess by frequency gets wrong."""
        return 1 - float(self.won_W.sum())

    def join(self, keeps: Tensor, goes: Tensor) -> None:
        """Join pairs of groups [P]; each takes part once."""
        sum_P = self.weight_W[keeps] + self.weight_W[goes]
        part_P1 = (self.weight_W[goes] / sum_P)[:, None]
        self.centre_WD[keeps] = self.centre_WD[keeps].lerp(self.centre_WD[goes], part_P1)
        self.weight_W[keeps] = sum_P
        self.won_W[keeps] = torch.maximum(self.won_W[keeps], self.won_W[goes])
        self.won_W[goes], self.left_W[goes] = 0.0, False

    def prices(self, some_P: Tensor) -> Tensor:
        """[P, W]: what joining each of these with each group costs for what it gains."""
        centre_PD, weight_P1 = self.centre_WD[some_P], self.weight_W[some_P][:, None]
        squared_P1 = centre_PD.square().sum(1, keepdim=True)
        price_PW = torch.addmm(
            squared_P1 + self.centre_WD.square().sum(1), centre_PD, self.centre_WD.T, alpha=-2
        )
        price_PW.clamp_min_(1e-6).mul_(weight_P1).mul_(self.weight_W)
        price_PW.div_(weight_P1 + self.weight_W)
        price_PW.div_(torch.minimum(self.won_W[some_P][:, None], self.won_W).clamp_min_(1e-12))
        price_PW[:, ~self.left_W] = torch.inf
        price_PW[torch.arange(len(some_P)), some_P] = torch.inf
        return price_PW


def _cheapest(price_WW: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Pairs of groups [P] that are each other's best joining, the cheapest for its gain first."""
    best_W, other_W = price_WW.min(1)
    index_W = torch.arange(len(price_WW))
    mutual_W = (other_W[other_W] == index_W) & (index_W < other_W) & best_W.isfinite()
    pairs = mutual_W.nonzero().squeeze(1)
    if not len(pairs):  # a ring of equal prices
        pairs = best_W.argmin()[None]
    pairs = pairs[best_W[pairs].argsort()][:most]
    return pairs, other_W[pairs]


def _join_rare(vector_WD: Tensor, share_W: Tensor, config: GroupingConfig) -> Tensor:
    """For each rare word the index of its cluster [W]; the most frequent ones are the seeds.

    Few centres move after the first round of k-means, and only those are looked at again.
    """
    clusters = max(1, round(len(vector_WD) / config.words_of_a_rare_group))
    if clusters == len(vector_WD):
        return torch.arange(clusters)
    centre_GD = vector_WD[share_W.argsort(descending=True, stable=True)[:clusters]].clone()
    _, group_W = _nearest(vector_WD, centre_GD)
    for _ in range(ROUNDS):
        size_G = torch.bincount(group_W, minlength=clusters)
        sum_GD = torch.zeros_like(centre_GD).index_add_(0, group_W, vector_WD)
        mean_GD = torch.where(size_G[:, None] > 0, sum_GD / size_G[:, None], centre_GD)
        moved_G = (mean_GD != centre_GD).any(1)
        if not moved_G.any():
            break
        centre_GD = mean_GD
        group_W = _look_again(vector_WD, centre_GD, group_W, moved_G)
    return group_W


def _look_again(vector_WD: Tensor, centre_GD: Tensor, group_W: Tensor, moved_G: Tensor) -> Tensor:
    """The nearest centre of each word [W], where some centres moved since `group_W` was found.

    A word whose own centre stayed can only have come nearer to one that moved.
    """
    found_W, stale_W = group_W.clone(), moved_G[group_W]
    found_W[stale_W] = _nearest(vector_WD[stale_W], centre_GD)[1]
    rest_R, moved_M = (~stale_W).nonzero().squeeze(1), moved_G.nonzero().squeeze(1)
    own_RD = centre_GD[group_W[rest_R]]
    own_R = own_RD.square().sum(1) - 2 * (vector_WD[rest_R] * own_RD).sum(1)
    other_R, place_R = _nearest(vector_WD[rest_R], centre_GD[moved_M])
    nearer_R = other_R < own_R
    found_W[rest_R[nearer_R]] = moved_M[place_R[nearer_R]]
    return found_W


def _nearest(vector_WD: Tensor, centre_GD: Tensor) -> tuple[Tensor, Tensor]:
    """(squared distance less the word's own square, index) of each word's nearest centre [W]."""
    squared_G = centre_GD.square().sum(1)
    parts = [
        torch.addmm(squared_G, part_CD, centre_GD.T, alpha=-2).min(1)
        for part_CD in vector_WD.split(PORTION)
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
