"""Label inference: labels stay at home or are drawn anew, but gradients and activations tell them.

Gradients, in the U-shape. Source: Li et al. 2022 (arXiv 2102.08504), norm and direction of
gradients as a leak of labels in split learning. For cross-entropy the gradient of a text points,
for every class, away from that class's row of the head; texts of one class so have nearly the same
direction, whatever the head, which the adversary does not know. Hence directions are grouped,
without any labelled text.

Activations, in either split: tuning draws the classes apart, so activations can be grouped too. And
where labels are drawn anew, a classifier of activations learns from all of them what the class of
each is, and corrects the drawn ones. Source: forward correction of the loss (Patrini et al. 2017,
arXiv 1609.03683), then Bayes' rule.

Groups have no names. Score them with `record_privacy(..., unnamed=True)`: the adversary learns
which texts belong together; one labelled text a class, or guessing, names them.

Shapes: L length, D hidden, N texts, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blindtune.errors import DataError

STARTS = 16  # of the grouping; the tightest is taken
ROUNDS = 50
FOLDS = 5  # each text is judged by a classifier that did not learn from its own label
DECAYS = (0.1, 0.01, 1e-3, 1e-4)  # of the classifier's weights


def groups_of_gradients(gradients: Sequence[Tensor], classes: int, *, seed: int = 0) -> Tensor:
    """Group texts by the direction of their gradient, int64 [N], groups from 0.

    Args:
        gradients: [L, D] of every text, as the customer sent them, all of one or few steps.
        classes: how many groups; the task's classes are known.
        seed: of the starts.

    Raises:
        DataError: fewer texts than classes, fewer than two classes, or no gradient at all.
    """
    direction_ND = torch.stack([rows.double().sum(0) for rows in gradients]) if gradients else None
    if direction_ND is not None and not bool(direction_ND.norm(dim=1).max() > 0):
        raise DataError("expected gradients, got zeros alone: no label was behind them")
    return _grouped(direction_ND, classes, seed)


def groups_of_activations(activation_ND: Tensor, classes: int, *, seed: int = 0) -> Tensor:
    """Group texts by their activations, such as the trunk's outputs: int64 [N], groups from 0.

    Args and errors as `groups_of_gradients`. Works once tuning has drawn the classes apart.
    """
    activation_ND = activation_ND.double()
    return _grouped(activation_ND - activation_ND.mean(0), classes, seed)


def labels_from_activations(
    activation_ND: Tensor,
    told_N: Tensor,
    classes: int,
    *,
    right: float,
    seed: int = 0,
) -> Tensor:
    """The likeliest label of each text, int64 [N], from told labels that may be wrong.

    A linear classifier learns from the told labels of four fifths of the texts and says what the
    others are; Bayes' rule weighs that with what each was told. How much its weights are held back
    is chosen by how well it foretells told labels.

    Args:
        activation_ND: of every text: states, or the trunk's outputs.
        told_N: int64, from 0 to `classes` - 1: labels that were drawn anew, or groups of such.
        classes: C.
        right: the chance of a told label to be the true one (`randomized_response.keep_chance`);
            every other is as likely.
        seed: of the folds.

    Raises:
        DataError: fewer texts than `FOLDS`, fewer than two classes, or other told labels.
    """
    count = len(activation_ND)
    if classes < 2 or count < FOLDS or told_N.shape != (count,):
        raise DataError(
            f"expected at least 2 classes, {FOLDS} texts and a told label for each, got {classes}, "
            f"{count} and {list(told_N.shape)}"
        )
    if not bool(((told_N >= 0) & (told_N < classes)).all()):
        raise DataError(f"expected told labels from 0 to {classes - 1}, got others")
    input_ND = _standardised(activation_ND)
    order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    folds = order_N.tensor_split(FOLDS)
    best, kept_NC = -torch.inf, torch.zeros(count, classes)
    channel_CC = torch.full((classes, classes), (1 - right) / (classes - 1), dtype=torch.float64)
    channel_CC.fill_diagonal_(right)
    told_NC = channel_CC.T[told_N]  # P(told | class)
    for decay in DECAYS:
        class_NC = torch.empty(count, classes, dtype=torch.float64)
        for fold in folds:
            others = torch.ones(count, dtype=torch.bool).index_fill_(0, fold, value=False)
            weight_DC = _classifier(input_ND[others], told_NC[others], decay)
            class_NC[fold] = (input_ND[fold] @ weight_DC).softmax(1)
        likelihood = float((class_NC * told_NC).sum(1).log().sum())
        if likelihood > best:
            best, kept_NC = likelihood, class_NC * told_NC
    return kept_NC.argmax(1)


def _standardised(activation_ND: Tensor) -> Tensor:
    """Each feature with mean 0, all together of norm 1 on average; and a constant one: [N, D+1]."""
    activation_ND = activation_ND.double().cpu()
    centred_ND = activation_ND - activation_ND.mean(0)
    scaled_ND = centred_ND / centred_ND.std(0).clamp_min(1e-12) / centred_ND.shape[1] ** 0.5
    return torch.cat([scaled_ND, torch.ones(len(scaled_ND), 1, dtype=torch.float64)], 1)


def _classifier(input_ND: Tensor, told_NC: Tensor, decay: float) -> Tensor:
    """Weights [D, C], the last row the biases, that make the told labels likeliest."""
    weight_DC = torch.zeros(
        input_ND.shape[1], told_NC.shape[1], dtype=torch.float64, requires_grad=True
    )
    optimizer = torch.optim.LBFGS([weight_DC], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        class_NC = (input_ND @ weight_DC).softmax(1)
        found = -(class_NC * told_NC).sum(1).log().mean() + decay * weight_DC[:-1].square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return weight_DC.detach()


def _grouped(vector_ND: Tensor | None, classes: int, seed: int) -> Tensor:
    """Spherical k-means (Dhillon and Modha 2001), the best of several starts."""
    if vector_ND is None or classes < 2 or len(vector_ND) < classes:
        count = 0 if vector_ND is None else len(vector_ND)
        raise DataError(
            f"expected at least 2 classes and a text for each, got {classes} and {count} texts"
        )
    unit_ND = normalize(vector_ND.cpu(), dim=1)
    draw = torch.Generator().manual_seed(seed)
    best, kept = -torch.inf, torch.zeros(len(unit_ND), dtype=torch.int64)
    for _ in range(STARTS):
        centre_CD = unit_ND[torch.randperm(len(unit_ND), generator=draw)[:classes]]
        for _ in range(ROUNDS):
            near_N, group_N = (unit_ND @ centre_CD.T).max(1)
            sum_CD = torch.zeros_like(centre_CD).index_add_(0, group_N, unit_ND)
            moved_CD = normalize(sum_CD, dim=1)
            moved_CD = torch.where(sum_CD.norm(dim=1, keepdim=True) > 0, moved_CD, centre_CD)
            if torch.equal(moved_CD, centre_CD):
                break
            centre_CD = moved_CD
        if float(near_N.sum()) > best:
            best, kept = float(near_N.sum()), group_N
    return kept
