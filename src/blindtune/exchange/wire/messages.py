"""What vendor and customer of split tuning say to each other (docs/wire-format.md).

Every request has exactly one reply. Requests that change a job are numbered 1, 2, 3, ... in one
count a job; the vendor applies each number once, in order. Hidden states travel packed: the rows
of real tokens only, sequence after sequence, so that padding never leaves a party.

Shapes: B sequences, L length with padding, T = sum of lengths, D hidden, C classes or outputs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from blindtune.errors import MismatchError, VerificationError

PROTOCOL_VERSION = 1
WINDOW = 8
"""Requests that a customer may have unanswered on one stream."""
MAX_SEQUENCES = 8192
"""B of one message, at most."""

Partition = Literal["two-part", "u-shape"]
Precision = Literal["float32", "float16", "int8"]
"""How hidden states and their gradients are written on the wire; all else is sent exactly."""
RefusalCode = Literal[
    "malformed", "mismatch", "policy", "limit", "unknown-job", "out-of-order", "internal"
]

Count = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[int, Meta(ge=1, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Sizes = Annotated[tuple[Size, ...], Meta(min_length=1, max_length=MAX_SEQUENCES)]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.+ -]{1,64}\Z")]
Text = Annotated[str, Meta(max_length=1024)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
JobToken = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Seconds = Annotated[float, Meta(ge=0, le=86400)]
Options = Annotated[dict[Name, int | float | bool | str | None], Meta(max_length=32)]
Metrics = Annotated[dict[Name, float], Meta(max_length=16)]

HIDDEN_FIELDS = frozenset({"hidden_TD", "gradient_TD"})
"""The fields that a message's `precision` is about."""


class _Message(
    msgspec.Struct,
    frozen=True,
    eq=False,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag=str.lower,
):
    """Abstract. A message prints as its kind alone: no content and no token reaches a log."""

    def __repr__(self) -> str:
        return f"<{named(self)}>"


class Hello(_Message, frozen=True, kw_only=True):
    """The first request of a stream: what the customer can speak."""

    versions: Annotated[tuple[Size, ...], Meta(min_length=1, max_length=16)] = (PROTOCOL_VERSION,)
    program: Name


class Welcome(_Message, frozen=True, kw_only=True):
    """The vendor's terms: the model that is tuned here, where it is cut, and the limits."""

    version: Size
    program: Name
    model_type: Name
    partitions: Annotated[tuple[Partition, ...], Meta(min_length=1, max_length=2)]
    cut: Count
    hidden_size: Size
    bottom: Sha256
    """Fingerprint of the package that customers of this model were given."""
    max_tokens: Size
    """T of one message, at most."""
    max_payload_bytes: Size


class OpenJob(_Message, frozen=True, kw_only=True):
    """Begin a job, or go on with it when the token is known. The customer draws the token."""

    token: JobToken
    partition: Partition
    cut: Count
    bottom: Sha256
    task: Literal["classification", "regression", "hidden"]
    outputs: Count
    """Classes or regression targets of the vendor's head; 0 in the U-shape."""
    precision: Precision = "float16"
    """Of the hidden states and gradients that the vendor sends."""
    options: Options
    """The tuning's options by name; the vendor refuses those that it does not know."""


class ResumeJob(_Message, frozen=True, kw_only=True):
    """Go on with a job that must exist already."""

    token: JobToken
    at: Count | None = None
    """Go back to the durable checkpoint after this number; None: stay at the last one applied."""


class JobState(_Message, frozen=True, kw_only=True):
    """Reply to OpenJob, ResumeJob, Status and Cancel."""

    job: Name
    """A name for logs and metrics, not a secret."""
    state: Literal["open", "cancelled", "closed"]
    applied: Count
    """The last number that was applied."""
    durable: Count
    """The last number that survives a crash of the vendor; at most `applied`."""
    steps: Count
    tokens: Count

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if self.durable > self.applied:
            raise VerificationError(
                f"a job with {self.durable} requests durable and {self.applied} applied: expected "
                "no more of the first than of the second"
            )


class Batch(_Message, frozen=True, kw_only=True):
    """Two-part: compute the loss at the vendor and add its gradient to the next step's."""

    sequence: Number
    precision: Precision = "float16"
    hidden_TD: Tensor
    lengths: Sizes
    labels: Tensor
    """[B] classes (int64) or [B] or [B, C] targets (float32)."""
    weight: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    """Factor of this batch's mean loss, such as 1 / accumulated batches."""
    input_gradient: bool = False
    """Whether the customer tunes below the cut and needs the gradient of `hidden_TD`."""

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.hidden_TD, self.lengths)
        _check_labels(self.labels, len(self.lengths))


class BatchResult(_Message, frozen=True, kw_only=True):
    """Reply to Batch: the mean loss without its weight, and the gradient if it was asked for."""

    sequence: Number
    precision: Precision = "float16"
    loss: float
    metrics: Metrics
    gradient_TD: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_finite([self.loss, *self.metrics.values()])
        _check_rows(self.gradient_TD)


class Forward(_Message, frozen=True, kw_only=True):
    """U-shape: run the trunk and keep what its backward pass needs."""

    sequence: Number
    precision: Precision = "float16"
    hidden_TD: Tensor
    lengths: Sizes

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.hidden_TD, self.lengths)


class Outputs(_Message, frozen=True, kw_only=True):
    """Reply to Forward, and to Predict in the U-shape (then without a number)."""

    sequence: Number | None
    precision: Precision = "float16"
    hidden_TD: Tensor

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.hidden_TD)


