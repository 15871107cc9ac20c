"""What every kind of package says about itself, whoever looks and whatever else it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtune.exchange.packages.package import Package
from blindtune.exchange.packages.signing import Signature


@dataclass(frozen=True, kw_only=True)
class InspectedPackage:
    """Facts of any package; each kind adds its own."""

    kind: str
    """emulator, adapter or bottom."""
    path: Path
    id: str
    """Package id."""
    model: str
    """Fingerprint of the full model that it belongs to."""
    model_type: str
    dtype: str
    parameters: int
    bytes: int
    """Of all files."""
    created_by: str
    signature: Signature | None
    """Who signed it."""
    reveals: tuple[str, ...]
    """Everything that a reader learns about the full model, or of an adapter about its tuning."""


def common_facts(package: Package[Any]) -> dict[str, Any]:
    """The fields of `InspectedPackage` that manifest and headers say, all but `reveals`."""
    manifest = package.manifest
    return {
        "kind": manifest.format.removeprefix("blindtune-"),
        "path": package.path,
        "id": package.id,
        "model": manifest.model,
        "model_type": manifest.model_type,
        "dtype": manifest.dtype,
        "parameters": package.parameters,
        "bytes": package.file_bytes,
        "created_by": manifest.created_by,
        "signature": package.signature,
    }
