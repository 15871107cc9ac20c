"""What an emulator package holds and what it reveals, told from its manifest and headers.

The model is built on the meta device only, to prove that the tensors are those that the manifest
describes: none of its numbers is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from blindtune.exchange.packages.inspected import InspectedPackage, common_facts
from blindtune.exchange.packages.manifest import (
    AdapterLayer,
    CompressedLayer,
    EmulatorManifest,
    HarmonizerLayer,
    LayerEntry,
)
from blindtune.exchange.packages.package import Package
from blindtune.exchange.tensors import TensorFacts, numbers
from blindtune.models.decoder import Decoder
from blindtune.models.families import Family
from blindtune.models.tokenizers import TOKENIZER_NAME, told
from blindtune.offsite.emulator import package_sketch, tokenizer_of
from blindtune.offsite.package_facts import (
    LayerFacts,
    of_layer,
    spans,
    weight_bytes,
)

_FACTOR = re.compile(r"(.+)\.(down|up)\.\d+")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class InspectedEmulator(InspectedPackage):
    """What an emulator package says about itself."""

    max_length: int | None
    """Longest sequence it was made for, in tokens, if it says so."""
    adapter_layers: int
    """N_a, at each end."""
    layers: tuple[LayerFacts, ...]
    full_layers: int
    full_parameters: int
    full_bytes: int
    """Of the full model's weights."""
    unchanged_parameters: int
    """Numbers that are the full model's own, at most: what the manifest leaves open counts."""
    tokenizer: str
    """Its kind and number of tokens."""


def inspect_emulator(package: Package[Any], manifest: EmulatorManifest) -> InspectedEmulator:
    """See `inspection.inspect`."""
    shape = package_sketch(package)
    family = Decoder(shape).family
    own = [of_layer(package.header, f"{family.layers}.{i}.") for i in range(len(manifest.layers))]
    reduced = _reduced_paths(manifest, family)
    layers = tuple(
        _layer_facts(i, entry, tensors, reduced)
        for i, (entry, tensors) in enumerate(zip(manifest.layers, own, strict=True))
    )
    parameters = package.parameters
    changed = sum(_changed(facts, tensors) for facts, tensors in zip(layers, own, strict=True))
    feed_forward = any(linear.path in reduced for linear in family.feed_forward)
    return InspectedEmulator(
        **common_facts(package),
        max_length=manifest.max_length or _int(manifest.config, "max_position_embeddings"),
        adapter_layers=manifest.adapter_layers,
        layers=layers,
        full_layers=manifest.full_model.layers,
        full_parameters=manifest.full_model.parameters,
        full_bytes=manifest.full_model.bytes,
        unchanged_parameters=parameters - changed,
        tokenizer=_tokenizer(package, shape),
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
        parameters=numbers(tensors),
        bytes=weight_bytes(tensors),
    )


def _changed(layer: LayerFacts, tensors: Mapping[str, TensorFacts]) -> int:
    """Numbers of a layer that are not the full model's own."""
    if layer.kind == "harmonizer":
        return numbers(tensors)
    paths = {*layer.ranks, *layer.dense}
    altered = {}
    for name, facts in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if (factor[1] if factor else name.removesuffix(".weight")) in paths:
            altered[name] = facts
    return numbers(altered)


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


def _tokenizer(package: Package[EmulatorManifest], shape: PreTrainedModel) -> str:
    if TOKENIZER_NAME not in package.manifest.files:
        return "none"
    return told(tokenizer_of(package, shape))


def _int(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None
