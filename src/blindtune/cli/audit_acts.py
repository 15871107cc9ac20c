"""Which audit fits a subject, with which options: what `blindtune audit` calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindtune.cli.configfile import options_path, read_saved
from blindtune.cli.options import Group, option_name
from blindtune.cli.trusting import trust_of
from blindtune.cli.verb import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from blindtune.evaluation.audits.audit import Audit
    from blindtune.models.costs import Estimate
    from blindtune.split.customer.private_texts import ReadingConfig

PRIVACY = Group(
    heading="Privacy, as for split-tune",
    module="blindtune.split.customer.privatizer_config",
    name="PrivatizerConfig",
    renamed={"special": "special_tokens"},
)

NEEDS = {
    "emulator": ("model", "public", "test"),
    "adapter": ("model", "data"),
    "bottom": ("data",),
    "job": (),
    "transcript": ("data", "bottom"),
}
"""Options that each kind must have."""
TAKES = {
    "emulator": ("adapter",),
    "adapter": ("others", "canaries"),
    "bottom": ("public",),
    "job": ("public", "bottom"),
    "transcript": ("public",),
}
"""Options that this kind takes beside those."""
NOISED = ("bottom", "transcript")
"""Kinds that take the options of the privatizer."""
_SPLIT = ("bottom", "job", "transcript")
_WINDOWED = ("emulator", "adapter")
OPTIONS = {
    "confidence": (*_WINDOWED, *_SPLIT),
    "test_tokens": ("emulator", *_SPLIT),
    "healing_steps": ("emulator",),
    "healing_batch_size": ("emulator",),
    "healing_learning_rate": ("emulator",),
    "max_records": ("adapter",),
    "false_positive_rate": ("adapter",),
    "public_tokens": _SPLIT,
    "attack_seconds": _SPLIT,
    "fresh_draws": _SPLIT,
    "prior": _SPLIT,
    "attribute_column": ("bottom", "transcript"),
    "dummies": _SPLIT,
    "batch_size": _WINDOWED,
    "seed": ("emulator", *_SPLIT),
    "text_column": (*_WINDOWED, *_SPLIT),
    "max_length": (*_WINDOWED, *_SPLIT),
    "pack": _WINDOWED,
    "validation_split": ("adapter",),
    "max_samples": _WINDOWED,
    "max_tokens": _WINDOWED,
    "split_seed": ("adapter",),
    "chat_template": _WINDOWED,
    "split": _WINDOWED,
    "name": _WINDOWED,
    "task": _SPLIT,
    "label_column": _SPLIT,
}
"""Which kinds look at an option of the other configs."""


def kind_of(settings: Settings) -> str:
    """What the subject holds, by its own word; the act checks the rest of it.

    Raises:
        PolicyError: a package of somebody who is not trusted; nothing of it was parsed.
        MismatchError: nothing that can be audited.
    """
    from blindtune.errors import MismatchError
    from blindtune.exchange.packages.package import package_kind
    from blindtune.split.customer.job import MARK

    subject = settings["subject"]
    if Path(subject).is_file():
        return "transcript"
    if (Path(subject) / MARK).is_file():
        return "job"
    kind = package_kind(subject, trust=trust_of(settings, remember=False))
    if kind not in AUDITS:
        raise MismatchError(
            f"{subject}: expected a package that can be audited (emulator, adapter, bottom), got "
            f"{kind}: give another directory"
        )
    return kind


def check_options(kind: str, settings: Settings) -> None:
    """Raise ConfigError for an option that is missing, does not fit, or that another kind takes."""
    from blindtune.errors import ConfigError

    missing = [f"--{name}" for name in NEEDS[kind] if settings[name] is None]
    this = f"{'an' if kind[0] in 'ae' else 'a'} {kind}"
    if missing:
        raise ConfigError(f"expected {', '.join(missing)} for the audit of {this}: see --help")
    known = {*NEEDS[kind], *TAKES[kind]}
    every = {name for names in (*NEEDS.values(), *TAKES.values()) for name in names}
    stray = sorted(f"--{name}" for name in every - known if settings[name] is not None)
    stray += _ignored(kind, settings)
    if stray:
        verb, what = ("does", "it") if len(stray) == 1 else ("do", "them")
        raise ConfigError(
            f"{', '.join(stray)} {verb} not fit the audit of {this}: leave {what} out"
        )
    if kind == "adapter":
        check_reading(settings)


def check_reading(settings: Settings) -> None:
    """Refuse to read an adapter's records in another way than the tuning did.

    Read otherwise they look as if they were not trained on. What the tuning's options were is known
    where it left them beside the adapter.

    Raises:
        ConfigError: an option of the data differs.
    """
    from blindtune.errors import ConfigError

    saved = options_path(Path(settings["subject"]))
    tuned = read_saved(saved)
    if tuned.get("validation") is not None:
        tuned["validation_split"] = 0.0  # a file of its own: all of the data was trained on
    reading = next(group for group in settings.groups if group.name == "DataConfig").options()
    differ = [name for name in reading if name in tuned and tuned[name] != settings[name]]
    if differ:
        wanted = ", ".join(_as_given(name, tuned[name]) for name in differ)
        raise ConfigError(
            f"{saved.name}: the tuning read its records with {wanted}; read otherwise they look as "
            "if they were not trained on: give the same"
        )


def _as_given(name: str, value: Any) -> str:
    """An option as it is typed; one that was not given says so."""
    if isinstance(value, bool):
        return option_name(name if value else f"no_{name}")
    return f"no {option_name(name)}" if value is None else f"{option_name(name)} {value}"


def _ignored(kind: str, settings: Settings) -> list[str]:
    """Options that were given another value than their default and that this kind looks past."""
    found = []
    for group in settings.groups:
        for name, f in group.options().items():
            kinds = NOISED if group is PRIVACY else OPTIONS[name]
            given = settings[name]
            if kind not in kinds and given != group.defaults.get(f.name, f.default):
                found.append(option_name(f"no_{name}" if given is False else name))
    return found


def _emulator(settings: Settings, on_stage: Callable[[str, int, int], None]) -> Audit:
    from blindtune.evaluation.audits.audit import AuditConfig
    from blindtune.evaluation.audits.emulator import audit_emulator
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
    from blindtune.evaluation.audits.adapter import audit_adapter
    from blindtune.evaluation.audits.audit import AuditConfig
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


def _split(settings: Settings, on_stage: Callable[[str, int, int], None]) -> Audit:
    from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
    from blindtune.evaluation.audits.split import audit_split
    from blindtune.split.customer.privatizer_config import PrivatizerConfig

    return audit_split(
        settings["subject"],
        bottom=settings["bottom"],
        data=settings["data"],
        public=settings["public"],
        privatizer=settings.of(PrivatizerConfig),
        reading=_split_reading(settings),
        config=settings.of(AuditConfig),
        adversary=settings.of(AdversaryConfig),
        trust=trust_of(settings),
        on_progress=on_stage,
    )


def _split_reading(settings: Settings) -> ReadingConfig:
    """Column and length are options that adapters' data has too."""
    from blindtune.split.customer.private_texts import ReadingConfig
    from blindtune.training.text import DataConfig

    reading = settings.of(DataConfig)
    return ReadingConfig(
        task=settings["task"],
        text_column=reading.text_column,
        label_column=settings["label_column"],
        max_length=reading.max_length,
    )