class Backward(_Message, frozen=True, kw_only=True):
    """U-shape: the loss's gradient by the outputs of an earlier Forward."""

    sequence: Number
    forward: Number
    """The number of that Forward; each is used once."""
    precision: Precision = "float16"
    gradient_TD: Tensor
    input_gradient: bool = False

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.gradient_TD)
        if self.forward >= self.sequence:
            raise VerificationError(
                f"backward {self.sequence} names forward {self.forward}, expected an earlier one"
            )


class Gradients(_Message, frozen=True, kw_only=True):
    """Reply to Backward: the gradient of its Forward's `hidden_TD`, if it was asked for."""

    sequence: Number
    precision: Precision = "float16"
    gradient_TD: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.gradient_TD)


class Step(_Message, frozen=True, kw_only=True):
    """The optimizer's step with the gradients gathered since the last one."""

    sequence: Number


class Stepped(_Message, frozen=True, kw_only=True):
    """Reply to Step: how many steps the job has made."""

    sequence: Number
    steps: Count
    gradient_norm: float

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_finite([self.gradient_norm])


class Checkpoint(_Message, frozen=True, kw_only=True):
    """Make the state after request `sequence` durable; not numbered itself."""

    sequence: Count


class Checkpointed(_Message, frozen=True, kw_only=True):
    """Reply to Checkpoint: the state after `sequence` (or a later one) survives a crash."""

    sequence: Count


class Predict(_Message, frozen=True, kw_only=True):
    """Use the tuned model; changes nothing, not numbered."""

    precision: Precision = "float16"
    hidden_TD: Tensor
    lengths: Sizes

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.hidden_TD, self.lengths)


class Predictions(_Message, frozen=True, kw_only=True):
    """Reply to Predict in the two-part split."""

    logits_BC: Tensor

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_rows(self.logits_BC)


class Status(_Message, frozen=True, kw_only=True):
    """Ask for the job's state."""


class Cancel(_Message, frozen=True, kw_only=True):
    """End the job; the vendor forgets its adapter."""


class Busy(_Message, frozen=True, kw_only=True):
    """Not now: this request and those after it on the stream were not applied; send them again."""

    retry_after_seconds: Seconds


class Refusal(_Message, frozen=True, kw_only=True):
    """Not like this: the request was not applied."""

    code: RefusalCode
    message: Text


Request = (
    Hello | OpenJob | ResumeJob | Batch | Forward | Backward | Step | Checkpoint | Predict
    | Status | Cancel
)  # fmt: skip
Reply = (
    Welcome | JobState | BatchResult | Outputs | Gradients | Stepped | Checkpointed | Predictions
    | Busy | Refusal
)  # fmt: skip
Message = Request | Reply
Numbered = Batch | Forward | Backward | Step
"""The requests that change a job."""

KINDS: dict[int, type[Message]] = {
    1: Hello, 2: Welcome, 3: OpenJob, 4: ResumeJob, 5: JobState, 6: Batch, 7: BatchResult,
    8: Forward, 9: Outputs, 10: Backward, 11: Gradients, 12: Step, 13: Stepped, 14: Checkpoint,
    15: Checkpointed, 16: Predict, 17: Predictions, 18: Status, 19: Cancel, 20: Busy, 21: Refusal,
}  # fmt: skip
"""Each kind's number on the wire: never used again for anything else."""
REQUESTS = frozenset({1, 3, 4, 6, 8, 10, 12, 14, 16, 18, 19})
REPLIES = frozenset(KINDS) - REQUESTS
WITH_TENSORS = frozenset({6, 7, 8, 9, 10, 11, 16, 17})


def pack(hidden_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The rows [T, D] of real tokens (mask not 0), and the length of each sequence."""
    kept_BL = mask_BL.bool()
    return hidden_BLD[kept_BL], tuple(int(n) for n in kept_BL.sum(1))


def unpack(hidden_TD: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Hidden states [B, L, D] padded with 0 at the right, and their mask [B, L] (int64)."""
    positions_L = torch.arange(max(lengths), device=hidden_TD.device)
    mask_BL = positions_L < torch.tensor(lengths, device=hidden_TD.device)[:, None]
    hidden_BLD = hidden_TD.new_zeros(*mask_BL.shape, hidden_TD.shape[1])
    return hidden_BLD.masked_scatter(mask_BL[..., None], hidden_TD), mask_BL.long()


def named(message: object) -> str:
    """A message in an error, by kind and number: what it carries may be private."""
    number = getattr(message, "sequence", None)
    return type(message).__name__ + ("" if number is None else f" {number}")


def equal(first: Message, second: Message) -> bool:
    """Whether two messages say the same, bit by bit."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return type(first) is type(second) and all(
        same(getattr(first, name), getattr(second, name)) for name in first.__struct_fields__
    )


def _check_rows(rows: Tensor | None, lengths: tuple[int, ...] | None = None) -> None:
    if rows is None:
        return
    if rows.ndim != 2 or not rows.is_floating_point():
        raise VerificationError(
            f"expected a floating-point tensor of 2 dimensions, got {rows.dtype} "
            f"{list(rows.shape)}: send the packed rows of real tokens"
        )
    if lengths is not None and sum(lengths) != len(rows):
        raise MismatchError(
            f"{len(rows)} rows, but the lengths add up to {sum(lengths)}: "
            "send one row for every real token"
        )


def _check_labels(labels: Tensor, sequences: int) -> None:
    classes = labels.dtype in (torch.int64, torch.int32) and labels.ndim == 1
    targets = labels.dtype == torch.float32 and labels.ndim in (1, 2)
    if not (classes or targets) or len(labels) != sequences:
        raise MismatchError(
            f"labels {labels.dtype} {list(labels.shape)} for {sequences} sequences, expected "
            f"[{sequences}] integers or [{sequences}] or [{sequences}, C] float32"
        )


def _check_finite(values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise VerificationError("a loss or metric is NaN or infinite: lower the learning rate")
