"""What an emulator gives away of its model, before it is shipped: for the model owner.

The adversary is whoever holds the package. It uses the emulator as it is, or trains it on public
text (`attacks.emulator_misuse`); the judge and its control are `evaluation.leakage.misuse`'s.

Shapes: N windows, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from blindtune.attacks.emulator_misuse import HealingConfig
from blindtune.evaluation.audits.audit import Audit, AuditConfig, Finding, NotRun
from blindtune.evaluation.leakage.misuse import Curve, Lead, Misuse, best, judge_misuse
from blindtune.evaluation.utility.loss import Perplexity
from blindtune.evaluation.utility.paired import student
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.models.loading import load_tokenizer
from blindtune.offsite.inspected_emulator import InspectedEmulator, inspect_emulator
from blindtune.training.text import DataConfig
from blindtune.training.windows import full_windows

GUARANTEE = (
    "There is no guarantee: an emulator is lossy, and nothing bounds what a better attack or more "
    "public text makes of it. The figures say what these attacks reached.",
)


def audit_emulator(
    emulator: str | Path,
    model: str | Path,
    *,
    public: str | Path,
    test: str | Path,
    adapter: str | Path | None = None,
    reading: DataConfig | None = None,
    config: AuditConfig | None = None,
    trust: Trust | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Use an emulator as a free model, and heal it on public text.

    Args:
        emulator: the package.
        model: the full model that it was made of; only for the scores and the control.
        public: text that the attacker trains on.
        test: text that is scored, such as the task's; not the attacker's.
        adapter: tuned on this emulator, to score what the data owner holds.
        reading: how both texts are cut into windows; None: windows of 128 tokens.
        config: how hard the attacker tries.
        trust: whose packages are opened; None: anybody's.
        on_progress: called with (what is trained, optimizer steps done, of all).

    Raises:
        PackageError, PolicyError, MismatchError, ModelError, DataError: see errors.py.
    """
    config, reading = config or AuditConfig(), reading or DataConfig()
    opened = open_package(emulator, "emulator", trust=trust)
    about = inspect_emulator(opened, opened.manifest)
    tokenizer = load_tokenizer(model)
    public_NL = full_windows(public, tokenizer, reading)
    test_NL = spread(full_windows(test, tokenizer, reading), config.test_tokens)
    tokens_of_a_step = config.healing_batch_size * public_NL.shape[1]
    found = judge_misuse(
        emulator, model, public_NL, test_NL, healing_attackers(config),
        confidence=config.confidence, adapter=adapter, trust=trust,
        batch_size=config.batch_size,
        on_stop=_told(on_progress, config.healing_steps, tokens_of_a_step),
    )  # fmt: skip
    findings = _findings(found, config, used_tokens=public_NL.numel())
    strongest = min(range(len(findings)), key=lambda k: _rank(findings[k]))
    return Audit(
        kind="emulator",
        subject=str(emulator),
        verdict=_verdict(found, findings[strongest]),
        guarantee=GUARANTEE,
        findings=findings,
        strongest=strongest,
        not_run=_not_run(found, adapter, config),
        facts=_facts(about, found, test, f"{public_NL.numel():,} tokens of {Path(public).name}"),
        curves=_curves(found),
    )


