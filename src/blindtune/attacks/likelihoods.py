"""What the mechanism itself says of each word, given what was sent: no training.

Token and exponential mode (Bayes-optimal reconstruction, arXiv 2410.17052): argmax over x of
P(x) P(y | x) for a sent token y, x among the words that public text holds most often and the sent
tokens. P(y | x) is computed in exponential mode and a Monte-Carlo estimate in token mode
(`privacy.channel`). Words outside that list are not considered. With word groups x and y stand for
their representatives, among which the mechanism draws.

Word groups without noise: every word of the group is as likely as another, and how common they are
decides (`group_candidates`).

Vector mode at cut 0 (as BeamClean, arXiv 2505.13758): P(z | w) is exactly proportional to
exp(-eta ||z - e_w||) in models whose embedding leaves as it is, or scaled. Where positions are
added and a layer norm takes the length away (BERT and kin), it is the integral over what the norm
took (`normed_embeddings`). In other models take the candidates of a trained inverter.

Either result can be ranked by a language model: `language_prior`.

Shapes: L length, T tokens of all texts, D hidden, V vocabulary, K words that are considered, M
draws, U distinct sent tokens, E distinct tuples of one a draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, Spared, StatesView, unigram
from blindtune.attacks.embedding_inversion import depends_on_place, made_at
from blindtune.attacks.imitation import Imitation
from blindtune.attacks.normed_embeddings import log_density, normed_embedding
from blindtune.errors import ConfigError, DataError
from blindtune.privacy.channel import CountingConfig, log_channel
from blindtune.privacy.metric_dp import MAX_ETA, Mechanism
from blindtune.privacy.replacing import places_of, words_to_draw
from blindtune.privacy.word_groups import WordGroups

PORTION_NUMBERS = 2**20  # float32 numbers of a table [T, V]; a dozen of them are held at once


@dataclass(frozen=True, kw_only=True)
class ChannelConfig:
    """How well the adversary estimates P(y | x); draws and smoothing for token mode alone."""

    words: int = 1000
    """Most frequent public words that are considered, besides the sent tokens."""
    draws: int = 32
    """Of the mechanism for each of them."""
    smoothing: float = 1.0
    """Weight of the smoothing, in draws."""
    candidates: int = 16
    """Words of every token that are kept for a language model."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        CountingConfig(draws=self.draws, smoothing=self.smoothing)
        if min(self.words, self.candidates) < 1:
            raise ConfigError(
                f"expected words and candidates of at least 1, got {self.words}, {self.candidates}"
            )


