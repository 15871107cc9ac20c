"""`blindtune audit`: what would leak, measured before anything leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import print_columns, print_pairs, stages
from blindtune.cli.trusting import OPENING, trust_of
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from blindtune.evaluation.audit import Audit

HELP = """Attack what is about to leave, and report what leaks.

Run by whoever is about to hand something over; SUBJECT says what:

\b
  an emulator   its owner, before shipping. Used as a free model, as it is and
                tuned, and healed by training on public text, beside the full
                model and a control.
  an adapter    the data owner, before returning it. Membership: which records
                it was tuned on, by their losses with and without it;
                canaries, if the data was planted (blindtune plant).

Prints each attack's figure with its interval beside what is guaranteed, and says in words what the
attacker knew and what the figure means. A leak that is found is real; one that is not found proves
nothing. Finishes in one go: interrupted, it leaves nothing behind.

\b
Needs:   for an emulator --model, --public (the attacker's text) and --test;
         for an adapter --model (the emulator it was tuned on; at the model
         owner, the full model) and --data (what it was tuned on), read with
         the options of the tuning (--max-length, --validation-split, ...).
Writes:  audit.html (one page, no network) and audit.json in the directory.

\b
Example:
  blindtune audit emulator/ --model smollm2-135m --public public.txt \\
      --test sample.txt --out audit/
  blindtune audit adapter/ --model emulator/ --data private.jsonl --out audit/
"""
NEEDS = {"emulator": ("model", "public", "test"), "adapter": ("model", "data")}
"""Options that each kind must have."""
TAKES = {"emulator": ("adapter",), "adapter": ("others", "canaries")}
"""Options that only this kind takes, beside those."""


def act(settings: Settings) -> Facts:
    """Call the act that fits the subject."""
    from blindtune.evaluation.audit_page import PAGE_NAME, write_audit

    kind = kind_of(settings["subject"])
    _check_options(kind, settings)
    with stages() as on_stage:
        found = AUDITS[kind](settings, on_stage)
    write_audit(found, settings["out"], overwrite=settings.overwrite)
    out = Path(settings["out"])
    return {"path": str(out), "page": str(out / PAGE_NAME), **found.plain()}


def kind_of(subject: str) -> str:
    """What a directory holds, by its own word; it is verified when it is opened.

    Raises:
        MismatchError: nothing that can be audited.
    """
    from blindtune.errors import MismatchError
    from blindtune.exchange.package import open_package

    opened = open_package(subject)
    kind = str(opened.manifest.format).removeprefix("blindtune-")
    if kind not in AUDITS:
        raise MismatchError(
            f"{subject}: expected an emulator or an adapter package, got {kind}: give the other "
            "directory"
        )
    return kind


def _check_options(kind: str, settings: Settings) -> None:
    from blindtune.errors import ConfigError

    missing = [f"--{name}" for name in NEEDS[kind] if settings[name] is None]
    if missing:
        raise ConfigError(f"expected {', '.join(missing)} for the audit of an {kind}: see --help")
    known = {*NEEDS[kind], *TAKES[kind]}
    every = {name for names in (*NEEDS.values(), *TAKES.values()) for name in names}
    stray = sorted(f"--{name}" for name in every - known if settings[name] is not None)
    if stray:
        raise ConfigError(f"{', '.join(stray)} does not fit the audit of an {kind}: leave it out")


def _emulator(settings: Settings, on_stage: Callable[[str, int, int], None]) -> Audit:
    from blindtune.evaluation.audit import AuditConfig
    from blindtune.evaluation.audit_emulator import audit_emulator
    from blindtune.training.text import DataConfig

    return audit_emulator(
        settings["subject"],
        settings["model"],
        public=settings["public"],
        test=settings["test"],
        adapter=settings["adapter"],
        reading=settings.of(DataConfig),
        config=settings.of(AuditConfig),
        trust=trust_of(settings),
        on_progress=on_stage,
    )


def _adapter(settings: Settings, on_stage: Callable[[str, int, int], None]) -> Audit:
    from blindtune.evaluation.audit import AuditConfig
    from blindtune.evaluation.audit_adapter import audit_adapter
    from blindtune.training.text import DataConfig

    return audit_adapter(
        settings["subject"],
        settings["model"],
        settings["data"],
        others=settings["others"],
        canaries=settings["canaries"],
        reading=settings.of(DataConfig),
        config=settings.of(AuditConfig),
        trust=trust_of(settings),
        on_progress=on_stage,
    )


AUDITS = {"emulator": _emulator, "adapter": _adapter}


def show(facts: Facts, console: Console) -> None:
    """Print the verdict, the table, and each finding in words."""
    console.print(facts["verdict"], style="bold")
    for sentence in facts["guarantee"]:
        console.print(sentence)
    findings = facts["findings"]
    rows = [(f["attack"], f["measure"], *_figures(f)) for f in findings]
    print_columns(console, ("attack", "measure", "measured", "interval"), rows)
    told = set()
    for finding in findings:
        words = [finding["meaning"]]
        if finding["knew"] not in told:
            words.insert(0, finding["knew"])
            told.add(finding["knew"])
        print_pairs(console, f"{finding['attack']}, {finding['measure']}", [("", w) for w in words])
    skipped = [(s["attack"], f"not run; it needs {s['needs']}") for s in facts["not_run"]]
    pairs = [("page", facts["page"]), ("options", facts["options"])]
    print_pairs(console, "Written", [*skipped, *pairs])


def _figures(finding: dict[str, Any]) -> tuple[str, str]:
    from blindtune.evaluation.audit import Finding

    found = Finding(**finding)
    return found.shown, found.interval


VERB = Verb(
    name="audit",
    help=HELP,
    parameters=(
        click.Argument(["subject"], metavar="SUBJECT"),
        click.Option(["--out"], required=True, metavar="DIR", help="Directory of the report."),
        click.Option(["--model"], metavar="MODEL", help="Full model, or (adapter) its emulator."),
        click.Option(["--public"], metavar="FILE", help="Emulator: text the attacker trains on."),
        click.Option(["--test"], metavar="FILE", help="Emulator: text that is scored."),
        click.Option(["--adapter"], metavar="DIR", help="Emulator: one that was tuned on it."),
        click.Option(["--data"], metavar="FILE", help="Adapter: what it was tuned on."),
        click.Option(
            ["--others"],
            metavar="FILE",
            help="Adapter: records of the same kind that were not trained on; default: those that "
            "tuning set aside for validation.",
        ),
        click.Option(
            ["--canaries"], metavar="FILE", help="Adapter: canaries.json, if --data was planted."
        ),
        *OPENING,
    ),
    groups=(
        Group(heading="Audit", module="blindtune.evaluation.audit", name="AuditConfig"),
        Group(
            heading="Reading the data, as at tuning",
            module="blindtune.training.text",
            name="DataConfig",
            renamed={"seed": "split_seed"},
            defaults={"max_length": 128},
        ),
    ),
    act=act,
    show=show,
    mark="audit.json",
    less_memory="lower --batch-size or --max-length",
)
