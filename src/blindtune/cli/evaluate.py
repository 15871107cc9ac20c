"""`blindtune evaluate`: scores, for either party."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_columns, print_pairs, stages
from blindtune.cli.trusting import OPENING, trust_of
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Score a model, an emulator, or either of them with an adapter.

Run by either party. Text gives perplexity; records with targets give the loss on the targets;
multiple-choice records (question, choices, label) give accuracy; tasks of lm-evaluation-harness
are run by name, where their data can be had.

Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   MODEL, a directory, a hub name, smollm2-135m, or an emulator
         package; at least one of --data, --choices, --tasks.
Writes:  nothing; with --out the scores as JSON, as --json prints them, and
         FILE.options.yaml beside them.

\b
Example:
  blindtune evaluate emulator/ --adapter adapter/ --data test.txt --json
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.evaluation.utility.evaluating import EvaluationConfig, evaluate

    with stages() as show:
        found = evaluate(
            settings["model"],
            adapter=settings["adapter"],
            data=settings["data"],
            choices=settings["choices"],
            config=settings.of(EvaluationConfig),
            on_progress=lambda done, total: show(f"score ({total:,})", done, total),
            trust=trust_of(settings),
        )
    return found.facts() if settings["out"] is None else {"path": settings["out"], **found.facts()}


def show(facts: Facts, console: Console) -> None:
    """Print the scores."""
    from rich.markup import escape

    rows = []
    text, choices = facts["perplexity"], facts["choices"]
    if text is not None:
        on = f"{text['tokens']:,} tokens"
        rows.append(("perplexity", f"{text['perplexity']:.3f}", "", on))
        rows.append(
            ("nats a token", f"{text['nats_per_token']:.4f}", _error(text["standard_error"]), on)
        )
    if choices is not None:
        on, error = f"{choices['items']:,} items", _error(choices["standard_error"])
        rows.append(("accuracy", f"{choices['accuracy']:.4f}", error, on))
        rows.append(("accuracy, normalised", f"{choices['accuracy_normalised']:.4f}", "", on))
    for task in facts["tasks"]:
        on = "" if task["items"] is None else f"{task['items']:,} items"
        for metric, value in task["metrics"].items():
            error = _error(task["standard_errors"].get(metric))
            rows.append((f"{task['task']} {metric}", f"{value:.4f}", error, on))
    console.print(f"[bold]{escape(facts['model'])}[/bold], {duration(facts['seconds'])}")
    print_columns(console, ("measure", "value", "standard error", "on"), rows)
    if facts.get("truncated"):
        console.print(
            f"records of the data: {facts['truncated']:,} cut at max_length (--max-length)"
        )
    if facts.get("dropped"):
        console.print(f"records of the data: {facts['dropped']:,} left out, with nothing to score")
    if "path" in facts:
        pairs = [("scores", facts["path"]), ("options", facts["options"])]
        print_pairs(console, "Written", pairs)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def estimate(settings: Settings) -> Estimate:
    """Estimate the act, harness tasks left out."""
    from blindtune.evaluation.utility.estimate import estimate_evaluate
    from blindtune.evaluation.utility.evaluating import EvaluationConfig

    return estimate_evaluate(
        settings["model"],
        adapter=settings["adapter"],
        data=settings["data"],
        choices=settings["choices"],
        config=settings.of(EvaluationConfig),
        trust=trust_of(settings, remember=False),
    )


VERB = Verb(
    name="evaluate",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        click.Option(["--adapter"], metavar="DIR", help="Adapter package to put in first."),
        click.Option(["--data"], metavar="FILE", help="Text or records, a file or a hub name."),
        click.Option(["--choices"], metavar="FILE", help="Multiple-choice records (.jsonl)."),
        click.Option(["--out"], metavar="FILE", help="Also write the scores, as JSON."),
        *OPENING,
    ),
    groups=(
        Group(
            heading="Evaluation",
            module="blindtune.evaluation.utility.evaluating",
            name="EvaluationConfig",
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    out_is_file=True,
    untold=("tasks",),
    less_memory="lower --batch-size or --max-length",
)
