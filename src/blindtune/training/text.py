"""Reading data files into a `TokenDataset`.

A file is read where it lies, row by row (`training.rows`), so that a bad row is named by file and
number, and private text stays where its owner put it; only data sets of the hub go through the
`datasets` library.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blindtune.errors import ConfigError, DataError
from blindtune.kinds import check_kinds
from blindtune.places import check_hub_name, data_source
from blindtune.training.dataset import IGNORED_LABEL, TokenDataset, show_sample
from blindtune.training.long_text import ids_in_pieces
from blindtune.training.records import (
    Example,
    Record,
    encode_completion,
    encode_messages,
    read_item,
    record_shape,
    text_of,
)
from blindtune.training.rows import csv_rows, decoded, json_rows, parquet_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataConfig",
    "TokenDataset",
    "encode_rows",
    "load_dataset_file",
    "read_rows",
    "show_sample",
]

_EXTENSIONS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
_ENDING = re.compile(r"\.[A-Za-z]\w{0,7}$")
"""Of a file: what names of data sets have behind a dot is a number, as in squad_v1.1."""
Row = tuple[str, Record]
"""Where a record stands ("file:line"), and the record."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read and how to cut it into examples."""

    text_column: str = "text"
    """Column that holds plain text."""
    max_length: int = 128
    """Tokens of a window of packed text, and the most tokens of any other example."""
    pack: bool = True
    """Join texts (end-of-text between them) and cut them into full windows; only the tail of the
    whole is dropped. Off: one example a text, cut after max_length tokens."""
    validation_split: float = 0.1
    """Share of the examples that the caller sets aside when there is no validation file."""
    max_samples: int | None = None
    """Read at most this many records."""
    max_tokens: int | None = None
    """Stop once this many tokens have been read; what follows is not looked at."""
    seed: int = 42
    """Seed of the split."""
    chat_template: str | None = None
    """Jinja template that replaces the tokenizer's own."""
    split: str = "train"
    """Split of a hub data set."""
    name: str | None = None
    """Configuration of a hub data set."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, got {self.max_length}")
        if not 0.0 <= self.validation_split < 1.0:
            raise ConfigError(f"validation_split must be in [0, 1), got {self.validation_split}")
        for field in ("max_samples", "max_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} must be at least 1, got {value}")


def load_dataset_file(
    path_or_hub_name: str | Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> TokenDataset:
    """Read a .txt, .jsonl, .json, .csv or .parquet file, or a hub data set, into tokens.

    Raises:
        DataError: the file is missing, empty, malformed, of an unknown kind, has none of the
            accepted columns, or most of its examples hold nothing to train on.
    """
    source = data_source(path_or_hub_name)
    return encode_rows(read_rows(source, config), source, tokenizer, config)


def encode_rows(
    rows: Iterable[Row], source: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> TokenDataset:
    """Records into tokens, as `load_dataset_file` does; `source` is named in errors.

    Raises:
        DataError: see there.
    """
    rows = islice(rows, config.max_samples)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source}: expected records, the file is empty: give a file with data")
    shape = record_shape(first[1], config.text_column, first[0])
    everything = _chain(first, rows)
    if shape == "text" and config.pack:
        return _packed(source, everything, tokenizer, config)
    if shape == "text":
        examples = _texts_apart(everything, tokenizer, config)
    else:
        examples = (_encode(row, shape, tokenizer, config) for row in everything)
    kept = _limit(examples, config.max_tokens)
    try:
        return _dataset(kept)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def _encode(
    row: Row, shape: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Example:
    where, record = row
    if record_shape(record, config.text_column, where) != shape:
        raise DataError(
            f"{where}: expected a record with the columns of the first one ({shape}), "
            f"found {', '.join(sorted(record))}: give one kind of record a file"
        )
    if shape == "messages":
        return encode_messages(
            record["messages"], tokenizer, config.max_length, where, config.chat_template
        )
    if shape == "choices":
        item = read_item(record, where)
        prompt, completion = item.prompt, item.continuations[item.label]
    else:
        prompt, completion = (text_of(record, name, where) for name in ("prompt", "completion"))
    return encode_completion(prompt, completion, tokenizer, config.max_length)


def _documents(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[Iterator[list[int]]]:
    """Token ids of every text that is not blank, a piece at a time."""
    for where, record in rows:
        text = text_of(record, config.text_column, where)
        if text.strip():
            yield ids_in_pieces(text, tokenizer)


def _packed(
    source: str, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> TokenDataset:
    """Texts joined and cut into full windows; read up to the budget."""
    stream, size = _stream(rows, tokenizer, config), config.max_length
    if len(stream) < size:
        raise DataError(
            f"{source}: one window needs {size} tokens, the text has {len(stream)}: "
            "give more text or a smaller max_length"
        )
    count = len(stream) // size
    ids_NL = torch.tensor(stream[: count * size], dtype=torch.int64).view(count, size)
    windows = [ids_L.clone() for ids_L in ids_NL]
    return TokenDataset(windows, windows)


def _stream(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> array[int]:
    """Ids of all texts, the end of text between them, or the first `max_tokens` of them."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = array("i")
    for pieces in _documents(rows, tokenizer, config):
        stream.extend(eos if stream else [])
        for ids in pieces:
            stream.extend(ids)
            if config.max_tokens is not None and len(stream) >= config.max_tokens:
                return stream[: config.max_tokens]
    return stream


