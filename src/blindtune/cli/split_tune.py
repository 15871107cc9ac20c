"""`blindtune split-tune`: the customer's first act of split tuning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from blindtune.cli.options import Group, as_typed
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_pairs, size, stages
from blindtune.cli.trusting import OPENING, trust_of
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate
    from blindtune.split.customer.privacy_statement import PrivacyStatement

HELP = """Tune a vendor's model on private texts that it never sees.

Run by the customer of split tuning. Texts are privatized here, once, and go through the model's
bottom; their states go to the vendor, which tunes the rest of the model. Before anything is sent it
prints how strong the noise is, how many words change, and what is spent. Give --public-text,
and every word becomes its group's, which keeps no less accuracy where attacks read as much; or
--eta, or --changed-share 0.5 to have it chosen, for noise with a promise per token. Either protects
words; labels have --label-epsilon, and with a u-shape package --dp-epsilon.

Interrupted or cut off, the same command goes on (exit code 5: the network).

\b
Needs:   URL of the vendor (https://host:7443) and its --fingerprint or
         --roots; your token in BLINDTUNE_TOKEN or --token-file; the bottom
         package; private texts (.csv, .jsonl, .parquet with `text` and
         `label`; or .txt for --task language-model, with a u-shape package).
Writes:  a directory with the job: options, the private states, its secret,
         losses, the privacy statement. It holds your texts: keep it here.

\b
Example:
  export BLINDTUNE_TOKEN=...
  blindtune split-tune https://vendor.example:7443 --bottom bottom/ \\
    --data train.csv --changed-share 0.5 --fingerprint 3f9c... --out job/
"""


def act(settings: Settings) -> Facts:
    """Call the act."""
    from dataclasses import asdict

    from blindtune.split.customer.access import AccessConfig
    from blindtune.split.customer.private_gradients import GradientConfig
    from blindtune.split.customer.private_texts import ReadingConfig
    from blindtune.split.customer.privatizer_config import PrivatizerConfig
    from blindtune.split.customer.requests import PassConfig
    from blindtune.split.customer.tuning_job import split_tune
    from blindtune.split.terms import TuningConfig

    with ExitStack() as preparing:
        on_part = preparing.enter_context(stages())

        def tell(statement: PrivacyStatement) -> None:
            preparing.close()  # the bar of the tuning comes next
            click.echo(as_typed(f"{statement}\n", VERB.known()), err=True)

        tuned = split_tune(
            settings["url"],
            settings["bottom"],
            settings["data"],
            settings["out"],
            settings.of(PrivatizerConfig),
            settings.of(TuningConfig),
            settings.of(PassConfig),
            dp=settings.of(GradientConfig),
            reading=settings.of(ReadingConfig),
            access=settings.of(AccessConfig),
            resume=settings["resume"],
            record=settings["record"],
            trust=trust_of(settings),
            on_statement=tell,
            on_part=on_part,
        )
    return asdict(tuned) | {"path": str(tuned.path)}


def show(facts: Facts, console: Console) -> None:
    """Print how the tuning went."""
    losses = facts["losses"]
    pairs = [
        ("steps", f"{facts['steps']:,}"),
        ("tokens", f"{facts['tokens']:,} ({facts['tokens_per_second']:,.0f} a second)"),
        ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "-"),
        ("sent", size(facts["bytes_sent"])),
        ("received", size(facts["bytes_received"])),
        ("time", duration(facts["seconds"])),
        ("job", facts["path"]),
    ]
    if facts["names"]:
        pairs.insert(0, ("classes", ", ".join(facts["names"])))
    if facts["resumed_from"] is not None:
        pairs.insert(1, ("gone on from step", f"{facts['resumed_from']:,}"))
    print_pairs(console, "Job tuned", pairs)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.split.customer.private_gradients import GradientConfig
    from blindtune.split.customer.private_texts import ReadingConfig
    from blindtune.split.customer.privatizer_config import PrivatizerConfig
    from blindtune.split.customer.requests import PassConfig
    from blindtune.split.customer.tuning_estimate import estimate_split_tune

    return estimate_split_tune(
        settings["bottom"],
        settings["data"],
        settings.of(PrivatizerConfig),
        settings.of(PassConfig),
        dp=settings.of(GradientConfig),
        reading=settings.of(ReadingConfig),
        trust=trust_of(settings, remember=False),
    )


TUNING = Group(heading="Tuning at the vendor", module="blindtune.split.terms", name="TuningConfig")
ACCESS = Group(
    heading="Vendor and network", module="blindtune.split.customer.access", name="AccessConfig"
)

VERB = Verb(
    name="split-tune",
    help=HELP,
    parameters=(
        click.Argument(["url"], metavar="URL"),
        click.Option(
            ["--bottom"], required=True, metavar="DIR", help="Bottom package from the vendor."
        ),
        click.Option(["--data"], required=True, metavar="FILE", help="Private texts."),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the job."),
        click.Option(
            ["--resume"],
            type=click.Choice(["auto", "never"]),
            default="auto",
            show_default=True,
            help="auto: a job that is there goes on; never: it is refused.",
        ),
        click.Option(
            ["--record"],
            is_flag=True,
            help="Keep every byte that crosses, now and in predict, in transcript.bin of the job, "
            "for audit.",
        ),
        *OPENING,
    ),
    groups=(
        Group(
            heading="Privacy",
            module="blindtune.split.customer.privatizer_config",
            name="PrivatizerConfig",
            renamed={"special": "special_tokens"},
        ),
        Group(
            heading="Differential privacy of labels, numbers or true words (u-shape package)",
            module="blindtune.split.customer.private_gradients",
            name="GradientConfig",
            prefix="dp_",
        ),
        Group(
            heading="Texts", module="blindtune.split.customer.private_texts", name="ReadingConfig"
        ),
        TUNING,
        Group(
            heading="Passes over the texts",
            module="blindtune.split.customer.requests",
            name="PassConfig",
            renamed={"seed": "order_seed"},
        ),
        ACCESS,
    ),
    act=act,
    show=show,
    estimate=estimate,
    mark="job.json",
    goes_on=True,
    less_memory="lower --batch-size or --max-length",
    interrupted="the job is kept: the same command goes on",
)
