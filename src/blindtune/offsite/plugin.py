"""The model owner's last act: put the returned adapter into the full model.

Nothing of the adapter is believed: it must name this model's fingerprint, and hold exactly the
adapter layers' tensors, in their shapes, all finite. The result is a plain Hugging Face directory.

Source: offsite-tuning (arXiv 2302.04870), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from blindtune.atomic import atomic_directory, check_free
from blindtune.errors import ConfigError, MismatchError, ModelError
from blindtune.exchange.manifest import AdapterManifest
from blindtune.exchange.package import Package, open_package
from blindtune.exchange.tensors import is_finite
from blindtune.models.decoder import Decoder
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.adapter import apply_adapter
from blindtune.offsite.emulator import DTYPES, adapter_indices

CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class PlugIn:
    """A full model with an adapter in it."""

    path: Path | None
    """Where it was written; None for a dry run."""
    model: PreTrainedModel
    adapter_id: str
    kind: str
    """full or lora."""
    relative_change: dict[int, float]
    """|W' - W| / |W| over all weights of each adapter layer, by index in the full model."""


def plug_in(
    model: str | Path,
    adapter: str | Path,
    out: str | Path | None,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> PlugIn:
    """Put an adapter package into the full model and write a Hugging Face directory.

    Args:
        model: a local directory, a hub name, or `smollm2-135m`.
        adapter: the package's directory.
        out: where to write; None checks and merges in memory only.
        dtype: of the written weights; all of them must be finite in it, in a dry run too.
        overwrite: replace what is in the way.

    Raises:
        PackageError: the package is damaged, or a value or a new weight is NaN or infinite.
        MismatchError: it was tuned for another model, or its tensors are not this model's.
        ModelError, OutputError: see errors.py.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    if out is not None:
        check_free(Path(out), overwrite=overwrite, mark=CONFIG_NAME)
    package = open_package(adapter, "adapter")
    full = load_model(model)
    change = merge(full, package, dtype=DTYPES[dtype])
    if out is not None:
        tokenizer = load_tokenizer(model)
        full = full.to(DTYPES[dtype])
        _check_finite(full, dtype)
        with atomic_directory(out, overwrite=overwrite, mark=CONFIG_NAME) as directory:
            full.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return PlugIn(
        path=None if out is None else Path(out),
        model=full,
        adapter_id=package.id,
        kind=package.manifest.kind,
        relative_change=change,
    )


def _check_finite(model: PreTrainedModel, dtype: str) -> None:
    """The adapter's weights were checked; the model's own may be too large for a narrow dtype."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise ModelError(
                f"expected a model whose weights are finite in {dtype}, got an infinite or NaN one "
                f"in {name}: choose a wider dtype"
            )


def merge(
    model: PreTrainedModel, package: Package[AdapterManifest], *, dtype: torch.dtype | None = None
) -> dict[int, float]:
    """Put an opened adapter package into the full model, in place.

    Args:
        dtype: in which the new weights must be finite too; None: the model's own.

    Returns:
        Relative change of every adapter layer, by index in the full model.

    Raises:
        MismatchError, PackageError: as for `plug_in`; the model is unchanged then.
    """
    manifest, path = package.manifest, package.path
    found = fingerprint(model)
    if manifest.model != found:
        raise MismatchError(
            f"{path}: expected an adapter for this model (fingerprint {found[:12]}...), got one "
            f"for {manifest.model[:12]}...: give the model whose emulator was tuned"
        )
    layer_count, ends = Decoder(model).layer_count, manifest.adapter_layers
    if manifest.layers > layer_count:
        raise MismatchError(
            f"{path}: expected an adapter for at most {layer_count} layers, got one for "
            f"{manifest.layers}: give the model whose emulator was tuned"
        )
    in_emulator = adapter_indices(ends, manifest.layers)
    in_model = adapter_indices(ends, layer_count)
    slots = dict(zip(in_emulator, in_model, strict=True))
    return apply_adapter(model, package, slots, dtype=dtype)
