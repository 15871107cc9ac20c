"""The vendor's trunk as a differentiable function: `loss.backward()` crosses the network.

U-shape only: the customer holds what is below and above, so an ordinary PyTorch loop trains its
own part while the vendor tunes the trunk:

    features = run_top(stack, cut, trunk(hidden_BLD, mask_BL), calls)
    loss(features).backward()      # sends the gradient, gets the inputs' gradient if needed
    trunk.step()                   # the vendor's optimizer

What is sent: hidden states (privatize them first), lengths, and gradients by the trunk's outputs.
Gradients depend on the labels; what they reveal of them is for attacks to measure.

Shapes: B batch, L length, T real tokens, D hidden.
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor

from blindtune.errors import VerificationError
from blindtune.exchange.wire.messages import (
    Backward,
    Checkpoint,
    Checkpointed,
    Forward,
    Gradients,
    Outputs,
    Precision,
    Predict,
    Step,
    Stepped,
    named,
    pack,
    unpack,
)
from blindtune.exchange.wire.transport import Transport


@final
class RemoteTrunk:
    """The trunk of one U-shape job.

    Args:
        transport: with an open job.
        applied: number of the last request that the job holds.
        precision: how states and gradients are written on the wire.

    Attributes:
        applied: number of the last request that was answered.
    """

    def __init__(
        self, transport: Transport, *, applied: int = 0, precision: Precision = "float16"
    ) -> None:
        self.applied = applied
        self._transport = transport
        self._precision = precision
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """What leaves the trunk [B, L, D], differentiable; padding (mask 0) is 0.

        The mask's padding is at the right. Call backward on it exactly once before `step`.
        """
        # The anchor makes autograd call backward even where the states need no gradient.
        crossed = _Crossing.apply(hidden_BLD, self._anchor, mask_BL, self)  # type: ignore[no-untyped-call]
        return cast(Tensor, crossed)

    def step(self) -> Stepped:
        """The vendor's optimizer step with the gradients since the last one."""
        reply = self._transport.call(Step(sequence=self.applied + 1))
        if not isinstance(reply, Stepped):
            raise VerificationError(f"expected a step, got {named(reply)}")
        self.applied += 1
        return reply

    def checkpoint(self) -> None:
        """Make what was done so far durable at the vendor; after a step."""
        reply = self._transport.call(Checkpoint(sequence=self.applied))
        if not isinstance(reply, Checkpointed) or reply.sequence < self.applied:
            raise VerificationError(f"expected a checkpoint, got {named(reply)}: ask the vendor")

    def predict(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """What leaves the trunk [B, L, D], without training."""
        rows_TD, lengths = pack(hidden_BLD.detach(), mask_BL)
        reply = self._transport.call(
            Predict(precision=self._precision, hidden_TD=rows_TD, lengths=lengths)
        )
        return self._arrived(reply, rows_TD, lengths)

    def forward(self, rows_TD: Tensor, lengths: tuple[int, ...]) -> tuple[int, Tensor]:
        """Send a forward; its number and the outputs [B, L, D]."""
        number = self.applied + 1
        reply = self._transport.call(
            Forward(sequence=number, precision=self._precision, hidden_TD=rows_TD, lengths=lengths)
        )
        out_BLD = self._arrived(reply, rows_TD, lengths)
        self.applied = number
        return number, out_BLD

    def backward(self, forward: int, gradient_TD: Tensor, *, input_gradient: bool) -> Tensor | None:
        """Send the gradient of a forward's outputs; the inputs' gradient [T, D] if asked for."""
        reply = self._transport.call(
            Backward(
                sequence=self.applied + 1,
                forward=forward,
                precision=self._precision,
                gradient_TD=gradient_TD,
                input_gradient=input_gradient,
            )
        )
        given = isinstance(reply, Gradients) and reply.gradient_TD is not None
        if not isinstance(reply, Gradients) or given != input_gradient:
            raise VerificationError(f"expected gradients, got {named(reply)}")
        if reply.gradient_TD is not None and reply.gradient_TD.shape != gradient_TD.shape:
            raise VerificationError("the vendor's gradient has another shape than the states")
        self.applied += 1
        return reply.gradient_TD

    def _arrived(self, reply: object, rows_TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        if not isinstance(reply, Outputs) or reply.hidden_TD.shape != rows_TD.shape:
            raise VerificationError(f"expected outputs {list(rows_TD.shape)}, got {named(reply)}")
        return unpack(reply.hidden_TD.to(rows_TD.device, rows_TD.dtype), lengths)[0]


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BLD: Tensor, _anchor: Tensor, mask_BL: Tensor, trunk: RemoteTrunk
    ) -> Tensor:
        rows_TD, lengths = pack(hidden_BLD.detach(), mask_BL)
        ctx.trunk, ctx.mask_BL, ctx.lengths = trunk, mask_BL, lengths
        ctx.number, out_BLD = trunk.forward(rows_TD, lengths)
        return out_BLD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_BLD: Tensor) -> Any:
        rows_TD, _ = pack(gradient_BLD, ctx.mask_BL)
        wanted = ctx.needs_input_grad[0]
        found_TD = ctx.trunk.backward(ctx.number, rows_TD, input_gradient=wanted)
        given = None if found_TD is None else unpack(found_TD.to(rows_TD), ctx.lengths)[0]
        return given, None, None, None
