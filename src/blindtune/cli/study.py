"""`blindtune study`: the model owner's first act."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_columns, print_pairs, stages
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Study a model on public text, once per model.

Run by the model owner. For every middle layer the study finds a small stand-in, the harmonizer,
and how much the model loses when the harmonizer replaces the layer. From these, `blindtune
emulate` makes any number of emulators without training. The study is the owner's alone: it never
leaves your machines.

\b
Needs:   MODEL, a local directory, a hub name, or smollm2-135m; public
         text (.txt, .jsonl, .csv, .parquet or a hub data set).
Writes:  a directory with study.json and study.safetensors; beside it
         NAME.options.yaml and, while it works, NAME.work with finished
         stages, from which the same command goes on.

\b
Example:
  blindtune study smollm2-135m --data public.txt --out study/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from blindtune.offsite.model_owner.importance import DynamicConfig
    from blindtune.offsite.model_owner.study import StudyConfig
    from blindtune.offsite.model_owner.studying import study

    with stages() as show:
        found = study(
            settings["model"],
            settings["data"],
            settings["out"],
            settings.of(StudyConfig),
            settings.of(DynamicConfig),
            resume=settings["resume"],
            overwrite=settings.overwrite,
            on_stage=show,
        )
    return {
        "path": settings["out"],
        "model": found.model,
        "fingerprint": found.fingerprint,
        "layers": found.layer_count,
        "middle": list(found.middle),
        "scores": found.scores_M.tolist(),
        "damage": None if found.damage_M is None else found.damage_M.tolist(),
        "explained": list(found.explained) or None,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "history": found.history,
    }


def show(facts: Facts, console: Console) -> None:
    """Print what was found."""
    count = len(facts["middle"])
    columns = ("layer", "score", "damage (nats/token)", "explained")
    rows = [
        (
            str(facts["middle"][k]),
            f"{facts['scores'][k]:.3f}",
            "-" if facts["damage"] is None else f"{facts['damage'][k]:.4f}",
            "-" if facts["explained"] is None else f"{facts['explained'][k]:.0%}",
        )
        for k in sorted(range(count), key=lambda k: facts["scores"][k])
    ]
    console.print(f"[bold]Studied {count} of {facts['layers']} layers[/bold], least needed first")
    print_columns(console, columns, rows)
    pairs = [
        (stage, duration(seconds) + _tokens(facts["tokens"].get(stage)))
        for stage, seconds in facts["seconds"].items()
    ]
    print_pairs(console, "Time", pairs)
    print_pairs(console, "Written", [("study", facts["path"]), ("options", facts["options"])])


def _tokens(count: int | None) -> str:
    return "" if count is None else f", {count:,} tokens"


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.offsite.model_owner.importance import DynamicConfig
    from blindtune.offsite.model_owner.study import StudyConfig
    from blindtune.offsite.model_owner.study_estimate import estimate_study

    return estimate_study(
        settings["model"],
        settings["data"],
        settings.of(StudyConfig),
        settings.of(DynamicConfig),
    )


VERB = Verb(
    name="study",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        click.Option(
            ["--data"], required=True, metavar="FILE", help="Public text, a file or a hub name."
        ),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the study."),
    ),
    groups=(
        Group(heading="Study", module="blindtune.offsite.model_owner.study", name="StudyConfig"),
        Group(
            heading="Dynamic LayerReplace",
            module="blindtune.offsite.model_owner.importance",
            name="DynamicConfig",
            prefix="dynamic_",
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="study.json",
    keeps_progress=True,
    less_memory="lower --batch-size, --dynamic-batch-size or --max-length",
    interrupted="finished stages are kept: the same command goes on from there",
)