@torch.no_grad()
def token_candidates(
    view: StatesView,
    sent: Guess,
    config: ChannelConfig | None = None,
    *,
    again: Sequence[Guess] = (),
    testing_seed: int | None = None,
) -> Candidates:
    """Words behind sent tokens, by Bayes' rule with the unigram prior of the public text.

    Of several draws the likelihoods are multiplied; a word beside the frequent ones is considered
    if the first draw sent it, or two draws in one place.

    Args:
        view: of token or exponential mode, with public text.
        sent: the tokens that the states belong to: by `nearest_tokens` at cut 0, and by an inverter
            that was trained without noise (`adaptive=False`) at deeper cuts.
        config: see there.
        again: sent tokens of the same texts in other draws.
        testing_seed: of the adversary's noise; for tests.

    Raises:
        ConfigError: another mode. DataError: no public text, or a guess of other lengths.
    """
    config, mechanism = config or ChannelConfig(), view.mechanism
    view.require_public("Bayes' rule")
    if mechanism is None or not mechanism.replaces_words:
        raise ConfigError(
            "expected a mechanism of token or exponential mode: take vector_candidates"
        )
    if any(tuple(map(len, guess)) != view.lengths for guess in (sent, *again)):
        raise DataError("expected one sent token for every state: take this view's guess")
    content = [view.margins.content(text) for text in view.public]
    prior_V = unigram(content, len(view.table_VD))
    sent_MT = torch.stack([torch.cat(list(guess)).cpu() for guess in (sent, *again)])
    sent_U, place_MT = sent_MT.unique(return_inverse=True)
    frequent = prior_V.topk(min(config.words, len(prior_V))).indices
    word_K = torch.cat([frequent, sent_MT[0], _sent_twice(sent_MT)]).unique()
    counting = CountingConfig(draws=config.draws, smoothing=config.smoothing)
    log_UK = _log_channel(view, mechanism, word_K, sent_U, counting, testing_seed)
    place_ME, each_T = place_MT.unique(dim=1, return_inverse=True)
    words, likelihoods = [], []
    portion = max(1, PORTION_NUMBERS // (len(place_ME) * len(word_K)))
    for place_Me in place_ME.split(portion, dim=1):
        log_eK = log_UK[place_Me].sum(0)
        best_eC = (log_eK + prior_V[word_K]).topk(min(config.candidates, len(word_K)), dim=1)[1]
        words.append(word_K[best_eC])
        likelihoods.append(log_eK.gather(1, best_eC))
    word_TC, likelihood_TC = torch.cat(words)[each_T], torch.cat(likelihoods)[each_T]
    # The tokens around a text leave as they are.
    _set_known(
        word_TC,
        likelihood_TC,
        torch.cat([view.margins.mask(text.cpu()) for text in sent]),
        sent_MT[0],
    )
    return Candidates(
        words=word_TC.split(view.lengths), log_likelihoods=likelihood_TC.split(view.lengths)
    )


def _sent_twice(sent_MT: Tensor) -> Tensor:
    """The words that stand in one place in two draws or more."""
    sorted_MT = sent_MT.sort(dim=0).values
    return sorted_MT[1:][sorted_MT[1:] == sorted_MT[:-1]]


def _log_channel(
    view: StatesView,
    mechanism: Mechanism,
    word_K: Tensor,
    sent_U: Tensor,
    counting: CountingConfig,
    testing_seed: int | None,
) -> Tensor:
    """log P(y | x) [U, K]; with groups that of their representatives, equal inside a group.

    Where tokens are spared, whichever they are: that of a token drawn from all.
    """
    rows_GD = words_to_draw(view.table_VD.cpu(), view.groups)
    word_M, column_K = places_of(word_K, view.groups).unique(return_inverse=True)
    sent_N, row_U = places_of(sent_U, view.groups).unique(return_inverse=True)
    log_NM = log_channel(mechanism, rows_GD, word_M, sent_N, counting, testing_seed=testing_seed)
    if (spared := view.spared) is not None:
        if spared.factor:
            less = replace(mechanism, eta=min(mechanism.eta / spared.factor, MAX_ETA))
            less_NM = log_channel(
                less, rows_GD, word_M, sent_N, counting, testing_seed=testing_seed
            )
        else:
            same_NM = sent_N[:, None] == word_M
            less_NM = torch.zeros_like(log_NM).masked_fill(~same_NM, -torch.inf)
        log_NM = torch.logaddexp(
            log_NM + math.log1p(-spared.share), less_NM + math.log(spared.share)
        )
    return log_NM[row_U][:, column_K]


@torch.no_grad()
def vector_candidates(
    view: StatesView, count: int = 16, *, again: Sequence[Sequence[Tensor]] = ()
) -> Candidates:
    """Words behind noisy embeddings at cut 0, by the noise's own density; of several draws by all.

    Cost: matrix products of T x D x V, and a few dozen operations for every token and word, in
    portions of `PORTION_NUMBERS` of them.

    Args:
        view: of vector mode at cut 0; public text, if there is any, gives the prior of the order.
        count: words of every token that are kept.
        again: states of the same texts in other draws.

    Raises:
        ConfigError: another mode or cut, or a model that makes states of words in another way.
    """
    mechanism = view.mechanism
    if mechanism is None or mechanism.mode != "vector" or view.cut:
        raise ConfigError("expected vector mode at cut 0: take a trained inverter's candidates")
    content = [view.margins.content(text) for text in view.public]
    prior_V = torch.zeros(len(view.table_VD))
    if content:
        prior_V = unigram(content, len(prior_V))
    prior_V = prior_V.to(view.table_VD.device)
    density = _normed_density(view, mechanism, prior_V) or _plain_density(view, mechanism)
    state_MTD = torch.stack([torch.cat(list(states)) for states in (view.states, *again)])
    state_MTD = state_MTD.to(view.table_VD.device, torch.float32)
    place_T = torch.cat([torch.arange(length) for length in view.lengths])
    words, likelihoods = [], []
    for some in torch.arange(len(place_T)).split(max(1, PORTION_NUMBERS // len(prior_V))):
        log_TV = sum(
            (density(state_TD[some], place_T[some]) for state_TD in state_MTD),
            start=torch.zeros((), device=prior_V.device),
        )
        best_TC = (log_TV + prior_V).topk(min(count, len(prior_V)), dim=1).indices
        words.append(best_TC.cpu())
        likelihoods.append(log_TV.gather(1, best_TC).cpu())
    word_TC, likelihood_TC = torch.cat(words), torch.cat(likelihoods)
    around_T, around_ids_T = _around(view)
    _set_known(word_TC, likelihood_TC, around_T, around_ids_T)
    return Candidates(
        words=word_TC.split(view.lengths), log_likelihoods=likelihood_TC.split(view.lengths)
    )


EXACT = 1e-2  # of a typical word's norm: so near lies what left without noise, by rounding
CERTAIN = 1e4  # nats: more than any prior takes away
Density = Callable[[Tensor, Tensor], Tensor]
"""log P(state | word) [T, V] of states [T, D] at their places [T], but for a constant a token."""


def _plain_density(view: StatesView, mechanism: Mechanism) -> Density:
    """Of a model that sends its word embeddings as they are, or scaled; ConfigError of others."""
    made_VD, scale = _sent_embeddings(view)
    near = EXACT * float(view.table_VD.norm(dim=1).median())
    width = made_VD.shape[1]

    def density(state_TD: Tensor, _place_T: Tensor) -> Tensor:
        distance_TV = torch.cdist(state_TD.to(made_VD), made_VD)
        return _mixed(
            view.spared,
            mechanism.eta / scale,
            lambda eta: width * math.log(eta) - eta * distance_TV,
            distance_TV < near,
        )

    return density


def _normed_density(view: StatesView, mechanism: Mechanism, prior_V: Tensor) -> Density | None:
    """Of a model that adds to its word embeddings at each place, and norms; None of others."""
    normed = normed_embedding(view.model, max(view.lengths))
    if normed is None:
        return None
    width = view.model.hidden_size

    def density(state_TD: Tensor, place_T: Tensor) -> Tensor:
        along_TV, squared_TV = normed.measured(state_TD, place_T)
        near_TV = (squared_TV.sqrt() < EXACT * along_TV) if view.spared is not None else None
        return _mixed(
            view.spared,
            mechanism.eta,
            lambda eta: log_density(along_TV, squared_TV, width, eta, prior_V),
            near_TV,
        )

    return density


def _mixed(
    spared: Spared | None, eta: float, log_of: Callable[[float], Tensor], near_TV: Tensor | None
) -> Tensor:
    """log P(state | word) but for a constant; of a token drawn from all where some are spared."""
    log_TV = log_of(eta)
    if spared is None:
        return log_TV
    if not spared.factor:
        assert near_TV is not None
        return log_TV + CERTAIN * near_TV
    less_TV = log_of(eta / spared.factor) + math.log(spared.share)
    return torch.logaddexp(log_TV + math.log1p(-spared.share), less_TV)


def _around(view: StatesView) -> tuple[Tensor, Tensor]:
    """Which states [T] are those of the tokens around a text, which leave as they are; and these.

    A window of a longer text has none, so they are looked for.
    """
    before, after = view.margins.before, view.margins.after
    clean, known, ids = Imitation(view.model, 0), [], []
    for state_LD in view.states:
        inside = len(state_LD) - len(before) - len(after)
        text_L = torch.tensor([*before, *[0] * max(inside, 0), *after])[: len(state_LD)]
        mask_L = view.margins.mask(text_L)
        if inside >= 0 and bool(mask_L.any()):
            clean_LD = clean.states([text_L])[0].to(state_LD)
            away_L = (clean_LD - state_LD).norm(dim=1)[mask_L]
            if bool((away_L > EXACT * clean_LD.norm(dim=1)[mask_L]).any()):
                mask_L = torch.zeros_like(mask_L)
        known.append(mask_L)
        ids.append(text_L)
    return torch.cat(known), torch.cat(ids)


def _set_known(word_TC: Tensor, likelihood_TC: Tensor, known_T: Tensor, ids_T: Tensor) -> None:
    """Leave the one word of tokens that left as they are; in place."""
    word_TC[known_T, 0], likelihood_TC[known_T, 0] = ids_T[known_T], 0.0
    likelihood_TC[known_T, 1:] = -torch.inf


def _sent_embeddings(view: StatesView) -> tuple[Tensor, float]:
    """What each word is at cut 0 [V, D], and by how much the model scaled what was noised."""
    word_V = torch.arange(len(view.table_VD), device=view.table_VD.device)
    noised_VW = view.model.embedding(word_V)
    refusal = ConfigError(
        "expected a model that sends its word embeddings as they are, or by adding positions and a "
        "layer norm, got one that does otherwise: take a trained inverter's candidates"
    )
    if depends_on_place(view.model, 2):
        raise refusal
    made_VD = made_at(Imitation(view.model, 0), word_V, 1)[:, 0]
    scale = float(made_VD.norm() / noised_VW.norm())
    if made_VD.shape != noised_VW.shape or not torch.allclose(
        made_VD, noised_VW * scale, rtol=1e-3, atol=1e-5
    ):
        raise refusal
    return made_VD, scale


def commonest_members(groups: WordGroups, prior_V: Tensor, candidates: int) -> dict[int, list[int]]:
    """The words of every group by its representative, the commonest first, at most so many.

    Args:
        groups: announced, as a vendor knows the bottom and the public text that they are made of.
        prior_V: how common every word is in public text.
        candidates: words that are kept of a group.
    """
    members: dict[int, list[int]] = {}
    for word in prior_V.argsort(descending=True, stable=True).tolist():
        mine = members.setdefault(int(groups.representative_V[word]), [])
        if len(mine) < candidates:
            mine.append(word)
    return members


def group_candidates(members: Mapping[int, list[int]], sent: Guess, candidates: int) -> Candidates:
    """The commonest words of each token's group, of equal likelihood: a group tells no more.

    Args:
        members: from `commonest_members`, with as many candidates.
        sent: the representatives that were sent, [L] a text.
        candidates: words of a token; smaller groups are filled up with impossible ones.
    """

    @cache
    def filled(word: int) -> tuple[Tensor, Tensor]:
        row = members.get(word, [word])
        rest = candidates - len(row)
        words = torch.tensor(row + rest * row[:1])
        return words, torch.tensor([0.0] * len(row) + [-math.inf] * rest)

    rows = [[filled(word) for word in text_L.tolist()] for text_L in sent]
    return Candidates(
        words=tuple(torch.stack([words for words, _ in row]) for row in rows),
        log_likelihoods=tuple(torch.stack([told for _, told in row]) for row in rows),
    )
