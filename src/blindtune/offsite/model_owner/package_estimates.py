"""What the short acts will take, before they start: emulate, inspect, plug in.

Shapes and counts come from configs, manifests and headers; no weight is read but a study's. Times:
see `models/costs.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from blindtune.errors import ConfigError
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.models.costs import (
    EIGH_FLOPS,
    FLOAT,
    READ_BYTES_PER_SECOND,
    SVD_FLOPS,
    Estimate,
    decoder_cost,
    estimated,
    matmul_rate,
    sketch,
    weight_bytes,
)
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_tokenizer
from blindtune.models.tokenizers import tokenizer_files
from blindtune.offsite import package_facts
from blindtune.offsite.emulator import DTYPES
from blindtune.offsite.model_owner.compression import compressed_rank, saves_space
from blindtune.offsite.model_owner.emulation import EmulatorConfig, replaced_layers
from blindtune.offsite.model_owner.study import Study, open_study
from blindtune.offsite.model_owner.vetting import public_windows
from blindtune.places import located


def estimate_emulate(
    study: str | Path | Study,
    config: EmulatorConfig | None = None,
    *,
    model: str | Path | None = None,
) -> Estimate:
    """Estimate `emulate`: reading the model, an eigenvalue problem or SVD a weight, writing.

    Raises:
        ConfigError: as for `emulate`.
    """
    config = config or EmulatorConfig()
    found = study if isinstance(study, Study) else open_study(study)
    replaced = replaced_layers(found, config)
    place = found.model if model is None else model
    full = sketch(place)
    decoder, rate = Decoder(full), matmul_rate(Decoder(full).hidden_size)
    numbers, flops = float(full.num_parameters()), 0.0
    for i in range(config.adapter_layers, decoder.layer_count - config.adapter_layers):
        if i in replaced:
            numbers -= sum(p.numel() for p in decoder.layers[i].parameters())
            stand_in = found.stand_ins[i - found.first]
            numbers += sum(p.numel() for p in stand_in.parameters())
        elif config.compresses:
            saved, work = _compression(decoder, i, config)
            numbers, flops = numbers - saved, flops + work
    size = torch.empty((), dtype=DTYPES[config.dtype]).element_size()
    files = sum(len(data) for data in tokenizer_files(load_tokenizer(place)).values())
    written = numbers * size + files
    moments = sum(t.numel() * FLOAT for m in found.second_moments for t in m.values())
    parts = {
        "load and check": 2 * weight_bytes(full) / READ_BYTES_PER_SECOND,
        "compress": flops / rate.flops_per_second,
        "write": 2 * written / READ_BYTES_PER_SECOND,
    }
    return estimated(parts, rate, memory=weight_bytes(full) + written + moments, written=written)


def _compression(decoder: Decoder, i: int, config: EmulatorConfig) -> tuple[int, float]:
    """(numbers saved, FLOPs) of compressing one layer."""
    projections = decoder.projections(i)
    projections += decoder.feed_forward(i) if config.feed_forward else ()
    saved, flops, rooted = 0, 0.0, set[tuple[str, int]]()
    for p in projections:
        ranks = tuple(
            compressed_rank((size, p.in_features), config.beta, config.reading) for size in p.sizes
        )
        if saves_space(p, ranks):
            saved += p.in_features * sum(p.sizes)
            saved -= sum(r * (p.in_features + n) for r, n in zip(ranks, p.sizes, strict=True))
        for size in p.sizes:
            small = min(size, p.in_features)
            if config.weighted:  # float64 products take twice as long
                inputs = (p.path.rpartition(".")[0], p.in_features)  # gate and up read the same
                roots = size > p.in_features and inputs not in rooted
                rooted |= {inputs} if roots else set()
                flops += (1 + roots) * EIGH_FLOPS * small**3
                flops += 4.0 * size * p.in_features * (p.in_features + small)
            else:
                flops += SVD_FLOPS * small**2 * max(size, p.in_features)
    return saved, flops


def estimate_inspect(package: str | Path) -> Estimate:
    """Estimate `inspect`: hashing every file; of an adapter, the tensors too.

    Raises:
        ConfigError: there is no such directory.
    """
    folder = located(package)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a package's directory, found none: check the path")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    parts = {"read and check": 2 * size / READ_BYTES_PER_SECOND}
    return estimated(parts, matmul_rate(), memory=2 * size, written=0)


def estimate_plug_in(
    model: str | Path,
    adapter: str | Path,
    *,
    dtype: str = "float32",
    data: str | Path | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `plug_in`: reading, hashing and writing the full model, scoring public text twice.

    Raises:
        PackageError, ModelError, DataError: as for `plug_in`.
    """
    package = open_package(adapter, "adapter", trust=trust)
    full = sketch(model)
    decoder, weights = Decoder(full), weight_bytes(full)
    rate, added = matmul_rate(decoder.hidden_size), package_facts.weight_bytes(package.header)
    size = torch.empty((), dtype=DTYPES[dtype]).element_size()
    written = weights / FLOAT * size
    parts = {
        "load and check": 2 * weights / READ_BYTES_PER_SECOND,
        "write": 2 * written / READ_BYTES_PER_SECOND,
    }
    tokens = longest = 0
    if data is not None:
        windows = public_windows(full, load_tokenizer(model), data)
        tokens, longest = 2 * windows.tokens, max(map(len, windows.input_ids))
        work, calls = decoder_cost(decoder, longest).forward, 2 * len(windows) * decoder.layer_count
        parts["score"] = rate.seconds(tokens * work, calls)
    scoring = FLOAT * longest * (16 * decoder.hidden_size + int(decoder.config.vocab_size))
    memory = weights + 2 * added + scoring
    return estimated(parts, rate, memory=memory, written=written, tokens=tokens)
