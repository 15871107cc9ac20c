"""The customer's loop of the U-shape: loss and head at home, the trunk's tuning at the vendor.

An ordinary PyTorch loop over `RemoteTrunk`; write your own where this one does not fit. The
customer's head is trained here; its layers and, for language models, the model's own head stay as
they are. What the customer learns is stored before the vendor is asked for the checkpoint that
belongs to it, so both can be taken back to the same step.

The head is not sent, and is no secret: its first weights follow from the seed that the vendor has,
and its training from the outputs and gradients that cross (docs/split.md).

Shapes: B batch, L length, T tokens, D hidden, F features, C outputs, N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError, MismatchError, PolicyError
from blindtune.exchange.wire.messages import Precision, ResumeJob, unpack
from blindtune.exchange.wire.resuming import ResumingTransport, RetryConfig
from blindtune.exchange.wire.transport import Transport
from blindtune.split.bottom import Bottom
from blindtune.split.customer.private_gradients import GradientNoise
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.customer.remote import RemoteTrunk
from blindtune.split.customer.requests import PassConfig, PlannedBatch, check_open, portions
from blindtune.split.numbered_states import NumberedStates
from blindtune.split.partition import (
    PooledHead,
    default_pooling,
    feature_size,
    lm_logits,
    mean_token_loss,
    run_top,
    task_loss,
    vendor_calls,
)
from blindtune.split.terms import TuningConfig
from blindtune.version import PROGRAM


@final
class Top:
    """The customer's upper part: the last layers, and a head.

    Args:
        bottom: a U-shape package.
        head: trained here; None: the language model's own head, which stays as it is.
        learning_rate: of AdamW for the head.
        directory: where the head's states are kept; None: nowhere, so a job cannot be resumed.

    Raises:
        ConfigError: a two-part package.
    """

    def __init__(
        self,
        bottom: Bottom,
        head: PooledHead | None,
        *,
        learning_rate: float = 1e-3,
        directory: Path | None = None,
    ) -> None:
        if bottom.cut.partition != "u-shape":
            raise ConfigError("expected a bottom package of the u-shape: ask the vendor for one")
        self._bottom, self._head = bottom, head
        self._states = None if directory is None else NumberedStates(directory, "top")
        self._optimizer = (
            None if head is None else torch.optim.AdamW(head.parameters(), learning_rate)
        )

    def loss(
        self,
        trunk_BLD: Tensor,
        mask_BL: Tensor,
        target: Tensor,
        *,
        cover: Callable[[Tensor], None] = lambda _entrance: None,
    ) -> Tensor:
        """Mean loss.

        Args:
            trunk_BLD: what left the trunk.
            mask_BL: 1 for tokens.
            target: [B] or [B, C] labels with a head, token ids [B, L] without.
            cover: gets the tensor [B, ...], of one record a row, that all gradients of the loss
                pass by on their way to what is trained here and to the vendor.
        """
        outputs = self.outputs(trunk_BLD, mask_BL)
        cover(trunk_BLD if self._head is None else outputs)
        if self._head is None:
            return mean_token_loss(outputs, target, mask_BL)
        return task_loss(
            outputs, target, "regression" if target.is_floating_point() else "classification"
        )

    def outputs(self, trunk_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Outputs [B, C] of the head, or logits [B, L, V], from what leaves the trunk."""
        stack = self._bottom.stack
        with torch.no_grad():
            calls = vendor_calls(stack, mask_BL)
        features_BLF = run_top(stack, self._bottom.cut, trunk_BLD, calls)
        if self._head is None:
            return lm_logits(stack, features_BLF)
        outputs_BC: Tensor = self._head(features_BLF, mask_BL)
        return outputs_BC

    def step(self) -> None:
        """The head's optimizer step."""
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def numbers(self) -> list[int]:
        """The requests after which a state is kept, ascending: where the job can go on."""
        return [] if self._states is None else self._states.numbers()

    def save(self, number: int) -> None:
        """Keep the state after request `number`, and one older one.

        Later ones, of a run before the job went back, are forgotten only now, when the vendor has
        taken requests: a job that cannot go on loses nothing.
        """
        if self._states is None:
            return
        state: dict[str, Any] = {}
        if self._head is not None and self._optimizer is not None:
            state = {"head": self._head.state_dict(), "optimizer": self._optimizer.state_dict()}
        self._states.save(number, state)

    def load(self, number: int) -> None:
        """Go back to the state after request `number`; later ones go with the next `save`.

        0 is the state at the start, which this object has when it is new.
        """
        assert self._states is not None
        if number and self._head is not None and self._optimizer is not None:
            state = self._states.load(number)
            self._head.load_state_dict(state["head"])
            self._optimizer.load_state_dict(state["optimizer"])


def customers_head(bottom: Bottom, outputs: int, tuning: TuningConfig) -> PooledHead | None:
    """The U-shape's head for a task, its first weights from the seed; None for language models."""
    if not outputs:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tuning.seed)
        pooling = tuning.pooling or default_pooling(bottom.stack)
        return PooledHead(feature_size(bottom.stack), outputs, pooling)


