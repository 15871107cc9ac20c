"""The customer's side of split tuning, over any transport: tune and predict.

Two-part: privatized states and labels are streamed ahead, up to eight requests without waiting,
because a frozen bottom needs no gradient back. Requests are numbered by their place in the plan,
which follows from the config and the number of texts alone: a customer who starts again makes the
same requests from where the vendor is.

What is sent: privatized states, lengths, labels, the tuning's options. Never: text, token ids.

Shapes: T tokens, D hidden, C outputs, N texts.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from blindtune.errors import (
    BlindtuneError,
    ConfigError,
    DataError,
    PolicyError,
    VerificationError,
)
from blindtune.exchange.wire.codec import MessageLimits, row_bytes
from blindtune.exchange.wire.messages import (
    WINDOW,
    Batch,
    BatchResult,
    Checkpoint,
    Checkpointed,
    Message,
    OpenJob,
    Partition,
    Precision,
    Predict,
    Predictions,
    Step,
    Stepped,
    Welcome,
    named,
)
from blindtune.exchange.wire.resuming import ResumingTransport, RetryConfig
from blindtune.exchange.wire.transport import Transport
from blindtune.kinds import check_kinds
from blindtune.split.bottom import Bottom
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.terms import PADDED, TuningConfig
from blindtune.version import PROGRAM

_ENDED = {
    "cancelled": "was cancelled",
    "closed": "has ended at the vendor: long unasked for, or its checkpoints were lost",
}


REQUESTS_OF_A_BATCH: dict[Partition, int] = {"two-part": 1, "u-shape": 2}
"""batch; or forward and backward. A step follows as a request of its own."""


LABEL_BYTES = 64
"""Of a text's label on the wire, and what its message needs besides, at most."""


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """One batch of the plan, and where its requests stand among all of a job."""

    step: int
    """Of the optimizer's steps, from 1, the one that it is part of."""
    texts: list[int]
    step_texts: int
    """Texts of the whole step: a batch's mean loss weighs by its share of them."""
    number: int
    """Of its last request."""
    ends_step: bool
    """Whether the step's own request follows, numbered one more."""
    checkpoint: bool
    """Whether a checkpoint follows that step."""


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """How a customer goes through its texts."""

    epochs: int = 1
    """Passes over the texts; their noise is the same in all of them (noise on gradients is not,
    and grows with the number of passes)."""
    batch_size: int = 16
    """Texts of one request."""
    accumulate: int = 1
    """Requests of one optimizer step."""
    seed: int = 0
    """Of the order of the texts."""
    precision: Precision = "float16"
    """How states are written on the wire."""
    checkpoint_steps: int = 50
    """Steps between checkpoints at the vendor; the last step always has one."""
    head_learning_rate: float = 1e-3
    """U-shape: of AdamW for the customer's own head."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        if min(self.epochs, self.batch_size, self.accumulate, self.checkpoint_steps) < 1:
            raise ConfigError("epochs, batch_size, accumulate, checkpoint_steps must be above 0")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"expected precision float32, float16, int8, got {self.precision!r}")
        if not 0 < self.head_learning_rate < 1e6:
            raise ConfigError("head_learning_rate must be above 0")

    def steps(self, texts: int) -> list[list[list[int]]]:
        """The plan: for every optimizer step its batches, for every batch its texts."""
        plan: list[list[list[int]]] = []
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order: list[int] = torch.randperm(texts, generator=generator).tolist()
            size = self.batch_size
            batches = [order[i : i + size] for i in range(0, texts, size)]
            per_step = self.accumulate
            plan += [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        return plan

    def numbered(self, texts: int, partition: Partition) -> Iterator[PlannedBatch]:
        """The plan's batches in order, with the numbers that their requests always have.

        Whoever sends, goes on, or notes losses counts by this alone.
        """
        number, plan = 0, self.steps(texts)
        for made, batches in enumerate(plan, 1):
            step_texts = sum(map(len, batches))
            for i, batch in enumerate(batches, 1):
                number += REQUESTS_OF_A_BATCH[partition]
                yield PlannedBatch(
                    step=made,
                    texts=batch,
                    step_texts=step_texts,
                    number=number,
                    ends_step=i == len(batches),
                    checkpoint=made % self.checkpoint_steps == 0 or made == len(plan),
                )
            number += 1


def new_token() -> str:
    """The secret that names a job: store it before the job is opened."""
    return secrets.token_hex(32)


def open_job(
    connect: Callable[[], Transport],
    bottom: Bottom,
    token: str,
    config: TuningConfig,
    *,
    task: Literal["classification", "regression", "hidden"],
    outputs: int = 0,
    precision: Precision = "float16",
    retries: RetryConfig | None = None,
) -> ResumingTransport:
    """Open a job, or find it again by its token; the transport outlives connections.

    Args:
        connect: makes a connection to the vendor.
        bottom: the package that the vendor gave.
        token: from `new_token`.
        config: how the vendor shall tune.
        task, outputs: of the vendor's head; "hidden" and 0 in the U-shape.
        precision: of what the vendor sends.

    Raises:
        NetworkError: the vendor cannot be reached. PolicyError, VerificationError: it refuses, or
            serves another model or cut.
    """
    opening = OpenJob(
        token=token,
        partition=bottom.cut.partition,
        cut=bottom.cut.cut,
        bottom=bottom.id,
        task=task,
        outputs=outputs,
        precision=precision,
        options=config.options(),
    )
    transport = ResumingTransport(connect, opening, program=PROGRAM, retries=retries)
    if transport.welcome.bottom != bottom.id or transport.welcome.hidden_size != bottom.hidden_size:
        transport.close()
        raise VerificationError("the vendor serves another bottom: ask for its package")
    return transport


def check_open(transport: ResumingTransport) -> None:
    """Close the transport of a job that has ended at the vendor, and raise PolicyError."""
    if transport.job.state != "open":
        transport.close()
        raise PolicyError(
            f"this job {_ENDED[transport.job.state]}: begin another job with another --out"
        )


def check_batches(welcome: Welcome, private: PrivateStates, config: PassConfig) -> None:
    """Whether the vendor takes the largest batch of the plan; asked before anything is sent.

    Raises:
        ConfigError: it does not.
    """
    batches = (texts for step in config.steps(len(private)) for texts in step)
    remedy = "lower batch_size or max_length in a new job"
    check_largest(welcome, private, batches, config.precision, remedy)


def check_largest(
    welcome: Welcome,
    private: PrivateStates,
    batches: Iterable[Sequence[int]],
    precision: Precision,
    remedy: str,
) -> None:
    """Whether the largest of some batches of texts is taken: its tokens, padding, bytes.

    Raises:
        ConfigError: it does not; `remedy` says what to do.
    """
    lengths = [len(state_LD) for state_LD in private.states]
    groups = [[lengths[i] for i in texts] for texts in batches]
    tokens = max(map(sum, groups))
    row = row_bytes(precision, welcome.hidden_size)
    labels = LABEL_BYTES * max(map(len, groups))
    allowed, whose = welcome.max_payload_bytes, "as the vendor says"
    if "u-shape" in welcome.partitions and allowed > MessageLimits().max_payload_bytes:
        # As much comes back.
        allowed, whose = MessageLimits().max_payload_bytes, "as much as is read here"
    padded, said = max(max(own) * len(own) for own in groups), "as the vendor says"
    for largest, most, unit, by in (
        (tokens, welcome.max_tokens, "tokens", said),
        (padded, PADDED * welcome.max_tokens, "tokens with padding", said),
        (tokens * row + labels, allowed, f"bytes at {precision}", whose),
    ):
        if largest > most:
            raise ConfigError(
                f"expected batches of at most {most:,} {unit}, {by}, the largest would have "
                f"{largest:,} (nothing was sent): {remedy}"
            )


def train(
    transport: Transport,
    private: PrivateStates,
    config: PassConfig,
    *,
    applied: int = 0,
    answered: int | None = None,
    on_loss: Callable[[float], None] = lambda _loss: None,
) -> list[float]:
    """Two-part: stream all batches and steps that the vendor has not applied yet.

    Args:
        transport: with an open job.
        private: states with labels; the same as before when a job is gone on with.
        config: the same as before when a job is gone on with.
        applied: number of the last request that the job holds (`JobState.applied`).
        answered: number of the last one whose reply is known here, if it is an earlier one. Those
            between are sent again and change nothing; the vendor remembers eight replies.
        on_loss: is told every batch's mean loss, in order.

    Returns:
        The mean losses of the batches that were sent.

    Raises:
        DataError: no labels. NetworkError: go on later. VerificationError: the vendor's answers
            are not those of the protocol. Others: the vendor refused.
    """
    if private.labels is None:
        raise DataError("expected labels to train with: privatize the texts with their labels")
    losses: list[float] = []
    waiting: deque[tuple[Message, Future[Message]]] = deque()

    def settle() -> None:
        request, future = waiting.popleft()
        reply = future.result()
        _check_reply(request, reply)
        if isinstance(reply, BatchResult):
            losses.append(reply.loss)
            on_loss(reply.loss)

    for request in _requests(private, private.labels, config, applied, answered):
        if len(waiting) >= WINDOW:
            settle()
        try:
            waiting.append((request, transport.submit(request)))
        except BlindtuneError:
            # A wrong reply that came before says more than what followed from it.
            while waiting:
                settle()
            raise
    while waiting:
        settle()
    return losses


def _check_reply(request: Message, reply: Message) -> None:
    """Whether a reply is of the kind and number that the request asks for."""
    if (isinstance(request, Batch) and isinstance(reply, BatchResult)) or (
        isinstance(request, Step) and isinstance(reply, Stepped)
    ):
        fits = request.sequence == reply.sequence
    elif isinstance(request, Checkpoint) and isinstance(reply, Checkpointed):
        fits = request.sequence <= reply.sequence
    else:
        fits = False
    if not fits:
        raise VerificationError(f"{named(reply)} is no answer to {named(request)}: ask the vendor")


def _requests(
    private: PrivateStates,
    labels: Tensor,
    config: PassConfig,
    applied: int,
    answered: int | None,
) -> Iterator[Message]:
    """The plan's requests after number `answered`; checkpoints where they are not yet applied."""
    answered = applied if answered is None else min(answered, applied)
    for batch in config.numbered(len(private), "two-part"):
        if batch.number > answered:
            hidden_TD, lengths = private.rows(batch.texts)
            yield Batch(
                sequence=batch.number,
                precision=config.precision,
                hidden_TD=hidden_TD,
                lengths=lengths,
                labels=labels[batch.texts],
                weight=len(batch.texts) / batch.step_texts,
            )
        if not batch.ends_step:
            continue
        step = batch.number + 1
        if step > answered:
            yield Step(sequence=step)
        if step >= applied and batch.checkpoint:
            yield Checkpoint(sequence=step)


def predict(
    transport: Transport,
    private: PrivateStates,
    *,
    outputs: int | None = None,
    batch_size: int = 16,
    precision: Precision = "float16",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Tensor:
    """Two-part: the tuned model's outputs [N, C] (logits of classes, or targets).

    `outputs` is the C that the job was opened with; None: whatever comes is taken. `on_progress` is
    told how many texts are done, and how many there are.

    Raises:
        VerificationError: the vendor's reply does not fit the texts.
    """
    found: list[Tensor] = []
    for indices in portions(len(private), batch_size):
        hidden_TD, lengths = private.rows(indices)
        request = Predict(precision=precision, hidden_TD=hidden_TD, lengths=lengths)
        reply = transport.call(request)
        if (
            not isinstance(reply, Predictions)
            or len(reply.logits_BC) != len(indices)
            or outputs not in (None, reply.logits_BC.shape[1])
        ):
            raise VerificationError(
                f"expected predictions for {len(indices)} texts, got {named(reply)}"
            )
        found.append(reply.logits_BC)
        on_progress(indices[-1] + 1, len(private))
    return torch.cat(found)


def portions(count: int, size: int) -> list[Sequence[int]]:
    """The batches of a prediction: texts in their order, the last batch may be smaller."""
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]
