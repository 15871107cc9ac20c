"""Embedding inversion by a network that is trained on public text behind the same bottom.

Sources: the trained EIA of Split-and-Privatize (arXiv 2312.15603, section 4); the bidirectional GRU
of BiSR (arXiv 2409.00960, section 4). The adversary makes states of public text itself, so it knows
the tokens behind them, and learns to read states of any cut. It is adaptive: it knows the mechanism
and trains under the same noise, unless told not to. Noise on vectors is drawn afresh in every
epoch, and only the current draw is kept. Drawing words (token and exponential mode) searches the
vocabulary for every token, which costs more than an epoch: there `draws` draws are kept, epochs go
through them in turn, and every `draws`-th epoch has a new one in the place of an old one, so that
none is learned by heart.

The network turns a state and its neighbours into a vector h and scores every word w by

    s (h . E[w] - q_w) + log P(w),

the log-likelihood of the state given w, and the prior of the public text. Words that the public
text lacks can so be found too. It starts from a closed form: if states are A E[w] + b plus Gaussian
error of covariance S, then h = A' S^-1 (z - b) and q_w = E[w]' A' S^-1 A E[w] / 2. That alone reads
shallow cuts; h then learns the rest.

What the adversary has: model, cut, mechanism, states, public text with the customer's tokenizer.

Shapes: L length, T tokens of several texts, D hidden, W width of word embeddings, V vocabulary, C
words that are learned with, K best words.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from blindtune.attacks.adversary import Candidates, Guess, StatesView, unigram
from blindtune.attacks.fitting import FitConfig, FitResult, fit, parted
from blindtune.attacks.imitation import Imitation
from blindtune.errors import ConfigError
from blindtune.privacy.entropy import SeededNoiseWarning
from blindtune.privacy.metric_dp import Mechanism

Kind = Literal["linear", "mlp", "gru"]
KINDS = ("linear", "mlp", "gru")
SCORED_NUMBERS = 2**24  # float32 scores held at once
RIDGE = 1e-3  # of the mean square of a coordinate, where a matrix is inverted


@dataclass(frozen=True, kw_only=True)
class InverterConfig:
    """The network and what it learns from."""

    kind: Kind = "gru"
    """"linear": h is linear in the state; "mlp": it sees `context` tokens at each side; "gru": it
    sees the whole text, as BiSR's."""
    hidden: int = 256
    """Units of the hidden layer, a direction."""
    context: int = 2
    """Neighbours at each side that the mlp sees."""
    adaptive: bool = True
    """Train under the announced noise and word groups; False: on clean states."""
    draws: int = 4
    """Token and exponential mode: draws of all public texts that are kept; one epoch in so many has
    a new one. Not used in other modes, where every epoch has a new one."""
    other_words: int = 1024
    """Words outside the public text that are learned with, as what it could have been instead."""
    fit: FitConfig = field(default_factory=FitConfig)
    """How long and how carefully."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.kind not in KINDS:
            raise ConfigError(f"expected kind {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("hidden", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.context < 0 or self.other_words < 0:
            raise ConfigError(
                f"expected no negative numbers, got context={self.context}, "
                f"other_words={self.other_words}"
            )


@final
class Inverter(nn.Module):
    """From states to scores of words; see the module's docstring.

    Args:
        config: the network.
        table_VW: word embeddings; not trained, not copied.
        log_prior_V: log P(w).
        state_TD: states to standardise by and to start from, with the tokens behind them, `ids_T`.
    """

    def __init__(
        self,
        config: InverterConfig,
        table_VW: Tensor,
        log_prior_V: Tensor,
        state_TD: Tensor,
        ids_T: Tensor,
    ) -> None:
        super().__init__()
        self.config = config
        self._fixed = (
            table_VW,
            log_prior_V.to(table_VW.device),
        )  # in a tuple: no part of the state
        hidden, width = state_TD.shape[1], table_VW.shape[1]
        self.register_buffer("mean_D", state_TD.mean(0))
        self.register_buffer("scale_D", state_TD.std(0).clamp_min(1e-6).reciprocal())
        self.start = nn.Linear(hidden, width)
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        self.gru: nn.GRU | None = None
        self.more: nn.Sequential | None = None
        if config.kind == "gru":
            self.gru = nn.GRU(hidden, config.hidden, batch_first=True, bidirectional=True)
            self.more = nn.Sequential(nn.Linear(2 * config.hidden, width))
        elif config.kind == "mlp":
            self.more = nn.Sequential(
                nn.Linear((2 * config.context + 1) * hidden, config.hidden),
                nn.GELU(),
                nn.Linear(config.hidden, width),
            )
        if self.more is not None:
            for parameter in self.more[-1].parameters():
                nn.init.zeros_(parameter)
        self.to(table_VW.device)
        self.register_buffer("half_V", self._start_from_gaussian(state_TD, table_VW, ids_T))
        reach = self.start(self._standard(state_TD)).std().detach()
        self.register_buffer("reach", reach)  # the order of h, which `more` adds to

    @torch.no_grad()
    def _start_from_gaussian(self, state_TD: Tensor, table_VW: Tensor, ids_T: Tensor) -> Tensor:
        """Set `start` to the closed form's h; returns its q [V]."""
        input_TD, word_TW = self._standard(state_TD).double(), table_VW[ids_T].double()
        middle_W = word_TW.mean(0)
        word_TW = word_TW - middle_W
        gram_WW = _invertible(word_TW.T @ word_TW / len(word_TW))
        mixing_WD = torch.linalg.solve(gram_WW, word_TW.T @ input_TD / len(word_TW))
        error_TD = input_TD - word_TW @ mixing_WD
        spread_DD = error_TD.T @ error_TD / len(error_TD)
        spread_DD.diagonal().add_(RIDGE)  # states are standardised: of a coordinate's square
        inverse_DW = torch.linalg.solve(spread_DD, mixing_WD.T)
        self.start.weight.copy_(inverse_DW.T)
        self.start.bias.copy_((mixing_WD @ inverse_DW) @ middle_W)
        factor_WW = mixing_WD @ inverse_DW
        return torch.cat(
            [((part @ factor_WW) * part).sum(1) / 2 for part in table_VW.double().split(4096)]
        ).float()

    def _standard(self, states: Tensor) -> Tensor:
        return (states - cast(Tensor, self.mean_D)) * cast(Tensor, self.scale_D)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """h [T, W] of texts' states [L, D], text after text."""
        lengths = [len(state) for state in states]
        input_TD = self._standard(torch.cat(list(states)).to(self.start.weight.device))
        start_TW: Tensor = self.start(input_TD)
        if self.more is None:
            return start_TW
        texts = input_TD.split(lengths)
        if self.gru is not None:
            packed = pack_sequence(list(texts), enforce_sorted=False)
            seen = unpack_sequence(self.gru(packed)[0])
        else:
            seen = [_with_neighbours(text_LD, self.config.context) for text_LD in texts]
        more_TW: Tensor = self.more(torch.cat(seen))
        return start_TW + more_TW * cast(Tensor, self.reach)

    def scores(self, h_TW: Tensor, word_C: Tensor | None = None) -> Tensor:
        """log P(state | word) but for a constant a row, [T, C] or of all words [T, V]."""
        table_VW, half_V = self._fixed[0], cast(Tensor, self.half_V)
        if word_C is None:
            return self.log_sharpness.exp() * (h_TW @ table_VW.T - half_V)
        return self.log_sharpness.exp() * (h_TW @ table_VW[word_C].T - half_V[word_C])

    def log_prior(self, word_C: Tensor | None = None) -> Tensor:
        """log P(w) of these words, or of all."""
        return self._fixed[1] if word_C is None else self._fixed[1][word_C]


