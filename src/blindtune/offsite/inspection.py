"""What a package holds and what it reveals, told from its manifest and headers.

The model is built on the meta device only, to prove that the tensors are those that the manifest
describes: none of its numbers is computed. Either party inspects: the model owner before sending an
emulator, the data owner before using it; likewise with the adapter on its way back.

Shapes: O output features, I input features, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from blindtune.errors import MismatchError, PackageError
from blindtune.exchange.manifest import (
    AdapterLayer,
    AdapterManifest,
    CompressedLayer,
    EmulatorManifest,
    HarmonizerLayer,
    LayerEntry,
)
from blindtune.exchange.package import Package, open_package
from blindtune.exchange.signing import Signature, Trust
from blindtune.exchange.tensors import TensorFacts
from blindtune.models.decoder import Decoder
from blindtune.models.families import Family
from blindtune.models.tokenizers import FILE_NAMES, TOKENIZER_NAME, tokenizer_from_files
from blindtune.offsite.emulator import adapter_indices, sketch

_FACTOR = re.compile(r"(.+)\.(down|up)\.\d+")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


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


@dataclass(frozen=True, kw_only=True)
class InspectedEmulator:
    """What an emulator package says about itself."""

    kind: str
    """emulator."""
    path: Path
    id: str
    """Package id."""
    model: str
    """Fingerprint of the full model."""
    model_type: str
    dtype: str
    max_length: int | None
    """Longest sequence it was made for, in tokens, if it says so."""
    adapter_layers: int
    """N_a, at each end."""
    layers: tuple[LayerFacts, ...]
    parameters: int
    bytes: int
    """Of all files."""
    full_layers: int
    full_parameters: int
    full_bytes: int
    """Of the full model's weights."""
    unchanged_parameters: int
    """Numbers that are the full model's own, at most: what the manifest leaves open counts."""
    tokenizer: str
    """Its kind and number of tokens."""
    created_by: str
    signature: Signature | None
    """Who signed it."""
    reveals: tuple[str, ...]
    """Everything that a reader learns about the full model."""


@dataclass(frozen=True, kw_only=True)
class InspectedAdapter:
    """What an adapter package says about itself."""

    kind: str
    """adapter."""
    path: Path
    id: str
    emulator: str
    """Package id of the emulator that it was tuned on."""
    model: str
    """Fingerprint of the full model that it belongs to."""
    model_type: str
    dtype: str
    training: str
    """full or lora."""
    lora_rank: int | None
    lora_alpha: float | None
    lora_targets: tuple[str, ...]
    adapter_layers: int
    emulator_layers: int
    layers: tuple[LayerFacts, ...]
    """The adapter layers that it has tensors for."""
    parameters: int
    bytes: int
    privacy: dict[str, Any] | None
    """Differential privacy as the data owner states it: epsilon, delta, unit; None: none."""
    created_by: str
    signature: Signature | None
    """Who signed it."""
    reveals: tuple[str, ...]
    """Everything that a reader learns about the tuning."""


Inspection = InspectedEmulator | InspectedAdapter


def inspect(package: str | Path, *, trust: Trust | None = None) -> Inspection:
    """Tell what is in an emulator or adapter package.

    The whole package is verified; of an adapter the tensors are also read, for their norms.

    Args:
        package: its directory.
        trust: whose packages are opened, and by what names; None: anybody's.

    Raises:
        PolicyError: `trust` refuses the package.
        ConfigError: there is no such directory.
        PackageError: it is damaged or malformed, an emulator that cannot be opened, or an adapter
            with a NaN or infinite value or a tensor of no adapter layer.
        MismatchError: an emulator's tensors are not those that its manifest describes, or it is a
            package of split tuning.
        UnsupportedModelError: its model family is not known here.
    """
    opened = open_package(package, trust=trust)
    if isinstance(opened.manifest, EmulatorManifest):
        return _inspect_emulator(opened, opened.manifest)
    if isinstance(opened.manifest, AdapterManifest):
        return _inspect_adapter(opened, opened.manifest)
    raise MismatchError(
        f"{package}: expected an emulator or an adapter package, got a {opened.manifest.format} "
        "package: give the other directory"
    )


