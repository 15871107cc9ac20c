"""Dynamic LayerReplace: learn which layers matter while harmonizers learn to stand in for them.

Learning steps train the harmonizers of one sampled mix of raw layers and harmonizers on a training
batch; score steps compare several mixes on one validation batch and move the scores of the layers
that each mix kept by how much better than the others it did (REINFORCE with the candidates' mean as
baseline). The two alternate. Raw layers stay frozen throughout.

Source: ScaleOT (arXiv 2412.09812), section "Dynamic LayerReplace"; score update as in IST (arXiv
2410.11772). With identity stand-ins the same code is Dynamic LayerDrop.

Shapes: B batch, L length, D hidden, V vocabulary, M middle layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from blindtune.errors import ConfigError
from blindtune.kinds import check_kinds
from blindtune.offsite.model_owner.mixed_network import MixedNetwork, Objective

Reward = Literal["paper", "scale-free"]
Grouping = Literal["count", "size"]
Practice = Literal["half", "ordered"]


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """Dynamic LayerReplace. The paper's values unless a docstring says otherwise."""

    steps: int = 160
    """Alternations of a learning step and, with candidates, a score step; 0 skips this stage."""
    groups: int = 4
    """N_g: contiguous groups, in each of which half of the layers is replaced (see `grouping`)."""
    grouping: Grouping = "count"
    """"count": N_g groups; "size": as few groups as have N_g layers at most, of nearly equal size.
    The paper allows both readings."""
    candidates: int = 0
    """N_c: mixes compared on one validation batch (the paper: 3); 0: no score steps, the initial
    scores stay."""
    reward: Reward = "scale-free"
    """"paper": exp(-L_c) minus its mean; "scale-free": (mean L - L_c) / std L, which also works
    where half a network leaves losses so high that exp(-L) vanishes (ours)."""
    score_rate: float | None = None
    """eta_rl. None: 10 for the paper's reward (IST), 0.5 for the scale-free one."""
    objective: Objective = "distill"
    """Learning steps minimise "lm": the cross-entropy of the text, as in the paper; "distill": the
    divergence from the full model's predictions, which says more per token (ours)."""
    practice: Practice = "ordered"
    """Mixes of the learning steps. "half": sampled like the candidates, as in the paper; "ordered":
    the layers of the lowest scores, a random number of them up to half, which are the mixes that
    emulators of this study will have (ours)."""
    learning_rate: float = 5e-4
    """Of the harmonizers (AdamW), falling linearly to 0."""
    batch_size: int = 4
    """Windows a step."""

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, low in (("steps", 0), ("groups", 1), ("candidates", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"expected {name} >= {low}, got {getattr(self, name)}")
        if self.learning_rate <= 0 or (self.score_rate is not None and self.score_rate <= 0):
            raise ConfigError(
                f"expected positive rates, got learning_rate={self.learning_rate}, "
                f"score_rate={self.score_rate}"
            )
        if self.candidates == 1:
            raise ConfigError("expected candidates 0 (no score steps) or at least 2, got 1")
        known = {"objective": ("lm", "distill"), "practice": ("half", "ordered")}
        known |= {"reward": ("paper", "scale-free"), "grouping": ("count", "size")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"expected {name} {' or '.join(values)}, got {getattr(self, name)!r}"
                )

    @property
    def rate(self) -> float:
        """eta_rl after defaults."""
        if self.score_rate is not None:
            return self.score_rate
        return 10.0 if self.reward == "paper" else 0.5


def layer_groups(count: int, config: DynamicConfig) -> list[range]:
    """Contiguous groups over the middle layers 0 .. count-1; sizes differ by at most one."""
    number = config.groups if config.grouping == "count" else -(-count // config.groups)
    number = max(1, min(number, count // 2))  # a group of one layer would never replace it
    bounds = [count * g // number for g in range(number + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def sample_mix(
    scores_M: Tensor, groups: Sequence[range], generator: torch.Generator
) -> frozenset[int]:
    """One action: the middle layers to replace, half of every group (rounded down).

    u_i ~ Uniform(0, sigmoid(s_i)); the group's largest u_i stay. Exactly half, by sorting: a
    comparison with the lower median would keep three of four.
    """
    draws_M = torch.rand(scores_M.shape, generator=generator, dtype=torch.float64)
    draws_M = draws_M * torch.sigmoid(scores_M.double())
    replaced: set[int] = set()
    for group in groups:
        ranked = sorted(group, key=lambda i: float(draws_M[i]))
        replaced.update(ranked[: len(group) // 2])
    return frozenset(replaced)


def ordered_mix(scores_M: Tensor, generator: torch.Generator) -> frozenset[int]:
    """The middle layers of the lowest scores, a random number of them from one to half."""
    most = max(1, len(scores_M) // 2)
    count = int(torch.randint(1, most + 1, (1,), generator=generator))
    return frozenset(scores_M.argsort()[:count].tolist())


def advantages(losses: Sequence[float], reward: Reward) -> list[float]:
    """How much better each candidate did than the others.

    "paper": r_c = exp(-L_c) - mean exp(-L); "scale-free": r_c = (mean L - L_c) / std L.
    """
    loss_C = torch.tensor(losses, dtype=torch.float64)
    if reward == "paper":
        gain_C = torch.exp(-loss_C)
        return [float(r) for r in gain_C - gain_C.mean()]
    spread = loss_C.std(correction=0)
    return [float(r) for r in (loss_C.mean() - loss_C) / spread.clamp_min(1e-12)]


def update_scores(
    scores_M: Tensor,
    mixes: Sequence[frozenset[int]],
    losses: Sequence[float],
    config: DynamicConfig,
) -> Tensor:
    """s_i += eta_rl sum_c keep_i^c r_c p_i (1 - p_i), over the layers that candidate c kept."""
    p_M = torch.sigmoid(scores_M)
    step_M = torch.zeros_like(scores_M)
    for mix, reward in zip(mixes, advantages(losses, config.reward), strict=True):
        kept_M = torch.tensor([i not in mix for i in range(len(scores_M))], dtype=scores_M.dtype)
        step_M += kept_M * reward
    return scores_M + config.rate * step_M * p_M * (1 - p_M)


@dataclass(kw_only=True)
class DynamicState:
    """All that Dynamic LayerReplace needs to go on after an interruption."""

    scores_M: Tensor
    stand_ins: nn.ModuleList
    optimizer: torch.optim.Optimizer | None
    generator: torch.Generator
    step: int = 0


@dataclass(frozen=True)
class DynamicStep:
    """What one alternation did."""

    step: int
    learning_loss: float
    candidate_losses: tuple[float, ...]


def start_dynamic(
    scores_M: Tensor, stand_ins: nn.ModuleList, config: DynamicConfig, seed: int
) -> DynamicState:
    """A fresh state; stand-ins without parameters (LayerDrop) have no optimizer."""
    parameters = list(stand_ins.parameters())
    return DynamicState(
        scores_M=scores_M.clone(),
        stand_ins=stand_ins,
        optimizer=torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        if parameters
        else None,
        generator=torch.Generator().manual_seed(seed),
    )


def run_dynamic(
    state: DynamicState,
    network: MixedNetwork,
    train_NL: Tensor,
    validation_NL: Tensor,
    config: DynamicConfig,
) -> Iterator[DynamicStep]:
    """Alternate learning and score steps from `state.step` to `config.steps`, in place.

    Every random draw comes from `state.generator`, so a saved state continues exactly.
    """
    groups = layer_groups(len(network.stand_ins), config)
    while state.step < config.steps:
        learning_loss, losses = float("nan"), list[float]()
        if state.optimizer is not None:
            learning_loss = _learning_step(state, network, train_NL, groups, config)
        if config.candidates:
            batch_BL = _draw(validation_NL, config.batch_size, state.generator)
            mixes = [
                sample_mix(state.scores_M, groups, state.generator)
                for _ in range(config.candidates)
            ]
            losses = network.losses(network.prefix(batch_BL), mixes, batch_BL)
            state.scores_M = update_scores(state.scores_M, mixes, losses, config)
        state.step += 1
        yield DynamicStep(state.step, learning_loss, tuple(losses))


def _learning_step(
    state: DynamicState,
    network: MixedNetwork,
    train_NL: Tensor,
    groups: Sequence[range],
    config: DynamicConfig,
) -> float:
    """One step of the optimizer on one mix; returns the loss before it."""
    assert state.optimizer is not None
    batch_BL = _draw(train_NL, config.batch_size, state.generator)
    if config.practice == "half":
        mix = sample_mix(state.scores_M, groups, state.generator)
    else:
        mix = ordered_mix(state.scores_M, state.generator)
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * (1 - state.step / config.steps)
    loss = network.loss(network.prefix(batch_BL), mix, batch_BL, config.objective)
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _draw(windows_NL: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return windows_NL[torch.randint(len(windows_NL), (count,), generator=generator)]
