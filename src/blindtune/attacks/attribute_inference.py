"""Attribute inference: who wrote it, when, about whom? From what crossed, never from the text.

Source: the AIA of Split-and-Privatize (arXiv 2312.15603, section 4): a small network on
representations, trained on auxiliary texts of which the adversary knows the attribute. It passes
them through the same bottom and the same noise, so it learns what survives the noise. A class
attribute may be a label of the task too.

A text is read as the mean and the deviation of its states over the tokens, and the logarithm of
their number, which crosses in the clear; all standardised.

Shapes: L length, D hidden, N texts, C values of the attribute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from blindtune.attacks.adversary import StatesView
from blindtune.attacks.fitting import FitConfig, FitResult, fit, parted
from blindtune.attacks.imitation import Imitation
from blindtune.errors import ConfigError, DataError

CONSTANT = 1e-6
"""A deviation over public texts below which a feature is only centred: no unit can be told."""


@dataclass(frozen=True, kw_only=True)
class AttributeConfig:
    """The network and how it learns."""

    hidden: int = 256
    """Units of the hidden layer."""
    draws: int = 4
    """Fresh draws of noise of every public text; each is an example."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=60, batch_size=32, patience=8))
    """How long and how carefully."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.hidden < 1 or self.draws < 1:
            raise ConfigError(
                f"expected hidden and draws of at least 1, got {self.hidden} and {self.draws}"
            )


def infer_attribute(
    view: StatesView, known_N: Tensor, config: AttributeConfig | None = None
) -> tuple[Tensor, FitResult]:
    """The attribute of every text in the view, int64 [texts], and how the training ended.

    Args:
        view: with public texts.
        known_N: the attribute of each public text, classes from 0.
        config: see there.

    Raises:
        DataError: fewer than two public texts, or other attributes than texts.
    """
    config = config or AttributeConfig()
    view.require_public("attribute inference", texts=2)
    if known_N.shape != (len(view.public),) or int(known_N.min()) < 0:
        raise DataError(
            f"expected a class from 0 for each of {len(view.public)} public texts, got "
            f"{list(known_N.shape)}"
        )
    imitation = Imitation.of(view)
    draws = config.draws if view.mechanism is not None else 1
    made_MNF = torch.stack([_pooled(imitation.states(view.public)) for _ in range(draws)])
    learn, held = parted(len(view.public), config.fit)
    mean_F = made_MNF[:, learn].flatten(0, 1).mean(0)
    scale_F = made_MNF[:, learn].flatten(0, 1).std(0, correction=0)
    scale_F = torch.where(scale_F < CONSTANT, 1.0, scale_F)
    made_MNF = (made_MNF - mean_F) / scale_F
    classes = int(known_N.max()) + 1
    target_N = known_N.to(made_MNF.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.fit.seed)
        network = nn.Sequential(
            nn.Linear(made_MNF.shape[2], config.hidden),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(config.hidden, classes),
        ).to(made_MNF.device)

        def loss_of(epoch: int, indices: Sequence[int]) -> Tensor:
            chosen = list(indices)
            return cross_entropy(network(made_MNF[epoch % draws, chosen]), target_N[chosen])

        @torch.no_grad()
        def held_out_loss() -> float:
            found = [cross_entropy(network(made_NF[held]), target_N[held]) for made_NF in made_MNF]
            return float(torch.stack(found).mean())

        result = fit(network, loss_of, learn, held_out_loss, config.fit)
    with torch.no_grad():
        scores_NC: Tensor = network((_pooled(view.states).to(mean_F) - mean_F) / scale_F)
    return scores_NC.argmax(1).cpu(), result


def _pooled(states: Sequence[Tensor]) -> Tensor:
    """Of every text mean and deviation over the tokens, and log(L): [N, 2 D + 1]."""
    return torch.stack([
        torch.cat(
            (state.mean(0), state.std(0, correction=0), state.new_tensor([math.log(len(state))]))
        ).detach()
        for state in states
    ])  # fmt: skip
