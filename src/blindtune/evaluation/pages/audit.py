"""An audit as a page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from blindtune.atomic import atomic_directory
from blindtune.evaluation.audits.audit import Audit
from blindtune.evaluation.pages import plots, report
from blindtune.evaluation.pages.report import Plot, Report, Section, Table, Words

JSON_NAME, PAGE_NAME = "audit.json", "audit.html"
TITLES = {
    "emulator": "What this emulator gives away",
    "adapter": "What this adapter tells of its data",
    "split": "What the vendor could read",
}

MEASURES = {
    "emulator": "Perplexity on the test text: the lower, the better a model the attacker has.",
    "adapter": "AUC: how often the attack ranks a trained record above another one; 0.5 is chance.",
    "split": "EP, empirical privacy: 1 minus the share that the attack read; 0 is all, 1 nothing.",
}


def write_audit(found: Audit, out: str | Path, *, overwrite: bool = False) -> None:
    """Write audit.html and audit.json as a directory.

    Raises:
        OutputError: something is in the way, or the disk refuses.
    """
    with atomic_directory(out, overwrite=overwrite, mark=JSON_NAME) as folder:
        text = json.dumps(found.plain(), indent=1, ensure_ascii=False)
        (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        report.write(page(found), folder / PAGE_NAME)


def page(found: Audit) -> Report:
    """The page: verdict, guarantee, the table of all attacks, then each in words."""
    first = found.findings[found.strongest]
    label = f"{first.measure}: {first.attack}"
    numbers = [(first.shown, label)]
    if first.interval:
        numbers.append((first.interval, "interval of this figure"))
    return Report(
        title=TITLES[found.kind],
        subtitle=f"Audit of {found.subject}",
        summary=[found.verdict],
        numbers=numbers,
        sections=[
            Section(title="What is guaranteed", text=list(found.guarantee)),
            _measured(found),
            _in_words(found),
        ],
        facts={"Subject": dict(found.facts)},
    )


def told_once(names: Iterable[str]) -> list[str]:
    """Each name where it first stands, and nothing where it stands again below itself."""
    found = list(names)
    return ["" if k and name == found[k - 1] else name for k, name in enumerate(found)]


def _measured(found: Audit) -> Section:
    names = told_once(f.attack for f in found.findings)
    rows = [
        [name, f.measure, f.shown, f.interval]
        for name, f in zip(names, found.findings, strict=True)
    ]
    table = Table(
        header=["Attack", "Measure", "Measured", "Interval"],
        rows=rows,
        emphasis=found.findings[found.strongest].attack,
    )
    blocks: list[Table | Plot] = [table]
    if any(len(points) > 1 for points in found.curves.values()):
        blocks.append(
            plots.curves(
                found.curves,
                stressed=next(iter(found.curves)),
                xlabel="tokens of public text spent",
                caption="What the attacker's training reaches on the test text.",
            )
        )
    notes = [f"Not run: {skipped.attack}; it needs {skipped.needs}." for skipped in found.not_run]
    return Section(
        title="What was measured", text=[MEASURES[found.kind]], blocks=blocks, notes=notes
    )


def _in_words(found: Audit) -> Section:
    """Attack by attack: what it knew and did, then what each of its figures means."""
    words: dict[str, list[str]] = {}
    for finding in found.findings:
        said = words.setdefault(finding.attack, [finding.knew])
        said.append(f"{finding.measure} {finding.shown}. {finding.meaning}")
    strongest = found.findings[found.strongest].attack
    block = Words(items=list(words.items()), emphasis=strongest)
    return Section(title="In words", blocks=[block])
