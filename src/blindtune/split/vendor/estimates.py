"""What the vendor's acts of split tuning will take, from the model's shape alone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from blindtune.exchange.wire.messages import WINDOW
from blindtune.models.costs import (
    FLOAT,
    READ_BYTES_PER_SECOND,
    Estimate,
    estimated,
    matmul_rate,
    sketch,
    weight_bytes,
)
from blindtune.split.numbered_states import KEPT_STATES
from blindtune.split.partition import Stack, feature_size, stack_of
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.lora import freeze
from blindtune.split.vendor.service import BottomConfig

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MOMENTS = 2
"""AdamW keeps two numbers a parameter."""
_ACTIVATIONS = 34
"""Numbers of the width D that training keeps a token and layer, near enough for every family."""


def estimate_bottom(model: str | Path, cut: int, config: BottomConfig | None = None) -> Estimate:
    """Estimate `bottom`.

    Raises:
        ModelError, ConfigError: as for `bottom`.
    """
    config = config or BottomConfig()
    stack = stack_of(sketch(model))
    whole, written = weight_bytes(stack.model), _package_bytes(stack, cut, config)
    rate = matmul_rate(stack.hidden_size)
    parts = _reading(whole, written)
    return estimated(parts, rate, memory=whole + written, written=written)


def estimate_serve(
    model: str | Path,
    cut: int,
    config: BottomConfig | None = None,
    limits: VendorLimits | None = None,
) -> Estimate:
    """Estimate `serve`: until it serves, and what every further job takes.

    Jobs are counted at the largest rank and head that `limits` allows, with LoRA in every linear
    map; memory is for as many of them as it allows, and one message of the largest size at work. In
    the U-shape there are open forwards besides: graphs of as many tokens as one message has, and
    every job's inputs.
    Replies that a job remembers are counted at their bound: each may hold as many rows as a message
    has, where gradients of the inputs are asked for. Customers of this project ask for none.

    Raises:
        ModelError, ConfigError: as for `serve`.
    """
    config, limits = config or BottomConfig(), limits or VendorLimits()
    stack = stack_of(sketch(model))
    where = config.cut(stack.layer_count, cut)
    whole, written = weight_bytes(stack.model), _package_bytes(stack, cut, config)
    served, rank = freeze(stack, where), limits.max_rank
    shapes = [
        tuple(stack.model.get_submodule(path).weight.shape)
        for path in (*served.attention, *served.feed_forward)
    ]
    learned = FLOAT * rank * sum(sum(shape) for shape in shapes)
    if where.partition == "two-part":
        learned += FLOAT * limits.max_outputs * (feature_size(stack) + 1)
    job = (2 + _MOMENTS) * learned  # weights and gathered gradients, and the optimizer's
    state = (1 + _MOMENTS) * learned
    work = (
        FLOAT * _ACTIVATIONS * stack.hidden_size
        * len(where.vendor_layers) * limits.max_message_tokens
    )  # fmt: skip
    rows = FLOAT * stack.hidden_size * limits.max_message_tokens
    sizes = {
        "the model": whole,
        f"a job in memory, of the largest rank ({rank})": job,
        "such a job on the disk, its replies not counted": KEPT_STATES * state,
        f"work on {limits.max_message_tokens:,} tokens at once": work,
    }
    waiting, replies = 0, WINDOW * rows
    sizes["replies that a job has remembered, at most"] = replies
    if where.partition == "u-shape":
        waiting = work + limits.max_jobs * rows
        sizes["forwards that wait for gradients, of all jobs"] = waiting
    return estimated(
        _reading(whole, written),
        matmul_rate(stack.hidden_size),
        memory=whole + work + waiting + limits.max_jobs * (job + replies),
        written=written,
        sizes=sizes,
    )


def _package_bytes(stack: Stack, cut: int, config: BottomConfig) -> int:
    """Of the customer's layers, the embedding, and in the U-shape the norm and head."""
    where = config.cut(stack.layer_count, cut)
    layers = sum(_count(stack.layers[i]) for i in where.customer_layers)
    ends = _count(stack.model) - sum(map(_count, stack.layers))
    head = getattr(stack, "head", None)
    if where.partition == "two-part" and head is not None:
        tied = head.weight is stack.embedding.weight
        ends -= 0 if tied else _count(head)
    return (layers + ends) * _BYTES[config.dtype]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _reading(whole: int, written: int) -> dict[str, float]:
    return {
        "load": whole / READ_BYTES_PER_SECOND,
        "fingerprint": whole / READ_BYTES_PER_SECOND,
        "bottom": written / READ_BYTES_PER_SECOND,
    }