@final
class _Draws:
    """The states that each epoch learns from.

    Args:
        make: draws them anew.
        kept: how many draws are kept, 1 where every epoch has a new one; 0: one serves all epochs.
    """

    def __init__(self, make: Callable[[], dict[int, Tensor]], kept: int) -> None:
        self._make, self._kept, self._epoch = make, kept, 0
        self._pool = [make()]

    def of(self, epoch: int) -> dict[int, Tensor]:
        """Those of an epoch, by text; epochs are asked for in order, each as often as needed."""
        if not self._kept:
            return self._pool[0]
        at = (epoch + epoch // self._kept) % self._kept
        if epoch != self._epoch:
            self._epoch = epoch
            if len(self._pool) < self._kept:
                self._pool.append(self._make())
            elif epoch % self._kept == 0:
                self._pool[at].clear()  # before the new one is made
                self._pool[at] = self._make()
        return self._pool[at]


def train_inverter(
    view: StatesView, config: InverterConfig | None = None
) -> tuple[Inverter, FitResult]:
    """Train on the view's public text; its states are not looked at.

    The noise follows from the seed too, so the same seed gives the same inverter, unless time ends
    the training.

    Raises:
        DataError: fewer than 2 public texts.
    """
    config = config or InverterConfig()
    view.require_public("a trained inverter", texts=2)
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeededNoiseWarning)  # an attacker's noise protects nobody
        imitation = Imitation.of(view, noised=config.adaptive, testing_seed=config.fit.seed)
    learn, held = parted(len(view.public), config.fit)
    table_VW, ids = view.table_VD, view.public
    held_states = imitation.states([ids[i] for i in held])
    draws = _Draws(
        lambda: dict(zip(learn, imitation.states([ids[i] for i in learn]), strict=True)),
        _kept(view.mechanism if config.adaptive else None, config),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.fit.seed)
        inverter = Inverter(
            config,
            table_VW,
            unigram([ids[i] for i in learn], len(table_VW)),
            torch.cat([draws.of(0)[i] for i in learn]),
            torch.cat([ids[i] for i in learn]).to(table_VW.device),
        )
        word_C = torch.cat([*ids, torch.randperm(len(table_VW))[: config.other_words]]).unique()
    word_C = word_C.to(table_VW.device)

    def loss_of(epoch: int, indices: Sequence[int]) -> Tensor:
        states = draws.of(epoch)
        return _loss(inverter, [states[i] for i in indices], [ids[i] for i in indices], word_C)

    @torch.no_grad()
    def held_out_loss() -> float:
        return float(_loss(inverter, held_states, [ids[i] for i in held], word_C))

    left = max(1.0, config.fit.limit_seconds - (time.monotonic() - begin))
    result = fit(inverter, loss_of, learn, held_out_loss, replace(config.fit, limit_seconds=left))
    return inverter, result


