"""`blindtune frontier`: which setting to ship, by trying them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs, stages
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

HELP = """Try settings (N_a, alpha, beta), and draw what each gives and keeps.

Run by the model owner before anything is shipped, on data of the data owner's
kind. One study, one full fine-tuning and one directly tuned adapter serve all
settings; each setting is emulated, tuned and plugged in as both parties would.
With --recovery and --gap it answers: the cheapest setting whose plug-in gains
that share of full fine-tuning's gain, and whose tuned emulator is that many
nats a token worse than the plug-in. What must reach them are lower ends at 95 %
confidence over test texts and, with --seeds 0,1,2, over seeds of tuning too;
with one seed, over test texts alone. More test text (--test, --test-share)
brings the lower ends nearer to the scores, and so does a third or fourth seed.

Every finished row is kept in the output directory: run the command again, after
an interruption, with more values, or with another question, and only what is
missing is run (there is no --resume).

\b
Needs:   MODEL; --data, tuned on, a share of it scored on; --public, text for
         the study (or --study, one that is there). Without both the study
         reads --data too, which flatters every emulator.
Writes:  frontier.html, frontier.json, rows/ and study-*/ in the directory.

\b
Example:
  blindtune frontier smollm2-135m --data sample.txt --public public.txt \\
      --alpha 0.125,0.25 --beta 1,0.8 --recovery 0.9 --gap 0.1 --out frontier/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from pathlib import Path

    from blindtune.evaluation.frontiers.offsite import FrontierConfig, frontier
    from blindtune.evaluation.pages.offsite_frontier import PAGE_NAME, write_frontier

    config, out = settings.of(FrontierConfig), Path(settings["out"])
    with stages() as on_stage:
        found = frontier(
            settings["model"],
            settings["data"],
            out,
            config,
            public=settings["public"],
            made_study=settings["study"],
            test=settings["test"],
            on_stage=on_stage,
        )
    facts = write_frontier(found, out, config, recovery=settings["recovery"], gap=settings["gap"])
    return {"path": str(out), "page": str(out / PAGE_NAME), **facts}


def show(facts: Facts, console: Console) -> None:
    """Print the settings and the answer."""
    rows = []
    for s in facts["settings"]:
        name = f"{s['adapter_layers']}, {s['alpha']:g}, {s['beta']:g}"
        keys = ("plug_in", "emulator_ft", "emulator_zs", "gap", "gap_low")
        scores = ["?" if s[key] is None else f"{s[key]:.3f}" for key in keys]
        if s["recovery"] is None:
            scores += ["undefined", ""]
        else:
            scores += [f"{s['recovery']:.3f}", f"{s['recovery_low']:.3f}"]
        rows.append((name, *scores, "yes" if s["efficient"] else ""))
    names = ("N_a, alpha, beta", "plug-in", "emulator FT", "emulator ZS", "gap", "at least")
    print_columns(console, (*names, "recovery", "at least", "frontier"), rows)
    if facts["sentence"] is not None:
        console.print(facts["sentence"], markup=False)
    whole = [
        ("untouched (ZS)", f"{facts['zs']:.3f} nats a token"),
        ("tuned (FT)", f"{facts['ft']:.3f}"),
    ]
    print_pairs(console, "Full model", whole)
    print_pairs(console, "Written", [("page", facts["page"])])


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.evaluation.frontiers.estimate import estimate_frontier
    from blindtune.evaluation.frontiers.offsite import FrontierConfig

    return estimate_frontier(
        settings["model"],
        settings["data"],
        settings.of(FrontierConfig),
        public=settings["public"],
        made_study=settings["study"],
        test=settings["test"],
    )


VERB = Verb(
    name="frontier",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        click.Option(["--data"], required=True, metavar="FILE", help="Data to tune and score on."),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the sweep."),
        click.Option(["--public"], metavar="FILE", help="Public text for the study."),
        click.Option(["--study"], metavar="DIR", help="A study that is there; none is made."),
        click.Option(["--test"], metavar="FILE", help="Scored on instead of a share of --data."),
        click.Option(
            ["--recovery"], type=float, help="Least recovery of the answer, by its lower end."
        ),
        click.Option(
            ["--gap"], type=float, help="Least gap of the answer, nats a token, by its lower end."
        ),
    ),
    groups=(
        Group(
            heading="Sweep", module="blindtune.evaluation.frontiers.offsite", name="FrontierConfig"
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="rows",
    goes_on=True,
    interrupted="finished rows are kept: run the same command again",
)