def estimate(settings: Settings) -> Estimate:
    """Estimate the audit that fits the subject."""
    from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
    from blindtune.evaluation.audits.estimate import (
        estimate_audit_adapter,
        estimate_audit_emulator,
        estimate_audit_split,
    )
    from blindtune.split.customer.privatizer_config import PrivatizerConfig
    from blindtune.training.text import DataConfig

    kind = kind_of(settings)
    check_options(kind, settings)
    config, reading = settings.of(AuditConfig), settings.of(DataConfig)
    trust = trust_of(settings, remember=False)
    if kind == "emulator":
        return estimate_audit_emulator(
            settings["subject"], settings["model"], adapter=settings["adapter"], reading=reading,
            config=config, trust=trust,
        )  # fmt: skip
    if kind == "adapter":
        return estimate_audit_adapter(
            settings["subject"], settings["model"], settings["data"],
            others=settings["others"], canaries=settings["canaries"], reading=reading,
            config=config, trust=trust,
        )  # fmt: skip
    return estimate_audit_split(
        settings["subject"],
        bottom=settings["bottom"],
        data=settings["data"],
        public=settings["public"],
        privatizer=settings.of(PrivatizerConfig),
        reading=_split_reading(settings),
        config=config,
        adversary=settings.of(AdversaryConfig),
        trust=trust,
    )


AUDITS = {
    "emulator": _emulator,
    "adapter": _adapter,
    "bottom": _split,
    "job": _split,
    "transcript": _split,
}
