"""Which audit fits a subject, with which options: what `blindtune audit` calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blindtune.cli.options import Group, option_name
from blindtune.cli.trusting import trust_of
from blindtune.cli.verb import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from blindtune.evaluation.audit import Audit
    from blindtune.models.costs import Estimate
    from blindtune.split.private_texts import ReadingConfig

PRIVACY = Group(
    heading="Privacy, as for split-tune",
    module="blindtune.split.privacy_statement",
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


def kind_of(settings: Settings) -> str:
    """What the subject holds, by its own word.

    Raises:
        PolicyError: a package of somebody who is not trusted; nothing of it was parsed.
        MismatchError: nothing that can be audited.
    """
    from blindtune.errors import MismatchError
    from blindtune.exchange.package import open_package
    from blindtune.split.customer_job import MARK

    subject = settings["subject"]
    if Path(subject).is_file():
        return "transcript"
    if (Path(subject) / MARK).is_file():
        return "job"
    opened = open_package(subject, trust=trust_of(settings, remember=False))
    kind = str(opened.manifest.format).removeprefix("blindtune-")
    if kind not in AUDITS:
        raise MismatchError(
            f"{subject}: expected a package that can be audited (emulator, adapter, bottom), got "
            f"{kind}: give another directory"
        )
    return kind


def check_options(kind: str, settings: Settings) -> None:
    """Raise ConfigError for an option that is missing, or that another kind takes."""
    from blindtune.errors import ConfigError

    missing = [f"--{name}" for name in NEEDS[kind] if settings[name] is None]
    this = f"{'an' if kind[0] in 'ae' else 'a'} {kind}"
    if missing:
        raise ConfigError(f"expected {', '.join(missing)} for the audit of {this}: see --help")
    known = {*NEEDS[kind], *TAKES[kind]}
    every = {name for names in (*NEEDS.values(), *TAKES.values()) for name in names}
    stray = sorted(f"--{name}" for name in every - known if settings[name] is not None)
    if kind not in NOISED:
        fields = PRIVACY.options()
        stray += [option_name(n) for n, f in fields.items() if settings[n] != f.default]
    if stray:
        raise ConfigError(f"{', '.join(stray)} does not fit the audit of {this}: leave it out")


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


def _split(settings: Settings, on_stage: Callable[[str, int, int], None]) -> Audit:
    from blindtune.evaluation.audit import AuditConfig
    from blindtune.evaluation.audit_split import audit_split
    from blindtune.split.privacy_statement import PrivatizerConfig

    return audit_split(
        settings["subject"],
        bottom=settings["bottom"],
        data=settings["data"],
        public=settings["public"],
        privatizer=settings.of(PrivatizerConfig),
        reading=_split_reading(settings),
        config=settings.of(AuditConfig),
        trust=trust_of(settings),
        on_progress=on_stage,
    )


def _split_reading(settings: Settings) -> ReadingConfig:
    """Column and length are options that adapters' data has too."""
    from blindtune.split.private_texts import ReadingConfig
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
    from blindtune.evaluation.audit import AuditConfig
    from blindtune.evaluation.audit_estimate import (
        estimate_audit_adapter,
        estimate_audit_emulator,
        estimate_audit_split,
    )
    from blindtune.training.text import DataConfig

    kind = kind_of(settings)
    check_options(kind, settings)
    config, reading = settings.of(AuditConfig), settings.of(DataConfig)
    if kind == "emulator":
        return estimate_audit_emulator(
            settings["subject"], settings["model"], reading=reading, config=config
        )
    if kind == "adapter":
        return estimate_audit_adapter(
            settings["subject"], settings["model"], settings["data"],
            others=settings["others"], reading=reading, config=config,
        )  # fmt: skip
    return estimate_audit_split(
        settings["subject"],
        bottom=settings["bottom"],
        data=settings["data"],
        public=settings["public"],
        reading=_split_reading(settings),
        config=config,
    )


AUDITS = {
    "emulator": _emulator,
    "adapter": _adapter,
    "bottom": _split,
    "job": _split,
    "transcript": _split,
}
