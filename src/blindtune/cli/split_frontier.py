"""`blindtune split-frontier`: where to cut and how much noise, by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blindtune.cli.audit_acts import OPTIONS
from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs, stages
from blindtune.cli.split_tune import TUNING
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.evaluation.frontiers.split import SplitFrontierConfig, Trial
    from blindtune.models.costs import Estimate

HELP = """Try settings (cut, noise, groups) of split tuning, and draw what each gives and hides.

Run before a real run by whoever has the model and texts of the customer's
kind. Each setting is tuned and predicted as both parties would, in this one
process; then its training texts are attacked as `audit` does. UA is the
accuracy on noised test texts, EP the share of tokens that an attack gets wrong.
With --public-text word groups are tried beside noise. With --ep it answers: the
mildest setting (largest eta, or least coarse groups, whichever has the better
UA) that holds every attack at that EP.

Every finished row is kept in the output directory: run the command again, after
an interruption, with more values, or with another question, and only what is
missing is run (there is no --resume).

\b
Needs:   MODEL; --data, labelled texts; --test, others of them; --public, text
         of that kind for the attacker, without which the stronger attacks are
         not run and EP flatters: --ep at cuts above 0 needs it. The strongest
         take long and are asked for: --prior, --dummies.
Writes:  split-frontier.html, split-frontier.json and rows/ in the directory.

\b
Example:
  blindtune split-frontier minilm --data train.csv --test test.csv \\
      --public public.txt --public-text public.txt --cut 0,2 \\
      --changed-share 0.15,0.4 --ep 0.4 --out frontier/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from pathlib import Path

    from blindtune.evaluation.frontiers.split import split_frontier
    from blindtune.evaluation.pages.split_frontier import PAGE_NAME, write_split_frontier

    config = _sweep(settings)
    out = Path(settings["out"])
    with stages() as on_stage:
        found = split_frontier(
            settings["model"],
            settings["data"],
            settings["test"],
            out,
            config,
            public=settings["public"],
            trial=_trial(settings),
            on_row=on_stage,
        )
    facts = write_split_frontier(found, out, settings["ep"])
    return {"path": str(out), "page": str(out / PAGE_NAME), **facts}


def show(facts: Facts, console: Console) -> None:
    """Print the settings and the answer."""
    rows = [
        (
            s["name"],
            *(f"{s[key]:.3f}" for key in ("ua", "ep_nearest", "ep")),
            s["strongest"] + "*" * (not s["settled"]),
            "yes" if s["efficient"] else "",
        )
        for s in facts["settings"]
    ]
    names = ("setting", "UA", "EP, nearest", "EP, strongest", "strongest attack", "frontier")
    print_columns(console, names, rows)
    for note in facts["notes"]:
        console.print(note)
    if facts["sentence"] is not None:
        console.print(facts["sentence"], markup=False)
    print_pairs(console, "Written", [("page", facts["page"])])


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.evaluation.frontiers.estimate import estimate_split_frontier

    return estimate_split_frontier(
        settings["model"],
        settings["data"],
        settings["test"],
        _sweep(settings),
        public=settings["public"],
        trial=_trial(settings),
    )


def _sweep(settings: Settings) -> SplitFrontierConfig:
    """The settings to try, if they can answer what is asked."""
    from blindtune.evaluation.frontiers.split import SplitFrontierConfig, check_answerable

    config = settings.of(SplitFrontierConfig)
    if settings["ep"] is not None:
        grouped = config.public_text is not None
        check_answerable(config.cut, settings["public"], grouped=grouped)
    return config


def _trial(settings: Settings) -> Trial:
    from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
    from blindtune.evaluation.frontiers.split import Trial
    from blindtune.split.customer.private_texts import ReadingConfig
    from blindtune.split.customer.requests import PassConfig
    from blindtune.split.terms import TuningConfig

    return Trial(
        tuning=settings.of(TuningConfig),
        passes=settings.of(PassConfig),
        reading=settings.of(ReadingConfig),
        trying=settings.of(AuditConfig),
        adversary=settings.of(AdversaryConfig),
    )


SWEEPS_OWN = ("confidence", "fresh_draws")
OTHER_AUDITS = frozenset(name for name, kinds in OPTIONS.items() if "job" not in kinds)
"""Options of audits of other subjects."""

VERB = Verb(
    name="split-frontier",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        click.Option(["--data"], required=True, metavar="FILE", help="Texts to tune on."),
        click.Option(["--test"], required=True, metavar="FILE", help="Texts to predict."),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the sweep."),
        click.Option(["--public"], metavar="FILE", help="The attacker's own text."),
        click.Option(["--ep"], type=click.FloatRange(0, 1), help="Least EP of the answer."),
    ),
    groups=(
        Group(
            heading="Sweep",
            module="blindtune.evaluation.frontiers.split",
            name="SplitFrontierConfig",
        ),
        Group(
            heading="Texts",
            module="blindtune.split.customer.private_texts",
            name="ReadingConfig",
            defaults={"max_length": 64},
            left_out=frozenset({"task"}),
        ),
        TUNING,
        Group(
            heading="Passes over the texts",
            module="blindtune.split.customer.requests",
            name="PassConfig",
            renamed={"seed": "order_seed"},
            defaults={"epochs": 2},
            left_out=frozenset({"checkpoint_steps", "head_learning_rate"}),
        ),
        Group(
            heading="Attacks",
            module="blindtune.evaluation.audits.audit",
            name="AuditConfig",
            renamed={"test_tokens": "attacked_tokens", "seed": "attack_seed"},
            defaults={"test_tokens": 4096, "attack_seconds": 60.0},
            left_out=OTHER_AUDITS.union(SWEEPS_OWN),
        ),
        Group(
            heading="The adversary",
            module="blindtune.evaluation.audits.audit",
            name="AdversaryConfig",
            left_out=frozenset({"attribute_column"}),
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="rows",
    goes_on=True,
    interrupted="finished rows are kept: run the same command again",
)
