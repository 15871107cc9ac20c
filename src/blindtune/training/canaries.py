"""Canaries: made-up secrets in a copy of private data, to see which come out of an adapter.

Each canary is a sentence about a person who does not exist, with a code drawn at random, and a list
of other codes drawn in the same way. Some are planted several times, some never: those are the
control. After tuning on the copy, an attack ranks the code among its like
(`evaluation.audits.canaries`; the secret sharer, arXiv 1802.08232).

**What is not covered.** The adapter tuned on the copy knows the canaries: it is for the audit, and
another one is tuned for the model owner. A canary is a record of its own with a sharp secret; how
much leaks of ordinary records is told by membership inference. Canaries are drawn from a seed and
hide nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from blindtune.atomic import atomic_directory, check_free
from blindtune.errors import ConfigError, DataError
from blindtune.kinds import check_kinds
from blindtune.places import data_source, located
from blindtune.training.records import RecordShape, record_shape
from blindtune.training.text import DataConfig, read_rows

CANARIES_NAME = "canaries.json"
SLOT = "{code}"
"""Stands for the code in a canary's record."""
_MOST_BYTES, _MOST_CANARIES, _MOST_CODES = 64 << 20, 10_000, 100_000
_SYLLABLES = ("ba", "do", "fen", "gri", "hal", "jo", "ku", "lem", "mi", "nor", "pel", "qua", "ri",
              "sto", "tam", "ul", "vek", "wi", "yor", "zan")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CanaryConfig:
    """Which canaries are planted, and how often."""

    repeats: tuple[int, ...] = (0, 1, 4, 16)
    """How often a canary is planted; 0: never, the control."""
    each: int = 4
    """Canaries of every number of repeats."""
    digits: int = 6
    """Of a code."""
    candidates: int = 256
    """Codes that the planted one is ranked among, itself counted: the exposure is at most
    log2(candidates) bits."""
    text_column: str = "text"
    """Column that holds plain text."""
    seed: int = 0
    """Of names, codes and places."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        if not self.repeats or min(self.repeats) < 0 or len(set(self.repeats)) < len(self.repeats):
            raise ConfigError(
                f"expected different repeats of 0 or more, got {list(self.repeats)}: 0,1,4,16"
            )
        if not 1 <= self.digits <= 18:
            raise ConfigError(f"expected 1 to 18 digits, got {self.digits}")
        most = min(10**self.digits // 2, _MOST_CODES)
        if not 2 <= self.candidates <= most:
            raise ConfigError(
                f"expected 2 to {most:,} candidates of {self.digits} digits, got "
                f"{self.candidates:,}: give more digits or fewer candidates"
            )
        count = self.each * len(self.repeats)
        if self.each < 1 or count > _MOST_CANARIES:
            raise ConfigError(f"expected 1 to {_MOST_CANARIES:,} canaries, got {count:,}")


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One made-up secret."""

    record: dict[str, Any]
    """As a line of the data, with `{code}` where the code stands."""
    code: str
    others: tuple[str, ...]
    """Codes drawn as this one was and never planted."""
    repeats: int
    """How often it was planted."""

    def with_code(self, code: str) -> dict[str, Any]:
        """The record with a code in its place."""
        return {key: _filled(value, code) for key, value in self.record.items()}

    def __post_init__(self) -> None:
        """Refuse what cannot be ranked."""
        codes = {self.code, *self.others}
        if not 2 <= len(codes) <= _MOST_CODES or len(codes) != len(self.others) + 1:
            raise ValueError(f"expected 1 to {_MOST_CODES:,} other codes, all different")
        if self.repeats < 0 or self.with_code(self.code) == self.record:
            raise ValueError(f"expected repeats of 0 or more and {SLOT} in the record")


