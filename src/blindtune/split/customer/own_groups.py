"""The word groups of a customer's job: made once, from the bottom and public text alone.

Guarantee: `privacy.word_groups`'s. The customer makes the groups itself, so a vendor cannot hand
out groups that hide nothing, and no word stays alone because the tokenizer calls it special. They
say what the public text says, and may be shown to anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blindtune.errors import DataError
from blindtune.privacy.word_groups import GroupingConfig, WordGroups, group_words
from blindtune.split.bottom import Bottom
from blindtune.split.customer.word_vectors import word_vectors
from blindtune.training.records import encoding
from blindtune.training.text import DataConfig, read_rows

OnPart = Callable[[str, int, int], None]
FEWEST_TOKENS = 10_000
"""Of public text; fewer say nothing about how frequent words are."""


def public_words(tokenizer: PreTrainedTokenizerBase, public_text: str | Path) -> Tensor:
    """The tokens [T] of public text in which words are counted; arguments as for `make_groups`.

    Raises:
        DataError: the text cannot be read, or is too short.
    """
    reading = DataConfig()
    cells = [row.get(reading.text_column) for _, row in read_rows(str(public_text), reading)]
    texts = [cell for cell in cells if isinstance(cell, str)]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    with encoding():
        encoded = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
    words_T = torch.tensor([i for ids in encoded for i in ids], dtype=torch.int64)
    if len(words_T) < FEWEST_TOKENS:
        raise DataError(
            f"{public_text}: expected at least {FEWEST_TOKENS:,} tokens of public text to count "
            f"words in, got {len(words_T):,}: give more, of the kind that yours is"
        )
    return words_T


def make_groups(
    bottom: Bottom,
    public_text: str | Path,
    config: GroupingConfig,
    *,
    on_part: OnPart = lambda _part, _done, _total: None,
) -> WordGroups:
    """Group the words of a bottom's vocabulary.

    Args:
        bottom: its blocks, or its embedding at cut 0, say which words mean the same.
        public_text: .txt, or .jsonl, .csv, .parquet with `text`.
        config: how coarse.
        on_part: is told what is done, and how much of it (some ten seconds on one core for 30,000
            words).

    Raises:
        DataError: the text cannot be read, or is too short.
    """
    words_T = public_words(bottom.tokenizer, public_text)
    vector_VD = word_vectors(
        bottom.stack, bottom.tokenizer, layers=bottom.cut.cut,
        on_progress=partial(on_part, "meanings of words"),
    )  # fmt: skip
    count_V = torch.bincount(words_T, minlength=len(vector_VD))
    on_part("grouping words", 0, 1)
    groups = group_words(vector_VD, count_V, config=config)
    on_part("grouping words", 1, 1)
    return groups