def _kept(mechanism: Mechanism | None, config: InverterConfig) -> int:
    """Draws to keep, see `_Draws`."""
    if mechanism is None:
        return 0
    return config.draws if mechanism.replaces_words else 1


@torch.no_grad()
def candidates(inverter: Inverter, states: Sequence[Tensor], count: int = 1) -> Candidates:
    """The `count` likeliest words of every token of these states [L, D]."""
    words: list[Tensor] = []
    likelihoods: list[Tensor] = []
    prior_V = inverter.log_prior()
    size = max(1, SCORED_NUMBERS // len(prior_V))
    for state_LD in states:
        for part_TW in inverter([state_LD]).split(size):
            score_TV = inverter.scores(part_TW)
            best_TK = (score_TV + prior_V).topk(min(count, len(prior_V)), dim=1).indices
            words.append(best_TK.cpu())
            likelihoods.append(score_TV.gather(1, best_TK).cpu())
    lengths = [len(state) for state in states]
    return Candidates(
        words=torch.cat(words).split(lengths), log_likelihoods=torch.cat(likelihoods).split(lengths)
    )


def trained_inversion(view: StatesView, config: InverterConfig | None = None) -> Guess:
    """Train on public text and read the view's states; DataError without public text."""
    inverter, _ = train_inverter(view, config)
    return candidates(inverter, view.states).first()


def _loss(
    inverter: Inverter, states: Sequence[Tensor], ids: Sequence[Tensor], word_C: Tensor
) -> Tensor:
    """Cross-entropy of the right word among `word_C` (ascending)."""
    score_TC = inverter.scores(inverter(states), word_C) + inverter.log_prior(word_C)
    target_T = torch.searchsorted(word_C, torch.cat(list(ids)).to(word_C.device))
    return cross_entropy(score_TC, target_T)


def _invertible(gram_NN: Tensor) -> Tensor:
    """The matrix with a little added to its diagonal, so that it has an inverse."""
    mean = gram_NN.diagonal().mean()
    return gram_NN + torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device) * (
        RIDGE * mean
    )


def _with_neighbours(text_LD: Tensor, context: int) -> Tensor:
    """Each row with `context` rows before and behind it, zeros beyond the ends, [L, (2c+1) D]."""
    length = len(text_LD)
    wide = torch.nn.functional.pad(text_LD, (0, 0, context, context))
    return torch.cat([wide[i : i + length] for i in range(2 * context + 1)], 1)
