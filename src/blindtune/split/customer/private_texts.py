"""A customer's texts as token ids, with their labels: what never leaves.

What a task trains on:

| task | file | labels |
|---|---|---|
| classification | .jsonl, .csv, .parquet, hub | classes, by their names |
| regression | the same | one number a text |
| language-model | .txt, or one of these with texts | none: the tokens themselves, in windows |

Shapes: L tokens of a text, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from blindtune.errors import ConfigError, DataError
from blindtune.kinds import check_kinds
from blindtune.models.decoder import UNLIMITED_CONTEXT, Decoder, context_limit
from blindtune.split.bottom import Bottom
from blindtune.split.customer.labelled_text import (
    LabelKind,
    LabelledTexts,
    labelled,
    read_labelled,
    read_texts,
)
from blindtune.training.records import encoding
from blindtune.training.text import DataConfig, load_dataset_file

Purpose = Literal["classification", "regression", "language-model"]
WINDOW_TOKENS = 128
"""Of language modelling, where neither the customer nor the package says another number."""


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What the texts are for, and where they stand in their file."""

    task: Purpose = "classification"
    """classification or regression of texts; language-model (U-shape only): the next token."""
    text_column: str = "text"
    """Column of the texts."""
    label_column: str = "label"
    """Column of classes or numbers."""
    max_length: int | None = None
    """Tokens of a text, longer ones are cut; of a window, for language models. None: as many as
    the bottom takes; 128 for windows."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        if self.task not in get_args(Purpose):
            raise ConfigError(f"expected task {', '.join(get_args(Purpose))}, got {self.task!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"expected max_length of at least 2, got {self.max_length}")


@dataclass(frozen=True, eq=False, kw_only=True)
class PrivateTexts:
    """Texts of one file."""

    ids: tuple[Tensor, ...]
    """[L] of every text, by the bottom's tokenizer."""
    labels: Tensor | None
    """[N] classes (int64) or targets (float32); None: there are none."""
    names: tuple[str, ...] = ()
    """What the classes are called."""
    rows: tuple[int, ...] = ()
    """Which row of the file each text is, from 1; for windows, their own number."""
    shortened: int = 0
    """How many texts of the file were longer, and lost their end."""

    def taken(self, order: Sequence[int]) -> PrivateTexts:
        """The texts at these places, in this order."""
        return replace(
            self,
            ids=tuple(self.ids[i] for i in order),
            labels=None if self.labels is None else self.labels[list(order)],
            rows=tuple(self.rows[i] for i in order) if self.rows else (),
        )


def read_training(bottom: Bottom, path: str | Path, reading: ReadingConfig) -> PrivateTexts:
    """Texts to tune on.

    Raises:
        DataError: the file is missing, malformed, or holds nothing to train on.
        ConfigError: language modelling with an encoder, or in the two-part split, whose vendor
            would see the text.
    """
    if reading.task == "language-model":
        return _windows(bottom, path, reading)
    found = read_labelled(
        path,
        text_column=reading.text_column,
        label_column=reading.label_column,
        kind=_kind(reading),
    )
    return _encoded(bottom, found, reading)


def read_unseen(
    bottom: Bottom, path: str | Path, reading: ReadingConfig, names: tuple[str, ...] = ()
) -> PrivateTexts:
    """Texts to predict or to audit; with labels if every row has one.

    Args:
        names: the classes of the training texts; (): those of this file.

    Raises:
        DataError: as for `read_training`, or a class that the training texts do not have.
    """
    if reading.task == "language-model":
        return _windows(bottom, path, reading)
    found = read_texts(path, text_column=reading.text_column, label_column=reading.label_column)
    if found.labelled:
        read = labelled(found, names=names, kind=_kind(reading))
        return _encoded(bottom, read, reading)
    ids, shortened = cut_texts(bottom, found.texts, reading)
    return PrivateTexts(ids=ids, labels=None, names=names, rows=found.rows, shortened=shortened)


def _kind(reading: ReadingConfig) -> LabelKind:
    return "class" if reading.task == "classification" else "target"


def encode_texts(
    bottom: Bottom, texts: Sequence[str], max_length: int | None = None
) -> tuple[Tensor, ...]:
    """Token ids [L] of every text, cut to `max_length` and to what the bottom takes.

    Raises:
        DataError: no texts, or one without tokens. ModelError: the tokenizer fails at one.
    """
    if not texts:
        raise DataError("expected texts, got none: give some")
    longest = _longest(bottom, max_length)
    with encoding():
        encoded = bottom.tokenizer(
            list(texts), truncation=True, max_length=longest, add_special_tokens=True
        )["input_ids"]
    ids = tuple(torch.tensor(text, dtype=torch.int64) for text in encoded)
    empty = next((i for i, text in enumerate(ids) if not len(text)), None)
    if empty is not None:
        raise DataError(f"text {empty} holds no token: leave it out")
    return ids


def _longest(bottom: Bottom, max_length: int | None) -> int:
    """The most tokens of a text: what is asked for, the package's limit, the model's."""
    limits = (max_length, bottom.max_length, context_limit(bottom.stack.config))
    return min((n for n in limits if n is not None), default=UNLIMITED_CONTEXT)


def _encoded(bottom: Bottom, found: LabelledTexts, reading: ReadingConfig) -> PrivateTexts:
    ids, shortened = cut_texts(bottom, found.texts, reading)
    return PrivateTexts(
        ids=ids, labels=found.labels_N, names=found.names, rows=found.rows, shortened=shortened
    )


def cut_texts(
    bottom: Bottom, texts: Sequence[str], reading: ReadingConfig
) -> tuple[tuple[Tensor, ...], int]:
    """Ids of every text, and how many texts lost their end; errors as of `encode_texts`."""
    ids = encode_texts(bottom, texts, reading.max_length)
    longest = _longest(bottom, reading.max_length)
    full = [text for text, ids_L in zip(texts, ids, strict=True) if len(ids_L) == longest]
    if not full:
        return ids, 0
    with encoding():
        whole = bottom.tokenizer(full, add_special_tokens=True, verbose=False)["input_ids"]
    return ids, sum(len(text) > longest for text in whole)


def _windows(bottom: Bottom, path: str | Path, reading: ReadingConfig) -> PrivateTexts:
    """Texts joined and cut into windows, as language models read them."""
    if bottom.cut.partition != "u-shape":
        raise ConfigError(
            "expected a bottom package of the u-shape for a language model, got the two-part "
            "split, where the text would go to the vendor as labels: ask for a u-shape package"
        )
    if not isinstance(bottom.stack, Decoder):
        raise ConfigError("expected a decoder for a language model, got an encoder's package")
    length = _longest(bottom, reading.max_length or WINDOW_TOKENS)
    data = load_dataset_file(
        path, bottom.tokenizer, DataConfig(text_column=reading.text_column, max_length=length)
    )
    if data.trained_tokens != data.tokens:
        raise DataError(f"{path}: expected plain texts for a language model, got prompts or turns")
    rows = tuple(range(1, len(data) + 1))
    return PrivateTexts(ids=tuple(data.input_ids), labels=None, rows=rows)
