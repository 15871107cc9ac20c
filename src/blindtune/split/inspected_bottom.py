"""What a bottom package holds and what it reveals, told from its manifest and headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blindtune.exchange.packages.inspected import InspectedPackage, common_facts
from blindtune.exchange.packages.manifest import BottomManifest
from blindtune.exchange.packages.package import Package
from blindtune.models.margins import margins_of, shown_tokens
from blindtune.models.tokenizers import told
from blindtune.split.bottom import tokenizer_of, verified_sketch


@dataclass(frozen=True, kw_only=True)
class InspectedBottom(InspectedPackage):
    """What a bottom package says about itself."""

    max_length: int | None
    """Longest sequence in tokens, if it says so."""
    partition: str
    """two-part or u-shape."""
    cut: int
    """Layers below the vendor's."""
    last: int
    """Layers above the vendor's, which the customer runs in the U-shape."""
    layers: int
    """Of the whole model."""
    tokenizer: str
    """Its kind and number of tokens."""
    before: tuple[str, ...]
    """Tokens that it puts before every text, quoted; by default they are sent without noise."""
    after: tuple[str, ...]
    """The same, behind every text."""
    special_tokens: tuple[str, ...]
    """What its settings call special, quoted: wherever a text has one, it is a word."""


def inspect_bottom(package: Package[Any], manifest: BottomManifest) -> InspectedBottom:
    """See `evaluation.inspection.inspect`; the model is built on the meta device only."""
    shape = verified_sketch(package)
    tokenizer = tokenizer_of(package, shape)
    margins = margins_of(tokenizer)
    return InspectedBottom(
        **common_facts(package),
        max_length=manifest.max_length,
        partition=manifest.partition,
        cut=manifest.cut,
        last=manifest.last,
        layers=manifest.layers,
        tokenizer=told(tokenizer),
        before=shown_tokens(tokenizer, margins.before),
        after=shown_tokens(tokenizer, margins.after),
        special_tokens=shown_tokens(tokenizer, tokenizer.all_special_ids),
        reveals=_revealed(manifest),
    )


def _revealed(manifest: BottomManifest) -> tuple[str, ...]:
    sizes = [f"{key} {manifest.config[key]}" for key in ("hidden_size", "vocab_size")
             if isinstance(manifest.config.get(key), int)]  # fmt: skip
    shape = [manifest.model_type, *sizes, f"{manifest.layers} layers"]
    found = [
        f"the architecture: {', '.join(shape)}",
        "the tokenizer and the embedding, unchanged",
    ]
    if manifest.cut:
        found.append(f"the first {manifest.cut} layers, unchanged")
    if manifest.partition == "u-shape":
        last = f"the last {manifest.last} layers, the" if manifest.last else "the"
        found.append(f"{last} final norm and the head, if it has them, unchanged")
    kept = manifest.layers - manifest.cut - manifest.last
    where = "between" if manifest.partition == "u-shape" else "above"
    return (
        *found,
        f"nothing of the {kept} layers {where}, which stay with the vendor",
        "the whole model's fingerprint: who holds a copy of the model can recognise it",
    )
