"""The tokens that a tokenizer puts around every text, such as [CLS] and [SEP]: where, not which.

A tokenizer's settings may call any word a special token, and a text may spell one: neither says
that a token is no content. What is certain is the place. The post-processor of a tokenizer puts
the same tokens before and behind every text, whatever it says; these are the **margins**, and
everything between them is the text.

Shapes: L length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blindtune.models.tokenizers import read_backend, refuse_malformed

_TEXTS = ("a", "A text, of 2 lines.\n", "a b\u00e9\u2603")
_OWN_WORDS = 8  # of the tokenizer's, in case it knows none of the texts above
_SHOWN_TOKENS, _SHOWN_LETTERS = 8, 40


@final
@dataclass(frozen=True)
class Margins:
    """Token ids that stand around every text; both empty: there are none."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def mask(self, ids_L: Tensor) -> Tensor:
        """Where the margins of a text are, bool [L].

        Both are there or neither: a piece of a longer text, such as a window of language modelling,
        that does not begin and end as texts do has no margins.
        """
        mask_L = torch.zeros(len(ids_L), dtype=torch.bool, device=ids_L.device)
        first, end = len(self.before), len(ids_L) - len(self.after)
        if first <= end and (*ids_L[:first].tolist(), *ids_L[end:].tolist()) == (
            *self.before,
            *self.after,
        ):
            mask_L[:first] = True
            mask_L[end:] = True
        return mask_L

    def content(self, ids_L: Tensor) -> Tensor:
        """The tokens between the margins."""
        return ids_L[~self.mask(ids_L)]


def margins_of(tokenizer: PreTrainedTokenizerBase) -> Margins:
    """Find a tokenizer's margins by encoding a few texts with and without them.

    Raises:
        PackageError: it does not put every text once, whole, between the same tokens. One that
            repeats a text would have its words noised in independent draws, which spend again.
    """
    with refuse_malformed():
        bare = _without_post_processor(tokenizer)
        found = {pair for text in _probes(tokenizer) if (pair := _around(tokenizer, bare, text))}
        if not found:
            raise ValueError("a tokenizer that finds no token in any of the texts it was tried on")
        if len(found) > 1:
            raise ValueError(
                "other tokens around one text than around another; expected the same around all"
            )
        return Margins(*found.pop())


def shown_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Tokens as a reader may see them: quoted, what controls a terminal escaped, long ones cut."""
    names: list[Any] = [tokenizer.convert_ids_to_tokens(i) for i in ids[:_SHOWN_TOKENS]]
    shown = [
        f"id {i}" if name is None else repr(str(name)[:_SHOWN_LETTERS])
        for i, name in zip(ids, names, strict=False)
    ]
    more = len(ids) - len(shown)
    return (*shown, f"and {more:,} more") if more else tuple(shown)


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from _TEXTS
    words = sorted(word for word in tokenizer.get_vocab() if len(word) <= _SHOWN_LETTERS)
    yield " ".join(words[:_OWN_WORDS])


def _without_post_processor(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What `add_special_tokens=False` is not: such a text is still repeated by its template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009
    return read_backend(
        json.dumps(json.loads(backend.to_str()) | {"post_processor": None}).encode()
    )


def _around(
    tokenizer: PreTrainedTokenizerBase, bare: Tokenizer, text: str
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The tokens before and behind a text; None if it has no token of its own."""
    content, whole = bare.encode(text).ids, tokenizer(text, return_special_tokens_mask=True)
    ids, added = whole["input_ids"], whole["special_tokens_mask"]
    first = added.index(0) if 0 in added else len(ids)
    end = first + len(content)
    if ids[first:end] != content or not all(added[end:]):
        raise ValueError(
            f"a text of {len(content)} tokens as {added.count(0)} among {len(ids)}; expected it "
            "once and whole between the tokens that are put around it"
        )
    return (tuple(ids[:first]), tuple(ids[end:])) if content else None
