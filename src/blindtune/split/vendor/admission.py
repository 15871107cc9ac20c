"""What a vendor checks before it computes anything; what fails is refused and changes nothing.

Shapes: B sequences, T real tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from blindtune.errors import MismatchError, PolicyError, VerificationError
from blindtune.exchange.wire.messages import WINDOW, OpenJob, RefusalCode
from blindtune.split.partition import Cut
from blindtune.split.terms import PADDED, VendorLimits, tuning_of


class RefusedError(PolicyError):
    """A refusal with a code of its own."""

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_opening(opening: OpenJob, cut: Cut, bottom: str, limits: VendorLimits) -> None:
    """Whether a job can be had as it is asked for.

    Raises:
        MismatchError: another split, cut or bottom. PolicyError: options that are not possible.
    """
    if (opening.partition, opening.cut, opening.bottom) != (cut.partition, cut.cut, bottom):
        raise MismatchError(
            f"this vendor serves the {cut.partition} split at cut {cut.cut} with bottom "
            f"{bottom[:12]}...: ask for its bottom package"
        )
    headless = cut.partition == "u-shape"
    if headless != (opening.task == "hidden") or headless != (opening.outputs == 0):
        raise MismatchError(
            "expected task hidden with 0 outputs in the u-shape, classification or regression "
            f"with outputs otherwise, got {opening.task} with {opening.outputs}"
        )
    if opening.task == "classification" and opening.outputs < 2:
        raise MismatchError("expected at least 2 classes, got 1")
    if opening.outputs > limits.max_outputs:
        raise RefusedError("limit", f"at most {limits.max_outputs} outputs are possible here")
    if tuning_of(opening.options).lora_rank > limits.max_rank:
        raise RefusedError("limit", f"lora_rank is above {limits.max_rank}: choose a smaller one")


def check_rows(
    hidden_TD: Tensor, lengths: tuple[int, ...], *, width: int, longest: int, limits: VendorLimits
) -> None:
    """Whether hidden states fit the model and the limits of one message.

    Args:
        width: D of the model.
        longest: tokens of a sequence.

    Raises:
        MismatchError, VerificationError: other widths, NaN. RefusedError: too much of it.
    """
    if hidden_TD.shape[1] != width:
        raise MismatchError(
            f"hidden states of width {hidden_TD.shape[1]}, expected {width}: "
            "use this vendor's bottom package"
        )
    if not bool(hidden_TD.isfinite().all()):
        raise VerificationError("hidden states hold NaN or infinite values: check the bottom")
    if max(lengths) > longest:
        raise RefusedError("limit", f"a sequence is longer than {longest} tokens: cut it")
    padded, most = max(lengths) * len(lengths), limits.max_message_tokens
    if len(hidden_TD) > most or padded > PADDED * most:
        raise RefusedError(
            "limit",
            f"{len(hidden_TD)} tokens, {padded} with padding: at most {most} and {PADDED * most}: "
            "send smaller batches, or such of more even lengths",
        )


def check_labels(labels: Tensor, task: str, outputs: int) -> None:
    """Whether labels are classes or targets of the head; MismatchError if not."""
    if task == "classification":
        within = not labels.is_floating_point() and ((labels >= 0) & (labels < outputs)).all()
        if not within:
            raise MismatchError(f"expected integer labels from 0 to {outputs - 1}")
        return
    wide = labels.shape[1] if labels.ndim == 2 else 1
    if not labels.is_floating_point() or wide != outputs or not labels.isfinite().all():
        raise MismatchError(f"expected {outputs} finite float32 targets a sequence")


def check_waiting(
    tokens: int, *, forwards: int, of_job: int, of_customer: int, limits: VendorLimits
) -> None:
    """Whether another forward may wait for its gradient; RefusedError if not.

    Args:
        tokens: its rows.
        forwards: of the job that wait already.
        of_job: their tokens.
        of_customer: the tokens of all forwards that wait, in the customer's jobs together.
    """
    if forwards >= WINDOW:
        raise RefusedError("limit", f"{WINDOW} forwards are open: send their gradients first")
    for open_tokens, most, whose in (
        (of_job, limits.max_message_tokens, "this job"),
        (of_customer, limits.open_tokens, "your jobs"),
    ):
        if open_tokens + tokens > most:
            raise RefusedError(
                "limit",
                f"{open_tokens} tokens of {whose} wait for their gradients and {tokens} more "
                f"came, at most {most} may: send the gradients first, or cancel a job",
            )
