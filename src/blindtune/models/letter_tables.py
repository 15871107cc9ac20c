"""A tokenizer's table of letters (`Precompiled`), as SentencePiece compiles it.

The size of a trie in bytes, the trie (a double array of 32-bit units), and the texts that it
points to, each ended by a zero byte. The tokenizers library looks up every grapheme of a text that
is under six bytes, and else each of its letters; what the first key found writes stands in its
place.

**The rule.** An entry writes what Unicode makes of its key (a compatibility form, with or without
case), or one letter of ASCII at most. What a vendor chooses therefore takes no more room than what
it replaces, and no step after it makes ASCII longer. What becomes longer does so as Unicode says,
and only a letter that the customer wrote: U+FDFA has 18 letters, four words that are not copies of
each other. A letter that Python's Unicode does not know yet may be any one letter. The tables of
SentencePiece (`nfkc`, `nmt_nfkc` and both with case folded) are all within this.
"""

from __future__ import annotations

import base64
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Iterator

MOST_CODED = 2**20
"""Letters of base64; SentencePiece's largest table has 329,556."""
MOST_KEY_BYTES = 5
"""Longer keys are never looked up."""
MOST_STATES = 2**15
"""Reached by keys that are looked up; SentencePiece's tables have up to 12,685."""
MOST_WRITTEN_BYTES = 64
"""Of one entry; Unicode's longest form has 33."""
_BLOCK = 0xFF
_HAS_ENTRY = 1 << 8
_LABEL = 1 << 31 | 0xFF
_PLACE = (1 << 31) - 1


def check_letter_table(coded: str) -> None:
    """Raise ValueError for a table that is broken, or by which a word could be written repeatedly.

    Args:
        coded: the table in base64.
    """
    if len(coded) > MOST_CODED:
        raise ValueError(f"a table of {len(coded):,} letters; expected at most {MOST_CODED:,}")
    for key, written in _entries(base64.b64decode(coded, validate=True)):
        if not _is_harmless(key, written):
            raise ValueError(
                f"a table that makes {written!a} of {key!a}, which could write a word several "
                "times; expected what Unicode makes of it, or one letter of ASCII at most"
            )


def _entries(table: bytes) -> Iterator[tuple[str, str]]:
    """What is written for which letters, of all keys that are looked up."""
    size = int.from_bytes(table[:4], "little")
    if size % 4 or size > len(table) - 4:
        raise ValueError(f"a Precompiled table of {len(table)} bytes with a trie of {size}")
    units = struct.unpack_from(f"<{size // 4}I", table, 4)
    texts = table[4 + size :]
    for key, place in _keys(units):
        if place >= len(texts):
            raise ValueError("a table that points behind its end")
        end = texts.find(b"\0", place, place + MOST_WRITTEN_BYTES + 1)
        if end < 0:
            raise ValueError(f"a table that writes over {MOST_WRITTEN_BYTES} bytes for a letter")
        try:
            yield key.decode(), texts[place:end].decode()
        except UnicodeDecodeError as error:
            raise ValueError("a table that cuts a letter into bytes") from error


def _keys(units: tuple[int, ...]) -> Iterator[tuple[bytes, int]]:
    """The keys and where their texts begin.

    A state is a place in the array; the unit of its child by a byte is at the place XOR the byte,
    and a unit's label says of which byte it is a child. So one pass finds the children of all.
    States may be shared, and a forged trie may have circles: the number of visits is bounded.
    """
    children: defaultdict[int, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        if 0 < (label := unit & _LABEL) <= _BLOCK:
            children[i ^ label].append(i)
    visits = 0
    waiting = [(_child_place(units, 0), b"")]
    while waiting:
        place, key = waiting.pop()
        for i in children.get(place, ()):
            visits += 1
            if visits > MOST_STATES:
                raise ValueError(f"a table of over {MOST_STATES:,} states")
            longer = key + bytes([units[i] & _BLOCK])
            next_place = _child_place(units, i)
            if units[i] & _HAS_ENTRY:
                yield longer, units[next_place] & _PLACE
            if len(longer) < MOST_KEY_BYTES:
                waiting.append((next_place, longer))


def _child_place(units: tuple[int, ...], i: int) -> int:
    """Where a unit's state is: it and all its children, there or not, must lie in the array."""
    unit = units[i] if units else 0
    place = i ^ (unit >> 10 << (unit >> 6 & 8))
    if place | _BLOCK >= len(units):
        raise ValueError("a table whose trie points out of it")
    return place


def _is_harmless(key: str, written: str) -> bool:
    if len(written) <= 1 and (
        written.isascii() or any(unicodedata.category(letter) == "Cn" for letter in key)
    ):
        return True
    whole = unicodedata.normalize("NFKC", key)
    cased = {form for text in (key, whole) for form in (text, text.lower(), text.casefold())}
    return any(
        written == unicodedata.normalize(form, text) for text in cased for form in ("NFKC", "NFKD")
    )
