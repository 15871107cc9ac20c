"""What the mechanism itself says of each word, given what was sent: no training.

Token mode (Bayes-optimal reconstruction, arXiv 2410.17052): argmax over x of P(x) P(y | x) for a
sent token y. P(y | x) has no closed form; it is a **Monte-Carlo estimate**: the adversary draws the
mechanism's own noise for the words that its public text holds most often and for the sent tokens,
and counts. The count of each x is smoothed towards the overall frequency of y, weighted by
exp(-d^2 / 8 s^2) with d the distance of x and y and s^2 = (D + 1) / eta^2 the noise's variance a
coordinate: how a pairwise bound of P(y | x) falls with the distance. Words outside that list are
not considered.

Exponential mode: the same rule, and P(y | x) is computed, not estimated.

Vector mode at cut 0 (as BeamClean, arXiv 2505.13758): P(z | w) is exactly proportional to
exp(-eta ||z - e_w||). Only for models whose embedding leaves as it is, or scaled: behind norms and
positions take the candidates of a trained inverter.

Either result can be ranked by a language model: `language_prior`.

Shapes: L length, T tokens of all texts, D hidden, V vocabulary, K words that are considered, U
distinct sent tokens, M draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, StatesView, unigram
from blindtune.attacks.embedding_inversion import depends_on_place, made_at
from blindtune.attacks.imitation import Imitation
from blindtune.errors import ConfigError, DataError
from blindtune.privacy.metric_dp import Privatizer
from blindtune.privacy.word_sampling import WordSampler

PORTION_TOKENS = 256  # whose distances to the vocabulary are held at once


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
        if min(self.words, self.draws, self.candidates) < 1 or not self.smoothing > 0:
            raise ConfigError(
                "expected words, draws and candidates of at least 1 and a positive smoothing, got "
                f"{self.words}, {self.draws}, {self.candidates}, {self.smoothing}"
            )


@torch.no_grad()
def token_candidates(
    view: StatesView,
    sent: Guess,
    config: ChannelConfig | None = None,
    *,
    testing_seed: int | None = None,
) -> Candidates:
    """Words behind sent tokens, by Bayes' rule with the unigram prior of the public text.

    Args:
        view: of token or exponential mode, with public text.
        sent: the tokens that the states belong to: by `nearest_tokens` at cut 0, and by an inverter
            that was trained without noise (`adaptive=False`) at deeper cuts.
        config: see there.
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
    if tuple(map(len, sent)) != view.lengths:
        raise DataError("expected one sent token for every state: take this view's guess")
    table_VD = view.table_VD.cpu()
    prior_V = unigram(view.public, len(table_VD))
    sent_T = torch.cat(list(sent)).cpu()
    sent_U, place_T = sent_T.unique(return_inverse=True)
    frequent = prior_V.topk(min(config.words, len(prior_V))).indices
    word_K = torch.cat([frequent, sent_U]).unique()
    if mechanism.mode == "exponential":
        sampler = WordSampler(table_VD)
        log_UK = sampler.log_probabilities(word_K, mechanism.eta, sent_U).T.float()
    else:
        drawn_MK = Privatizer(mechanism, table_VD, testing_seed=testing_seed).tokens(
            word_K.expand(config.draws, -1)
        )
        log_UK = _smoothed(drawn_MK, word_K, sent_U, table_VD, mechanism.eta, config)
    # Special tokens leave as they are and come from nothing else.
    special = torch.tensor(view.special_ids, dtype=torch.int64)
    log_UK[:, torch.isin(word_K, special)] = -torch.inf
    kept = torch.isin(sent_U, special)
    log_UK[kept] = torch.where(word_K == sent_U[kept][:, None], 0.0, -torch.inf)
    best_UC = (log_UK + prior_V[word_K]).topk(min(config.candidates, len(word_K)), dim=1).indices
    likelihood_UC = log_UK.gather(1, best_UC)
    return Candidates(
        words=word_K[best_UC][place_T].split(view.lengths),
        log_likelihoods=likelihood_UC[place_T].split(view.lengths),
    )


def _smoothed(
    drawn_MK: Tensor,
    word_K: Tensor,
    sent_U: Tensor,
    table_VD: Tensor,
    eta: float,
    config: ChannelConfig,
) -> Tensor:
    """log P(y | x) [U, K] from the mechanism's answers for each word."""
    draws, vocabulary = len(drawn_MK), len(table_VD)
    overall_V = torch.bincount(drawn_MK.reshape(-1), minlength=vocabulary).double() + 0.5
    overall_U = overall_V[sent_U] / overall_V.sum()
    place = torch.searchsorted(sent_U, drawn_MK).clamp_max(len(sent_U) - 1)
    hit_MK = sent_U[place] == drawn_MK
    count_UK = torch.zeros(len(sent_U), len(word_K), dtype=torch.float64)
    columns_MK = torch.arange(len(word_K)).expand_as(drawn_MK)
    count_UK.index_put_(
        (place[hit_MK], columns_MK[hit_MK]), torch.ones(1, dtype=torch.float64), accumulate=True
    )
    distance_UK = torch.cdist(table_VD[sent_U].double(), table_VD[word_K].double())
    near_UK = torch.exp(-distance_UK.square() * eta**2 / (8 * (table_VD.shape[1] + 1)))
    near_UK = near_UK / near_UK.mean(1, keepdim=True).clamp_min(1e-30)
    smooth_UK = config.smoothing * overall_U[:, None] * near_UK
    return ((count_UK + smooth_UK).clamp_min(1e-30) / (draws + config.smoothing)).log().float()


@torch.no_grad()
def vector_candidates(view: StatesView, count: int = 16) -> Candidates:
    """Words behind noisy embeddings at cut 0, by the noise's own density.

    Args:
        view: of vector mode at cut 0; public text, if there is any, gives the prior of the order.
        count: words of every token that are kept.

    Raises:
        ConfigError: another mode or cut, or a model that adds to the embedding.
    """
    mechanism = view.mechanism
    if mechanism is None or mechanism.mode != "vector" or view.cut:
        raise ConfigError("expected vector mode at cut 0: take a trained inverter's candidates")
    made_VD, scale = _sent_embeddings(view)
    prior_V = unigram(view.public, len(made_VD)) if view.public else made_VD.new_zeros(len(made_VD))
    words, likelihoods = [], []
    for part_TD in torch.cat(view.states).to(made_VD).split(PORTION_TOKENS):
        log_TV = -mechanism.eta / scale * torch.cdist(part_TD, made_VD)
        best_TC = (log_TV + prior_V.to(made_VD)).topk(min(count, len(made_VD)), dim=1).indices
        words.append(best_TC.cpu())
        likelihoods.append(log_TV.gather(1, best_TC).cpu())
    return Candidates(
        words=torch.cat(words).split(view.lengths),
        log_likelihoods=torch.cat(likelihoods).split(view.lengths),
    )


def _sent_embeddings(view: StatesView) -> tuple[Tensor, float]:
    """What each word is at cut 0 [V, D], and by how much the model scaled what was noised."""
    word_V = torch.arange(len(view.table_VD), device=view.table_VD.device)
    noised_VW = view.model.embedding(word_V)
    refusal = ConfigError(
        "expected a model that sends its word embeddings as they are, got one that adds positions "
        "or norms: take a trained inverter's candidates"
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
