"""The model owner's second act: make emulators from a study, without training.

A triplet (N_a, alpha, beta) decides: N_a adapter layers at each end stay raw, the share alpha of
the middle layers with the lowest scores becomes harmonizers, the others lose rank in their
attention weights as beta says.

Source: ScaleOT (arXiv 2412.09812), section "Privacy-utility-scalable emulators".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from blindtune.errors import ConfigError, MismatchError
from blindtune.exchange.packages.manifest import (
    AdapterLayer,
    CompressedLayer,
    FullModelFacts,
    HarmonizerLayer,
    LayerEntry,
    RawLayer,
    decode_manifest,
)
from blindtune.exchange.packages.package import read_manifest
from blindtune.exchange.packages.signing import Signer
from blindtune.exchange.packages.writing import check_place
from blindtune.kinds import check_kinds
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer, preferred_device
from blindtune.models.surgery import keep_layers, replace_layer
from blindtune.offsite.emulator import write_emulator
from blindtune.offsite.model_owner.compression import Reading, compress_layer
from blindtune.offsite.model_owner.study import Study, open_study
from blindtune.places import located


@dataclass(frozen=True, kw_only=True)
class EmulatorConfig:
    """The triplet, and how compression reads it."""

    adapter_layers: int = 2
    """N_a: layers at each end that stay raw and are tuned."""
    alpha: float = 0.25
    """Share of the middle layers that harmonizers replace, 0..1 (rounded to whole layers)."""
    beta: float = 0.8
    """Share of the rank of kept layers' attention weights that stays (or goes: see `reading`)."""
    reading: Reading = "kept"
    """kept: beta of the rank stays, 1 compresses nothing; removed: beta of it goes, 0 compresses
    nothing. The paper allows both; measured in docs/choosing.md."""
    weighted: bool = True
    """Truncate in the metric of the calibration inputs instead of plain SVD (ours)."""
    feed_forward: bool = False
    """Also compress the feed-forward weights."""
    choice: Literal["scores", "uniform"] = "scores"
    """Which layers to replace: those with the lowest scores, or evenly spaced ones (the ablation of
    offsite-tuning)."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights in the package."""

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.adapter_layers < 1:
            raise ConfigError(f"expected adapter_layers >= 1, got {self.adapter_layers}")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"expected {name} from 0 to 1, got {getattr(self, name)}")
        choices = {
            "reading": ("removed", "kept"),
            "choice": ("scores", "uniform"),
            "dtype": ("float32", "float16", "bfloat16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def compresses(self) -> bool:
        """Whether beta takes any rank away."""
        return self.beta > 0 if self.reading == "removed" else self.beta < 1


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """An emulator that was made."""

    id: str
    """Package id."""
    path: Path
    config: EmulatorConfig
    layers: tuple[LayerEntry, ...]
    parameters: int
    """Of the emulator."""
    full_parameters: int
    bytes: int
    """Of the package's files, as its manifest lists them."""
    full_bytes: int
    """Of the full model's weights."""
    full_layers: int
    seconds: float

    @property
    def kinds(self) -> dict[str, int]:
        """How many layers are adapter, raw, compressed and harmonizer layers."""
        return dict(Counter(str(layer.__struct_config__.tag) for layer in self.layers))


def emulate(
    study: str | Path | Study,
    out: str | Path,
    config: EmulatorConfig | None = None,
    *,
    model: str | Path | None = None,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> Emulation:
    """Make one emulator package from a study. Seconds to minutes, no training.

    Args:
        study: a study or its directory.
        out: directory of the package.
        config: the triplet.
        model: where the studied model is now; None: where it was when it was studied.
        overwrite: replace an earlier package.
        signer: signs the package; None: it stays unsigned.

    Raises:
        ConfigError: the triplet leaves no middle layer or no kept one, or asks for what the study
            does not hold.
        MismatchError: the model at the study's place is no longer the one that was studied.
    """
    config, start = config or EmulatorConfig(), time.perf_counter()
    found = study if isinstance(study, Study) else open_study(study)
    replaced = replaced_layers(found, config)
    source = found.model if model is None else model
    read = None if isinstance(study, Study) else study
    check_place(located(out), overwrite=overwrite, kind="emulator", inputs=(source, read))
    full = load_model(source, device=preferred_device())
    if fingerprint(full) != found.fingerprint:
        raise MismatchError(
            f"expected the model that was studied, got another one at {source}: study it "
            "again, or restore it"
        )
    facts = full_model_facts(full)
    layers = reshape(full, found, replaced, config)
    package_id = write_emulator(
        full, load_tokenizer(source), layers, out, model_fingerprint=found.fingerprint,
        adapter_layers=config.adapter_layers, full_model=facts, dtype=config.dtype,
        overwrite=overwrite, signer=signer,
    )  # fmt: skip
    written = decode_manifest(read_manifest(located(out)))
    return Emulation(
        id=package_id,
        path=located(out),
        config=config,
        layers=tuple(layers),
        parameters=full.num_parameters(),
        full_parameters=facts.parameters,
        bytes=sum(entry.bytes for entry in written.files.values()),
        full_bytes=facts.bytes,
        full_layers=facts.layers,
        seconds=time.perf_counter() - start,
    )


def full_model_facts(model: PreTrainedModel) -> FullModelFacts:
    """The full model's size."""
    return FullModelFacts(
        parameters=model.num_parameters(),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        layers=Decoder(model).layer_count,
    )


def replaced_layers(study: Study, config: EmulatorConfig) -> tuple[int, ...]:
    """Indices in the model of the layers that become harmonizers (or are dropped).

    Refuses all that cannot be made of a study, before anything is loaded.

    Raises:
        ConfigError: N_a does not fit the study, alpha leaves no kept middle layer, or the study has
            no scores to choose by, or no moments to compress the others by.
    """
    ends = config.adapter_layers
    if ends < study.first:
        raise ConfigError(
            f"expected adapter_layers >= {study.first}, which the study was made for, got {ends}: "
            f"choose a larger N_a, or study again with --min-adapter-layers {ends}"
        )
    middle = range(ends, study.layer_count - ends)
    count = int(config.alpha * len(middle) + 0.5)
    if not middle or count >= len(middle):
        raise ConfigError(
            f"expected a kept middle layer, got none of {study.layer_count} layers with "
            f"adapter_layers={ends} and alpha={config.alpha}: choose smaller values"
        )
    if config.compresses:
        _moments(study, middle[0], config)
    if config.choice == "uniform":
        kept = uniform_choice(len(middle), len(middle) - count)
        return tuple(i for k, i in enumerate(middle) if k not in kept)
    if count and len(study.scores_M) > 1 and bool((study.scores_M == study.scores_M[0]).all()):
        raise ConfigError(
            "expected a study with scores, this one began with none and learned none: take "
            "the choice uniform, or study again with initial scores greedy or with candidates"
        )
    ranked = sorted(middle, key=lambda i: (float(study.scores_M[i - study.first]), i))
    return tuple(sorted(ranked[:count]))


def uniform_choice(count: int, kept: int) -> frozenset[int]:
    """Evenly spaced positions: round(k (n-1) / (m-1)) for k = 0 .. m-1; the middle one for m = 1.

    Source: offsite-tuning (arXiv 2302.04870), its layer-drop baseline.
    """
    if kept == 1:
        return frozenset({count // 2})
    return frozenset(round(k * (count - 1) / (kept - 1)) for k in range(kept))


def reshape(
    model: PreTrainedModel, study: Study, replaced: Sequence[int], config: EmulatorConfig
) -> list[LayerEntry]:
    """Turn the full model into the emulator, in place; returns what each layer became."""
    decoder = Decoder(model)
    last = decoder.layer_count - config.adapter_layers
    layers: list[LayerEntry] = []
    for i in range(decoder.layer_count):
        if not config.adapter_layers <= i < last:
            layers.append(AdapterLayer())
        elif i in replaced:
            stand_in = study.stand_ins[i - study.first]
            if isinstance(stand_in, Harmonizer):
                replace_layer(model, i, stand_in.to(model.device, model.dtype))
                layers.append(HarmonizerLayer(rank=stand_in.down.out_features))
        elif config.compresses:
            ranks = compress_layer(
                decoder,
                i,
                config.beta,
                reading=config.reading,
                second_moments=_moments(study, i, config),
                feed_forward=config.feed_forward,
            )
            layers.append(CompressedLayer(ranks=ranks))
        else:
            layers.append(RawLayer())
    if len(layers) < decoder.layer_count:
        keep_layers(model, [i for i in range(decoder.layer_count) if i not in replaced])
    return layers


def _moments(study: Study, i: int, config: EmulatorConfig) -> dict[str, Tensor] | None:
    if not config.weighted:
        return None
    if not study.second_moments:
        raise ConfigError(
            "expected a study with moments for weighted compression, got one made without the "
            "regression warm start: give --no-weighted, or study again with --warm-start regression"
        )
    moments = study.second_moments[i - study.first]
    if config.feed_forward and not study.config.feed_forward:
        raise ConfigError(
            "expected a study with feed-forward moments, got one without: give --no-weighted, or "
            "study again with --feed-forward"
        )
    return moments
