"""The model owner's last act: put the returned adapter into the full model.

Nothing of the adapter is believed: it must name this model's fingerprint, hold exactly its adapter
layers' tensors, in their shapes, all finite, and change the model within bounds. How many layers
are adapter layers the adapter itself says; the emulator that was shipped proves it. The result is a
plain Hugging Face directory.

Source: offsite-tuning (arXiv 2302.04870), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from blindtune.atomic import atomic_directory, check_free
from blindtune.errors import ConfigError, MismatchError, ModelError
from blindtune.exchange.packages.manifest import AdapterManifest
from blindtune.exchange.packages.package import Package, open_package
from blindtune.exchange.packages.signing import Signature, Trust
from blindtune.exchange.tensors import is_finite
from blindtune.models.decoder import Decoder
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.models.surgery import cast_weights
from blindtune.offsite.adapter import Updates, apply_adapter
from blindtune.offsite.emulator import DTYPES, adapter_indices
from blindtune.offsite.model_owner.vetting import (
    ChangeBounds,
    LayerChange,
    check_changes,
    check_loss,
    measure_changes,
    public_loss,
    public_windows,
)
from blindtune.places import located
from blindtune.training.text import TokenDataset

CONFIG_NAME = "config.json"
_ID = "sha256:"


@dataclass(frozen=True, kw_only=True)
class PlugIn:
    """A full model with an adapter in it."""

    path: Path | None
    """Where it was written; None for a dry run."""
    model: PreTrainedModel
    adapter_id: str
    kind: str
    """full or lora."""
    adapter_layers: int
    """N_a, as the adapter says."""
    changes: tuple[LayerChange, ...]
    """Norm and spectrum of what the adapter changed, layer by layer."""
    public_loss: tuple[float, float] | None
    """Before and after, nats a token on the public text; None if there was none."""
    signature: Signature | None
    """Who signed the adapter."""

    @property
    def relative_change(self) -> dict[int, float]:
        """|W' - W| / |W| over all weights of each adapter layer, by index in the full model."""
        return {change.layer: change.relative for change in self.changes}


def plug_in(
    model: str | Path,
    adapter: str | Path,
    out: str | Path | None,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
    data: str | Path | None = None,
    bounds: ChangeBounds | None = None,
    accept_large_change: bool = False,
    emulator: str | Path | None = None,
    trust: Trust | None = None,
) -> PlugIn:
    """Put an adapter package into the full model and write a Hugging Face directory.

    Args:
        model, adapter: a directory, a hub name, or `smollm2-135m`; the package's directory.
        out: where to write; None checks and merges in memory only.
        dtype: of the written weights; all of them must be finite in it, in a dry run too.
        overwrite: replace the model directory that is in the way, whoever made it.
        data: public text, on which the loss may not rise too much; None: it is not measured.
        bounds, accept_large_change: how much the adapter may change; or measure, refuse nothing.
        emulator: the only one whose adapter is taken: directory of the shipped package, whose
            layers are compared too, or its package id; None: any.
        trust: whose packages are opened; None: anybody's.

    Raises:
        PolicyError: the change is out of bounds, or `trust` refuses the package.
        PackageError: the package is damaged, or a value or a new weight is NaN or infinite.
        MismatchError: it is of another model or emulator, or its tensors are not this model's.
        ModelError, OutputError: see errors.py.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    if out is not None:
        read = (model, adapter, emulator, data)
        check_free(located(out), overwrite=overwrite, mark=CONFIG_NAME, inputs=read)
    package = open_package(adapter, "adapter", trust=trust)
    _check_emulator(package, emulator, trust)
    full = load_model(model)
    tokenizer = None if data is None and out is None else load_tokenizer(model)
    public = None if data is None else public_windows(full, tokenizer, data)
    limits = None if accept_large_change else bounds or ChangeBounds()
    changes, losses = _vetted_merge(full, package, dtype, public, limits)
    if out is not None and tokenizer is not None:
        cast_weights(full, DTYPES[dtype])
        with atomic_directory(out, overwrite=overwrite, mark=CONFIG_NAME) as directory:
            full.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return PlugIn(
        path=None if out is None else located(out),
        model=full,
        adapter_id=package.id,
        kind=package.manifest.kind,
        adapter_layers=package.manifest.adapter_layers,
        changes=changes,
        public_loss=losses,
        signature=package.signature,
    )


def _vetted_merge(
    model: PreTrainedModel,
    package: Package[AdapterManifest],
    dtype: str,
    public: TokenDataset | None,
    bounds: ChangeBounds | None,
) -> tuple[tuple[LayerChange, ...], tuple[float, float] | None]:
    """Merge, measure, and refuse what is out of bounds; None: refuse nothing.

    The public text, which takes longest, is scored when the adapter is known to fit.
    """
    changes: list[LayerChange] = []
    before = 0.0

    def vet(decoder: Decoder, updates: Updates) -> None:
        nonlocal before
        changes.extend(measure_changes(decoder, updates))
        if bounds is not None:
            check_changes(changes, bounds, package.path)
        if public is not None:
            before = public_loss(model, public)

    merge(model, package, dtype=DTYPES[dtype], vet=vet)
    _check_finite(model, dtype)
    if public is None:
        return tuple(changes), None
    after = public_loss(model, public)
    if bounds is not None:
        check_loss(before, after, bounds, package.path)
    return tuple(changes), (before, after)


def _check_emulator(
    package: Package[AdapterManifest], emulator: str | Path | None, trust: Trust | None
) -> None:
    """Whether the adapter is of this emulator, as it says, and of its layers."""
    if emulator is None:
        return
    found, shipped = package.manifest, None
    if not str(emulator).startswith(_ID):
        shipped = open_package(emulator, "emulator", trust=trust)
    wanted = str(emulator) if shipped is None else shipped.id
    if found.emulator != wanted:
        raise MismatchError(
            f"{package.path}: expected an adapter tuned on {wanted[:19]}..., got one tuned on "
            f"{found.emulator[:19]}...: ask for the adapter of that emulator"
        )
    if shipped is not None:
        ours = (shipped.manifest.adapter_layers, len(shipped.manifest.layers))
        if (found.adapter_layers, found.layers) != ours:
            raise MismatchError(
                f"{package.path}: expected {ours[0]} adapter layers at each end of {ours[1]}, as "
                f"in {shipped.path}, got {found.adapter_layers} of {found.layers}: it is not what "
                "tuning that emulator makes"
            )


def _check_finite(model: PreTrainedModel, dtype: str) -> None:
    """The adapter's weights were checked; the model's own may be too large for a narrow dtype."""
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach().to(DTYPES[dtype])):
            raise ModelError(
                f"expected a model whose weights are finite in {dtype}, got an infinite or NaN one "
                f"in {name}: choose a wider dtype"
            )


def merge(
    model: PreTrainedModel,
    package: Package[AdapterManifest],
    *,
    dtype: torch.dtype | None = None,
    vet: Callable[[Decoder, Updates], None] | None = None,
) -> None:
    """Put an opened adapter package into the full model, in place.

    Args:
        dtype: in which the new weights must be finite too; None: the model's own.
        vet: looks at the new weights, and raises if they are not to be put in.

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
    apply_adapter(model, package, slots, dtype=dtype, vet=vet)
