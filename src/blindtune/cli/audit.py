"""`blindtune audit`: what would leak, measured before anything leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blindtune.cli.audit_acts import AUDITS, PRIVACY, check_options, estimate, kind_of
from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs, stages
from blindtune.cli.trusting import OPENING
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console


HELP = """Attack what is about to leave, and report what leaks.

Run by whoever is about to hand something over; SUBJECT says what:

\b
  an emulator   its owner, before shipping. Used as a free model, as it is and
                tuned, and healed by training on public text, beside the full
                model and a control.
  an adapter    the data owner, before returning it. Membership: which records
                it was tuned on, by their losses with and without it;
                canaries, if the data was planted (blindtune plant).
  a bottom      the customer of split tuning, before a run: a sample of --data
                is privatized as split-tune would with the same options, kept
                here, and read as the vendor would. Or a job's directory: the
                states that it drew. Or its transcript.bin, what crossed
                (split-tune --record). On request with a language model
                (--prior), by search (--dummies), and for an attribute of the
                texts (--attribute-column).

Prints each attack's figure with its interval beside what is guaranteed, and says in words what the
attacker knew and what the figure means. A leak that is found is real; one that is not found proves
nothing. Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   for an emulator --model, --public (the attacker's text) and --test;
         for an adapter --model (the emulator it was tuned on; at the model
         owner, the full model) and --data (what it was tuned on), read with
         the options of the tuning (--max-length, --validation-split, ...);
         for a bottom --data and the privacy options of split-tune, and better
         --public too, text of the same kind that the attacker learns from;
         for a job only --public; for a transcript --bottom besides.
Writes:  audit.html (one page, no network) and audit.json in the directory.

\b
Example:
  blindtune audit emulator/ --model smollm2-135m --public public.txt \\
      --test sample.txt --out audit/
  blindtune audit adapter/ --model emulator/ --data private.jsonl --out audit/
  blindtune audit bottom/ --data train.csv --public public.txt \\
      --changed-share 0.5 --out audit/
  blindtune audit bottom/ --data train.csv --public public.csv \\
      --changed-share 0.5 --attribute-column author --out audit/
"""


def act(settings: Settings) -> Facts:
    """Call the act that fits the subject."""
    from blindtune.evaluation.pages.audit import PAGE_NAME, write_audit

    kind = kind_of(settings)
    check_options(kind, settings)
    with stages() as on_stage:
        found = AUDITS[kind](settings, on_stage)
    write_audit(found, settings["out"], overwrite=settings.overwrite)
    out = Path(settings["out"])
    return {"path": str(out), "page": str(out / PAGE_NAME), **found.plain()}


def show(facts: Facts, console: Console) -> None:
    """Print the verdict, the table, and each finding in words."""
    from blindtune.evaluation.pages.audit import told_once

    console.print(facts["verdict"], style="bold", markup=False)
    for sentence in facts["guarantee"]:
        console.print(sentence, markup=False)
    findings = facts["findings"]
    strongest = findings[facts["strongest"]]["attack"]
    names = told_once(f["attack"] for f in findings)
    rows = [
        (f"{name} (strongest)" if name == strongest else name, f["measure"], *_figures(f))
        for name, f in zip(names, findings, strict=True)
    ]
    print_columns(console, ("attack", "measure", "measured", "interval"), rows)
    words: dict[str, list[tuple[str, str]]] = {}
    for finding in findings:
        said = words.setdefault(finding["attack"], [("", finding["knew"])])
        said.append(("", finding["meaning"]))
    for attack, said in words.items():
        print_pairs(console, attack, said)
    skipped = [(s["attack"], f"it needs {s['needs']}") for s in facts["not_run"]]
    if skipped:
        print_pairs(console, "Not run", skipped)
    print_pairs(console, "Written", [("page", facts["page"]), ("options", facts["options"])])


def _figures(finding: dict[str, Any]) -> tuple[str, str]:
    from blindtune.evaluation.audits.audit import Finding

    found = Finding(**finding)
    return found.shown, found.interval


VERB = Verb(
    name="audit",
    help=HELP,
    parameters=(
        click.Argument(["subject"], metavar="SUBJECT"),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the report."),
        click.Option(["--model"], metavar="MODEL", help="Full model, or (adapter) its emulator."),
        click.Option(["--public"], metavar="FILE", help="Text that the attacker learns from."),
        click.Option(["--test"], metavar="FILE", help="Emulator: text that is scored."),
        click.Option(["--adapter"], metavar="DIR", help="Emulator: one that was tuned on it."),
        click.Option(
            ["--data"],
            metavar="FILE",
            help="Private: what an adapter was tuned on, or the texts to be sent.",
        ),
        click.Option(
            ["--others"],
            metavar="FILE",
            help="Adapter: records of the same kind that were not trained on; default: those that "
            "tuning set aside for validation (none with differential privacy: give some).",
        ),
        click.Option(
            ["--canaries"], metavar="FILE", help="Adapter: canaries.json, if --data was planted."
        ),
        click.Option(["--bottom"], metavar="DIR", help="Job, transcript: the bottom package."),
        *OPENING,
    ),
    groups=(
        Group(heading="Audit", module="blindtune.evaluation.audits.audit", name="AuditConfig"),
        Group(
            heading="The adversary of split tuning",
            module="blindtune.evaluation.audits.audit",
            name="AdversaryConfig",
        ),
        Group(
            heading="Reading the data, as at tuning",
            module="blindtune.training.text",
            name="DataConfig",
            renamed={"seed": "split_seed"},
        ),
        PRIVACY,
        Group(
            heading="Texts of split tuning",
            module="blindtune.split.customer.private_texts",
            name="ReadingConfig",
            left_out=frozenset({"text_column", "max_length"}),
        ),
    ),
    act=act,
    show=show,
    estimate=estimate,
    inputs=("prior", "public_text"),
    less_memory="lower --batch-size or --max-length",
)
