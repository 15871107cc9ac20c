"""What a recorded step of the U-shape gives away by its gradients: tokens, or labels.

Shapes: L length, D hidden, N texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.attacks.adversary import Guess
from blindtune.attacks.gradient_matching import NO_GUESS, GradientsView, tokens_from_gradients
from blindtune.attacks.label_inference import groups_of_gradients
from blindtune.evaluation.audits.audit import Finding
from blindtune.evaluation.audits.split_subject import SplitSubject
from blindtune.evaluation.leakage.empirical_privacy import record_privacy
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
KNEW_LABELS = (
    "Had the gradients of each text's backward passes; grouped texts by the direction of the first "
    "one, and by that of their sum, which noise on each hides less; was told which did better, and "
    "what each group is called."
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


def labels_of(subject: SplitSubject, labels_N: Tensor, confidence: float) -> Finding | None:
    """Which texts have one label, against the labels [N] of all texts; None of too few texts."""
    classes = int(labels_N.max()) + 1
    known = [i for i, one in enumerate(subject.passes) if one is not None]
    passes = [one for one in subject.passes if one is not None]
    if classes < 2 or len(known) < classes:
        return None
    scored = (  # two looks: their intervals hold together
        record_privacy(
            groups_of_gradients(gradients, classes), labels_N[known], unnamed=True,
            confidence=(1 + confidence) / 2,
        )
        for gradients in ([one.gradient_LD for one in passes], [one.all_LD for one in passes])
    )  # fmt: skip
    found = min(scored, key=lambda one: one.privacy.value)
    return Finding(
        attack="gradients, grouped",
        knew=KNEW_LABELS,
        measure="EP, labels",
        value=found.privacy.value,
        low=found.privacy.low,
        high=found.privacy.high,
        meaning=f"It put {found.accuracy:.1%} of {len(known):,} texts into the right class; saying "
        f"the commonest class each time gets {found.blind_accuracy:.1%}.",
    )
