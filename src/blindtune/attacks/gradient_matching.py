"""Matching the gradients that were seen at the top cut of a U-shape.

Source: BiSR (arXiv 2409.00960), section 4.3, which takes the pre-trained weights as what
the adversary knows: the vendor owns the model, so it knows the bottom, and the top but for what the
customer trained.

`tokens_from_gradients`: when a language model is tuned by the U-shape, the customer sends the
loss's gradient by the trunk's outputs. The loss is of the customer's *true* next tokens, so no
noise on the inputs protects them. BiSR optimises dummy labels until their gradient is the observed
one. The gradient is linear in what reaches the head's input, u = J'^-1 g, so we solve for u (least
squares by conjugate gradients) and compare it with what each next token would give,

    u_t = c (W' p_t - W[y]),   p_t = softmax of the logits that the adversary computes itself,

by cosine over the whole vocabulary: c, the share of one token in the loss, needs not be known.
The first token of a text has no prediction and is not found: whoever has the states too reads it
there (`filled`).

Shapes: L length of one text, D hidden, F what the head takes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindtune.attacks.adversary import Guess
from blindtune.errors import ConfigError, DataError
from blindtune.models.decoder import Decoder
from blindtune.models.given_words import placing_ids

NO_GUESS = -1
"""In a guess: the attack says nothing of this token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientsView:
    """One step of a U-shape's language model tuning, as its vendor saw it."""

    model: Decoder
    """The model, or the customer's part of it; its top as the customer has it."""
    last: int
    """Layers of the customer's top."""
    outputs: tuple[Tensor, ...]
    """[L, D] of every text: what the vendor's trunk gave."""
    gradients: tuple[Tensor, ...]
    """[L, D] of every text: what the customer sent back for them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be of one model."""
        if not 0 <= self.last <= self.model.layer_count:
            raise ConfigError(
                f"expected at most {self.model.layer_count} layers at the customer's top, got "
                f"{self.last}"
            )
        shapes = [tuple(rows.shape) for rows in self.outputs]
        width = self.model.hidden_size
        if not shapes or any(len(s) != 2 or not s[0] or s[1] != width for s in shapes):
            raise DataError(f"expected outputs [tokens, {width}] of at least one text")
        if [tuple(rows.shape) for rows in self.gradients] != shapes:
            raise DataError("expected a gradient for every row of the outputs: take both of a step")


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """How exactly the gradient at the head's input is solved for."""

    iterations: int = 100
    """Steps of conjugate gradients, at most."""
    tolerance: float = 1e-4
    """Relative residual at which to stop."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.iterations < 1 or not 0 < self.tolerance < 1:
            raise ConfigError(
                f"expected iterations of at least 1 and a tolerance between 0 and 1, got "
                f"{self.iterations} and {self.tolerance}"
            )


def tokens_from_gradients(view: GradientsView, config: SolveConfig | None = None) -> Guess:
    """The private tokens of every text but its first, which is `NO_GUESS`."""
    found = []
    for output_LD, gradient_LD in zip(view.outputs, view.gradients, strict=True):
        guess_L = torch.full((len(output_LD),), NO_GUESS)
        if len(output_LD) > 1:
            next_L = _next_tokens(view, output_LD, gradient_LD, config or SolveConfig())
            guess_L[1:] = next_L[:-1].cpu()
        found.append(guess_L)
    return tuple(found)


def filled(guess: Guess, other: Guess) -> Guess:
    """A guess, with another's token wherever it is `NO_GUESS`; both of the same texts."""
    return tuple(
        torch.where(mine_L == NO_GUESS, other_L.to(mine_L), mine_L)
        for mine_L, other_L in zip(guess, other, strict=True)
    )


def _next_tokens(
    view: GradientsView, output_LD: Tensor, gradient_LD: Tensor, config: SolveConfig
) -> Tensor:
    model = view.model
    weight_VF = model.head.weight
    assert isinstance(weight_VF, Tensor), type(weight_VF)
    hidden_LD = output_LD.to(weight_VF).detach().requires_grad_()
    feature_LF, logits_LV = _top(model, view.last, hidden_LD)
    u_LF = _solve(hidden_LD, feature_LF, gradient_LD.to(weight_VF), config)
    with torch.no_grad():
        # A cap on the logits scales each word's gradient by its slope.
        cap = getattr(model.config, "final_logit_softcapping", None)
        slope_LV = 1 - (logits_LV / cap).square() if cap else torch.ones_like(logits_LV)
        middle_LF = (logits_LV.softmax(1) * slope_LV) @ weight_VF
        along_LV = (u_LF * middle_LF).sum(1, keepdim=True) - slope_LV * (u_LF @ weight_VF.T)
        squared_LV = (
            middle_LF.square().sum(1, keepdim=True)
            - 2 * slope_LV * (middle_LF @ weight_VF.T)
            + slope_LV.square() * weight_VF.square().sum(1)
        )
        return (along_LV / squared_LV.clamp_min(1e-12).sqrt()).argmax(1)


def _top(model: Decoder, last: int, hidden_LD: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the head [L, F] and the logits [L, V], from the trunk's output."""
    end = model.layer_count
    mask_1L = torch.ones(1, len(hidden_LD), dtype=torch.int64, device=hidden_LD.device)
    with torch.no_grad():
        calls = model.begin(placing_ids(model.config, mask_1L)).calls
    taken: list[Tensor] = []

    def take(_module: Any, args: tuple[Tensor, ...]) -> None:
        taken.append(args[0])

    handle = model.head.register_forward_pre_hook(take)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            logits_1LV = model.logits(model.run_layers(hidden_LD[None], calls, end - last, end))
    finally:
        handle.remove()
    return taken[0][0], logits_1LV[0].detach()


def _solve(
    hidden_LD: Tensor, feature_LF: Tensor, gradient_LD: Tensor, config: SolveConfig
) -> Tensor:
    """u [L, F] with J' u = gradient by least squares (CGLS; Bjorck 1996, section 7.4)."""
    u_LF = torch.zeros_like(feature_LF, requires_grad=True)
    (back_LD,) = torch.autograd.grad(feature_LF, hidden_LD, u_LF, create_graph=True)

    def down(u: Tensor) -> Tensor:  # J' u
        return torch.autograd.grad(feature_LF, hidden_LD, u, retain_graph=True)[0]

    def up(rows: Tensor) -> Tensor:  # J rows: the derivative of J' u, which is linear, by u
        return torch.autograd.grad(back_LD, u_LF, rows, retain_graph=True)[0]

    found_LF = torch.zeros_like(feature_LF)
    left_LD = gradient_LD / gradient_LD.norm().clamp_min(1e-30)
    slope_LF = up(left_LD)
    step_LF, size = slope_LF, slope_LF.square().sum()
    for _ in range(config.iterations):
        if float(left_LD.norm()) < config.tolerance or not float(size):
            break
        moved_LD = down(step_LF)
        rate = size / moved_LD.square().sum().clamp_min(1e-30)
        found_LF = found_LF + rate * step_LF
        left_LD = left_LD - rate * moved_LD
        slope_LF = up(left_LD)
        before, size = size, slope_LF.square().sum()
        step_LF = slope_LF + size / before * step_LF
    return found_LF.detach()
