"""Long text into token ids piece by piece, with the ids that the whole would have.

A tokenizer holds some 170 bytes for every byte of what it is given at once, and reads all of it.
So a long text is cut before spaces that follow a character which is no space, where the tokenizer
is of a kind that

- begins a new word there whatever stands around, so that both sides are split and merged as in the
  whole: byte-level with the patterns of GPT-2 or of Llama 3 and Qwen, or Metaspace (which puts no
  mark of its own before text that begins with a space);
- has no added token that a cut could go through or that takes spaces behind it;
- puts, if any, the same tokens around every text, once.

Any other tokenizer is given the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from blindtune.training.records import encoding, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 2**18
"""Characters of a piece, the least; it goes on to the next place for a cut."""
_CUT = re.compile(r"(?<=\S) ")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of Qwen 2 and 3; that of Llama 3 takes digits by threes. No branch of either goes
from another character to a space, and none looks back."""


def ids_in_pieces(
    text: str, tokenizer: PreTrainedTokenizerBase, size: int = PIECE
) -> Iterator[list[int]]:
    """Token ids of a text, special tokens included, a piece at a time.

    Raises:
        ModelError: the tokenizer cannot encode it.
    """
    around = _around(tokenizer) if len(text) > size else None
    if around is None:
        yield token_ids(text, tokenizer)
        return
    before, after = around
    yield before
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + size)
        end = len(text) if cut is None else cut.start()
        yield token_ids(text[start:end], tokenizer, special=False)
        start = end
    yield after


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """The tokens before and behind every text; None if a text must not be cut."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    normalizer, splitter, processor = (
        {} if part is None else json.loads(part.__getstate__())
        for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    )
    added_tokens = backend.get_added_tokens_decoder().values()
    whole = any(
        token.rstrip or token.single_word or re.search(r"\S ", token.content)
        for token in added_tokens
    )
    if whole or normalizer not in ({}, {"type": "NFC"}):
        return None
    if not (_begins_words(splitter) and _says_once(processor)):
        return None
    with encoding():
        encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in added:
        return None
    return ids[: added.index(0)], ids[len(added) - added[::-1].index(0) :]


def _begins_words(splitter: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer begins a word at every cut, as it would in the whole text."""
    parts = splitter.get("pretokenizers", [splitter] if splitter else [])
    match list(dropwhile(lambda part: part["type"] == "Digits", parts)):
        case [{"type": "ByteLevel", "use_regex": True}, *rest]:
            pass
        case [{"type": "Metaspace", "split": True, "replacement": "\u2581"}, *rest]:
            pass
        case [
            {
                "type": "Split",
                "behavior": "Isolated",
                "invert": False,
                "pattern": {"Regex": str(pattern)},
            },
            *rest,
        ] if pattern.replace("{1,3}", "") == _WORDS:
            pass
        case _:
            return False
    return all(part["type"] in ("ByteLevel", "Digits") for part in rest)


def _says_once(processor: Mapping[str, Any]) -> bool:
    """Whether a post-processor has every text once among the tokens that it adds."""
    match processor:
        case {"type": "Sequence", "processors": parts}:
            return all(_says_once(part) for part in parts)
        case {"type": "TemplateProcessing", "single": parts}:
            return sum("Sequence" in part for part in parts) == 1
        case {} if not processor:
            return True
        case _:
            return processor["type"] in ("ByteLevel", "BertProcessing", "RobertaProcessing")
