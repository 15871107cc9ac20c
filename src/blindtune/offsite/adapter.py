"""The adapter package, written by the data owner and read by the model owner.

It holds the adapter layers' weights, or LoRA factors for them, and nothing else. Reading believes
nothing: names, shapes and dtypes must be exactly those of the layers it is meant for.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blindtune.errors import ConfigError, MismatchError, PackageError
from blindtune.exchange.packages.manifest import AdapterManifest, LoraFacts, PrivacyFacts
from blindtune.exchange.packages.package import Package, open_package
from blindtune.exchange.packages.signing import Signer, Trust
from blindtune.exchange.packages.writing import write_package
from blindtune.exchange.tensors import Expected, is_finite
from blindtune.kinds import check_kinds
from blindtune.models.decoder import Decoder
from blindtune.offsite.emulator import DTYPES, Emulator, adapter_parameters

Updates = dict[int, dict[str, Tensor]]
"""New float32 values by layer index in the full model and parameter name."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What of the adapter layers is trained."""

    lora_rank: int = 0
    """0: all weights of the adapter layers; otherwise LoRA of this rank in their linear maps."""
    lora_alpha: float = 32.0
    """LoRA's scale is lora_alpha / lora_rank."""
    lora_dropout: float = 0.1
    """Dropout before LoRA's first factor."""
    lora_targets: tuple[str, ...] = ()
    """Module paths inside a layer, such as self_attn.q_proj; empty: every linear map."""

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.lora_rank < 0 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                "expected lora_rank >= 0, lora_alpha > 0 and lora_dropout in [0, 1), got "
                f"{self.lora_rank}, {self.lora_alpha}, {self.lora_dropout}"
            )
        # Without a rank there is no dropout either: 0 says what is so.
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (f.default, 0)]
        if given and not self.lora_rank:
            raise ConfigError(
                f"expected lora_rank above 0 with {', '.join(given)}, got 0, which trains all "
                f"weights of the adapter layers: give a rank, or leave {' and '.join(given)}"
            )


def write_adapter(
    emulator: Emulator,
    config: AdapterConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    signer: Signer | None = None,
    privacy: PrivacyFacts | None = None,
) -> str:
    """Write the tuned adapter of an emulator as a package, signed or not, and return its id.

    `privacy` is stated in the package where it was tuned with differential privacy.
    """
    tensors = (
        _lora_tensors(emulator.model, emulator.adapter_indices)
        if config.lora_rank
        else {
            n: p.detach() for n, p in adapter_parameters(emulator.model, emulator.adapter_indices)
        }
    )
    manifest = AdapterManifest(
        emulator=emulator.id,
        model=emulator.manifest.model,
        kind="lora" if config.lora_rank else "full",
        model_type=emulator.manifest.model_type,
        dtype="float32",
        adapter_layers=emulator.manifest.adapter_layers,
        layers=len(emulator.manifest.layers),
        lora=_lora_facts(tensors, config) if config.lora_rank else None,
        privacy=privacy or msgspec.UNSET,
    )
    return write_package(out, manifest, tensors, {}, overwrite=overwrite, signer=signer)


def _lora_tensors(model: PreTrainedModel, indices: tuple[int, ...]) -> dict[str, Tensor]:
    """LoRA factors as `layers.<i>.<module>.lora_A.weight` and `.lora_B.weight`."""
    layers = Decoder(model).layers
    found: dict[str, Tensor] = {}
    for i in indices:
        for name, parameter in layers[i].named_parameters():
            if ".lora_" in name:
                found[f"layers.{i}.{name.replace('.default', '')}"] = parameter.detach()
    return found


def _lora_facts(tensors: Mapping[str, Tensor], config: AdapterConfig) -> LoraFacts:
    modules = {name.split(".", 2)[2].rsplit(".lora_", 1)[0] for name in tensors}
    return LoraFacts(rank=config.lora_rank, alpha=config.lora_alpha, targets=sorted(modules))


@torch.no_grad()
def apply_adapter(
    model: PreTrainedModel,
    package: Package[AdapterManifest],
    slots: Mapping[int, int],
    *,
    dtype: torch.dtype | None = None,
    vet: Callable[[Decoder, Updates], None] | None = None,
) -> None:
    """Put an opened adapter into a model, in place.

    Args:
        model: a full model or an emulator.
        package: the adapter.
        slots: index in the emulator -> index in `model`, of every adapter layer.
        dtype: in which the new weights must be finite too, because they will be written in it;
            None: the model's own.
        vet: looks at the new weights, and raises if they are not to be put in.

    Raises:
        MismatchError, PackageError: a tensor is missing, unknown, misshapen or not finite, or a
            new weight would not be finite; the model is unchanged then.
    """
    decoder = Decoder(model)
    read = _read_lora if package.manifest.kind == "lora" else _read_full
    updates = read(decoder, package, slots)
    for i, values in updates.items():
        _check_finite(decoder, i, values, dtype, package.path)
    if vet is not None:
        vet(decoder, updates)
    for i, values in updates.items():
        for name, value in values.items():
            decoder.layers[i].get_parameter(name).copy_(value)


