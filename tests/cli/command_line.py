"""What the tests of the command line share: files of both parties, and quick options."""

import json
import pydoc_data.topics
import random

from log_watch import keep_secret
from tiny_models import tiny_model, tiny_tokenizer

WORDS = ["cat", "mat", "home", "fish", "rice", "eats", "sits", "some"]
STUDY_OPTIONS = ["--max-length", "32", "--calibration-tokens", "640", "--damage-tokens", "128"]
STUDY_OPTIONS += ["--harmonizer-rank", "4"]
TUNE_OPTIONS = ["--max-steps", "3", "--max-length", "64", "--learning-rate", "1e-3"]


def write_files(place):
    for name in ("llama", "smollm2"):
        tiny_model(name).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    text = "\n".join(pydoc_data.topics.topics.values())
    (place / "public.txt").write_text(text[:5000])
    draw = random.Random(0)
    records = [
        {"prompt": f"Say {draw.choice(WORDS)}: ", "completion": " ".join(draw.choices(WORDS, k=4))}
        for _ in range(40)
    ]
    keep_secret(*(record["completion"] for record in records))
    write_lines(place / "private.jsonl", records)
    questions = [
        {"question": f"What {draw.choice(WORDS)}", "choices": ["a cat", "rice"], "label": i % 2}
        for i in range(6)
    ]
    write_lines(place / "choices.jsonl", questions)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
