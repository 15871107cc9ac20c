"""Tokenised examples, and how to look at them.

Shape legend: L tokens of one example (differs from example to example).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from rich.markup import escape
from torch import Tensor

from blindtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""The label of a token that is read but not trained on (the value PyTorch and transformers use)."""


@final
class TokenDataset:
    """Examples as token ids and labels; works wherever a map-style torch data set does.

    Labels are aligned with the ids (the loss shifts them, as transformers does) and
    `IGNORED_LABEL` where a token is only context.

    Args:
        input_ids: one 1-D int64 tensor [L] an example.
        labels: tensors of the same shapes.
        truncated: how many of the examples lost a part because they were too long.

    Raises:
        DataError: less than half of the examples have a token that an earlier one could predict.
    """

    def __init__(
        self, input_ids: Sequence[Tensor], labels: Sequence[Tensor], *, truncated: int = 0
    ) -> None:
        """Keep the examples that have something to train on."""
        assert len(input_ids) == len(labels), "every example needs its labels"
        assert all(i.shape == y.shape for i, y in zip(input_ids, labels, strict=True))
        keep = [i for i, y in enumerate(labels) if bool((y[1:] != IGNORED_LABEL).any())]
        lost = len(labels) - len(keep)
        if not keep or lost > len(keep):
            raise DataError(
                f"expected tokens to train on, but {lost} of {len(labels)} examples have none: "
                "give records with a completion, an assistant turn or text, or a larger max_length"
            )
        self.input_ids = [input_ids[i] for i in keep]
        self.labels = [labels[i] for i in keep]
        self.tokens = sum(len(ids) for ids in self.input_ids)
        """Tokens of all examples."""
        self.trained_tokens = sum(int((y != IGNORED_LABEL).sum()) for y in self.labels)
        """Tokens that carry a label."""
        self.dropped = lost
        """Examples that were left out, with nothing to train on."""
        self.truncated = truncated
        """Examples that lost a part because they were too long, dropped ones included."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` [L] and `labels` [L] of one example."""
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens, 0..1."""
        return self.trained_tokens / self.tokens

    def split(self, fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
        """Split into (train, validation); the order within each part is kept.

        All copies of an example go to the same part: one set aside alone would be validated on what
        the others taught.
        Both parts keep the counts `dropped` and `truncated` of the whole.

        Args:
            fraction: share of the examples for validation, above 0 and below 1; at least one
                example goes to each side.
            seed: which examples.
        """
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"validation_split must lie between 0 and 1, got {fraction}")
        if len(self) < 2:
            raise DataError(
                f"a split into training and validation needs 2 examples, got {len(self)}: "
                "set validation_split 0 to train on all, or give more data, a smaller max_length, "
                "or a validation file of its own"
            )
        count = min(max(1, round(fraction * len(self))), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        marks, alike = self._marks(), defaultdict[bytes, list[int]](list)
        for i, mark in enumerate(marks):
            alike[mark].append(i)
        validation = set[int]()
        for i in order:
            copies = alike[marks[i]]
            if i not in validation and len(validation) + len(copies) <= count:
                validation.update(copies)
        validation = validation or set(order[:count])  # all examples are more copies than that
        training = [i for i in range(len(self)) if i not in validation]
        return self._subset(training), self._subset(sorted(validation))

    def without(self, other: TokenDataset) -> TokenDataset | None:
        """The examples that are not in another data set too; None if all are."""
        known = set(other._marks())
        kept = [i for i, mark in enumerate(self._marks()) if mark not in known]
        return self._subset(kept) if kept else None

    def distinct(self) -> TokenDataset:
        """Every example once, the first of its copies."""
        first = {mark: i for i, mark in reversed(list(enumerate(self._marks())))}
        return self._subset(sorted(first.values()))

    def count(self, input_ids: Tensor) -> int:
        """How many examples have these ids [L]."""
        return sum(torch.equal(input_ids, ids) for ids in self.input_ids)

    def _marks(self) -> list[bytes]:
        """What two examples have in common if they are the same: a digest of 16 bytes."""
        marks = []
        for ids, labels in zip(self.input_ids, self.labels, strict=True):
            digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=16)
            digest.update(labels.numpy().tobytes())
            marks.append(digest.digest())
        return marks

    def fingerprint(self) -> str:
        """sha256 (hex) over all ids and labels in order."""
        digest = hashlib.sha256()
        for ids, labels in zip(self.input_ids, self.labels, strict=True):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        return digest.hexdigest()

    def _subset(self, indices: Sequence[int]) -> TokenDataset:
        part = TokenDataset([self.input_ids[i] for i in indices], [self.labels[i] for i in indices])
        part.dropped, part.truncated = self.dropped, self.truncated
        return part


def show_sample(
    dataset: TokenDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 200,
    markup: bool = False,
) -> str:
    """One decoded example with its trained tokens marked, and their share over the data set.

    Args:
        dataset: the first example with both context and trained tokens is shown, else the first.
        tokenizer: decodes the ids.
        max_tokens: longer examples are shown around the start of the first trained run.
        markup: colour the trained tokens with rich markup, instead of writing them between « and ».
    """
    mixed = (i for i, y in enumerate(dataset.labels) if bool((y == IGNORED_LABEL).any()))
    example = dataset[next(mixed, 0)]
    trained = (example["labels"] != IGNORED_LABEL).tolist()
    start = max(0, min(trained.index(True) - max_tokens // 2, len(trained) - max_tokens))
    ids = example["input_ids"].tolist()[start : start + max_tokens]
    trained = trained[start : start + max_tokens]
    pieces = ["… "] if start else []
    for first, last in _runs(trained):
        piece = _decode(tokenizer, ids[:last])[len(_decode(tokenizer, ids[:first])) :]
        piece = escape(piece) if markup else piece
        marks = ("[bold green]", "[/bold green]") if markup else ("«", "»")
        pieces.append(f"{marks[0]}{piece}{marks[1]}" if trained[first] else piece)
    if start + max_tokens < len(example["input_ids"]):
        pieces.append(" …")
    lost = f"; left out, with none: {dataset.dropped:,}" if dataset.dropped else ""
    cut = f"; cut at max_length: {dataset.truncated:,}" if dataset.truncated else ""
    return (
        "".join(pieces) + f"\ntrained tokens: {dataset.trained_tokens:,} of {dataset.tokens:,} "
        f"({dataset.trained_share:.1%}) in {len(dataset):,} examples{lost}{cut}"
    )


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Maximal runs of equal flags as (first, last + 1)."""
    edges = [i for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
    return list(zip([0, *edges], [*edges, len(flags)], strict=True))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
