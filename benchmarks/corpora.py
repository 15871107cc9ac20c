"""Public and private text for the benchmarks, from a directory of plain data sets.

Expected there: wikitext2_valid.txt, wikitext2_test.txt, arc_easy_{train,test}.jsonl and, as public
text, state_union.jsonl, openbookqa_train.jsonl, fpb_50agree.jsonl, sst2_train.jsonl,
trec_qc_train.jsonl (docs/benchmarks.md says what they are). Public text never contains what is
tuned or scored on. The language reference that ships with Python is public too.
"""

import json
import pydoc_data.topics
import random
from pathlib import Path

PUBLIC = ("state_union", "openbookqa_train", "fpb_50agree", "sst2_train", "trec_qc_train")
SHARE_CHARACTERS = 400_000


def public_text(data: Path) -> str:
    """Paragraphs of all public sources, shuffled; each source gives about the same share."""
    paragraphs = []
    for name in PUBLIC:
        lines = (data / f"{name}.jsonl").read_text().splitlines()
        texts = [_text(json.loads(line)) for line in lines]
        paragraphs += _blocks(random.Random(0).sample(texts, len(texts)))
    paragraphs += _blocks("\n".join(pydoc_data.topics.topics.values()).split("\n\n"))
    random.Random(1).shuffle(paragraphs)
    return "\n".join(paragraphs)


def _text(record: dict) -> str:
    return record.get("text") or f"{record['question']} {record['choices'][record['label']]}"


def _blocks(texts: list[str], size: int = 2000) -> list[str]:
    """Texts joined into blocks of about `size` characters, up to the source's share."""
    blocks, block = [], ""
    for text in texts:
        block += text + "\n"
        if len(block) >= size:
            blocks.append(block)
            block = ""
        if len(blocks) * size >= SHARE_CHARACTERS:
            break
    return blocks
