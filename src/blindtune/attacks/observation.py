"""From a transcript to what an adversary can read from it: texts' states, labels, gradients.

A text is known by its states: what is sent again in a later epoch is the same text, because noise
is drawn once. Where it is drawn anew, every draw counts as a text of its own.

Shapes: L length, D hidden, T tokens of a message, N distinct texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blindtune.errors import DataError
from blindtune.exchange.wire.messages import Backward, Batch, Forward, Outputs, Predict
from blindtune.exchange.wire.transcript import Transcript


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenTexts:
    """The distinct texts of a transcript, in the order in which they first crossed."""

    states: tuple[Tensor, ...]
    """[L, D] of every text, float32."""
    labels: tuple[Tensor | None, ...]
    """What the customer sent as the text's label, or None."""
    times: tuple[int, ...]
    """How often it crossed."""
    tuned: tuple[bool, ...]
    """Whether it was tuned on (Batch, Forward); False: only predicted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenGradients:
    """One backward pass of the U-shape."""

    texts: tuple[int, ...]
    """Which of `SeenTexts` they are."""
    outputs: tuple[Tensor, ...]
    """[L, D] of every text: what the vendor's trunk gave."""
    gradients: tuple[Tensor, ...]
    """[L, D] of every text: what the customer sent for them."""


def seen_texts(transcript: Transcript) -> SeenTexts:
    """Every text of the transcript once; DataError if no states crossed."""
    found: dict[bytes, tuple[Tensor, Tensor | None, int, bool]] = {}
    for crossing in transcript.crossings():
        message = crossing.message
        if not isinstance(message, Batch | Forward | Predict):
            continue
        for i, state_LD in enumerate(_texts(message.hidden_TD, message.lengths)):
            key = _name(state_LD)
            state, label, times, tuned = found.get(key, (state_LD, None, 0, False))
            found[key] = (
                state,
                message.labels[i] if isinstance(message, Batch) else label,
                times + 1,
                tuned or not isinstance(message, Predict),
            )
    if not found:
        raise DataError("expected a transcript of split tuning, got one without hidden states")
    states, labels, times_N, tuned_N = zip(*found.values(), strict=True)
    return SeenTexts(states=states, labels=labels, times=times_N, tuned=tuned_N)


def seen_gradients(transcript: Transcript, texts: SeenTexts) -> list[SeenGradients]:
    """Every backward pass whose forward and outputs crossed too, in order."""
    number_of = {_name(state): i for i, state in enumerate(texts.states)}
    forwards: dict[int, Forward] = {}
    outputs: dict[int, Tensor] = {}
    found = []
    for crossing in transcript.crossings():
        message = crossing.message
        if isinstance(message, Forward):
            forwards[message.sequence] = message
        elif isinstance(message, Outputs) and message.sequence is not None:
            outputs[message.sequence] = message.hidden_TD
        elif isinstance(message, Backward) and message.forward in outputs:
            forward = forwards[message.forward]
            found.append(
                SeenGradients(
                    texts=tuple(
                        number_of[_name(s)] for s in _texts(forward.hidden_TD, forward.lengths)
                    ),
                    outputs=_texts(outputs[message.forward], forward.lengths),
                    gradients=_texts(message.gradient_TD, forward.lengths),
                )
            )
    return found


def _texts(rows_TD: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(rows_TD.detach().to("cpu", torch.float32).split(list(lengths)))


def _name(state_LD: Tensor) -> bytes:
    return state_LD.numpy().tobytes()
