"""Exact nearest neighbour in a vocabulary by L2 distance, in tiles, near the speed of a matmul.

||x - e||^2 = ||x||^2 + (||e||^2 - 2 x.e): one float32 matmul a tile gives all distances but for
rounding. Rounding has a bound, so every row that could be the nearest is known and is measured
again in float64; typically that is a handful of rows a query. The answer is the one of a brute
force in float64, and the lowest index where rows are equally near. No approximate index: it would
change the mechanism.

Shapes: N queries, V vocabulary rows, D hidden, T rows of a tile, Q queries of a tile, P pairs of a
query and a row measured again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError

UNIT_ROUNDOFF = 2.0**-24  # float32
LARGEST_NORM = 1e15  # squares and their sums stay far inside float32
PAIR_NUMBERS = 2**22  # float64 numbers gathered at once when pairs are measured again


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the search is cut to fit in memory. Changes speed, never an answer."""

    queries: int = 1024
    """Queries of a tile; a tile of distances takes 4 x queries x rows bytes."""
    rows: int = 4096
    """Vocabulary rows of a tile; one tile of rows is converted to float32 at a time."""

    def __post_init__(self) -> None:
        if self.queries < 1 or self.rows < 1:
            raise ConfigError(
                f"expected tiles of at least 1, got queries={self.queries}, rows={self.rows}"
            )


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matmuls in true float32: the rounding bound does not hold for TF32 or bfloat16.

    The switches are the process's: another thread that lowers them meanwhile breaks the bound.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@final
class NearestRows:
    """Finds, for each query, the index of the nearest row of a table.

    Args:
        table_VD: the vocabulary's embeddings, any floating dtype and device; not copied, and not
            to be changed while this object is in use.
        tiling: speed and memory.

    Raises:
        DataError: the table is empty, not 2-D, or holds numbers that are not finite.
    """

    def __init__(self, table_VD: Tensor, tiling: Tiling | None = None) -> None:
        if table_VD.ndim != 2 or not table_VD.numel() or not table_VD.is_floating_point():
            raise DataError(
                f"expected a table of floats [vocabulary, hidden], got {table_VD.dtype} "
                f"{list(table_VD.shape)}: pass the embedding's weight"
            )
        self.table_VD = table_VD.detach()
        self.tiling = tiling or Tiling()
        tiles = self.table_VD.split(self.tiling.rows)
        self.squared_norms_V = torch.cat([tile.double().square().sum(1) for tile in tiles])
        self.largest_norm = self.squared_norms_V.max().sqrt().item()
        if not self.largest_norm < LARGEST_NORM:
            raise DataError(
                f"expected finite rows of norm below {LARGEST_NORM:g}, got {self.largest_norm:g}: "
                "the embedding is damaged"
            )

    @torch.no_grad()
    def find(self, query_ND: Tensor) -> Tensor:
        """Index of the nearest row of each query [N, D]: int64 [N], lowest index where equal.

        Raises:
            DataError: another width, or queries that are not finite.
        """
        width = self.table_VD.shape[1]
        if query_ND.ndim != 2 or query_ND.shape[1] != width:
            raise DataError(f"expected queries [N, {width}], got {list(query_ND.shape)}")
        query_ND = query_ND.to(self.table_VD.device, torch.float64)
        norm_N = query_ND.norm(dim=1)
        if not bool((norm_N < LARGEST_NORM).all()):
            raise DataError(f"expected finite queries of norm below {LARGEST_NORM:g}")
        # |computed - true| <= slack for every distance of a query: rounding of inputs and output,
        # of a dot product of D terms summed in any order (Higham 2002, section 3.1), and, for
        # queries a billion times longer than the rows, of float64.
        slack_N = 2.1 * (width + 16) * norm_N * self.largest_norm + 8 * self.largest_norm**2
        slack_N = UNIT_ROUNDOFF * slack_N + 2.0**-52 * width * norm_N.square()
        best = _Best(query_ND, self.table_VD)
        with _full_float32():
            for first_row in range(0, len(self.table_VD), self.tiling.rows):
                rows = slice(first_row, first_row + self.tiling.rows)
                row_TD = self.table_VD[rows].float()
                norm_T = self.squared_norms_V[rows].float()
                for first in range(0, len(query_ND), self.tiling.queries):
                    tile = slice(first, first + self.tiling.queries)
                    score_QT = torch.addmm(norm_T, query_ND[tile].float(), row_TD.T, alpha=-2)
                    query_P, row_P = _contenders(
                        score_QT, slack_N[tile], best.distance_N[tile] - norm_N[tile].square()
                    )
                    best.measure(query_P + first, row_P + first_row)
        return best.row_N


def _contenders(score_QT: Tensor, slack_Q: Tensor, best_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (query, row) of a tile that may be nearer than the best so far, or as near."""
    lowest_Q = score_QT.amin(1).double()
    hopeful = (lowest_Q <= best_Q + slack_Q).nonzero().squeeze(1)
    limit = torch.minimum(best_Q, lowest_Q + slack_Q)[hopeful] + slack_Q[hopeful]
    limit = limit.float().nextafter(limit.new_tensor(torch.inf, dtype=torch.float32))
    pairs = (score_QT[hopeful] <= limit[:, None]).nonzero()
    return hopeful[pairs[:, 0]], pairs[:, 1]


@final
class _Best:
    """The nearest row so far of each query, by squared distances measured in float64."""

    def __init__(self, query_ND: Tensor, table_VD: Tensor) -> None:
        self.query_ND, self.table_VD = query_ND, table_VD
        self.distance_N = query_ND.new_full((len(query_ND),), torch.inf)
        self.row_N = torch.zeros(len(query_ND), dtype=torch.int64, device=query_ND.device)

    def measure(self, query_P: Tensor, row_P: Tensor) -> None:
        """Measure pairs and keep each query's nearest row, the lowest among equals."""
        size = max(1, PAIR_NUMBERS // self.query_ND.shape[1])
        for query, row in zip(query_P.split(size), row_P.split(size), strict=True):
            difference = self.query_ND[query] - self.table_VD[row].double()
            distance = difference.square_().sum(1)
            nearest_N = self.distance_N.scatter_reduce(0, query, distance, "amin")
            self.row_N[nearest_N < self.distance_N] = len(self.table_VD)
            wins = distance == nearest_N[query]
            self.row_N.scatter_reduce_(0, query[wins], row[wins], "amin")
            self.distance_N = nearest_N
