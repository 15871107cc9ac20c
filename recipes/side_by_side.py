"""What both recipes of split tuning begin and end with: options, texts, and a table of all runs."""

import argparse
from pathlib import Path

from rich.table import Table

from blindtune.split.customer.labelled_text import LabelledTexts, read_labelled
from sample_sentences import write_sentences


def common_options(about) -> argparse.ArgumentParser:
    """Options of both recipes, with defaults that take some minutes on two cores."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--model", default="minilm", help="directory or hub name")
    parser.add_argument("--train", type=Path, help=".jsonl or .csv with text and label")
    parser.add_argument("--test", type=Path, help="the same, held out")
    parser.add_argument("--cut", type=int, default=0, help="layers at the customer")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--attacked", type=int, default=40, help="texts that are attacked")
    parser.set_defaults(public=None)
    parser.add_argument("--out", type=Path, default=Path("demo-split"))
    return parser


def labelled_texts(options) -> tuple[LabelledTexts, LabelledTexts]:
    """Training and test texts, of the user or of this Python; the options then name their files."""
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.train and options.test):
        options.train, options.test, public = write_sentences(options.out, 240, 160)
        options.public = options.public or public
    learn = read_labelled(options.train)
    return learn, read_labelled(options.test, names=learn.names)


def as_table(rows, cut, layers) -> Table:
    """The runs side by side; the last one has every column."""
    table = Table(title=f"Two-part split at cut {cut} of {layers} layers")
    for name in rows[-1]:
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        table.add_row(*(f"{v:,.3g}" if isinstance(v, float) else v or "" for v in row.values()))
    return table
