"""Where the randomness of the mechanisms comes from.

A guarantee holds only while nobody can guess the noise. PyTorch's generators do not qualify: the
CPU generator is a Mersenne Twister started from 32 bits of its seed, so whoever sees one noisy
vector can try every seed. Noise is therefore made from the operating system's cryptographic
generator, 53 fresh bits for each number.

Not covered: an operating system whose entropy is broken or cloned (a virtual machine resumed twice
from one snapshot), and whoever reads this process's memory.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Uniforms = Callable[..., Tensor]
"""uniforms(*shape): float64 numbers, independent and uniform on (0, 1]."""


class SeededNoiseWarning(UserWarning):
    """Noise comes from a seed: it can be repeated and guessed, and protects nothing."""


def system_uniforms(*shape: int) -> Tensor:
    """Uniform float64 numbers on (0, 1] from the operating system's entropy."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    return (bits & (2**53 - 1)).add_(1).double().mul_(2.0**-53).view(shape)


def seeded_uniforms(seed: int) -> Uniforms:
    """For tests only: a stream of uniform numbers that repeats itself. Warns."""
    warnings.warn(
        f"noise is drawn from testing seed {seed}: anyone can repeat it, nothing is protected; "
        "leave testing_seed out for real data",
        SeededNoiseWarning,
        stacklevel=2,
    )
    generator = torch.Generator().manual_seed(seed)

    def uniforms(*shape: int) -> Tensor:
        return 1 - torch.rand(shape, generator=generator, dtype=torch.float64)

    return uniforms


def uniforms_from(testing_seed: int | None) -> Uniforms:
    """The operating system's entropy, unless a testing seed is given (which warns)."""
    return system_uniforms if testing_seed is None else seeded_uniforms(testing_seed)