def _told(
    on_progress: Callable[[str, int, int], None] | None, steps: int, tokens_of_a_step: int
) -> Callable[[str, int, float], None]:
    """Tells of stops as steps."""

    def on_stop(name: str, tokens: int, _nats: float) -> None:
        if on_progress is not None:
            healing = f"heal the emulator{name.removeprefix('healed')}"
            stage = "train the control" if name == "control" else healing
            on_progress(stage, tokens // tokens_of_a_step, steps)

    return on_stop


def _curves(found: Misuse) -> dict[str, list[tuple[int, float]]]:
    curves = {"healed emulator": found.healed, "control": found.control}
    return {name: _points(curve) for name, curve in curves.items() if curve}


def _facts(
    about: InspectedEmulator, found: Misuse, test: str | Path, public: str
) -> dict[str, str | list[str]]:
    return {
        "package": about.id,
        "full model": f"{found.full.perplexity:,.2f} perplexity",
        "tested on": f"{found.full.tokens:,} tokens of {Path(test).name}",
        "attacker's text": public,
        "revealed by the package itself": list(about.reveals),
    }


def healing_attackers(config: AuditConfig) -> tuple[HealingConfig, ...]:
    """Ways to heal, alike but for the rate; none where healing was not asked for."""
    if not config.healing_steps:
        return ()
    return tuple(
        HealingConfig(
            steps=config.healing_steps,
            points=5,
            batch_size=config.healing_batch_size,
            learning_rate=rate,
            seed=config.seed,
        )
        for rate in config.healing_learning_rate
    )


def _not_run(found: Misuse, adapter: str | Path | None, config: AuditConfig) -> tuple[NotRun, ...]:
    skipped = []
    if adapter is None:
        needs = "--adapter, one that was tuned on it"
        skipped.append(NotRun(attack="free model, tuned", needs=needs))
    if not config.healing_steps:
        skipped.append(NotRun(attack="healing", needs="--healing-steps above 0"))
    elif not found.control:
        needs = "an emulator with fewer whole layers than the model; this one has all of them"
        skipped.append(NotRun(attack="control, no attack", needs=needs))
    return tuple(skipped)


def spread(windows_NL: Tensor, tokens: int) -> Tensor:
    """As many of the windows, evenly spread, as hold at most this many tokens; at least one."""
    count = min(len(windows_NL), max(1, tokens // windows_NL.shape[1]))
    return windows_NL[[i * len(windows_NL) // count for i in range(count)]]


def _findings(found: Misuse, config: AuditConfig, used_tokens: int) -> tuple[Finding, ...]:
    full, shipped = found.full, found.emulator
    findings = [
        _finding(
            "free model, as it is", shipped, config,
            "Had the package alone, and used it as a language model.",
            f"{_gap(shipped, full)} This is what the package is worth with no effort.",
        )
    ]  # fmt: skip
    if found.tuned is not None:
        findings.append(
            _finding(
                "free model, tuned", found.tuned, config,
                "Had the package and its own adapter, as every data owner does.",
                f"{_gap(found.tuned, full)} Compare the plug-in: the difference is what the owner "
                "still has to offer.",
            )
        )  # fmt: skip
    if not config.healing_steps:
        return tuple(findings)
    tokens, healed = best(found.healed)
    share = found.healed_share
    closed = "" if share is None else f"closed {max(0.0, share):.0%} of the gap; "
    findings.append(
        _finding(
            "healing", healed, config,
            f"Had the package and {used_tokens:,} tokens of public text; made every layer whole "
            f"again and trained all of them on {tokens:,} tokens, at "
            f"{_rates(found, config.healing_learning_rate)}.",
            f"Healing {closed}{_gap(healed, full, begin='the emulator')}{_more(found)}",
        )
    )  # fmt: skip
    if found.lead is not None:
        _, control = best(found.control)
        findings.append(
            _finding(
                "control, no attack", control, config,
                "Evenly spaced layers of the full model itself, as many as the emulator has whole, "
                "trained on the same text; the attacker does not have them.",
                _beside_control(found.lead),
            )
        )  # fmt: skip
    return tuple(findings)


def _more(found: Misuse) -> str:
    if found.settled:
        return ""
    return " It was still getting better when it ended: give more text and --healing-steps."


def _rates(found: Misuse, tried: Sequence[float]) -> str:
    of = f", the best of {len(tried)} learning rates" if len(tried) > 1 else ""
    return f"{found.learning_rate:g}{of}"


def _beside_control(lead: Lead) -> str:
    """Whether healing gets further than a model of as many layers."""
    as_many = "a model of as many layers would have"
    if lead.nats > lead.reach:
        return (
            f"The healed emulator is {lead.nats:.2f} nats better: it gave away more than {as_many}."
        )
    proves = "which does not prove that no healing does"
    if lead.nats < -lead.reach:
        return (
            f"The healed emulator is {-lead.nats:.2f} nats worse: no further than this, {proves}."
        )
    return (
        f"The healed emulator is {abs(lead.nats):.2f} nats "
        f"{'better' if lead.nats > 0 else 'worse'}, within the error ({lead.reach:.2f}): nothing "
        f"shows that it gave away more than {as_many}, {proves}."
    )


def _finding(
    attack: str, loss: Perplexity, config: AuditConfig, knew: str, meaning: str
) -> Finding:
    low = high = None
    if loss.standard_error is not None:
        reach = student(loss.examples - 1, 0.5 + config.confidence / 2) * loss.standard_error
        low, high = (math.exp(loss.nats_per_token + sign * reach) for sign in (-1, 1))
    return Finding(
        attack=attack,
        knew=knew,
        measure="perplexity",
        value=loss.perplexity,
        low=low,
        high=high,
        meaning=meaning,
    )


def _gap(loss: Perplexity, full: Perplexity, begin: str = "It") -> str:
    gap = loss.nats_per_token - full.nats_per_token
    than = f"{abs(gap):.2f} nats a token {'worse' if gap >= 0 else 'better'} than the full model"
    return f"{begin} is {than} (perplexity {full.perplexity:,.2f})."


def _rank(finding: Finding) -> float:
    """Lower is the better model in the attacker's hands; the control is nobody's."""
    return math.inf if finding.attack.startswith("control") else finding.value


def _verdict(found: Misuse, strongest: Finding) -> str:
    full, shipped = (f"{loss.perplexity:,.2f}" for loss in (found.full, found.emulator))
    return (
        f"The most that was made of this emulator is a model of perplexity {strongest.shown} "
        f"({strongest.attack}{_effort(found, strongest)}), where the full model has {full} and the "
        f"emulator as shipped {shipped}."
    )


def _effort(found: Misuse, strongest: Finding) -> str:
    """How much text the attacker spent, where the strongest was healed."""
    if strongest.attack != "healing":
        return ""
    tokens, _ = best(found.healed)
    return f" on {tokens:,} tokens" + ("" if found.settled else ", and still getting better")


def _points(curve: Curve) -> list[tuple[int, float]]:
    return [(tokens, loss.nats_per_token) for tokens, loss in curve]