def _inspect_emulator(package: Package[Any], manifest: EmulatorManifest) -> InspectedEmulator:
    shape = sketch(package)
    family = Decoder(shape).family
    own = [_in_layer(package.header, f"{family.layers}.{i}.") for i in range(len(manifest.layers))]
    reduced = _reduced_paths(manifest, family)
    layers = tuple(
        _layer_facts(i, entry, tensors, reduced)
        for i, (entry, tensors) in enumerate(zip(manifest.layers, own, strict=True))
    )
    parameters = _count(package.header)
    changed = sum(_changed(facts, tensors) for facts, tensors in zip(layers, own, strict=True))
    feed_forward = any(linear.path in reduced for linear in family.feed_forward)
    return InspectedEmulator(
        kind="emulator",
        path=package.path,
        id=package.id,
        model=manifest.model,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        max_length=manifest.max_length or _int(manifest.config, "max_position_embeddings"),
        adapter_layers=manifest.adapter_layers,
        layers=layers,
        parameters=parameters,
        bytes=_file_bytes(manifest),
        full_layers=manifest.full_model.layers,
        full_parameters=manifest.full_model.parameters,
        full_bytes=manifest.full_model.bytes,
        unchanged_parameters=parameters - changed,
        tokenizer=_tokenizer(package, manifest, shape.config.vocab_size),
        created_by=manifest.created_by,
        signature=package.signature,
        reveals=_revealed(manifest, layers, parameters, changed, feed_forward=feed_forward),
    )


def _reduced_paths(manifest: EmulatorManifest, family: Family) -> tuple[str, ...]:
    """Projections that lost rank in every compressed layer, also where the product is stored.

    All of attention; the feed-forward network as a whole if any of it is stored as factors. That it
    lost rank and is stored dense everywhere, the manifest cannot tell.
    """
    factored = {p for e in manifest.layers if isinstance(e, CompressedLayer) for p in e.ranks}
    attention = tuple(linear.path for linear in family.attention)
    feed_forward = tuple(linear.path for linear in family.feed_forward)
    return attention + (feed_forward if factored & set(feed_forward) else ())


def _layer_facts(
    i: int, entry: LayerEntry, tensors: Mapping[str, TensorFacts], reduced: Sequence[str]
) -> LayerFacts:
    ranks: dict[str, tuple[int, ...]] = {}
    dense: tuple[str, ...] = ()
    if isinstance(entry, HarmonizerLayer):
        kind, ranks = "harmonizer", {"harmonizer": (entry.rank,)}
    elif isinstance(entry, CompressedLayer):
        kind, ranks = "compressed", {path: tuple(r) for path, r in entry.ranks.items()}
        dense = tuple(path for path in reduced if path not in ranks)
    else:
        kind = "adapter" if isinstance(entry, AdapterLayer) else "raw"
    return LayerFacts(
        index=i,
        kind=kind,
        ranks=ranks,
        dense=dense,
        parameters=_count(tensors),
        bytes=_bytes(tensors),
    )


def _changed(layer: LayerFacts, tensors: Mapping[str, TensorFacts]) -> int:
    """Numbers of a layer that are not the full model's own."""
    if layer.kind == "harmonizer":
        return _count(tensors)
    paths = {*layer.ranks, *layer.dense}
    altered = {}
    for name, facts in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if (factor[1] if factor else name.removesuffix(".weight")) in paths:
            altered[name] = facts
    return _count(altered)


def _revealed(
    manifest: EmulatorManifest,
    layers: Sequence[LayerFacts],
    parameters: int,
    changed: int,
    *,
    feed_forward: bool,
) -> tuple[str, ...]:
    indices = {
        kind: [layer.index for layer in layers if layer.kind == kind]
        for kind in ("adapter", "raw", "compressed", "harmonizer")
    }
    full, dropped = manifest.full_model, manifest.full_model.layers - len(layers)
    sizes = [f"{key} {manifest.config[key]}" for key in _SIZES if _int(manifest.config, key)]
    found = [
        f"the architecture: {manifest.model_type}, {', '.join(sizes)}",
        f"the full model's size: {full.layers} layers, {full.parameters:,} parameters",
        "the tokenizer, the embedding, the final norm and the head, unchanged",
        f"layers {spans(indices['adapter'])}, unchanged (the adapter)",
    ]
    if indices["raw"]:
        found.append(f"layers {spans(indices['raw'])}, unchanged (raw)")
    if indices["compressed"]:
        found.append(_compressed(indices["compressed"], feed_forward=feed_forward))
    if indices["harmonizer"]:
        found.append(
            f"layers {spans(indices['harmonizer'])}: a low-rank regression of what each one "
            "does to public text, none of its weights"
        )
    if dropped:
        found.append(f"nothing of {dropped} dropped layers, except how many they are")
    bound = "at most " if indices["compressed"] and not feed_forward else ""
    found += [
        f"{bound}{(parameters - changed) / full.parameters:.1%} of the full model's parameters "
        "are in the package unchanged",
        "the full model's fingerprint: who holds a copy of the model can recognise it",
    ]
    return tuple(found)


