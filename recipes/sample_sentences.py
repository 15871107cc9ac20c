"""Labelled sentences that every Python has: language reference (1), library docstrings (0)."""

import json
import pydoc_data.topics
import random
import re
from pathlib import Path

from sample_text import docstrings


def write_sentences(folder: Path, train: int, test: int) -> tuple[Path, Path, Path]:
    """Write train.jsonl and test.jsonl, half of each class, and public.txt with all that is left.

    No sentence is in two of them.
    """
    reference = "\n\n".join(pydoc_data.topics.topics.values())
    library = "\n\n".join(docstrings(600_000))
    rows = []
    for label, text in enumerate((library, reference)):
        sentences = sorted(set(re.findall(r"[A-Z][a-z]+ [a-z][a-z ,']{30,120}\.", text)))
        random.Random(label).shuffle(sentences)
        rows.append([{"text": s, "label": label} for s in sentences])
    paths = folder / "train.jsonl", folder / "test.jsonl", folder / "public.txt"
    rest = f"{library}\n\n{reference}"
    for path, begin, size in zip(paths[:2], (0, train // 2), (train // 2, test // 2), strict=True):
        chosen = [row for kind in rows for row in kind[begin : begin + size]]
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        for row in chosen:
            rest = rest.replace(row["text"], "")
    paths[2].write_text(rest, encoding="utf-8")
    return paths
