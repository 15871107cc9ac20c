"""A frontier of split tuning as a page and as JSON, with the answer to what was asked of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blindtune.atomic import atomic_file
from blindtune.evaluation.frontiers.split import (
    OFFERED,
    SplitFrontier,
    SplitFrontierConfig,
    SplitSetting,
    Trial,
)
from blindtune.evaluation.pages import plots, report
from blindtune.evaluation.pages.report import Report, Section, Table
from blindtune.places import located

JSON_NAME, PAGE_NAME = "split-frontier.json", "split-frontier.html"
NOT_LEARNED = "No public text was given: attacks that learn from text were not run."
GROUPED = (
    "groups: every word becomes its group's; the number is the share of frequent words' tokens "
    "that a guess by frequency gets wrong."
)
CUT_SHORT = "an attack's training was ended by --attack-seconds; a longer one may read more."


def write_split_frontier(
    found: SplitFrontier, out: str | Path, ep: float | None = None
) -> dict[str, Any]:
    """Write split-frontier.json and split-frontier.html into `out`; returns the facts in the JSON.

    Args:
        found: what was measured.
        out: an existing directory.
        ep: what the strongest attack must be held at; the mildest setting that does is the answer.

    Raises:
        OutputError: a file cannot be written.
        ConfigError: `ep` where no attack was run that could tell (`check_answerable`).
    """
    answer = None if ep is None else found.mildest(ep)
    facts = found.facts() | {
        "asked": None if ep is None else {"ep": ep},
        "answer": None if answer is None else asdict(answer) | {"name": answer.name},
        "sentence": None if ep is None else answer_sentence(found, answer, ep),
        "notes": _notes(found),
        "config": asdict(found.config),
        "trial": asdict(found.trial),
    }
    with atomic_file(located(out) / JSON_NAME) as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    page = Report(
        title="Privacy-utility frontier of split tuning",
        subtitle=f"{len(found.settings)} settings: {_tried(found.config)}",
        summary=[] if facts["sentence"] is None else [facts["sentence"]],
        numbers=[(f"{found.best_ua:.3f}", "best accuracy of words as they are")],
        sections=[_drawn(found, answer, ep), _table(found, answer)],
        facts={"Sweep": asdict(found.config), **_how(found.trial)},
    )
    report.write(page, located(out) / PAGE_NAME)
    return facts


def _tried(config: SplitFrontierConfig) -> str:
    noise = [] if config.privatizer == "groups" else [f"privatizer {config.privatizer}"]
    groups = [] if config.public_text is None else ["word groups"]
    return " and ".join(["no noise", *noise, *groups])


def _how(trial: Trial) -> dict[str, dict[str, Any]]:
    return {
        "Tuning": asdict(trial.tuning), "Passes": asdict(trial.passes),
        "Texts": asdict(trial.reading), "Attacks": asdict(trial.trying),
        "The adversary": asdict(trial.adversary),
    }  # fmt: skip


def answer_sentence(found: SplitFrontier, answer: SplitSetting | None, ep: float) -> str:
    """The answer to "the mildest setting with EP >= z under every attack", in words."""
    if answer is None:
        best = max(found.settings, key=lambda s: s.ep_low)
        return (
            f"No setting tried holds every attack at an EP of {ep:g}: the most private is "
            f"{best.name}, with {best.ep:.3f} under {best.strongest}, at least {best.ep_low:.3f} "
            "with 95 % confidence."
        )
    alone = f" for this setting by itself, of {len(found.settings)} tried"
    alone *= len(found.settings) > 1
    return (
        f"The mildest setting that holds every attack at an EP of {ep:g} is {answer.name}: "
        f"EP {answer.ep:.3f} under {answer.strongest} (at least {answer.ep_low:.3f} under each, "
        f"with 95 % confidence{alone}), UA {answer.ua:.3f}, "
        f"{100 * (found.best_ua - answer.ua):.1f} points below the best of words as they are."
        + ("" if answer.settled else f" It may not hold them: {CUT_SHORT}")
        + "".join(f" {note}" for note in _not_run((answer,)))
    )


def _drawn(found: SplitFrontier, answer: SplitSetting | None, ep: float | None) -> Section:
    drawn = plots.frontier(
        {s.name: (s.ua, s.ep) for s in found.settings},
        [s.name for s in found.efficient()],
        chosen="" if answer is None else answer.name,
        wanted=(None, ep),
        bound=found.best_ua,
        xlabel="utility accuracy (UA)",
        ylabel="empirical privacy (EP), strongest attack",
        caption="Joined are those that no other setting beats in both. Dashed: the best of words "
        "as they are.",
    )
    text = [
        "To the right the tuned model answers better; upwards the vendor reads fewer of the "
        "customer's tokens. EP is measured: a stronger attack than those tried would find less."
    ]
    return Section(title="What each setting gives and hides", text=text, blocks=[drawn])


def _notes(found: SplitFrontier) -> list[str]:
    """What must be known to read the settings rightly."""
    notes = ["One seed and one draw of the noise: small differences mean nothing."]
    if any(s.wrong_guesses is not None for s in found.settings):
        notes.append(GROUPED)
    if found.public is None:
        notes.append(NOT_LEARNED)
    if not all(s.settled for s in found.settings):
        notes.append(f"*: {CUT_SHORT}")
    return [*notes, *_not_run(found.settings)]


def _not_run(settings: Iterable[SplitSetting]) -> list[str]:
    """Which attacks may read more than those that were run."""
    names = {name for setting in settings for name in setting.not_run}
    missing = [f"{name} ({option})" for name, option in OFFERED.items() if name in names]
    return [f"Not run, and may read more: {', '.join(missing)}."] if missing else []


def _table(found: SplitFrontier, answer: SplitSetting | None) -> Section:
    efficient = found.efficient()
    rows = [
        [s.name, f"{s.ua:.3f}", f"{s.ep_nearest:.3f}", f"{s.ep:.3f}", f"{s.ep_low:.3f}",
         s.strongest + "*" * (not s.settled), "yes" if s in efficient else ""]
        for s in found.settings
    ]  # fmt: skip
    block = Table(
        header=["Setting", "UA", "EP, nearest neighbour", "EP, strongest", "at least",
                "strongest attack", "Frontier"],
        rows=rows,
        caption="Accuracy on noised test texts; empirical privacy of the training texts",
        emphasis="" if answer is None else answer.name,
    )  # fmt: skip
    return Section(title="All settings", blocks=[block], notes=_notes(found))
