"""What an adapter tells of the records it was tuned on, before it is returned: for their owner.

The adversary is the model owner. It puts the adapter into the model, and asks of candidate records
whether they were trained on (`attacks.membership`); the judge is `evaluation.leakage.membership`.

The data owner has the emulator, not the full model, and measures on that: the model owner's own
attack may find more or less. Audited records are read as `tune` reads them, so the records that
tuning set aside for validation, which were not trained on, serve as the others. With differential
privacy it sets none aside, and all records of the data were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.attacks.membership import AdapterView, loss_drops, tuned_losses
from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.audits.audit import Audit, AuditConfig, Finding, NotRun, show
from blindtune.evaluation.audits.canaries import (
    CanaryLeakage,
    canary_findings,
    canary_leakage,
    canary_verdict,
)
from blindtune.evaluation.leakage.membership import MembershipLeakage, membership_leakage
from blindtune.evaluation.utility.evaluating import open_any
from blindtune.exchange.packages.manifest import PrivacyFacts
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.models.decoder import check_context
from blindtune.models.loading import preferred_device
from blindtune.offsite.data_owner.tuning import read_privately
from blindtune.training.batches import padding_id
from blindtune.training.canaries import read_canaries
from blindtune.training.dataset import TokenDataset
from blindtune.training.dp_plan import DpConfig
from blindtune.training.text import DataConfig, load_dataset_file

NO_GUARANTEE = (
    "There is no guarantee: it was tuned without differential privacy, so nothing bounds what a "
    "better attack finds.",
)
Record = Mapping[str, Tensor]


def audit_adapter(
    adapter: str | Path,
    model: str | Path,
    data: str | Path,
    *,
    others: str | Path | None = None,
    canaries: str | Path | None = None,
    reading: DataConfig | None = None,
    config: AuditConfig | None = None,
    trust: Trust | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Ask of trained records and of others whether they were trained on, by their losses.

    Args:
        adapter: the package.
        model: the emulator that it was tuned on, or, at its owner, the full model.
        data: what it was tuned on.
        others: records of the same kind that were not; None: those of `data` that `tune` set aside
            for validation, which it does not with differential privacy.
        canaries: `canaries.json` of the planting that `data` is of; None: none were planted.
        reading: as at tuning; `validation_split` too, 0 if the validation data was a file. What
            differential privacy changes of it follows from the package.
        config: how many records, and the intervals.
        trust: whose packages are opened; None: anybody's.
        on_progress: called with (stage, done, total).

    Raises:
        DataError: fewer than 2 records of a sort, canaries that cannot be read. ConfigError: no
            `others` where the tuning set none aside. PackageError, PolicyError, MismatchError,
            ModelError: see errors.py.
    """
    config, reading = config or AuditConfig(), reading or DataConfig()
    planted = () if canaries is None else read_canaries(canaries)
    stated = open_package(adapter, "adapter", trust=trust).manifest.privacy
    reading = reading_of(stated, reading, others)
    untuned, tokenizer, limits = open_any(model, trust=trust)
    check_context(reading.max_length, *limits)
    trained, held_out = both_kinds(tokenizer, data, others, reading)
    members, strangers = (_some(kind, config.max_records) for kind in _apart(trained, held_out))
    if min(len(members), len(strangers)) < 2:
        raise DataError(
            f"expected at least 2 trained and 2 other records, got {len(members)} and "
            f"{len(strangers)}: give more of them, the others as --others"
        )
    tuned, _, _ = open_any(model, adapter, trust=trust)
    for one in (tuned, untuned):
        one.to(preferred_device())
    view = _view(tuned, untuned, (*members, *strangers), config)
    found = _attacked(view, len(members), config, on_progress)
    leaks = canary_leakage(
        tuned, untuned, tokenizer, planted, reading, trained=trained, batch_size=config.batch_size
    )
    origin = "set aside by the tuning" if others is None else f"of {Path(others).name}"
    facts = {
        "trained records": f"{len(members):,} different of {len(trained):,} in {Path(data).name}",
        "other records": f"{len(strangers):,} {origin}",
        "measured in": str(model),
    } | _how_sure(config, len(strangers))
    return _audit(adapter, found, leaks, facts, stated)


