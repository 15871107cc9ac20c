"""A frontier as a page and as JSON, with the answer to what was asked of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blindtune.atomic import atomic_file
from blindtune.evaluation.frontiers.offsite import FrontierConfig
from blindtune.evaluation.frontiers.scores import Frontier, Setting
from blindtune.evaluation.pages import plots, report
from blindtune.evaluation.pages.report import Report, Section, Table
from blindtune.evaluation.utility.scoreboard import as_perplexity
from blindtune.places import located

JSON_NAME, PAGE_NAME = "frontier.json", "frontier.html"


def write_frontier(
    found: Frontier,
    out: str | Path,
    config: FrontierConfig,
    *,
    recovery: float | None = None,
    gap: float | None = None,
) -> dict[str, Any]:
    """Write frontier.json and frontier.html into `out`; returns the facts in the JSON.

    Args:
        found: what was measured.
        out: an existing directory.
        config: of the sweep, for the record.
        recovery, gap: what a setting must surely reach; the cheapest that does is the answer.

    Raises:
        OutputError: a file cannot be written.
    """
    asked = recovery is not None or gap is not None
    answer = found.cheapest(recovery, gap) if asked else None
    facts = found.facts() | {
        "asked": {"recovery": recovery, "gap": gap} if asked else None,
        "answer": None if answer is None else asdict(answer),
        "sentence": answer_sentence(found, answer, recovery, gap) if asked else None,
        "config": asdict(config),
    }
    with atomic_file(located(out) / JSON_NAME) as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    report.write(_page(found, config, answer, recovery, gap), located(out) / PAGE_NAME)
    return facts


def answer_sentence(
    found: Frontier, answer: Setting | None, recovery: float | None, gap: float | None
) -> str:
    """The answer to "the cheapest setting with recovery >= x and gap >= y", in words."""
    wants = [f"recovery of at least {recovery:g}"] if recovery is not None else []
    wants += [f"a gap of at least {gap:g} nats"] if gap is not None else []
    wish = " and ".join(wants)
    if answer is not None:
        return (
            f"The cheapest setting with {wish} is (N_a, alpha, beta) = ({answer.name}): "
            f"{_scores(found, answer)}, {answer.flops_per_token / 1e6:,.0f} MFLOPs a token to "
            f"tune. {confidence(found)}"
        )
    undefined = f" {undefined_recovery(found)}" if recovery is not None else ""
    likely = found.cheapest(recovery, gap, surely=False)
    if likely is not None:
        more = "More test text" if found.seeds == 1 else "More test text or more seeds"
        return (
            f"No setting tried is sure to have {wish}, but by its scores alone ({likely.name}) "
            f"has: {_scores(found, likely)}. {more} would tell. {confidence(found)}"
        )
    best = min(found.settings, key=lambda s: s.plug_in)
    widest = max(found.settings, key=lambda s: s.gap)
    return (
        f"No setting tried has {wish}: the best recovery is "
        f"{_share(found.recovery(best.plug_in))} at ({best.name}), the widest gap "
        f"{widest.gap:.3f} nats at ({widest.name}).{undefined}"
    ).rstrip()


def confidence(found: Frontier) -> str:
    """What "at least" rests on, in words."""
    texts = f"{found.test_texts:,} test text{'s' * (found.test_texts != 1)}"
    alone = f", for this setting by itself, of {len(found.settings)} tried"
    alone *= len(found.settings) > 1
    if found.seeds > 1:
        return (
            f"At least: with 95 % confidence, over {texts} and {found.seeds} seeds of tuning"
            f"{alone}."
        )
    return (
        f"At least: with 95 % confidence, over {texts} alone{alone}; with another seed of tuning "
        "it may come out otherwise (several seeds would tell)."
    )


def undefined_recovery(found: Frontier) -> str:
    """Why recovery is undefined, and what would help; empty where it is defined."""
    if found.recovery(found.zs) is not None:
        return ""
    gain, low = found.zs - found.ft, found.gain_low
    return (
        f"Recovery is undefined: full fine-tuning gains {gain:.3f} nats over ZS here, and "
        f"{'nobody knows how surely' if low is None else f'surely only {low:.3f}'}; more test text "
        "or longer tuning may help."
    )


def _scores(found: Frontier, setting: Setting) -> str:
    recovered = found.recovery(setting.plug_in)
    said = "undefined"
    if recovered is not None:
        said = f"{recovered:.3f} (at least {_share(setting.recovery_low, '?')})"
    return f"recovery {said}, gap {setting.gap:.3f} nats (at least {_share(setting.gap_low, '?')})"


def _page(
    found: Frontier,
    config: FrontierConfig,
    answer: Setting | None,
    recovery: float | None,
    gap: float | None,
) -> Report:
    asked = recovery is not None or gap is not None
    summary = [answer_sentence(found, answer, recovery, gap)] if asked else []
    undefined = undefined_recovery(found)
    if undefined and not any(undefined in said for said in summary):
        summary.append(undefined)
    return Report(
        title="Privacy-utility frontier",
        subtitle=f"{len(found.settings)} settings on {found.test_tokens:,} test tokens, "
        f"{found.seeds} seed{'s' * (found.seeds > 1)} of tuning",
        summary=summary,
        numbers=[
            (f"{as_perplexity(found.zs):,.1f}", "perplexity of the full model, untouched"),
            (f"{as_perplexity(found.ft):,.1f}", "perplexity of full fine-tuning"),
        ],
        sections=[_drawn(found, answer, recovery, gap), _table(found, answer)],
        facts={"Sweep": asdict(config), "Study": {"text": found.study_text}},
    )


def _drawn(
    found: Frontier, answer: Setting | None, recovery: float | None, gap: float | None
) -> Section:
    defined = found.recovery(found.zs) is not None
    efficient = found.efficient()
    xs = {s: (found.recovery(s.plug_in) if defined else -s.plug_in) for s in found.settings}
    points = {s.name: (float(x or 0.0), s.gap) for s, x in xs.items()}
    direct = [found.recovery(nats) for nats in found.direct.values()] if defined else []
    drawn = plots.frontier(
        points,
        [s.name for s in efficient],
        chosen="" if answer is None else answer.name,
        lows={s.name: (s.recovery_low, s.gap_low) for s in found.settings},
        wanted=(recovery if defined else None, gap),
        bound=max((share for share in direct if share is not None), default=None),
        **({} if defined else {"xlabel": "minus nats a token of the plug-in"}),
        caption="Each point is (N_a, alpha, beta); joined are those that no other beats in both. "
        "Lines to the left and down end at the lower ends. Dashed: the adapter tuned on the full "
        "model itself.",
    )
    text = [
        "To the right the model owner gains more of full fine-tuning; upwards the data owner keeps "
        "less of the model. A gap is no guarantee: it says what the emulator is worth as it is, "
        "not after healing."
    ]
    return Section(title="What each setting gives and keeps", text=text, blocks=[drawn])


def _table(found: Frontier, answer: Setting | None) -> Section:
    efficient = found.efficient()
    header = ["N_a, alpha, beta", "Plug-in", "Emulator FT", "Emulator ZS"]
    header += [
        "Gap, nats",
        "at least",
        "Recovery",
        "at least",
        "Size, MiB",
        "MFLOPs a token",
        "Frontier",
    ]
    rows = [
        [
            s.name,
            *(f"{as_perplexity(n):,.2f}" for n in (s.plug_in, s.emulator_ft, s.emulator_zs)),
            f"{s.gap:.3f}",
            _share(s.gap_low, "?"),
            _share(found.recovery(s.plug_in)),
            _share(s.recovery_low, "?"),
            f"{s.bytes / 2**20:,.1f}",
            f"{s.flops_per_token / 1e6:,.1f}",
            "yes" if s in efficient else "",
        ]
        for s in found.settings
    ]
    notes = [
        f"The study read {found.study_text}.",
        f"{confidence(found)} For each setting by itself: of many settings that fall short, one "
        "may pass by luck. Texts count as independent; windows of one long text are alike, and "
        "tell less than that.",
    ]
    block = Table(
        header=header,
        rows=rows,
        caption="Perplexities; MFLOPs of one step of tuning, at the data owner",
        emphasis="" if answer is None else answer.name,
    )
    return Section(title="All settings", blocks=[block], notes=notes)


def _share(value: float | None, unknown: str = "undefined") -> str:
    return unknown if value is None else f"{value:.3f}"
