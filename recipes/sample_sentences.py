"""Labelled sentences that every Python has: language reference (1), library docstrings (0)."""

import json
import pydoc_data.topics
import random
import re
from pathlib import Path

from sample_text import docstrings

SENTENCE = re.compile(r"(?<!\S)[A-Z][a-z]+ [a-z][a-z ,']{30,120}\.(?!\S)")


def write_sentences(folder: Path, train: int, test: int) -> tuple[Path, Path, Path]:
    """Write train.jsonl and test.jsonl, half of each class, and public.txt with all that is left.

    No sentence is in two of them.
    """
    library, reference = (
        paragraphs(docstrings(600_000)),
        paragraphs(pydoc_data.topics.topics.values()),
    )
    found = [set(SENTENCE.findall("\n".join(source))) for source in (library, reference)]
    rows = []
    for label, sentences in enumerate(found):
        own = sorted(sentences - found[1 - label])
        assert len(own) >= (train + test) // 2, f"this Python has {len(own)} sentences of {label}"
        random.Random(label).shuffle(own)
        rows.append([{"text": sentence, "label": label} for sentence in own])
    paths = folder / "train.jsonl", folder / "test.jsonl", folder / "public.txt"
    rest = "\n".join((*library, *reference))
    for path, begin, size in zip(paths[:2], (0, train // 2), (train // 2, test // 2), strict=True):
        chosen = [row for kind in rows for row in kind[begin : begin + size]]
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        for row in chosen:
            rest = rest.replace(row["text"], "")
    paths[2].write_text(rest, encoding="utf-8")
    return paths


def paragraphs(texts) -> list[str]:
    """Each in one line."""
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
