"""Emulators by other methods, as the same package that `emulate` writes.

Each method is one function in one module, `(model, public windows, config) -> (layers, tokens)`,
and one line in the table below; its config says which. What the data owner and the owner's plug-in
do with the package does not depend on how it was made. docs/competitors.md compares them.

Shapes: N windows, L length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from blindtune.exchange.packages.manifest import LayerEntry
from blindtune.exchange.packages.writing import check_place
from blindtune.models.decoder import check_context, context_limit
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer, preferred_device
from blindtune.offsite.competitors.crash import CrashConfig, crash
from blindtune.offsite.competitors.fixed_margin import FixedMarginConfig, raise_by_margin
from blindtune.offsite.competitors.gradot import GradotConfig, gradot
from blindtune.offsite.competitors.layer_drop import LayerDropConfig, drop_layers
from blindtune.offsite.emulator import write_emulator
from blindtune.offsite.model_owner.emulation import full_model_facts
from blindtune.places import located
from blindtune.training.text import DataConfig
from blindtune.training.windows import full_windows, shuffled

CompetitorConfig = LayerDropConfig | CrashConfig | GradotConfig | FixedMarginConfig
METHODS: dict[type, Callable[..., tuple[list[LayerEntry], int]]] = {
    LayerDropConfig: drop_layers,
    CrashConfig: crash,
    GradotConfig: gradot,
    FixedMarginConfig: raise_by_margin,
}
"""What makes the emulator that a config asks for."""


@dataclass(frozen=True, kw_only=True)
class CompetitorEmulation:
    """An emulator that another method made."""

    id: str
    """Package id."""
    path: Path
    config: CompetitorConfig
    layers: tuple[LayerEntry, ...]
    parameters: int
    """Of the emulator."""
    full_parameters: int
    tokens: int
    """Of public text that went through the model to make it."""
    seconds: float


def emulate_by(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: CompetitorConfig,
    *,
    max_length: int = 128,
    overwrite: bool = False,
) -> CompetitorEmulation:
    """Make an emulator package of a model by another method than a study.

    Args:
        model: a local directory, a hub name, or an embedded model.
        data: public text; methods that need none read it all the same.
        out: directory of the package.
        config: its class chooses the method.
        max_length: tokens of a window of public text.
        overwrite: replace an earlier package.

    Raises:
        ModelError, DataError, ConfigError, OutputError: see errors.py.
    """
    start = time.perf_counter()
    check_place(located(out), overwrite=overwrite, kind="emulator", inputs=(model, data))
    full = load_model(model, device=preferred_device())
    check_context(max_length, context_limit(full.config))
    windows_NL = public_windows(model, data, max_length)
    name, facts = fingerprint(full), full_model_facts(full)
    make: Callable[..., Any] = METHODS[type(config)]
    layers, tokens = make(full, windows_NL, config)
    package_id = write_emulator(
        full,
        load_tokenizer(model),
        layers,
        out,
        model_fingerprint=name,
        adapter_layers=config.adapter_layers,
        full_model=facts,
        overwrite=overwrite,
    )
    return CompetitorEmulation(
        id=package_id,
        path=located(out),
        config=config,
        layers=tuple(layers),
        parameters=full.num_parameters(),
        full_parameters=facts.parameters,
        tokens=tokens,
        seconds=time.perf_counter() - start,
    )


def public_windows(model: str | Path, data: str | Path, max_length: int) -> Tensor:
    """All full windows of a public text [N, L], in a fixed shuffled order.

    Raises:
        DataError: there is not one.
    """
    reading = DataConfig(max_length=max_length)
    return shuffled(full_windows(data, load_tokenizer(model), reading), 0)
