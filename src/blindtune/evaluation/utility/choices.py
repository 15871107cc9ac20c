"""Multiple-choice questions, scored by the likelihood of each choice.

Shapes: B prompts of one length, R rows (one per prompt and choice), L prompt length, C choice
length, D hidden.

The choices of a question share its prompt: the prompt runs once, and its keys and values are
handed to every choice. Prompts of equal length run together, so nothing is padded in the middle
and no attention mask is needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blindtune.errors import DataError
from blindtune.evaluation.utility.loss import Progress, scoring, target_log_probs
from blindtune.models.decoder import UNLIMITED_CONTEXT, context_limit
from blindtune.places import data_source
from blindtune.training.records import Item, open_ended_ids, read_item
from blindtune.training.rows import json_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = tuple[int, ...]

__all__ = ["Answer", "Item", "MultipleChoice", "log_likelihoods", "multiple_choice", "read_items"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model made of one item."""

    label: int
    """Index of the right choice."""
    log_likelihoods: tuple[float, ...]
    """Of each choice given the prompt, in nats."""
    prediction: int
    """The likeliest choice."""
    prediction_normalised: int
    """The choice of highest log-likelihood per character."""


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """Accuracy over a set of items."""

    accuracy: float
    """Share of items whose likeliest choice is the right one."""
    accuracy_normalised: float
    """The same with log-likelihoods divided by the characters of the choice."""
    items: int
    standard_error: float | None
    """Of accuracy; None for a single item."""
    answers: tuple[Answer, ...]
    """One per item, in the order of the items."""


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> MultipleChoice:
    """Score items the way lm-evaluation-harness scores its ``multiple_choice`` tasks.

    Prompt and continuations are those of `Item`, so tuning and scoring read a record alike. A
    prompt that is too long for the model loses its beginning.

    Args:
        model: any decoder with a language-model head.
        tokenizer: the model's own.
        items: at least one.
        batch_size: prompts per forward pass; changes speed and memory only.
        on_progress: called with (prompts done, prompts in all).

    Raises:
        DataError: no items, or a choice longer than the model's context.
    """
    if not items:
        raise DataError("expected at least one multiple-choice item, got none")
    limit = _context_limit(model, tokenizer)
    pairs = [
        _encode(tokenizer, item.prompt, continuation, limit)
        for item in items
        for continuation in item.continuations
    ]
    scores = iter(log_likelihoods(model, pairs, batch_size=batch_size, on_progress=on_progress))
    answers = tuple(_answer(item, [next(scores) for _ in item.choices]) for item in items)
    right = sum(answer.prediction == answer.label for answer in answers) / len(answers)
    normalised = sum(a.prediction_normalised == a.label for a in answers) / len(answers)
    variance = right * (1 - right)
    return MultipleChoice(
        accuracy=right,
        accuracy_normalised=normalised,
        items=len(items),
        standard_error=math.sqrt(variance / (len(items) - 1)) if len(items) > 1 else None,
        answers=answers,
    )


def log_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> list[float]:
    """Log-likelihood (nats) of every continuation given its prompt; both are not empty.

    Pairs with the same prompt share its computation, in whatever order they come.
    """
    indices_of: dict[Tokens, list[int]] = defaultdict(list)
    for index, (prompt, _) in enumerate(pairs):
        indices_of[prompt].append(index)
    prompts_of_length: dict[int, list[Tokens]] = defaultdict(list)
    for prompt in indices_of:
        prompts_of_length[len(prompt)].append(prompt)
    scores = [0.0] * len(pairs)
    done = 0
    with scoring(model):
        for length in sorted(prompts_of_length, reverse=True):
            prompts = prompts_of_length[length]
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                rows = [
                    (b, index) for b, prompt in enumerate(batch) for index in indices_of[prompt]
                ]
                sums = _score_batch(model, batch, [(b, pairs[i][1]) for b, i in rows])
                for (_, index), value in zip(rows, sums, strict=True):
                    scores[index] = value
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, len(indices_of))
    return scores


def read_items(path: str | Path) -> list[Item]:
    """Read items from JSON lines, in any form that `blindtune.training.records.read_item` knows.

    Raises:
        DataError: the file cannot be read or is empty, or a line is malformed (named).
    """
    items = [read_item(record, where) for where, record in json_rows(Path(data_source(path)))]
    if not items:
        raise DataError(f"expected at least one item, {path} is empty: give a file with questions")
    return items


def _answer(item: Item, scores: Sequence[float]) -> Answer:
    per_character = [s / len(c) for s, c in zip(scores, item.choices, strict=True)]
    return Answer(
        label=item.label,
        log_likelihoods=tuple(scores),
        prediction=max(range(len(scores)), key=scores.__getitem__),
        prediction_normalised=max(range(len(scores)), key=per_character.__getitem__),
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, limit: int
) -> tuple[Tokens, Tokens]:
    """Tokens of the prompt, and those that the continuation adds to them."""
    before = open_ended_ids(prompt, tokenizer)
    after = open_ended_ids(prompt + continuation, tokenizer)[len(before) :]
    if not 0 < len(after) < limit:
        raise DataError(
            f"expected a choice of 1 to {limit - 1} tokens, got {len(after)} "
            f"for one of {len(continuation.strip())} characters: shorten or remove it"
        )
    return tuple(before[-(limit + 1 - len(after)) :]), tuple(after)


def _context_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    own = min(int(tokenizer.model_max_length), UNLIMITED_CONTEXT)
    return context_limit(model.config) or own


def _score_batch(
    model: PreTrainedModel, prompts: Sequence[Tokens], rows: Sequence[tuple[int, Tokens]]
) -> list[float]:
    """Log-likelihood of every row (index of its prompt, continuation); prompts of one length."""
    device, decoder = model.device, model.get_decoder()
    prompt_of_R = torch.tensor([b for b, _ in rows], device=device)
    lengths_R = torch.tensor([len(tokens) for _, tokens in rows], device=device)
    targets_RC = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokens) for _, tokens in rows], batch_first=True
    ).to(device)
    out = decoder(input_ids=torch.tensor(prompts, device=device), use_cache=True)
    hidden_RCD = out.last_hidden_state[prompt_of_R, -1:]
    if targets_RC.shape[1] > 1:
        out.past_key_values.batch_select_indices(prompt_of_R)
        later = decoder(
            input_ids=targets_RC[:, :-1], past_key_values=out.past_key_values, use_cache=True
        )
        hidden_RCD = torch.cat([hidden_RCD, later.last_hidden_state], dim=1)
    scored_RC = torch.arange(targets_RC.shape[1], device=device) < lengths_R[:, None]
    log_probs_N = target_log_probs(model, hidden_RCD[scored_RC], targets_RC[scored_RC]).double()
    sums_R = log_probs_N.new_zeros(len(rows))
    return sums_R.index_add(0, scored_RC.nonzero()[:, 0], log_probs_N).tolist()
