"""An attribute of a customer's texts, such as who wrote them, as the vendor could guess it.

Its classes are the values that the public text has. Texts of the customer without a value, or with
one that the public text lacks, are left out: nobody could guess those, and to count them as wrong
would flatter the defence.

Shapes: N texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blindtune.errors import DataError
from blindtune.evaluation.audits.audit import Finding
from blindtune.evaluation.leakage.empirical_privacy import RecordLeakage, record_privacy
from blindtune.exchange.files import printable
from blindtune.split.customer.labelled_text import read_texts
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.training.records import kind_of_value

ATTACK = "attribute inference"
MEASURE = "EP of attribute"


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownAttribute:
    """What the adversary knows of its own texts."""

    column: str
    names: tuple[str, ...]
    """The values, sorted."""
    classes_N: Tensor
    """Of every public text the place of its value in `names`; -1: it has none."""

    @property
    def count(self) -> int:
        """Public texts with a value."""
        return int((self.classes_N >= 0).sum())


def read_attribute(path: str | Path, column: str, reading: ReadingConfig) -> tuple[str | None, ...]:
    """The values of all texts of a file, in the order in which they are read for an audit.

    Raises:
        DataError: no such file, a kind without columns, no row has a value there, or a row has one
            that is neither text nor a number.
    """
    found = read_texts(path, text_column=reading.text_column, label_column=column)
    pairs = zip(found.labels, found.where, strict=True)
    values = tuple(_value(raw, where, column) for raw, where in pairs)
    if not any(value is not None for value in values):
        raise DataError(f"{path}: expected values in the column {column!r}, got none: name another")
    return values


def known_attribute(column: str, values: Sequence[str | None]) -> KnownAttribute:
    """The attribute of the public texts; DataError where they have fewer than two values."""
    names = tuple(sorted({value for value in values if value is not None}))
    if len(names) < 2:
        raise DataError(
            f"expected public texts of at least two values of {column!r}, got {len(names)}: give "
            "more, or name another column"
        )
    return KnownAttribute(column=column, names=names, classes_N=_places(names, values))


def check_shared(known: KnownAttribute, values: Sequence[str | None]) -> None:
    """Raise DataError if none of the texts has a value that could be guessed.

    Only values of the public texts are said.
    """
    if not bool((_places(known.names, values) >= 0).any()):
        raise DataError(
            f"expected texts with values of {known.column!r} that the public text has too, got "
            f"none: it has {printable(', '.join(known.names))}; give public text with values of "
            "yours, raise --public-tokens, or name another column"
        )


def attribute_findings(
    guess_N: Tensor,
    known: KnownAttribute,
    values: Sequence[str | None],
    confidence: float,
    note: str = "",
) -> list[Finding]:
    """The share of texts whose attribute was guessed wrong, and that of saying the commonest one.

    Args:
        guess_N: classes of all texts.
        known: what was known to the adversary.
        values: the truth.
        confidence: of the intervals.
        note: a sentence on how far to trust the figure.

    Raises:
        DataError: no text has a value that could be guessed.
    """
    check_shared(known, values)
    truth_N = _places(known.names, values)
    scored_N = truth_N >= 0
    guess_N, truth_N = guess_N[scored_N], truth_N[scored_N]
    blind_N = torch.full_like(truth_N, int(truth_N.mode().values))
    attacked, blind = (
        record_privacy(some_N, truth_N, confidence=confidence) for some_N in (guess_N, blind_N)
    )
    left = int((~scored_N).sum())
    said = f" {left:,} texts without a value that public text has are left out." if left else ""
    return [
        _finding(
            ATTACK,
            f"Knew the {known.column} of {known.count:,} public texts; made states of them as you "
            "do and trained a network to tell it from the mean, the deviation and the number of a "
            "text's states. It used no labels, also where they are sent.",
            attacked,
            f"{_right(known, attacked)}, of {len(known.names):,} values; saying the "
            f"commonest each time gets {attacked.blind_accuracy:.1%}.{said} {note}".rstrip(),
        ),
        _finding(
            "commonest value, no attack",
            f"Looked at nothing, and said the commonest {known.column} of your texts each time.",
            blind,
            f"{_right(known, blind)}.",
        ),
    ]


def _right(known: KnownAttribute, score: RecordLeakage) -> str:
    count = score.privacy.of
    return f"It got the {known.column} of {score.accuracy:.1%} of {count:,} texts right"


def _finding(attack: str, knew: str, score: RecordLeakage, meaning: str) -> Finding:
    return Finding(
        attack=attack, knew=knew, measure=MEASURE, value=score.privacy.value,
        low=score.privacy.low, high=score.privacy.high, meaning=meaning,
    )  # fmt: skip


def _value(raw: Any, where: str, column: str) -> str | None:
    """A value by its name; None where there is none. A whole number is one however it is typed."""
    if isinstance(raw, bool | list | dict):
        raise DataError(
            f"{where}: expected text or a number in {column!r}, got {kind_of_value(raw)}: name "
            "another column"
        )
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return None
    return re.sub(r"^(-?[0-9]+)\.0$", r"\1", str(raw).strip()) or None


def _places(names: Sequence[str], values: Sequence[str | None]) -> Tensor:
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([-1 if value is None else place.get(value, -1) for value in values])