def go_on(
    connect: Callable[[], Transport],
    top: Top,
    token: str,
    *,
    retries: RetryConfig | None = None,
) -> tuple[ResumingTransport, int]:
    """Resume a U-shape job at the newest state that both parties kept.

    Args:
        connect: makes a connection to the vendor.
        top: as at the start, with its directory; it is taken back to that state.
        token: of the job.

    Returns:
        The transport, and the number to give `train_u_shape` as `applied`.

    Raises:
        NetworkError: the vendor cannot be reached.
        PolicyError: the job has ended, or no such state is left at both; nothing here was touched.
    """
    for number in reversed([0, *top.numbers()]):
        opening = ResumeJob(token=token, at=number)
        try:
            transport = ResumingTransport(connect, opening, program=PROGRAM, retries=retries)
        except MismatchError:  # the vendor does not have this one: it was stored here first
            continue
        check_open(transport)
        top.load(number)
        return transport, number
    raise PolicyError(
        "the vendor kept no state of this job that is kept here too, and asking again brings none "
        "back: begin another job with another --out"
    )


def train_u_shape(
    transport: Transport,
    top: Top,
    private: PrivateStates,
    config: PassConfig,
    *,
    language_model: bool,
    applied: int = 0,
    noise: GradientNoise | None = None,
    true_targets: bool = False,
    on_loss: Callable[[float], None] = lambda _loss: None,
) -> list[float]:
    """Tune the trunk and the customer's head.

    Args:
        transport: with an open job; to go on, from `go_on`.
        private: states; with labels unless `language_model`.
        config: the same as before when a job is gone on with.
        language_model: predict `private.targets`: the texts' own tokens, or those that were sent.
        applied: from `go_on`; 0 for a new job.
        noise: on gradients, before anything is computed from them; None: they are sent as they are.
        true_targets: send gradients of true words: they give the text away, though it was noised.
        on_loss: is told every batch's mean loss.

    Returns:
        The mean losses of the batches that were sent.

    Raises:
        DataError: no labels, or `applied` is not at the end of a step.
        ConfigError: gradients would give away what the privatizer hides.
        PolicyError: a gradient would be noised twice.
    """
    _check_targets(private, language_model, meant=noise is not None or true_targets)
    plan = list(config.numbered(len(private), "u-shape"))
    _check_applied(applied, plan)
    trunk = RemoteTrunk(transport, applied=applied, precision=config.precision)
    losses: list[float] = []
    for batch in plan:
        if batch.number < applied:  # its step is part of the job already
            continue
        hidden_BLD, mask_BL = unpack(*private.rows(batch.texts))
        target = _target(private, batch.texts, language_model)
        cover = (lambda _: None) if noise is None else partial(noise.cover, batch=batch)
        loss = top.loss(trunk(hidden_BLD, mask_BL), mask_BL, target, cover=cover)
        (loss * len(batch.texts) / batch.step_texts).backward()
        assert trunk.applied == batch.number
        losses.append(float(loss.detach()))
        on_loss(losses[-1])
        if batch.ends_step:
            trunk.step()
            top.step()
            if batch.checkpoint:
                top.save(trunk.applied)
                trunk.checkpoint()
                if noise is not None:
                    noise.forget(min(top.numbers(), default=0))
    if noise is not None:
        noise.forget(trunk.applied)  # it is whole at both parties
    return losses


def _check_applied(applied: int, plan: list[PlannedBatch]) -> None:
    ends = [0, *(batch.number + 1 for batch in plan if batch.ends_step)]
    if applied not in ends:
        earlier = max((end for end in ends if end < applied), default=0)
        raise DataError(f"request {applied} is not the end of a step: resume at {earlier}")


def _check_targets(private: PrivateStates, language_model: bool, *, meant: bool) -> None:
    """Refuse states without targets, and targets that would undo the states' privacy."""
    if private.labels is None and not language_model:
        raise DataError("expected labels to train with: privatize the texts with their labels")
    if language_model and private.privatized and private.sent_ids is None and not meant:
        raise ConfigError(
            "expected the words that were sent as targets, got the true ones, whose gradients give "
            "the text away: privatize with predict_sent=True, give noise, or say true_targets=True"
        )


def predict_u_shape(
    transport: Transport,
    top: Top,
    private: PrivateStates,
    *,
    batch_size: int = 16,
    precision: Precision = "float16",
) -> list[Tensor]:
    """Outputs of every batch in order: [B, C] of the head, or logits [B, L, V]."""
    return list(each_u_shape(transport, top, private, batch_size=batch_size, precision=precision))


def each_u_shape(
    transport: Transport,
    top: Top,
    private: PrivateStates,
    *,
    batch_size: int = 16,
    precision: Precision = "float16",
) -> Iterator[Tensor]:
    """As `predict_u_shape`, one batch at a time: logits of many texts do not fit in memory."""
    trunk = RemoteTrunk(transport, precision=precision)
    for indices in portions(len(private), batch_size):
        hidden_BLD, mask_BL = unpack(*private.rows(indices))
        with torch.no_grad():
            outputs = top.outputs(trunk.predict(hidden_BLD, mask_BL), mask_BL)
        yield outputs


def _target(private: PrivateStates, indices: list[int], language_model: bool) -> Tensor:
    if language_model:
        chosen = [private.targets[i] for i in indices]
        return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    assert private.labels is not None
    return private.labels[indices]
