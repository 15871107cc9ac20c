"""What the gradients of the U-shape give away of a language model's texts.

Shapes: L length, D hidden.
"""

from __future__ import annotations

import torch

from blindtune.attacks.adversary import Guess
from blindtune.attacks.gradient_matching import NO_GUESS, GradientsView, tokens_from_gradients
from blindtune.evaluation.audits.split_subject import SplitSubject
from blindtune.models.decoder import Decoder

KNEW_TOKENS = (
    "Had the states, the gradient of each text's first backward pass, the model, and the trunk's "
    "outputs; took the next tokens whose loss has that gradient, and where gradients are silent (a "
    "text's first token, texts without a backward pass) the word of the "
)
KNEW_TUNING = (
    "Has the model, and gets the gradients of the tuning, which give nearly every word that is "
    "predicted; it is taken to read them all."
)


def tokens_of(subject: SplitSubject) -> Guess:
    """The tokens of every text of a language model's tuning; `NO_GUESS` where none was seen."""
    stack, seen = subject.bottom.stack, subject.passes
    assert isinstance(stack, Decoder), type(stack)
    mine = [one for one in seen if one is not None]
    view = GradientsView(
        model=stack,
        last=subject.bottom.cut.last,
        outputs=tuple(one.output_LD for one in mine),
        gradients=tuple(one.gradient_LD for one in mine),
    )
    found = iter(tokens_from_gradients(view))
    return tuple(
        torch.full_like(ids_L, NO_GUESS) if one is None else next(found)
        for ids_L, one in zip(subject.ids, seen, strict=True)
    )
