"""What replacing layers costs, measured: each one alone, and one after the other.

Shapes: N windows, L length, M middle layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blindtune.offsite.model_owner.mixed_network import GrowingMix, MixedNetwork


@torch.no_grad()
def measured_damage(
    network: MixedNetwork,
    windows_NL: Tensor,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """How much the loss rises when each middle layer alone is replaced, in nats a token.

    The slow but direct answer that the learned scores try to predict; the layers below the replaced
    one are computed once for all (half of the work of one full pass a layer).

    Returns:
        Damage of every middle layer [M], float64; negative where the stand-in does better.
    """
    singles = [frozenset[int](), *(frozenset({i}) for i in range(len(network.stand_ins)))]
    total = torch.zeros(len(singles), dtype=torch.float64)
    for batch_BL in windows_NL.split(batch_size):
        losses = network.losses(network.prefix(batch_BL), singles, batch_BL)
        total += torch.tensor(losses, dtype=torch.float64) * len(batch_BL)
        if on_batch is not None:
            on_batch(len(batch_BL))
    mean = total / len(windows_NL)
    return mean[1:] - mean[0]


@torch.no_grad()
def greedy_damage(
    network: MixedNetwork,
    windows_NL: Tensor,
    batch_size: int,
    single_M: Tensor,
    count: int,
    on_choice: Callable[[int], None] | None = None,
) -> Tensor:
    """Damage in company: replace layers one after the other, each time the one that costs least.

    The damage of several replaced layers is more than the sum of their own, and layers side by side
    are replaced more cheaply than their own damage says. Costs rarely fall as others are replaced,
    so a layer is measured again only when its last known cost makes it the next choice (lazy
    greedy; Minoux 1978). A try of layer i starts at i, from what enters it under the choices so
    far: M + 1 hidden states a token are kept.

    Args:
        single_M: the damage of each layer alone, from `measured_damage`.
        count: how many layers to order; the others keep their last known cost.

    Returns:
        Cost of every layer in the order of choice [M], made non-decreasing along that order, so
        that sorting by it gives the order back.
    """
    batches = [GrowingMix(network, batch_BL) for batch_BL in windows_NL.split(batch_size)]

    def loss(also: int | None = None) -> float:
        losses = [batch.loss(also) * len(batch.input_ids_BL) for batch in batches]
        return sum(losses) / len(windows_NL)

    current, chosen = loss(), list[int]()
    known = {i: (float(single_M[i]), 0) for i in range(len(single_M))}
    cost_M = torch.zeros(len(single_M), dtype=torch.float64)
    highest = float("-inf")
    while len(chosen) < count:
        i = min(known, key=lambda i: (known[i][0], i))
        if known[i][1] < len(chosen):
            known[i] = (loss(i) - current, len(chosen))
            continue
        current += known[i][0]
        highest = max(highest + 1e-9, known.pop(i)[0])
        cost_M[i] = highest
        chosen.append(i)
        for batch in batches:
            batch.add(i)
        if on_choice is not None:
            on_choice(len(chosen))
    for i, (cost, _) in known.items():
        cost_M[i] = max(cost, highest + 1e-9)
    return cost_M