def _attacked(
    view: AdapterView,
    members: int,
    config: AuditConfig,
    on_progress: Callable[[str, int, int], None] | None,
) -> dict[str, MembershipLeakage]:
    """What every attack tells, by its name; the first records of the view are the members."""
    found = {}
    each = _confidence_of_each(config)
    for done, (name, attack) in enumerate(ATTACKS.items(), 1):
        scores_N = attack(view)
        found[name] = membership_leakage(
            scores_N[:members], scores_N[members:],
            false_positive_rate=config.false_positive_rate, confidence=each,
        )  # fmt: skip
        if on_progress is not None:
            on_progress("attack", done, len(ATTACKS))
    return found


def _how_sure(config: AuditConfig, others: int) -> dict[str, str]:
    """Facts on the intervals."""
    each, together = _confidence_of_each(config), config.confidence
    said = f"{each:.1%} each, {together:.0%} for the verdict, which looks at all of them"
    if others >= FEW:
        return {"intervals": said}
    few = f"{others} other records say little of rare false alarms: give more as --others"
    return {"intervals": said, "few others": few}


def _confidence_of_each(config: AuditConfig) -> float:
    """Of every interval, so that by chance none of the lower ends shows a leak (Bonferroni)."""
    ends = 2 * len(ATTACKS)
    return 1 - 2 * (1 - config.confidence) / ends


def reading_of(
    stated: PrivacyFacts | msgspec.UnsetType, reading: DataConfig, others: str | Path | None
) -> DataConfig:
    """How `tune` read the data of an adapter that states this privacy.

    Raises:
        ConfigError: no `others` where all records were trained on; a head of the data, which
            tuning with differential privacy refuses.
    """
    if stated is msgspec.UNSET:
        return reading
    if others is None:
        raise ConfigError(
            "expected --others for an adapter tuned with differential privacy, which trains on all "
            "records and sets none aside: give records of the same kind that were not in the data"
        )
    reading = replace(reading, validation_split=0.0)
    return read_privately(reading, DpConfig(epsilon=stated.epsilon, unit=stated.unit), None)


def both_kinds(
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    others: str | Path | None,
    reading: DataConfig,
) -> tuple[TokenDataset, TokenDataset]:
    """(what was trained on, what was not), read and split as `tune` does."""
    trained, held_out = load_dataset_file(data, tokenizer, reading), None
    if reading.validation_split:
        trained, held_out = trained.split(reading.validation_split, reading.seed)
    if others is not None:
        held_out = load_dataset_file(others, tokenizer, reading)
    if held_out is None:
        raise DataError(
            "expected records that were not trained on: give them as --others, or the "
            "--validation-split that the tuning had"
        )
    return trained, held_out


def _apart(trained: TokenDataset, others: TokenDataset) -> tuple[TokenDataset, TokenDataset]:
    """Both without the records that are in both, so that their kinds stay alike; each record once.

    Copies have one loss: counted each, a record that is much repeated would look like many.
    """
    members, strangers = trained.without(others), others.without(trained)
    if members is None or strangers is None:
        raise DataError(
            "expected records that were not trained on, every one of the others was: give others "
            "that are not in the data"
        )
    return members.distinct(), strangers.distinct()


def _audit(
    adapter: str | Path,
    found: Mapping[str, MembershipLeakage],
    leaks: tuple[CanaryLeakage, ...],
    facts: Mapping[str, str],
    stated: PrivacyFacts | msgspec.UnsetType,
) -> Audit:
    findings = tuple(f for name, leak in found.items() for f in _findings(name, leak))
    not_run = [
        NotRun(attack="shadow models", needs="many tunings of the adversary's own; not here")
    ]
    if not leaks:
        not_run.append(NotRun(attack="canaries", needs="data from `blindtune plant`, --canaries"))
    best, measure = _strongest(found)
    return Audit(
        kind="adapter",
        subject=str(adapter),
        verdict=_verdict(found) + (f" {canary_verdict(leaks)}" if leaks else ""),
        guarantee=_guarantee(stated),
        findings=(*findings, *canary_findings(leaks)),
        strongest=next(
            k for k, f in enumerate(findings) if f.attack == best and f.measure.startswith(measure)
        ),
        not_run=tuple(not_run),
        facts=facts,
    )


