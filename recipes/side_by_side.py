"""What both recipes of split tuning begin and end with: the texts, and a table of all runs."""

from rich.table import Table

from blindtune.split.labelled_text import LabelledTexts, read_labelled
from sample_sentences import write_sentences


def labelled_texts(options) -> tuple[LabelledTexts, LabelledTexts]:
    """Training and test texts, of the user or of this Python; the options then name their files."""
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.train and options.test):
        options.train, options.test = write_sentences(options.out, 240, 160)
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
