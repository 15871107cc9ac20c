"""The d_chi mechanism: metric differential privacy for what leaves the customer.

Source: Feyisetan et al. 2020 (arXiv 1910.08902), as used by Split-and-Privatize (arXiv 2312.15603,
section 3). A vector e becomes e + l v: l ~ Gamma(shape D, scale 1/eta), v uniform on the unit
sphere, both drawn afresh and independently for every token. The noise has density proportional to
exp(-eta ||z||), so for all inputs x, x' and every set S of outputs

    P[M(x) in S] <= exp(eta ||x - x'||) P[M(x') in S].

eta is per token (per position), per unit of L2 distance in the space that is noised; smaller is
more private; the noise has mean norm D / eta. Texts of many tokens spend it on each: `accounting`.

Modes
-----
token: the word embedding is noised and replaced by the nearest row of the vocabulary; what leaves
    (or enters the bottom) is a text of other tokens. Guarantee: the formula above for every
    position, with x, x' rows of the embedding table, for everything computed from the result. The
    search is exact; an approximate one would be another mechanism.
exponential: no noise on the embedding; another word is drawn with P(w' | w) proportional to
    exp(-eta/2 ||e_w - e_w'||) (`word_sampling`). Guarantee: the formula of token mode, in the same
    words and at the same eta; other words come out than the rounding of noise gives.
vector: the noisy word embedding itself, or its image under the bottom's blocks, leaves. Same
    guarantee (what is computed from a noisy vector spends nothing more), and the adversary sees
    more: token mode is this plus a rounding.
block-output: noise on each position's hidden state after k blocks. The formula holds for each
    position's *state*, and for a text with the sum of the positions' distances. That is not the
    guarantee of the other modes: a state mixes in the context, so changing one token moves many
    states, by distances that no embedding distance bounds; without `clip_norm` no number of
    epsilon can be given for a token or for a text. With `clip_norm` C, a position spends at most
    2 C eta and a text of L positions at most 2 C L eta, whatever was changed in it.

Not covered, in any mode
------------------------
- Distant words: indistinguishability is promised between words that are near each other. A rare
  word far from all others, or a topic told by many words, shows through.
- How many tokens a text has, where special tokens and padding are, labels, and how often and when
  something is sent.
- Noise factors that depend on the word: the formula holds between words of one factor f, with
  eta / f, and not between words of different ones; factor 0 sends the token as it is (see
  `token_importance`).
- Repetition: every fresh draw for the same text spends eta again; averaging removes the noise.
- What the later model, its gradients or its predictions tell; only what is computed from the
  noised values alone is safe.
- The last bits: noise is drawn with 53 bits, cut off at 8.6 standard deviations a coordinate
  (probability 1e-16), and outputs are rounded to a grid that does not depend on the input
  (Mironov 2012 shows why raw floating point leaks). This closes the known attack; it is no proof
  for finite precision. Running time is not constant either.

Shapes: B batch, L length, D hidden, V vocabulary, N positions in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.entropy import Uniforms, uniforms_from
from blindtune.privacy.nearest import NearestRows, Tiling
from blindtune.privacy.word_sampling import WordSampler

Mode = Literal["token", "exponential", "vector", "block-output"]
MODES = ("token", "exponential", "vector", "block-output")
NOISE_NUMBERS = 2**21  # float64 numbers drawn at once
GRID_FINENESS = 1024  # grid steps in 1 / eta; the noise of a coordinate is about sqrt(D) / eta


MAX_ETA = 1e6
"""Of a mechanism; the least is its inverse."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What is promised. Everything here changes privacy; see `Tiling` for speed."""

    eta: float
    """Per token, per unit of L2 distance in the space that is noised; smaller is more private."""
    mode: Mode = "token"
    """What is noised and what leaves: "token", "exponential", "vector" or "block-output" (module
    docstring)."""
    clip_norm: float | None = None
    """Block-output mode only: states longer than this are shortened to it before the noise, which
    bounds what a position can spend by 2 clip_norm eta. None: no such bound."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"expected mode {', '.join(MODES)}, got {self.mode!r}")
        if not 1 / MAX_ETA <= self.eta <= MAX_ETA:
            raise ConfigError(
                f"expected eta between {1 / MAX_ETA:g} and {MAX_ETA:g}, got {self.eta}"
            )
        if self.clip_norm is None:
            return
        if self.mode != "block-output":
            raise ConfigError(f"expected no clip_norm in {self.mode} mode, got {self.clip_norm}")
        if not 0 < self.clip_norm < math.inf:
            raise ConfigError(f"expected a positive, finite clip_norm, got {self.clip_norm}")

    @property
    def replaces_words(self) -> bool:
        """Whether words come out, one for each token (token and exponential mode)."""
        return self.mode in ("token", "exponential")


def d_chi_noise(count: int, dimension: int, eta: float, uniforms: Uniforms) -> Tensor:
    """Noise of density proportional to exp(-eta ||z||): `count` independent vectors.

    The radius is the sum of D exponentials, which is Gamma(D); the direction a normalised Gaussian
    (Box and Muller; its scale falls out). Returns float64 [count, dimension].
    """
    radius_N = uniforms(count, dimension).log_().sum(1).div_(-eta)
    half = (dimension + 1) // 2
    length = uniforms(count, half).log_().neg_().sqrt_()
    angle = uniforms(count, half).mul_(2 * math.pi)
    gaussian_ND = torch.cat((length * angle.cos(), length * angle.sin()), 1)[:, :dimension]
    norm_N: Tensor = gaussian_ND.norm(dim=1).clamp_min(1e-300)
    return gaussian_ND * (radius_N / norm_N)[:, None]


@final
class Privatizer:
    """Applies a mechanism. One object can serve a whole run; every call draws fresh noise.

    Call the method of the mechanism's mode; the others refuse. Gradients do not pass.

    Args:
        mechanism: what is promised.
        table_VD: the word embedding's weight, needed in token and exponential mode only.
        tiling: speed and memory of the pass over the table.
        testing_seed: for tests only: noise that anyone can repeat. Warns.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        table_VD: Tensor | None = None,
        *,
        tiling: Tiling | None = None,
        testing_seed: int | None = None,
    ) -> None:
        if mechanism.replaces_words != (table_VD is not None):
            raise ConfigError(
                "expected an embedding table in token and exponential mode and none in the others, "
                f"got mode {mechanism.mode!r} and {'no table' if table_VD is None else 'a table'}"
            )
        self.mechanism = mechanism
        self._rows = self._sampler = None
        if table_VD is not None and mechanism.mode == "exponential":
            self._sampler = WordSampler(table_VD, tiling)
            self._rows = self._sampler.rows
        elif table_VD is not None:
            self._rows = NearestRows(table_VD, tiling)
        self._uniforms = uniforms_from(testing_seed)

    @torch.no_grad()
    def tokens(self, ids_BL: Tensor, factors_BL: Tensor | None = None) -> Tensor:
        """Token and exponential mode: ids of the words that come out, same shape as `ids_BL`.

        In token mode the nearest rows of the noisy embeddings, in exponential mode drawn words.

        `factors_BL` in [0, 1] scales each token's noise (its eta becomes eta / factor); a token of
        factor 0 stays what it is.

        Raises:
            ConfigError: another mode. DataError: ids outside the vocabulary, factors outside [0, 1]
                or of another shape.
        """
        rows = self._rows
        if rows is None:
            raise ConfigError(
                f"expected a mechanism of token or exponential mode, got {self.mechanism.mode!r}"
            )
        ids_N = ids_BL.reshape(-1).to(rows.table_VD.device)
        if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(rows.table_VD):
            raise DataError(
                f"expected ids below {len(rows.table_VD)}, got {int(ids_N.min())} to "
                f"{int(ids_N.max())}: tokenizer and embedding do not belong together"
            )
        factor_N = _flat_factors(factors_BL, ids_BL.shape)
        if self._sampler is not None:
            return self._sampled(self._sampler, ids_N, factor_N).view(ids_BL.shape).to(ids_BL)
        found = [
            torch.where(
                (factor == 0).to(ids.device),
                ids,
                rows.find(self._noised(rows.table_VD[ids].double(), factor)),
            )
            for ids, factor in self._portions(ids_N, factor_N, rows.table_VD.shape[1])
        ]
        return torch.cat(found).view(ids_BL.shape).to(ids_BL.device) if found else ids_BL.clone()

    def embeddings(self, embedding_BLD: Tensor, factors_BL: Tensor | None = None) -> Tensor:
        """Vector mode: noisy word embeddings, same shape, dtype and device; factors as `tokens`.

        Give the word embeddings alone, before positions and blocks are added: those are
        post-processing of the result.

        Raises:
            ConfigError: another mode. DataError: numbers that are not finite, bad factors.
        """
        self._of_mode("vector")
        return self._add_noise(embedding_BLD, _flat_factors(factors_BL, embedding_BLD.shape[:-1]))

    def block_outputs(self, hidden_BLD: Tensor) -> Tensor:
        """Block-output mode: noisy hidden states, clipped first where `clip_norm` is set.

        Takes no factors: the state of a spared position (a special token above all) holds what
        attention carried there from every other position.

        Raises:
            ConfigError: another mode. DataError: numbers that are not finite.
        """
        self._of_mode("block-output")
        return self._add_noise(hidden_BLD, _flat_factors(None, hidden_BLD.shape[:-1]))

    def _of_mode(self, mode: Mode) -> None:
        if self.mechanism.mode != mode:
            raise ConfigError(f"expected a mechanism of {mode} mode, got {self.mechanism.mode!r}")

    def _sampled(self, sampler: WordSampler, ids_N: Tensor, factor_N: Tensor) -> Tensor:
        """Drawn words [N]; a token of factor f is drawn at eta / f, one of factor 0 is kept."""
        drawn_N = ids_N.clone()
        for factor in factor_N[factor_N > 0].unique().tolist():
            mine = (factor_N == factor).to(ids_N.device)
            eta = self.mechanism.eta / factor
            drawn_N[mine] = sampler.draw(ids_N[mine], eta, self._uniforms)
        return drawn_N

    @torch.no_grad()
    def _add_noise(self, vector_BLD: Tensor, factor_N: Tensor) -> Tensor:
        if not bool(vector_BLD.isfinite().all()):
            raise DataError("expected finite numbers to noise, got inf or nan: check the model")
        width = vector_BLD.shape[-1]
        flat_ND = vector_BLD.detach().reshape(-1, width)
        clip = self.mechanism.clip_norm
        done = []
        for vector_ND, factor_n in self._portions(flat_ND, factor_N, width):
            given_ND = vector_ND.double()
            if clip is not None:
                norm_N = given_ND.norm(dim=1, keepdim=True)
                given_ND = given_ND * (clip / norm_N.clamp_min(clip))
            done.append(self._noised(given_ND, factor_n).to(vector_BLD.dtype))
        return torch.cat(done).view(vector_BLD.shape) if done else vector_BLD.clone()

    def _noised(self, vector_ND: Tensor, factor_N: Tensor) -> Tensor:
        """Vectors plus scaled noise on the grid (float64); rows of factor 0 unchanged."""
        eta, device = self.mechanism.eta, vector_ND.device
        count, width = vector_ND.shape
        noise_ND = d_chi_noise(count, width, eta, self._uniforms).to(device)
        factor_N1 = factor_N.to(device)[:, None]
        step = 2.0 ** math.floor(-math.log2(eta * GRID_FINENESS))
        noisy_ND = torch.round((vector_ND + factor_N1 * noise_ND) / step) * step
        return torch.where(factor_N1 == 0, vector_ND, noisy_ND)

    def _portions(
        self, item_N: Tensor, factor_N: Tensor, width: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Items and their factors in portions whose noise fits in memory."""
        if not len(item_N):
            return []
        size = max(1, NOISE_NUMBERS // max(width, 1))
        return list(zip(item_N.split(size), factor_N.split(size), strict=True))


def _flat_factors(factors_BL: Tensor | None, shape: torch.Size) -> Tensor:
    """Factors as a float64 row [N], 1 where none are given."""
    if factors_BL is None:
        return torch.ones(math.prod(shape), dtype=torch.float64)
    if factors_BL.shape != shape:
        raise DataError(f"expected factors {list(shape)}, got {list(factors_BL.shape)}")
    factor_N = factors_BL.detach().reshape(-1).double().cpu()
    if not bool(((factor_N >= 0) & (factor_N <= 1)).all()):
        raise DataError("expected noise factors between 0 and 1: 1 is full noise, 0 is none")
    return factor_N
