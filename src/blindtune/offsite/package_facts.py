"""Facts that inspections of both kinds of package tell: of layers, and of tensors in headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blindtune.exchange.tensors import TensorFacts


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer of a package."""

    index: int
    """In the emulator."""
    kind: str
    """adapter, raw, compressed or harmonizer."""
    ranks: dict[str, tuple[int, ...]]
    """What is left of the rank: of projections stored as factors by path, or of the harmonizer."""
    dense: tuple[str, ...] = ()
    """Projections of a compressed layer, by path, that lost rank too but are stored as the dense
    product of their factors; the manifest does not state their rank."""
    parameters: int
    bytes: int
    norm: float | None = None
    """Frobenius norm over the layer's tensors (for lora: of the update); adapters only."""


def of_layer(header: Mapping[str, TensorFacts], prefix: str) -> dict[str, TensorFacts]:
    """The tensors of one layer, by their names within it."""
    return {n.removeprefix(prefix): f for n, f in header.items() if n.startswith(prefix)}


def weight_bytes(header: Mapping[str, TensorFacts]) -> int:
    """Their bytes in the file."""
    return sum(facts.end - facts.begin for facts in header.values())


def spans(indices: Sequence[int]) -> str:
    """Sorted indices in short: 0, 1, 2, 5 becomes "0-2, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
