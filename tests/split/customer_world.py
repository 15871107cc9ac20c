"""Files of a customer, and quick options for its acts."""

import csv

from split_world import LABELS, TEXTS

from blindtune.split.customer.access import AccessConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig
from blindtune.split.terms import TuningConfig
from log_watch import keep_secret

NAMES = ["label-of-bad", "label-of-good"]
keep_secret(*NAMES)
TUNING = TuningConfig(lora_rank=2, learning_rate=1e-2, seed=3)
PASSES = PassConfig(epochs=2, batch_size=4, accumulate=2, checkpoint_steps=1)
VECTOR = PrivatizerConfig(privatizer="vector", eta=20.0)
OPEN = PrivatizerConfig(privatizer="none", unprotected=True)
QUICK = AccessConfig(give_up_after_seconds=5.0)


def write_table(path, texts=TEXTS, labels=LABELS, names=NAMES):
    """A file with the columns text and label; without labels if there are none."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"] if labels is not None else ["text"])
        for i, text in enumerate(texts):
            table.writerow([text, names[labels[i]]] if labels is not None else [text])
    return path