def _texts_apart(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[Example]:
    """One example a text, read as far as it is kept."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = config.max_length
    for pieces in _documents(rows, tokenizer, config):
        ids: list[int] = []
        for piece in pieces:
            ids += piece
            if len(ids) > size:
                break
        else:
            ids += eos
        kept = ids[:size]
        yield Example(input_ids=kept, trained=[True] * len(kept), cut=len(ids) > size)


def _limit(examples: Iterable[Example], max_tokens: int | None) -> list[Example]:
    """The longest head of the examples within the budget, at least one; no more are encoded."""
    total = 0
    kept: list[Example] = []
    for example in examples:
        total += len(example.input_ids)
        if kept and max_tokens is not None and total > max_tokens:
            break
        kept.append(example)
    return kept


def _dataset(examples: list[Example]) -> TokenDataset:
    input_ids = [torch.tensor(example.input_ids, dtype=torch.int64) for example in examples]
    labels = [
        ids
        if all(example.trained)
        else ids.masked_fill(~torch.tensor(example.trained, dtype=torch.bool), IGNORED_LABEL)
        for ids, example in zip(input_ids, examples, strict=True)
    ]
    return TokenDataset(input_ids, labels, truncated=sum(example.cut for example in examples))


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def read_rows(source: str, config: DataConfig) -> Iterator[Row]:
    """The records of a file or a hub data set, as they come.

    Raises:
        DataError: the file is missing, empty, malformed, or of an unknown kind.
    """
    source = data_source(source)
    path = Path(source)
    extension = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{source}: expected a file, got a directory: name one file in it")
    if not path.exists():
        if _is_a_path(source):
            raise DataError(
                f"{source}: expected a data file, there is none: check the path (a name with an "
                "ending, or in a folder that is there, is not looked for on the hub)"
            )
        check_hub_name(source)
        return _hub_rows(source, config)
    if extension not in _EXTENSIONS:
        raise DataError(
            f"{source}: expected a file ending in {', '.join(_EXTENSIONS)}, "
            f"got {extension or 'no ending'}: convert or rename it"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{source}: expected data, the file is empty: give a file with data")
    if extension == ".txt":
        return iter([(source, {config.text_column: decoded(path.read_bytes(), source)})])
    if extension in (".jsonl", ".json"):
        return json_rows(path)
    return _table_rows(path)


def _is_a_path(source: str) -> bool:
    """Whether a name that is no file's looks like one: mistyped names should not go to the hub."""
    begun = source.count("/") == 1 and Path(source).parent.is_dir()
    spelt = bool(_ENDING.search(source)) or "\\" in source
    return spelt or begun or source.count("/") > 1 or source.startswith((".", "~"))


def _table_rows(path: Path) -> Iterator[Row]:
    """Rows of a .csv or .parquet file; an empty cell of .csv holds nothing."""
    if path.suffix.lower() == ".parquet":
        for number, record in parquet_rows(path):
            yield f"{path}, row {number}", record
        return
    for number, cells in csv_rows(path):
        yield f"{path}, row {number}", {name: cell or None for name, cell in cells.items()}


def _hub_rows(name: str, config: DataConfig) -> Iterator[Row]:
    for index, record in enumerate(_load(name, config)):
        yield f"{name}, row {index + 1}", record


def _load(name: str, config: DataConfig) -> Iterable[Record]:
    """`datasets.load_dataset` without its progress bars, its errors translated."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table: Iterable[Record] = datasets.load_dataset(name, name=config.name, split=config.split)
    except Exception as error:  # the library raises its own, pyarrow's, pandas' and OS errors
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{name}: expected a data file, or a hub data set that can be reached: {reason[0]}"
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    return table