def _compressed(indices: Sequence[int], *, feed_forward: bool) -> str:
    if feed_forward:
        what, rest = "attention and feed-forward weights", "everything else in them unchanged"
    else:
        what = "attention weights"
        rest = (
            "everything else in them unchanged, unless the feed-forward weights lost rank too and "
            "are stored as a dense product, which the manifest does not tell"
        )
    return (
        f"layers {spans(indices)}: a low-rank approximation of the {what}, as factors of the rank "
        f"listed or as their dense product (rank not stated), {rest}"
    )


def _tokenizer(package: Package[Any], manifest: EmulatorManifest, rows: int) -> str:
    if TOKENIZER_NAME not in manifest.files:
        return "none"
    files = {name: package.read_file(name) for name in FILE_NAMES if name in manifest.files}
    backend: Any = getattr(tokenizer_from_files(files, rows=rows), "backend_tokenizer")  # noqa: B009
    return f"{type(backend.model).__name__}, {backend.get_vocab_size():,} tokens"


def _inspect_adapter(package: Package[Any], manifest: AdapterManifest) -> InspectedAdapter:
    _check_places(package, manifest)
    tensors = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    scale = 1.0 if manifest.lora is None else manifest.lora.alpha / manifest.lora.rank
    layers = []
    for i in range(manifest.layers):
        own = _in_layer(package.header, f"layers.{i}.")
        if own:
            values = {name: tensors[f"layers.{i}.{name}"] for name in own}
            norm = _norm(values, scale, package.path) if manifest.lora else _plain_norm(values)
            layers.append(
                LayerFacts(
                    index=i,
                    kind="adapter",
                    ranks={},
                    parameters=_count(own),
                    bytes=_bytes(own),
                    norm=norm,
                )
            )
    lora, private = manifest.lora, manifest.privacy
    return InspectedAdapter(
        kind="adapter",
        path=package.path,
        id=package.id,
        emulator=manifest.emulator,
        model=manifest.model,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        training=manifest.kind,
        lora_rank=lora.rank if lora else None,
        lora_alpha=lora.alpha if lora else None,
        lora_targets=tuple(lora.targets) if lora else (),
        adapter_layers=manifest.adapter_layers,
        emulator_layers=manifest.layers,
        layers=tuple(layers),
        parameters=_count(package.header),
        bytes=_file_bytes(manifest),
        privacy=None if private is msgspec.UNSET else msgspec.to_builtins(private),
        created_by=manifest.created_by,
        signature=package.signature,
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


def _norm(values: Mapping[str, Tensor], scale: float, path: Path) -> float:
    """Of the update scale * B A over all targets; |B A|^2 = <B^T B, A A^T>, never formed."""
    total = 0.0
    for name, down_RI in values.items():
        stem, found, _ = name.partition(".lora_A.")
        up_OR = values.get(f"{stem}.lora_B.weight")
        if not found and ".lora_B." in name:
            continue
        if not found or up_OR is None or down_RI.ndim != 2 or up_OR.ndim != 2:
            raise PackageError(f"{path}: expected LoRA factors in pairs: ask for the package again")
        if up_OR.shape[1] != down_RI.shape[0]:
            raise PackageError(f"{path}: the ranks of {stem} differ: ask for the package again")
        left_RR = up_OR.double().T @ up_OR.double()
        right_RR = down_RI.double() @ down_RI.double().T
        total += float((left_RR * right_RR).sum())
    return float(scale * max(total, 0.0) ** 0.5)


def _in_layer(header: Mapping[str, TensorFacts], prefix: str) -> dict[str, TensorFacts]:
    return {n.removeprefix(prefix): f for n, f in header.items() if n.startswith(prefix)}


def _count(header: Mapping[str, TensorFacts]) -> int:
    return sum(int(torch.Size(facts.shape).numel()) for facts in header.values())


def _bytes(header: Mapping[str, TensorFacts]) -> int:
    return sum(facts.end - facts.begin for facts in header.values())


def _file_bytes(manifest: EmulatorManifest | AdapterManifest) -> int:
    return sum(entry.bytes for entry in manifest.files.values())


def _int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None


def spans(indices: Sequence[int]) -> str:
    """Sorted indices in short: 0, 1, 2, 5 becomes "0-2, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
