"""What a decoder costs: FLOPs a token, and how many of them this machine does a second.

A multiply-add counts as two FLOPs. Linear maps and attention are counted; norms, activations and
the embedding lookup are not. Models on the meta device will do: only shapes are read.

Shapes: L length, D hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from blindtune.models.decoder import Decoder
from blindtune.models.encoders import is_encoder, meta_encoder
from blindtune.models.loading import load_config, model_source
from blindtune.models.surgery import meta_model

EFFICIENCY = 0.7
"""Share of the matrix product's rate that small decoders reached in training on CPUs (measured
0.85 forward, 0.73 forward and backward)."""
LAYER_CALL_SECONDS = 3e-4
"""What calling one layer costs on top of its arithmetic; it matters for tiny models only."""
FLOAT = 4
"""Bytes of a float32."""
EIGH_FLOPS = 30.0
"""Eigenvectors of n x n in float64, as float32 FLOPs of a product over n^3 (measured 25 .. 47)."""
SVD_FLOPS = 40.0
"""Singular vectors of n x n in float32, in the same unit (measured 34 .. 68)."""
READ_BYTES_PER_SECOND = 1e9
"""Reading, hashing and writing weights (measured: 1 to 2 GB/s with a warm cache)."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of a part of a decoder for one token, in one forward pass."""

    linear: float = 0.0
    """Linear maps: two a weight."""
    attention: float = 0.0
    """Products of queries, keys and values at a given length, causal."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(linear=self.linear + other.linear, attention=self.attention + other.attention)

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """Gradients of the activations alone, as in a frozen layer that a gradient passes."""
        return self.linear + 2 * self.attention

    @property
    def weights(self) -> float:
        """Gradients of the weights."""
        return self.linear


@dataclass(frozen=True, kw_only=True)
class DecoderCost:
    """The parts of a decoder at one sequence length."""

    layers: tuple[Cost, ...]
    head: Cost

    def stack(self, start: int = 0, stop: int | None = None) -> Cost:
        """The layers start .. stop-1 together."""
        return sum(self.layers[start:stop], Cost())

    @property
    def forward(self) -> float:
        """FLOPs a token of a forward pass, head included."""
        return (self.stack() + self.head).forward

    @property
    def training(self) -> float:
        """FLOPs a token of forward and backward passes with all layers trained, head frozen."""
        stack = self.stack()
        return self.forward + stack.backward + stack.weights + self.head.backward


def decoder_cost(decoder: Decoder, length: int) -> DecoderCost:
    """Count a decoder, emulators included (harmonizers, low-rank factors).

    Args:
        decoder: may be on the meta device.
        length: L, tokens of a sequence: a token attends to L / 2 others on average.
    """
    layers = tuple(_layer_cost(decoder, i, length) for i in range(decoder.layer_count))
    between = decoder.family.after_norm
    after = None if between is None else _module(decoder.model, between)
    head = matrix_numbers(decoder.head) + (0 if after is None else matrix_numbers(after))
    return DecoderCost(layers=layers, head=Cost(linear=2.0 * head))


def _layer_cost(decoder: Decoder, i: int, length: int) -> Cost:
    linear = 2.0 * matrix_numbers(decoder.layers[i])
    if not decoder.is_raw(i):
        return Cost(linear=linear)
    width = next(
        size
        for projection in decoder.projections(i)
        for part, size in zip(projection.parts, projection.sizes, strict=True)
        if part == "query"
    )
    return Cost(linear=linear, attention=2.0 * length * width)


def matrix_numbers(module: nn.Module) -> int:
    """Numbers in the matrices of a module: two FLOPs each for a token that passes."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(parent), name, None)
    return found if isinstance(found, nn.Module) else None


def sketch(name: str | Path) -> PreTrainedModel:
    """A model's shape without its weights, from its config alone (on the meta device).

    Args:
        name: as for `load_any`.

    Raises:
        ModelError: as for `load_any`.
    """
    config = load_config(model_source(name))
    return meta_encoder(config) if is_encoder(config) else meta_model(config)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast this machine multiplies matrices in float32."""

    flops_per_second: float
    threads: int

    def seconds(self, flops: float, layer_calls: float = 0.0) -> float:
        """How long a decoder takes for that many FLOPs in that many calls of layers."""
        return flops / (EFFICIENCY * self.flops_per_second) + layer_calls * LAYER_CALL_SECONDS


def matmul_rate(width: int = 1024, *, seconds: float = 0.3) -> Rate:
    """Measure the rate of [512, width] @ [width, width] products, at torch's thread count."""
    x, weight = torch.rand(512, width), torch.rand(width, width)
    out = x @ weight
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        torch.matmul(x, weight, out=out)
        count += 1
    return Rate(
        flops_per_second=count * 2.0 * out.numel() * width / elapsed,
        threads=torch.get_num_threads(),
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an act will take. Estimated, not promised."""

    memory_bytes: int
    """At most in use at one time, by the whole process."""
    written_bytes: int
    """Of the output."""
    scratch_bytes: int
    """Beside the output while the act runs."""
    seconds: float
    parts: dict[str, float]
    """Seconds by part of the act."""
    tokens: int
    """That go through a model, or parts of it."""
    rate: Rate
    """What the times were computed from."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Other bytes worth knowing, by name."""
    findings: dict[str, str] = field(default_factory=dict)
    """What was not estimated but measured, by name."""


def estimated(
    parts: dict[str, float],
    rate: Rate,
    *,
    memory: float,
    written: float,
    scratch: float = 0.0,
    tokens: int = 0,
    sizes: dict[str, int] | None = None,
) -> Estimate:
    """An estimate of an act in this process; `memory` comes on top of what it uses already."""
    return Estimate(
        memory_bytes=_resident_bytes() + int(memory),
        written_bytes=int(written),
        scratch_bytes=int(scratch),
        seconds=sum(parts.values()),
        parts=parts,
        tokens=tokens,
        rate=rate,
        sizes=sizes or {},
    )


def weight_bytes(model: nn.Module) -> int:
    """Of the weights in float32, tied ones once."""
    return FLOAT * sum(p.numel() for p in model.parameters())


def _resident_bytes() -> int:
    """What this process, with its libraries, has in use now."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 400 << 20