def _check_finite(
    decoder: Decoder, i: int, values: Mapping[str, Tensor], dtype: torch.dtype | None, path: Path
) -> None:
    """Finite factors may have an infinite product, and float32 holds more than float16."""
    for name, value in values.items():
        own = decoder.layers[i].get_parameter(name).dtype
        written = dtype or own
        if not is_finite(value.to(own).to(written)):
            raise PackageError(
                f"{path}: expected finite weights in {str(written).removeprefix('torch.')}, got an "
                f"infinite or NaN one in layer {i}, {name}: nothing was changed, ask for the "
                "adapter again or write in a wider dtype"
            )


def tuned_emulator(
    emulator: Emulator, adapter: str | Path, *, trust: Trust | None = None
) -> Emulator:
    """The emulator with an adapter that was tuned on it, in place (Emulator FT).

    Args:
        trust: whose adapters are opened; None: anybody's.

    Raises:
        PolicyError: `trust` refuses the adapter.
        MismatchError: the adapter was tuned on another emulator.
    """
    package = open_package(adapter, "adapter", trust=trust)
    check_tuned_on(package, emulator.id)
    apply_adapter(emulator.model, package, {i: i for i in emulator.adapter_indices})
    return emulator


def check_tuned_on(package: Package[AdapterManifest], emulator: str) -> None:
    """Raise MismatchError for an adapter of another emulator than the one of this package id."""
    if package.manifest.emulator != emulator:
        raise MismatchError(
            f"{package.path}: expected an adapter tuned on this emulator ({emulator[:19]}...), got "
            f"one tuned on {package.manifest.emulator[:19]}...: give the emulator it belongs to"
        )


def _read_full(
    decoder: Decoder, package: Package[AdapterManifest], slots: Mapping[int, int]
) -> Updates:
    dtype = DTYPES[package.manifest.dtype]
    expected: Expected = {
        f"layers.{slot}.{name}": (tuple(parameter.shape), dtype)
        for slot, i in slots.items()
        for name, parameter in decoder.layers[i].named_parameters()
    }
    tensors = package.read_tensors(expected)
    return {
        i: {
            name: tensors[f"layers.{slot}.{name}"].float()
            for name, _ in decoder.layers[i].named_parameters()
        }
        for slot, i in slots.items()
    }


def _read_lora(
    decoder: Decoder, package: Package[AdapterManifest], slots: Mapping[int, int]
) -> Updates:
    """W + (alpha / r) B A for every target."""
    lora, dtype = package.manifest.lora, DTYPES[package.manifest.dtype]
    assert lora is not None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for slot, i in slots.items():
        for path, shape in _target_shapes(decoder, i, lora, package.path).items():
            expected[f"layers.{slot}.{path}.lora_A.weight"] = ((lora.rank, shape[1]), dtype)
            expected[f"layers.{slot}.{path}.lora_B.weight"] = ((shape[0], lora.rank), dtype)
    tensors = package.read_tensors(expected)
    updates: Updates = {}
    for slot, i in slots.items():
        updates[i] = {}
        for path in lora.targets:
            module = decoder.layers[i].get_submodule(path)
            down_RI = tensors[f"layers.{slot}.{path}.lora_A.weight"].float()
            up_OR = tensors[f"layers.{slot}.{path}.lora_B.weight"].float()
            delta_OI = (lora.alpha / lora.rank) * (up_OR @ down_RI)
            delta = delta_OI.T if isinstance(module, Conv1D) else delta_OI
            updates[i][f"{path}.weight"] = module.get_parameter("weight").float() + delta
    return updates


def _target_shapes(
    decoder: Decoder, i: int, lora: LoraFacts, path: Path
) -> dict[str, tuple[int, int]]:
    """(output, input) features of every LoRA target in layer i."""
    known = {
        p.path: (sum(p.sizes), p.in_features)
        for p in (*decoder.projections(i), *decoder.feed_forward(i))
    }
    unknown = sorted(set(lora.targets) - set(known))
    if unknown or lora.rank > max(max(shape) for shape in known.values()):
        raise MismatchError(
            f"{path}: expected LoRA of a possible rank in {', '.join(known)}, got rank {lora.rank} "
            f"in {', '.join(lora.targets)[:200]}: ask for the adapter again"
        )
    return {target: known[target] for target in lora.targets}