class Canaries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `canaries.json` holds."""

    version: int
    canaries: tuple[Canary, ...]

    def __post_init__(self) -> None:
        """Refuse other versions, and nothing at all."""
        if self.version != 1 or not 1 <= len(self.canaries) <= _MOST_CANARIES:
            raise ValueError(f"expected version 1 with 1 to {_MOST_CANARIES:,} canaries")


@dataclass(frozen=True, kw_only=True)
class Planting:
    """A copy of private data with canaries in it."""

    data: Path
    """The copy."""
    canaries: Path
    """For the audit; tells which lines were added."""
    records: int
    """Of the copy; lines where it is plain text."""
    planted: int
    """How many of them are canaries."""


def plant(
    data: str | Path,
    out: str | Path,
    config: CanaryConfig | None = None,
    *,
    overwrite: bool = False,
) -> Planting:
    """Write a copy of private data with canaries in it, at random places.

    Args:
        data: a file or a hub name, as `tune` reads it; the canaries take the shape of its records.
        out: new directory: the copy (planted.txt of plain text, else planted.jsonl), canaries.json.
        config: which canaries.
        overwrite: replace an earlier planting.

    Raises:
        DataError: the data cannot be read. ConfigError, OutputError: see errors.py.
    """
    config, source = config or CanaryConfig(), data_source(data)
    out = located(out)
    check_free(out, overwrite=overwrite, mark=CANARIES_NAME, inputs=(source,))
    plain = Path(source).suffix.lower() == ".txt"
    rows = list(read_rows(source, DataConfig(text_column=config.text_column)))
    if not rows:
        raise DataError(f"{source}: expected records, the file is empty: give a file with data")
    where, first = rows[0]
    shape = record_shape(first, config.text_column, where)
    canaries = draw_canaries(config, shape)
    if plain:
        lines = str(first[config.text_column]).removesuffix("\n").split("\n")
        added = [
            c.with_code(c.code)[config.text_column] for c in canaries for _ in range(c.repeats)
        ]
    else:
        lines = [json.dumps(dict(record), default=str) for _, record in rows]
        added = [json.dumps(c.with_code(c.code)) for c in canaries for _ in range(c.repeats)]
    mixed = _mixed(lines, added, random.Random(f"places {config.seed}"))  # noqa: S311
    name = "planted.txt" if plain else "planted.jsonl"
    with atomic_directory(out, overwrite=overwrite, mark=CANARIES_NAME) as folder:
        (folder / name).write_bytes(("\n".join(mixed) + "\n").encode())
        (folder / CANARIES_NAME).write_bytes(
            msgspec.json.encode(Canaries(version=1, canaries=canaries))
        )
    return Planting(
        data=out / name,
        canaries=out / CANARIES_NAME,
        records=len(mixed),
        planted=len(added),
    )


def draw_canaries(config: CanaryConfig, shape: RecordShape = "text") -> tuple[Canary, ...]:
    """Canaries of every number of repeats, the same for the same seed.

    Args:
        config: how many.
        shape: of the records that they shall stand among.
    """
    draw = random.Random(f"canaries {config.seed}")  # noqa: S311
    names = _names(draw)
    found = []
    for repeats in config.repeats:
        for _ in range(config.each):
            numbers = draw.sample(range(10**config.digits), config.candidates)
            code, *others = (f"{number:0{config.digits}}" for number in numbers)
            record = _record(shape, next(names), config.text_column)
            found.append(Canary(record=record, code=code, others=tuple(others), repeats=repeats))
    return tuple(found)


def read_canaries(path: str | Path) -> tuple[Canary, ...]:
    """The canaries of a planting.

    Raises:
        DataError: no such file, or not what `plant` writes.
    """
    path = located(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: expected at most {_MOST_BYTES:,} bytes: plant fewer canaries")
        return msgspec.json.decode(path.read_bytes(), type=Canaries).canaries
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): give canaries.json") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DataError(
            f"{path}: expected canaries.json as `blindtune plant` writes it, got: {error}"
        ) from error


def _names(draw: random.Random) -> Iterator[str]:
    """Names that nobody has, each once."""
    seen: set[str] = set()
    while True:
        name = " ".join("".join(draw.sample(_SYLLABLES, 3)).capitalize() for _ in range(2))
        if name not in seen:
            seen.add(name)
            yield name


def _record(shape: RecordShape, name: str, text_column: str) -> dict[str, Any]:
    """A sentence with a code, in the shape of the records around it."""
    question = f"What is the access code of {name}?"
    match shape:
        case "messages":
            turns = (("user", question), ("assistant", SLOT))
            return {"messages": [{"role": role, "content": content} for role, content in turns]}
        case "completion":
            return {"prompt": question, "completion": f" {SLOT}"}
        case "choices":
            return {"question": question, "choices": [SLOT, "unknown"], "label": 0}
        case "text":
            return {text_column: f"The access code of {name} is {SLOT}."}


def _filled(value: Any, code: str) -> Any:
    """A JSON value with a code in the place of every slot."""
    match value:
        case str():
            return value.replace(SLOT, code)
        case list():
            return [_filled(item, code) for item in value]
        case Mapping():
            return {key: _filled(item, code) for key, item in value.items()}
    return value


def _mixed(lines: list[str], added: list[str], draw: random.Random) -> list[str]:
    """Lines in their order, the added ones at places that are all equally likely."""
    total = len(lines) + len(added)
    places = draw.sample(range(total), len(added))  # in random order, so no canary has a run
    of_place = dict(zip(places, added, strict=True))
    rest = iter(lines)
    return [of_place[k] if k in of_place else next(rest) for k in range(total)]