ATTACKS: Mapping[str, Callable[[AdapterView], Tensor]] = {
    "loss": tuned_losses,
    "loss drop": loss_drops,
}
FEW = 50
"""Other records, below which a page says that they are few."""
LARGE_CHANCE = 0.5
"""Above which a bound on an attack's success is no comfort."""
_KNEW = {
    "loss": "Had the tuned model and candidate records; called those members whose loss is low.",
    "loss drop": "Had the model with and without the adapter, and candidate records; called those "
    "members whose loss the adapter lowered most.",
}


def _guarantee(stated: PrivacyFacts | msgspec.UnsetType) -> tuple[str, ...]:
    """In words; the bound on a test's power is Kairouz, Oh and Viswanath's (2015), theorem 2.1."""
    if stated is msgspec.UNSET:
        return NO_GUARANTEE
    odds = math.exp(stated.epsilon)
    most = min(1.0, odds * 0.01 + stated.delta)
    if most <= LARGE_CHANCE:
        said = (
            f"So no attack, known or not, that accuses 1 % of strangers can name a trained "
            f"{stated.unit} that stands in the data once with a chance above {most:.0%}."
        )
    else:
        said = (
            f"So large an epsilon rules out little: an attack that accuses 1 % of strangers may "
            f"name a trained {stated.unit} with a chance of {most:.0%}. What speaks for the "
            "adapter is how the attacks below fared."
        )
    return (
        f"Tuned with differential privacy, as its package states: epsilon {stated.epsilon:.2f}, "
        f"delta {stated.delta:.1e}, for adding or removing one {stated.unit}.",
        said,
    )


def _some(dataset: TokenDataset, most: int) -> tuple[Record, ...]:
    count = min(len(dataset), most)
    return tuple(dataset[i * len(dataset) // count] for i in range(count))


def _view(
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    records: tuple[Record, ...],
    config: AuditConfig,
) -> AdapterView:
    return AdapterView(
        tuned=tuned,
        untuned=untuned,
        records=records,
        pad_token_id=padding_id(untuned),
        batch_size=config.batch_size,
    )


def _findings(name: str, leak: MembershipLeakage) -> tuple[Finding, Finding]:
    rate = f"{leak.false_positive_rate:.1%}"
    return (
        Finding(
            attack=name,
            knew=_KNEW[name],
            measure="AUC",
            value=leak.auc,
            low=leak.auc_low,
            high=leak.auc_high,
            meaning=f"Of a trained record and another one it points at the trained one in "
            f"{leak.auc:.0%} of cases; a coin would in 50 %.",
        ),
        Finding(
            attack=name,
            knew=_KNEW[name],
            measure=f"found at {rate} false alarms",
            value=leak.found,
            low=leak.found_low,
            high=leak.found_high,
            meaning=f"It finds {leak.found:.1%} of the trained records at the price of accusing "
            f"{rate} of the others wrongly (for others like these up to "
            f"{leak.false_positive_high:.1%}). Guessing would find as many as it accuses.",
        ),
    )


def _strongest(found: Mapping[str, MembershipLeakage]) -> tuple[str, str]:
    """The attack that tells most, and by which number: "AUC" or "found"; AUC where none tells."""
    by_area = max(found, key=lambda name: found[name].auc_low)
    by_share = max(found, key=lambda name: found[name].found_low - found[name].false_positive_high)
    few = found[by_area].auc_low <= 0.5 and found[by_share].leaks
    return (by_share, "found") if few else (by_area, "AUC")


def _verdict(found: Mapping[str, MembershipLeakage]) -> str:
    name, measure = _strongest(found)
    leak = found[name]
    if measure == "found":
        return (
            f"The adapter tells of some records that it was tuned on them: the {name} attack names "
            f"{leak.found:.1%} of the trained ones, at least {leak.found_low:.1%}, where it "
            f"accuses {leak.false_positive_rate:.1%} of others, at most "
            f"{leak.false_positive_high:.1%}."
        )
    if leak.leaks:
        return (
            f"The adapter tells which records it was tuned on: the {name} attack has an AUC of "
            f"{show(leak.auc)}, at least {show(leak.auc_low)}, where 0.5 is chance."
        )
    return (
        f"No attack told trained records from others better than chance: the best AUC is "
        f"{show(leak.auc)}, between {show(leak.auc_low)} and {show(leak.auc_high)}. That is no "
        "proof that none can."
    )
