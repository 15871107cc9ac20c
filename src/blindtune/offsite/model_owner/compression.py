"""Selective Rank Compression: the kept layers lose most of the rank of their attention weights.

Every weight W [O, I] of query, key, value and output of a kept layer becomes two factors of rank r
(ScaleOT, arXiv 2412.09812, section "Selective Rank Compression"). Plain: the truncated SVD, best in
the Frobenius norm of W. Activation-weighted: best in the expected error |W x - W' x|^2 over the
calibration inputs x (ours; SVD-LLM and ASVD scale in the same spirit).

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blindtune.models.blocks import LowRankLinear
from blindtune.models.decoder import Decoder, Projection

Reading = Literal["removed", "kept"]
SVD_SEED = 0
"""Of the randomised SVD, which large matrices use."""


def compressed_rank(shape: tuple[int, int], beta: float, reading: Reading) -> int:
    """The rank that beta leaves of an m x n weight, at least 1.

    "removed" (reading A): r = floor((1 - beta) min(m, n)); "kept" (reading B, the default):
    r = floor(beta min(m, n)). The paper gives beta = 0.8 and leaves the direction open.
    """
    share = 1 - beta if reading == "removed" else beta
    return max(1, int(share * min(shape) + 1e-9))


def moment_root(second_moment_II: Tensor, device: torch.device) -> Tensor:
    """S^(1/2) [I, I] in float64, of the damped S, but for a rotation.

    By eigenvalues, because rounding may leave those of S below 0.
    """
    values_I, vectors_II = torch.linalg.eigh(_damped(second_moment_II, device))
    root_II: Tensor = vectors_II * values_I.clamp_min(0).sqrt()
    return root_II


@torch.no_grad()
def low_rank_factors(
    weight_OI: Tensor,
    rank: int,
    second_moment_II: Tensor | None = None,
    *,
    root_of: Callable[[Tensor, torch.device], Tensor] = moment_root,
) -> tuple[Tensor, Tensor]:
    """Factors (up [O, R], down [R, I]) whose product stands in for the weight.

    Without moments this is the truncated SVD. With the inputs' second moment S = E[x x^T] it is the
    minimiser of E|W x - up down x|^2: the leading eigenvectors Q of W S W^T give up = Q,
    down = Q^T W. With more outputs than inputs Q comes from the smaller problem.

    Args:
        weight_OI: the weight, [output, input].
        rank: R, 1 .. min(O, I).
        second_moment_II: uncentred second moment of the inputs, or None for plain SVD.
        root_of: `moment_root`, or what remembers its answers.
    """
    weight = weight_OI.detach().float()
    assert 1 <= rank <= min(weight.shape), (rank, weight.shape)
    if second_moment_II is not None:
        wide = weight.double()
        rows, columns = wide.shape
        if rows > columns:
            up = _tall_basis(wide, root_of(second_moment_II, wide.device), rank)
        else:
            up = _wide_basis(wide, _damped(second_moment_II, wide.device), rank)
        down = up.T @ wide
    else:
        up, down = _truncated_svd(weight, rank)
    balance = (down.norm() / up.norm()).sqrt()
    return (up * balance).to(weight_OI.dtype), (down / balance).to(weight_OI.dtype)


def _damped(moment_II: Tensor, device: torch.device) -> Tensor:
    """In float64, with a millionth of the mean diagonal added to it."""
    moment = moment_II.to(device, torch.float64)
    damping = 1e-6 * moment.diagonal().mean()
    return moment + damping * torch.eye(len(moment)).to(moment)


def _wide_basis(weight_OI: Tensor, moment_II: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors [O, R] of W S W^T, an O x O problem."""
    _, vectors_OO = torch.linalg.eigh(weight_OI @ moment_II @ weight_OI.T)
    leading_OR: Tensor = vectors_OO[:, -rank:].flip(-1)
    return leading_OR


def _tall_basis(weight_OI: Tensor, root_II: Tensor, rank: int) -> Tensor:
    """The same by I x I problems: with B = W S^(1/2) and V of B^T B, they are B V, normalised.

    QR normalises, because a B of lower rank than asked for leaves columns without a direction.
    """
    root_OI = weight_OI @ root_II
    _, leading_II = torch.linalg.eigh(root_OI.T @ root_OI)
    basis_OR: Tensor = torch.linalg.qr(root_OI @ leading_II[:, -rank:].flip(-1)).Q
    return basis_OR


def _truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Full SVD where it is cheap; randomised (seeded, 4 power iterations) above 1024."""
    if min(weight.shape) <= 1024 or rank + 16 > min(weight.shape):
        u, s, v_t = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank, None] * v_t[:rank]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(SVD_SEED)
        u, s, v = torch.svd_lowrank(weight, q=rank + 16, niter=4)
    return u[:, :rank], s[:rank, None] * v[:, :rank].T


def saves_space(projection: Projection, ranks: tuple[int, ...]) -> bool:
    """Whether factors of these ranks hold fewer numbers than the weight."""
    dense = projection.in_features * sum(projection.sizes)
    factors = sum(
        rank * (projection.in_features + size)
        for rank, size in zip(ranks, projection.sizes, strict=True)
    )
    return factors < dense


def compress_layer(
    decoder: Decoder,
    layer: int,
    beta: float,
    *,
    reading: Reading,
    second_moments: Mapping[str, Tensor] | None = None,
    feed_forward: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Compress the attention weights of one layer (and its feed-forward ones by switch), in place.

    Args:
        second_moments: of the inputs [I, I] by the projection's path inside the layer; None for
            plain SVD.

    Returns:
        Ranks of the factored projections by path, as `put_factors` tells.
    """
    projections = decoder.projections(layer)
    if feed_forward:
        projections += decoder.feed_forward(layer)
    factored: dict[str, tuple[int, ...]] = {}
    root_of = cache(moment_root)  # gate and up read the same inputs
    for projection in projections:
        moment = None if second_moments is None else second_moments[projection.path]
        ranks = tuple(
            compressed_rank((size, projection.in_features), beta, reading)
            for size in projection.sizes
        )
        module = projection.low_rank(ranks)
        for part, (weight, rank) in enumerate(zip(projection.weights(), ranks, strict=True)):
            factors = low_rank_factors(weight, rank, moment, root_of=root_of)
            module.set_factors(part, *factors)
        factored |= put_factors(decoder.layers[layer], projection, module)
    return factored


@torch.no_grad()
def put_factors(
    layer: nn.Module, projection: Projection, factors: LowRankLinear
) -> dict[str, tuple[int, ...]]:
    """Put factors in the place of a layer's projection, or their product into its weight.

    The product where the factors would not be smaller than the weight: so the loss of rank is the
    same and the bytes never grow.

    Returns:
        The ranks by the projection's path; nothing where the product was written.
    """
    if saves_space(projection, factors.ranks):
        layer.set_submodule(projection.path, factors)
        return {projection.path: factors.ranks}
    weight = projection.module.get_parameter("weight")
    product_OI = factors.dense_weight()
    weight.copy_(product_OI.T if isinstance(projection.module, Conv1D) else product_OI)
    return {}
