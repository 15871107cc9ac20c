"""What a stranger's tokenizer may do to a text before it cuts it into tokens.

A tokenizer.json describes a small program: steps that rewrite a text, steps that split it, a model
that finds tokens, and a template that puts tokens around them. Run as it is, it could send a word
several times, in as many independent draws of the noise; blow one letter up to gigabytes; or choose
tokens by chance, so that the same text is drawn anew at every reading. So steps are named here, and
nothing is random.

**Bounds.** What a step writes by the vendor's choice is one letter in the place of at least one,
and it is ASCII or U+2581, which no Unicode form makes longer: a chain of such steps makes no text
longer. Steps that add a letter, that write bytes, or that write from a table stand there once.
BERT's spaces around a Chinese letter stay spaces, for nothing of the vendor's choice stands beside
them. So a text grows by these spaces, by Unicode's forms of the letters that the customer wrote, by
three letters at the beginning of each piece that it is cut into, and to the bytes of a letter where
a tokenizer writes bytes: four at most, three of U+2581.

Not bounded here is the vocabulary: into how many tokens a word is cut, up to its letters or bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blindtune.models.letter_tables import check_letter_table

MOST_STEPS = 16
"""Of one kind, nested ones counted."""
MOST_PIECES = 64
"""Tokens and texts that a template puts."""
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
_BEFORE_MODEL = ("normalizer", "pre_tokenizer")
_NESTED = ("normalizers", "pretokenizers", "processors", "decoders")
_ONCE = ("BertNormalizer", "ByteLevel", "Metaspace", "Precompiled", "Prepend")
_CHOSEN = {"Metaspace", "Precompiled", "Prepend", "Replace"}
_AROUND = ("continuing_subword_prefix", "end_of_word_suffix")
"""What a model writes beside the parts of a word before it looks them up."""
_SPACE = "\u2581"
_REGEXES = (
    " {2,}", " +\u2581", r"[\n\r\t]", r"\n", r"\s+", r"\s{2,}|[\n\r\t]", "^\u2581+$",
)  # fmt: skip
"""Of a Replace, as the tokenizers of transformers have them: each finds a letter at least."""


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
    _check_together([s for kind in _BEFORE_MODEL for s in _steps(described.get(kind))])
    for kind in _STEPS:
        for step in _steps(described.get(kind)):
            _check_step(step)
    _check_model(described["model"])


def _check_model(model: dict[str, Any]) -> None:
    if model.get("dropout"):
        raise ValueError("a model that drops merges by chance; expected dropout null or 0")
    if model.get("byte_fallback") and any(model.get(name) for name in _AROUND):
        raise ValueError(
            f"a model with byte_fallback and a {' or '.join(_AROUND)}, whose bytes it would write "
            "for every letter that it does not know; expected one of the two"
        )


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


def _check_together(steps: list[dict[str, Any]]) -> None:
    """Of the steps before the model: those that make a text longer do not feed each other."""
    names = [step["type"] for step in steps]
    for name in _ONCE:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} steps {name}; expected at most one")
    spaced = any(step.get("handle_chinese_chars") for step in steps)
    if spaced and (chosen := _CHOSEN.intersection(names)):
        raise ValueError(
            f"a {min(chosen)} beside a BertNormalizer that puts spaces around Chinese letters, "
            "which could write a word several times; expected one of the two"
        )


def _check_step(step: dict[str, Any]) -> None:
    kind = step["type"]
    key = {"Replace": "content", "Prepend": "prepend", "Metaspace": "replacement"}.get(kind)
    if key is not None:
        _check_written(kind, step[key])
    if kind == "Replace":
        _check_pattern(step["pattern"])
    if kind == "TemplateProcessing":
        for name in ("single", "pair"):
            _check_template(step[name], step["special_tokens"])
    if kind == "Precompiled":
        check_letter_table(step["precompiled_charsmap"])


def _check_written(kind: str, written: str) -> None:
    if len(written) > 1:
        raise ValueError(
            f"a {kind} of {len(written)} letters, which could write a word several times; "
            "expected one letter at most"
        )
    if not written.isascii() and written != _SPACE:
        raise ValueError(
            f"a {kind} that writes {written!a}, which other steps could make longer; expected a "
            f"letter of ASCII or {_SPACE!a}"
        )


def _check_pattern(pattern: dict[str, str]) -> None:
    """A place that is no letter must not be found: there is one beside every letter."""
    if pattern.get("String") or pattern.get("Regex") in _REGEXES:
        return
    raise ValueError(
        f"a Replace of {str(pattern)[:60]!a}, which could find what is no letter, and write beside "
        f"every letter; expected a String that is not empty, or a Regex of {', '.join(_REGEXES)}"
    )


def _check_template(pieces: list[dict[str, Any]], special: dict[str, Any]) -> None:
    texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
    tokens = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    count = len(texts) + sum(len(special[token]["ids"]) for token in tokens)
    if count > MOST_PIECES or len(set(texts)) < len(texts):
        raise ValueError(
            f"a template of {count} pieces, {len(texts)} of them texts; expected each text "
            f"once, and at most {MOST_PIECES} pieces"
        )
