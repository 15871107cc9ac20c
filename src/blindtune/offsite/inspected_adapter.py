"""What an adapter package holds and what it reveals; its tensors are read, for their norms.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from blindtune.errors import PackageError
from blindtune.exchange.packages.inspected import InspectedPackage, common_facts
from blindtune.exchange.packages.manifest import (
    AdapterManifest,
)
from blindtune.exchange.packages.package import Package
from blindtune.exchange.tensors import numbers
from blindtune.offsite.emulator import adapter_indices
from blindtune.offsite.package_facts import (
    LayerFacts,
    of_layer,
    spans,
    weight_bytes,
)


@dataclass(frozen=True, kw_only=True)
class InspectedAdapter(InspectedPackage):
    """What an adapter package says about itself."""

    emulator: str
    """Package id of the emulator that it was tuned on."""
    training: str
    """full or lora."""
    lora_rank: int | None
    lora_alpha: float | None
    lora_targets: tuple[str, ...]
    adapter_layers: int
    emulator_layers: int
    layers: tuple[LayerFacts, ...]
    """The adapter layers that it has tensors for."""
    privacy: dict[str, Any] | None
    """Differential privacy as the data owner states it: epsilon, delta, unit; None: none."""


def inspect_adapter(package: Package[Any], manifest: AdapterManifest) -> InspectedAdapter:
    """See `inspection.inspect`."""
    _check_places(package, manifest)
    tensors = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    scale = 1.0 if manifest.lora is None else manifest.lora.alpha / manifest.lora.rank
    layers = []
    for i in range(manifest.layers):
        own = of_layer(package.header, f"layers.{i}.")
        if own:
            values = {name: tensors[f"layers.{i}.{name}"] for name in own}
            rank = manifest.lora.rank if manifest.lora else None
            norm = _plain_norm(values) if rank is None else _norm(values, rank, package.path)
            norm *= scale
            layers.append(
                LayerFacts(
                    index=i,
                    kind="adapter",
                    ranks={},
                    parameters=numbers(own),
                    bytes=weight_bytes(own),
                    norm=norm,
                )
            )
    lora, private = manifest.lora, manifest.privacy
    return InspectedAdapter(
        **common_facts(package),
        emulator=manifest.emulator,
        training=manifest.kind,
        lora_rank=lora.rank if lora else None,
        lora_alpha=lora.alpha if lora else None,
        lora_targets=tuple(lora.targets) if lora else (),
        adapter_layers=manifest.adapter_layers,
        emulator_layers=manifest.layers,
        layers=tuple(layers),
        privacy=None if private is msgspec.UNSET else msgspec.to_builtins(private),
        reveals=(
            "which emulator it was tuned on, and so which model",
            f"the tuned weights of layers {spans([layer.index for layer in layers])}: they were "
            "fitted to the private data, and may betray whether a text was among it",
            "whether LoRA was used" + (", its rank, scale and targets" if lora else ""),
            "nothing else: no data, no paths, no learning rate, no losses",
        ),
    )


def _check_places(package: Package[Any], manifest: AdapterManifest) -> None:
    """Every tensor must belong to an adapter layer."""
    ends = adapter_indices(manifest.adapter_layers, manifest.layers)
    prefixes = tuple(f"layers.{i}." for i in ends)
    stray = [name for name in package.header if not name.startswith(prefixes)]
    if stray:
        raise PackageError(
            f"{package.path}: expected weights of the adapter layers {spans(sorted(set(ends)))} "
            f"only, got {', '.join(stray[:3])}: ask for the package again"
        )


def _plain_norm(values: Mapping[str, Tensor]) -> float:
    return float(sum(float(t.double().pow(2).sum()) for t in values.values()) ** 0.5)


def _norm(values: Mapping[str, Tensor], rank: int, path: Path) -> float:
    """Of B A over all targets, by |B A|^2 = <B^T B, A A^T> unless B A is smaller than these.

    No matrix that is made has more numbers than the factors.
    """
    total = 0.0
    for name, down_RI in values.items():
        stem, found, _ = name.partition(".lora_A.")
        up_OR = values.get(f"{stem}.lora_B.weight")
        if not found and ".lora_B." in name:
            continue
        if not found or up_OR is None or down_RI.ndim != 2 or up_OR.ndim != 2:
            raise PackageError(f"{path}: expected LoRA factors in pairs: ask for the package again")
        if not up_OR.shape[1] == down_RI.shape[0] == rank:
            raise PackageError(f"{path}: the ranks of {stem} differ: ask for the package again")
        if rank > min(len(up_OR), down_RI.shape[1]):
            total += float((up_OR.double() @ down_RI.double()).square().sum())
            continue
        left_RR = up_OR.double().T @ up_OR.double()
        right_RR = down_RI.double() @ down_RI.double().T
        total += float((left_RR * right_RR).sum())
    return float(max(total, 0.0) ** 0.5)
