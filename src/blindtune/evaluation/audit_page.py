"""An audit as a page and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from blindtune.atomic import atomic_directory
from blindtune.evaluation import plots, report
from blindtune.evaluation.audit import Audit
from blindtune.evaluation.report import Plot, Report, Section, Table

JSON_NAME, PAGE_NAME = "audit.json", "audit.html"
TITLES = {
    "emulator": "What this emulator gives away",
    "adapter": "What this adapter tells of its data",
    "split": "What the vendor could read",
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


def _measured(found: Audit) -> Section:
    rows = [[f.attack, f.measure, f.shown, f.interval] for f in found.findings]
    table = Table(header=["Attack", "Measure", "Measured", "Interval"], rows=rows)
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
    return Section(title="What was measured", blocks=blocks, notes=notes)


def _in_words(found: Audit) -> Section:
    rows = []
    for k, finding in enumerate(found.findings):
        again = k and found.findings[k - 1].knew == finding.knew
        rows.append([f"{finding.attack}: {finding.measure}", "" if again else finding.knew,
                     finding.meaning])  # fmt: skip
    header = ["Attack", "What the attacker knew and did", "What the figure means"]
    emphasis = rows[found.strongest][0]
    return Section(title="In words", blocks=[Table(header=header, rows=rows, emphasis=emphasis)])
