"""The likelihood of a word behind a noisy embedding that left through a layer norm (BERT and kin).

At cut 0 such an encoder sends h = g * n(x) + b, n(x) = (x - mean) / deviation, where
x = E[w] + p + z: the word, what the model adds at that place (position, token type), and the noise
of vector mode, of density proportional to exp(-eta |z|) in D dimensions (`privacy.metric_dp`).
g, b and p are known. What h tells of x is the direction u of x without its mean, a unit vector in
the D - 1 dimensions H across the vector of ones: u is (h - b) / g, without its mean, normed. Two
numbers are lost: the length s > 0 of x in H, and the mean, m = |x's part along the ones|. We
integrate over both.

Let c be E[w] + p without its mean, a = c.u and d^2 = |c|^2 - a^2. In H the noise is s u - c, of
length r(s) = sqrt(d^2 + (s - a)^2); along the ones it is any number m, as x's mean is unknown. With
the volume s^(D-2) ds du of H in spherical coordinates,

    P(u | w) = const. integral over s of s^(D-2) [integral over m of exp(-eta sqrt(r^2 + m^2))]
             = const. integral over s of s^(D-2) 2 r K_1(eta r),

K_1 the modified Bessel function (Gradshteyn and Ryzhik, 3.914): const. = eta^D, but for what only D
says. In place of x e^x K_1(x) stands sqrt(1 + pi x / 2 + k x / (x + 0.6)), k = 3 pi / 8 - 1, which
is right at 0 and at infinity and off by 0.2 % at most, and 20 times as fast.

The integrand is log-concave in s (a marginal of log-concave functions), so it has one peak, which
Newton's method finds, and nodes of even distance in log s around it suffice. Left out: the norm's
epsilon, through which h tells a little of s where x is tiny.

Shapes: L length, T tokens of several texts, D hidden, V vocabulary, K words of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blindtune.attacks.adversary import Stack
from blindtune.attacks.imitation import Imitation

NORM = "embeddings.LayerNorm"  # in every family of `models.encoders`
STEPS = 6  # of Newton's method; it only has to come near
NODES = tuple(0.75 * k for k in range(-8, 9))  # in widths of the peak
REFINED = 64  # words of a token that get all nodes; the others are far below them
LEAST_GAIN = 1e-4  # of the largest: below it a coordinate is lost in rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class NormedEmbedding:
    """How a model makes states at cut 0 of word embeddings: adds at each place, and norms."""

    word_VD: Tensor
    """Word embeddings without their mean."""
    place_LD: Tensor
    """What is added at every place, without its mean."""
    gain_D: Tensor
    bias_D: Tensor

    def measured(self, state_TD: Tensor, place_T: Tensor) -> tuple[Tensor, Tensor]:
        """a and d^2 of each state and word, [T, V]; see the module's docstring."""
        seen_TD = _centred((state_TD - self.bias_D) / self.gain_D)
        seen_TD = seen_TD / seen_TD.norm(dim=1, keepdim=True).clamp_min(1e-30)
        added_TD = self.place_LD[place_T]
        along_TV = seen_TD @ self.word_VD.T + (seen_TD * added_TD).sum(1, keepdim=True)
        squared_TV = 2 * added_TD @ self.word_VD.T + added_TD.square().sum(1, keepdim=True)
        squared_TV += self.word_VD.square().sum(1)
        return along_TV, (squared_TV - along_TV.square()).clamp_min_(0)


