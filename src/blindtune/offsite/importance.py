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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.errors import ConfigError
from blindtune.models.decoder import Decoder, LayerInputs

Reward = Literal["paper", "scale-free"]
Grouping = Literal["count", "size"]
Objective = Literal["lm", "distill"]
Practice = Literal["half", "ordered"]


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """Dynamic LayerReplace. The paper's values unless a docstring says otherwise."""

    steps: int = 160
    """Alternations of a learning step and, with candidates, a score step; 0 skips this stage."""
    groups: int = 4
    """N_g: contiguous groups, in each of which half of the layers is replaced (see `grouping`)."""
    grouping: Grouping = "count"
    """"count": N_g groups; "size": groups of N_g layers. The paper allows both readings."""
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


@final
class MixedNetwork:
    """A frozen decoder whose middle layers can each be run raw or by their stand-in.

    Args:
        decoder: the full model, frozen.
        stand_ins: one module a middle layer (a harmonizer, or `nn.Identity` for LayerDrop).
        first: index of the first middle layer in the decoder.
    """

    def __init__(self, decoder: Decoder, stand_ins: Sequence[nn.Module], first: int) -> None:
        self.decoder = decoder
        self.stand_ins = stand_ins
        self.first = first
        self.stop = first + len(stand_ins)

    @torch.no_grad()
    def prefix(self, input_ids_BL: Tensor) -> LayerInputs:
        """The hidden states that enter the first middle layer: the same for every mix."""
        start = self.decoder.begin(input_ids_BL.to(self.decoder.model.device))
        hidden_BLD = self.decoder.run_layers(start.hidden_BLD, start.calls, 0, self.first)
        return LayerInputs(hidden_BLD, start.calls)

    def _step(self, i: int, hidden_BLD: Tensor, inputs: LayerInputs, replaced: bool) -> Tensor:
        layer = self.stand_ins[i - self.first] if replaced else None
        if isinstance(layer, nn.Identity):
            return hidden_BLD
        return self.decoder.run_layer(i, hidden_BLD, inputs.calls[i], layer)

    def loss(
        self,
        inputs: LayerInputs,
        mix: frozenset[int],
        input_ids_BL: Tensor,
        objective: Objective = "lm",
    ) -> Tensor:
        """Loss of one mix in nats a token, with gradients to the stand-ins in it.

        Args:
            inputs: from `prefix`.
            mix: the middle layers to replace.
            input_ids_BL: the batch.
            objective: "lm": cross-entropy of the next token; "distill": KL(full model || mix) of
                the next token's distribution. What both have below the first replaced layer is
                computed once.
        """
        first = self.first + min(mix, default=0)
        with torch.no_grad():
            hidden_BLD = self.decoder.run_layers(inputs.hidden_BLD, inputs.calls, self.first, first)
        mixed_BLD = hidden_BLD
        for i in range(first, self.stop):
            mixed_BLD = self._step(i, mixed_BLD, inputs, i - self.first in mix)
        if objective == "lm":
            return self._tail(mixed_BLD, inputs, input_ids_BL)
        last = self.decoder.layer_count
        with torch.no_grad():
            full_BLD = self.decoder.run_layers(hidden_BLD, inputs.calls, first, last)
            full_BLV = self.decoder.logits(full_BLD[:, 1:]).float().log_softmax(-1)
        mixed_BLD = self.decoder.run_layers(mixed_BLD, inputs.calls, self.stop, last)
        mixed_BLV = self.decoder.logits(mixed_BLD[:, 1:]).float().log_softmax(-1)
        return F.kl_div(
            mixed_BLV.flatten(0, 1), full_BLV.flatten(0, 1), reduction="batchmean", log_target=True
        )

    @torch.no_grad()
    def losses(
        self, inputs: LayerInputs, mixes: Sequence[frozenset[int]], input_ids_BL: Tensor
    ) -> list[float]:
        """Cross-entropies of several mixes on one batch.

        Mixes that agree on all layers so far share their hidden states: a layer runs once per
        distinct prefix. Depth first, so at most one state a mix is alive.
        """
        found: dict[frozenset[int], float] = {}

        def descend(i: int, hidden_BLD: Tensor, alive: list[frozenset[int]]) -> None:
            while i < self.stop:
                out = [mix for mix in alive if i - self.first in mix]
                if out and len(out) < len(alive):
                    descend(i + 1, self._step(i, hidden_BLD, inputs, True), out)
                    alive = [mix for mix in alive if i - self.first not in mix]
                    out = []
                hidden_BLD = self._step(i, hidden_BLD, inputs, bool(out))
                i += 1
            loss = float(self._tail(hidden_BLD, inputs, input_ids_BL))
            found.update(dict.fromkeys(alive, loss))

        descend(self.first, inputs.hidden_BLD, list(dict.fromkeys(mixes)))
        return [found[mix] for mix in mixes]

    def _tail(self, hidden_BLD: Tensor, inputs: LayerInputs, input_ids_BL: Tensor) -> Tensor:
        last = self.decoder.layer_count
        hidden_BLD = self.decoder.run_layers(hidden_BLD, inputs.calls, self.stop, last)
        logits_BLV = self.decoder.logits(hidden_BLD[:, :-1])
        targets_N = input_ids_BL[:, 1:].flatten().to(logits_BLV.device)
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_N)


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
    greedy; Minoux 1978).

    Args:
        single_M: the damage of each layer alone, from `measured_damage`.
        count: how many layers to order; the others keep their last known cost.

    Returns:
        Cost of every layer in the order of choice [M], made non-decreasing along that order, so
        that sorting by it gives the order back.
    """
    everything = tuple(windows_NL.split(batch_size))
    prefixes = [network.prefix(batch_BL) for batch_BL in everything]

    def loss(mix: frozenset[int]) -> float:
        losses = [
            network.losses(prefix, [mix], batch_BL)[0] * len(batch_BL)
            for prefix, batch_BL in zip(prefixes, everything, strict=True)
        ]
        return sum(losses) / len(windows_NL)

    current, chosen = loss(frozenset()), list[int]()
    known = {i: (float(single_M[i]), 0) for i in range(len(single_M))}
    cost_M = torch.zeros(len(single_M), dtype=torch.float64)
    highest = float("-inf")
    while len(chosen) < count:
        i = min(known, key=lambda i: (known[i][0], i))
        if known[i][1] < len(chosen):
            known[i] = (loss(frozenset({*chosen, i})) - current, len(chosen))
            continue
        current += known[i][0]
        highest = max(highest + 1e-9, known.pop(i)[0])
        cost_M[i] = highest
        chosen.append(i)
        if on_choice is not None:
            on_choice(len(chosen))
    for i, (cost, _) in known.items():
        cost_M[i] = max(cost, highest + 1e-9)
    return cost_M


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
