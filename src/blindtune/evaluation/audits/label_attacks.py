"""What a vendor learns of labels that it was not told, or was told with mistakes.

Shapes: L length, D hidden, N texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blindtune.attacks.label_inference import (
    FOLDS,
    groups_of_activations,
    groups_of_gradients,
    labels_from_activations,
)
from blindtune.evaluation.audits.audit import Finding
from blindtune.evaluation.audits.split_subject import Pass, SplitSubject
from blindtune.evaluation.leakage.empirical_privacy import RecordLeakage, record_privacy
from blindtune.privacy.randomized_response import keep_chance

BY_GRADIENTS = "gradients, grouped"
BY_ACTIVATIONS = "activations, grouped"
CORRECTED = "drawn labels, corrected"
KNEW = {
    BY_GRADIENTS: "Had the gradients of each text's backward passes; grouped texts by the "
    "direction of the first one, and by that of their sum, which noise on each hides less; was "
    "told which did better, and what each group is called.",
    BY_ACTIVATIONS: "Has what its own layers made of each text in the last pass, which tuning drew "
    "apart by class; grouped texts by that, and was told what each group is called.",
    CORRECTED: "Had the labels as they were drawn anew and how often that changes one; trained a "
    "classifier of {what} on them, which knows that some are wrong, and weighed for each text what "
    "one that did not see its label says of it with the label that was drawn.",
}


def label_findings(subject: SplitSubject, confidence: float) -> Iterator[Finding]:
    """What each attack that fits learned of the labels of the subject's texts."""
    labels = subject.labels
    if labels is None or (classes := int(labels.true_N.max()) + 1) < 2:
        return
    if subject.passes:
        known = [i for i, one in enumerate(subject.passes) if one is not None]
        passes = [one for one in subject.passes if one is not None]
        if len(known) >= max(classes, FOLDS):
            yield from _of_passes(passes, labels.true_N[known], classes, labels.epsilon, confidence)
    elif labels.told_N is not None and labels.epsilon and len(labels.true_N) >= FOLDS:
        activation_ND = torch.stack([state_LD.float().mean(0) for state_LD in subject.states])
        right = keep_chance(labels.epsilon, classes)
        guess_N = labels_from_activations(activation_ND, labels.told_N, classes, right=right)
        yield _finding(CORRECTED, record_privacy(guess_N, labels.true_N, confidence=confidence),
                       what="the states")  # fmt: skip


def _of_passes(
    passes: Sequence[Pass],
    labels_N: Tensor,
    classes: int,
    epsilon: float | None,
    confidence: float,
) -> Iterator[Finding]:
    """Of the U-shape: labels stay at home, and gradients and activations depend on them."""

    def judged(groups_N: Tensor, looks: int = 1) -> RecordLeakage:
        of_each = 1 - (1 - confidence) / looks  # the intervals of several looks hold together
        return record_privacy(groups_N, labels_N, unnamed=True, confidence=of_each)

    told_N = groups_of_gradients([one.gradient_LD for one in passes], classes)
    summed_N = groups_of_gradients([one.all_LD for one in passes], classes)
    looks = (judged(told_N, 2), judged(summed_N, 2))
    yield _finding(BY_GRADIENTS, min(looks, key=lambda one: one.privacy.value))
    activation_ND = torch.stack([_where_it_counts(one) for one in passes])
    yield _finding(BY_ACTIVATIONS, judged(groups_of_activations(activation_ND, classes)))
    if epsilon is not None:
        right = keep_chance(epsilon, classes)
        guess_N = labels_from_activations(activation_ND, told_N, classes, right=right)
        what = "its layers' outputs (the labels by the groups of the first gradients)"
        yield _finding(CORRECTED, judged(guess_N), what=what)


def _where_it_counts(one: Pass) -> Tensor:
    """The mean [D] of the outputs that the customer's head reads: those that have a gradient."""
    counts_L = one.gradient_LD.abs().sum(1) > 0
    return one.last_LD[counts_L if bool(counts_L.any()) else slice(None)].mean(0)


def _finding(attack: str, found: RecordLeakage, what: str = "") -> Finding:
    return Finding(
        attack=attack,
        knew=KNEW[attack].format(what=what),
        measure="EP, labels",
        value=found.privacy.value,
        low=found.privacy.low,
        high=found.privacy.high,
        meaning=f"It put {found.accuracy:.1%} of {found.privacy.of:,} texts into the right class; "
        f"saying the commonest class each time gets {found.blind_accuracy:.1%}.",
    )
