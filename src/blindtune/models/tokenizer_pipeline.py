"""What a stranger's tokenizer may do to a text before it cuts it into tokens.

A tokenizer.json describes a small program: steps that rewrite a text, steps that split it, a model
that finds tokens, and a template that puts tokens around them. Run as it is, it could send a word
several times, in as many independent draws of the noise; blow one letter up to gigabytes; or choose
tokens by chance, so that the same text is drawn anew at every reading. So steps are named here, one
that rewrites may not make a text longer than Unicode's own mappings do, and nothing is random.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterator
from typing import Any

from tokenizers.normalizers import Precompiled

MOST_STEPS = 16
"""Of one kind, nested ones counted."""
MOST_PIECES = 64
"""Tokens and texts of a template."""
_STEPS = {
    "normalizer": (
        "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt",
        "Precompiled", "Prepend", "Replace", "Strip", "StripAccents",
    ),
    "pre_tokenizer": (
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation",
        "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    ),
    "post_processor": ("BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"),
    "decoder": (
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip",
        "WordPiece",
    ),
}  # fmt: skip
_NESTED = ("normalizers", "pretokenizers", "processors", "decoders")
_LAST_LETTER = 0x10000


def check_pipeline(described: dict[str, Any]) -> None:
    """Raise ValueError for a tokenizer.json that repeats, blows up, or draws.

    Args:
        described: the parsed file.
    """
    for kind, known in _STEPS.items():
        steps = list(_steps(described.get(kind)))
        names = [str(step.get("type")) for step in steps]
        strange = sorted(set(names) - set(known))
        if strange:
            raise ValueError(f"a {kind} that is a {strange[0][:40]}; expected {', '.join(known)}")
        if len(names) > MOST_STEPS:
            raise ValueError(f"{len(names)} steps of a {kind}; expected at most {MOST_STEPS}")
        for step in steps:
            _check_step(step)
    cut = [*_steps(described.get("normalizer")), *_steps(described.get("pre_tokenizer"))]
    if sum(step["type"] == "ByteLevel" for step in cut) > 1:
        raise ValueError("bytes of bytes; expected at most one step ByteLevel")
    if described["model"].get("dropout"):
        raise ValueError("a model that drops merges by chance; expected dropout null or 0")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """The steps of one kind, without the sequences around them."""
    if value is None:
        return
    if value.get("type") != "Sequence":
        yield value
        return
    for name in _NESTED:
        for step in value.get(name, ()):
            yield from _steps(step)


def _check_step(step: dict[str, Any]) -> None:
    kind = step["type"]
    written = {"Replace": "content", "Prepend": "prepend", "Metaspace": "replacement"}.get(kind)
    if written is not None and len(step[written]) > 1:
        raise ValueError(
            f"a {kind} of {len(step[written])} letters, which could write a word several times; "
            "expected one letter at most"
        )
    if kind == "TemplateProcessing":
        for name in ("single", "pair"):
            _check_template(step[name])
    if kind == "Precompiled":
        _check_mapping(base64.b64decode(step["precompiled_charsmap"]))


def _check_template(pieces: list[dict[str, Any]]) -> None:
    texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
    if len(pieces) > MOST_PIECES or len(set(texts)) < len(texts):
        raise ValueError(
            f"a template of {len(pieces)} pieces, {len(texts)} of them texts; expected each text "
            f"once, and at most {MOST_PIECES} pieces"
        )


def _check_mapping(compiled: bytes) -> None:
    """A table of letters may make none longer than Unicode's compatibility forms or cases do."""
    mapping = Precompiled(compiled)
    for code in range(_LAST_LETTER):
        letter = chr(code)
        if unicodedata.category(letter) in ("Cs", "Cn", "Co"):
            continue
        longest = max(len(form) for form in _forms(letter))
        if len(mapping.normalize_str(letter)) > longest:
            raise ValueError(
                f"a table that makes U+{code:04X} longer than {longest} letters, which could write "
                "a word several times"
            )


def _forms(letter: str) -> Iterator[str]:
    yield letter
    whole = unicodedata.normalize("NFKD", letter)
    yield whole
    yield whole.casefold()
    yield letter.casefold()
