"""The modules that surgery puts into a model. They take numbers, not configs.

Shapes: B batch, L length, D hidden, R rank, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu


class Harmonizer(nn.Module):
    """A low-rank ReLU network with a residual that stands in for a whole decoder layer.

    y = x + W_up ReLU(W_down norm(x) + b1) + b2 with norm(x) = x / sqrt(mean(x^2) + eps).
    W_up = b2 = 0 at the start, so a new harmonizer is the identity (LayerDrop) with a non-zero
    gradient. Source: ScaleOT (arXiv 2412.09812), "simple low-rank FFN with ReLU"; residual and
    initialisation are ours.

    Args:
        hidden_size: D, the width of the decoder.
        rank: R, at least 1.
        eps: added to the mean square.
        returns_tuple: what the family's own layers return (`Family.returns_tuple`).
    """

    def __init__(
        self, hidden_size: int, rank: int, *, eps: float = 1e-6, returns_tuple: bool = False
    ) -> None:
        super().__init__()
        assert hidden_size >= 1, hidden_size
        assert rank >= 1, f"a harmonizer needs a rank of at least 1, got {rank}"
        self.eps = eps
        self.returns_tuple = returns_tuple
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, hidden_size)
        nn.init.kaiming_uniform_(self.down.weight, nonlinearity="relu")
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def normalize(self, hidden_BLD: Tensor) -> Tensor:
        """norm(x): RMS normalisation without weights, computed in float32. Shape unchanged."""
        x = hidden_BLD.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden_BLD.dtype)

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Hidden states [B, L, D] to [B, L, D], wrapped as the family's own layer wraps them.

        Takes whatever a decoder layer takes and uses only the hidden states; the KV cache among
        the arguments is not touched.
        """
        out_BLD: Tensor = hidden_states + self.up(relu(self.down(self.normalize(hidden_states))))
        return (out_BLD, None) if self.returns_tuple else out_BLD


class LowRankLinear(nn.Module):
    """A linear map kept as factors: y = up (down x) + bias. The product is never formed.

    A fused projection has several parts, each with its own factors; their outputs are laid out as
    the original module lays out its rows.

    Args:
        in_features: I.
        parts: (output features, rank) of every part, in row order.
        bias: whether a bias [O] (in the original row layout) is added.
        heads: None for stacked rows; a number of heads when the parts alternate head by head
            (GPT-NeoX, BLOOM), for which all parts must be of one size.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[tuple[int, int]],
        *,
        bias: bool,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        sizes = [out for out, _ in parts]
        assert parts, "a low-rank map needs at least one part"
        assert all(1 <= rank <= min(in_features, out) for out, rank in parts), parts
        assert heads is None or (len(set(sizes)) == 1 and sizes[0] % heads == 0), (parts, heads)
        self.in_features = in_features
        self.out_features = sum(sizes)
        self.heads = heads
        self.down = nn.ParameterList([nn.Parameter(torch.empty(r, in_features)) for _, r in parts])
        self.up = nn.ParameterList([nn.Parameter(torch.empty(out, r)) for out, r in parts])
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the factors as `nn.Linear` fills its weight."""
        for factor in (*self.down, *self.up):
            nn.init.kaiming_uniform_(factor, a=5**0.5)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every part."""
        return tuple(down.shape[0] for down in self.down)

    def set_factors(self, part: int, up_OR: Tensor, down_RI: Tensor) -> None:
        """Write the factors of one part (their product is that part's weight [O, I])."""
        with torch.no_grad():
            self.up[part].copy_(up_OR)
            self.down[part].copy_(down_RI)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        outs = [linear(linear(x, down), up) for down, up in zip(self.down, self.up, strict=True)]
        y = join_parts(outs, self.heads)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """The product as a weight [O, I] in the original row layout; `forward` never forms it."""
        rows = [(up @ down).T for up, down in zip(self.up, self.down, strict=True)]
        return join_parts(rows, self.heads).T

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}"
        )


def join_parts(parts: Sequence[Tensor], heads: int | None) -> Tensor:
    """Parts [..., O_p] to the fused [..., sum O_p]: stacked, or alternating over `heads`."""
    if len(parts) == 1:
        return parts[0]
    if heads is None:
        return torch.cat(list(parts), dim=-1)
    per_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
    return torch.cat(per_head, dim=-1).flatten(-2)


def split_parts(fused: Tensor, sizes: Sequence[int], heads: int | None) -> tuple[Tensor, ...]:
    """The inverse of `join_parts`: the fused [..., sum O_p] to its parts [..., O_p]."""
    if heads is None or len(sizes) == 1:
        return torch.split(fused, list(sizes), dim=-1)
    per_head = fused.reshape(*fused.shape[:-1], heads, -1)
    parts = torch.split(per_head, [size // heads for size in sizes], dim=-1)
    return tuple(part.flatten(-2) for part in parts)