@torch.no_grad()
def normed_embedding(model: Stack, length: int) -> NormedEmbedding | None:
    """How this model norms the embeddings of texts of `length`; None if it does otherwise.

    Found by trying: embeddings of two words must reach the norm with the same added to each, and
    leave it as the states.
    """
    try:
        norm = model.model.get_submodule(NORM)
    except AttributeError:
        return None
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
        return None
    table_VD = model.embedding.weight
    assert isinstance(table_VD, Tensor), type(table_VD)
    tried_3LD = torch.stack([torch.zeros_like(table_VD[0]), table_VD[1], table_VD[2]])
    tried_3LD = tried_3LD[:, None].expand(-1, length, -1)
    mask_3L = torch.ones(tried_3LD.shape[:2], dtype=torch.int64, device=table_VD.device)
    taken: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, args: taken.append(args[0]))
    try:
        made_3LD = Imitation(model, 0).through(tried_3LD, mask_3L)
    finally:
        handle.remove()
    if not taken or taken[0].shape != tried_3LD.shape:
        return None
    place_LD = taken[0][0]
    if not (_equal(taken[0], tried_3LD + place_LD) and _equal(made_3LD, norm(taken[0]))):
        return None
    gain_D, bias_D = norm.weight.detach().float(), norm.bias.detach().float()
    if float(gain_D.abs().min()) < LEAST_GAIN * float(gain_D.abs().max()):
        return None
    return NormedEmbedding(
        word_VD=_centred(table_VD.detach().float()), place_LD=_centred(place_LD.float()),
        gain_D=gain_D, bias_D=bias_D,
    )  # fmt: skip


def log_density(
    along_TV: Tensor, squared_TV: Tensor, width: int, eta: float, prior_V: Tensor
) -> Tensor:
    """log P(u | w) [T, V], but for a constant that is the same for every eta.

    By all nodes for the `REFINED` words of a token that are likeliest with the prior, and from the
    peak alone, as if it were a Gaussian's (Laplace), for the others.

    Args:
        along_TV, squared_TV: a and d^2.
        width: D, at least 3.
        eta: of the noise.
        prior_V: log P(w).
    """
    log_TV = integrated(along_TV, squared_TV, width, eta, (0.0,)) + math.log(2 * math.pi) / 2
    best_TK = (log_TV + prior_V).topk(min(REFINED, len(prior_V)), dim=1).indices
    some_TK = along_TV.gather(1, best_TK), squared_TV.gather(1, best_TK)
    log_TK = integrated(*some_TK, width, eta, NODES) + math.log(NODES[1] - NODES[0])
    return log_TV.scatter_(1, best_TK, log_TK)


def integrated(
    along: Tensor, squared: Tensor, width: int, eta: float, nodes: Sequence[float]
) -> Tensor:
    """log of eta^D times the integral over s, as a sum over nodes without their distance."""
    length, spread = _peak(along, squared, width, eta)
    top = (squared + (length - along).square()).sqrt()
    total = torch.zeros_like(along)
    for node in nodes:
        at = length * (node * spread).exp()
        distance = (squared + (at - along).square()).sqrt()
        lower = (width - 1) * node * spread - eta * (distance - top)
        total += lower.exp() * _bessel(eta * distance)
    return total.log() + spread.log() + (width - 1) * (length.log() + math.log(eta)) - eta * top


def _peak(along: Tensor, squared: Tensor, width: int, eta: float) -> tuple[Tensor, Tensor]:
    """Where s^(D-2) exp(-eta r) is largest, and the width of that peak in log s.

    1 / eta^2 is added to d^2: K_1 rounds the kink of r at d = 0 off about so. The slope of the
    logarithm falls and is convex right of a, so Newton's method from the left does not overshoot.
    """
    power, squared = width - 2, squared + eta**-2
    length = along.clamp_min(power / eta)
    for step in range(STEPS + 1):
        beyond = length - along
        distance = (squared + beyond.square()).sqrt()
        bend = power / length.square() + eta * squared / distance.pow(3)
        if step < STEPS:
            length = length + (power / length - eta * beyond / distance) / bend
    return length, bend.rsqrt() / length


def _bessel(x: Tensor) -> Tensor:
    """x e^x K_1(x), to 0.2 %."""
    return (1 + math.pi / 2 * x + (3 * math.pi / 8 - 1) * x / (x + 0.6)).sqrt()


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5)
