"""Tune a model that you may not see, on data that you may not share.

The acts of both parties, by the names that the command line uses too; each is imported when it is
first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blindtune.errors import (
    BlindtuneError,
    ConfigError,
    DataError,
    MismatchError,
    ModelError,
    NetworkError,
    OutputError,
    PackageError,
    PolicyError,
    TrainingError,
    UnsupportedModelError,
    VerificationError,
)
from blindtune.version import __version__

if TYPE_CHECKING:
    from blindtune.evaluation.audits.adapter import audit_adapter
    from blindtune.evaluation.audits.audit import AdversaryConfig, Audit, AuditConfig
    from blindtune.evaluation.audits.emulator import audit_emulator
    from blindtune.evaluation.audits.split import audit_split
    from blindtune.evaluation.frontiers.offsite import FrontierConfig, frontier
    from blindtune.evaluation.frontiers.scores import Frontier
    from blindtune.evaluation.frontiers.split import (
        SplitFrontier,
        SplitFrontierConfig,
        Trial,
        split_frontier,
    )
    from blindtune.evaluation.inspection import Inspection, inspect
    from blindtune.evaluation.pages.audit import write_audit
    from blindtune.evaluation.utility.evaluating import Evaluation, EvaluationConfig, evaluate
    from blindtune.exchange.packages.keyring import Keyring
    from blindtune.exchange.packages.sealing import seal, unseal
    from blindtune.exchange.packages.signing import Signer, Trust
    from blindtune.exchange.wire.guard import GuardConfig
    from blindtune.exchange.wire.serving import ServerConfig
    from blindtune.offsite.adapter import AdapterConfig
    from blindtune.offsite.data_owner.tuning import Tuning, tune
    from blindtune.offsite.emulator import Emulator, open_emulator
    from blindtune.offsite.model_owner.emulation import Emulation, EmulatorConfig, emulate
    from blindtune.offsite.model_owner.importance import DynamicConfig
    from blindtune.offsite.model_owner.plugin import PlugIn, plug_in
    from blindtune.offsite.model_owner.study import Study, StudyConfig, open_study
    from blindtune.offsite.model_owner.studying import study
    from blindtune.offsite.model_owner.vetting import ChangeBounds
    from blindtune.split.customer.access import AccessConfig
    from blindtune.split.customer.cancellation import Cancellation, cancel
    from blindtune.split.customer.prediction import AskingConfig, Prediction, predict
    from blindtune.split.customer.privacy_statement import PrivacyStatement
    from blindtune.split.customer.private_gradients import GradientConfig
    from blindtune.split.customer.private_texts import ReadingConfig
    from blindtune.split.customer.privatizer_config import PrivatizerConfig
    from blindtune.split.customer.requests import PassConfig
    from blindtune.split.customer.tuning_job import SplitTuning, split_tune
    from blindtune.split.terms import TuningConfig, VendorLimits
    from blindtune.split.vendor.door import CertificateConfig, admit, revoke
    from blindtune.split.vendor.service import (
        BottomConfig,
        Service,
        WatchConfig,
        WrittenBottom,
        bottom,
        serve,
    )
    from blindtune.training.canaries import CanaryConfig, Planting, plant
    from blindtune.training.config import RunConfig, TrainingConfig
    from blindtune.training.dp_plan import DpConfig
    from blindtune.training.text import DataConfig

_PLACES = {
    "AccessConfig": "blindtune.split.customer.access",
    "AdapterConfig": "blindtune.offsite.adapter",
    "AdversaryConfig": "blindtune.evaluation.audits.audit",
    "AskingConfig": "blindtune.split.customer.prediction",
    "Audit": "blindtune.evaluation.audits.audit",
    "AuditConfig": "blindtune.evaluation.audits.audit",
    "WrittenBottom": "blindtune.split.vendor.service",
    "BottomConfig": "blindtune.split.vendor.service",
    "Cancellation": "blindtune.split.customer.cancellation",
    "CanaryConfig": "blindtune.training.canaries",
    "CertificateConfig": "blindtune.split.vendor.door",
    "ChangeBounds": "blindtune.offsite.model_owner.vetting",
    "DataConfig": "blindtune.training.text",
    "DpConfig": "blindtune.training.dp_plan",
    "DynamicConfig": "blindtune.offsite.model_owner.importance",
    "Emulation": "blindtune.offsite.model_owner.emulation",
    "Emulator": "blindtune.offsite.emulator",
    "EmulatorConfig": "blindtune.offsite.model_owner.emulation",
    "Evaluation": "blindtune.evaluation.utility.evaluating",
    "EvaluationConfig": "blindtune.evaluation.utility.evaluating",
    "Frontier": "blindtune.evaluation.frontiers.scores",
    "FrontierConfig": "blindtune.evaluation.frontiers.offsite",
    "GradientConfig": "blindtune.split.customer.private_gradients",
    "GuardConfig": "blindtune.exchange.wire.guard",
    "Inspection": "blindtune.evaluation.inspection",
    "Keyring": "blindtune.exchange.packages.keyring",
    "PassConfig": "blindtune.split.customer.requests",
    "PlugIn": "blindtune.offsite.model_owner.plugin",
    "Planting": "blindtune.training.canaries",
    "Prediction": "blindtune.split.customer.prediction",
    "PrivacyStatement": "blindtune.split.customer.privacy_statement",
    "PrivatizerConfig": "blindtune.split.customer.privatizer_config",
    "ReadingConfig": "blindtune.split.customer.private_texts",
    "RunConfig": "blindtune.training.config",
    "ServerConfig": "blindtune.exchange.wire.serving",
    "Service": "blindtune.split.vendor.service",
    "Signer": "blindtune.exchange.packages.signing",
    "SplitFrontier": "blindtune.evaluation.frontiers.split",
    "SplitFrontierConfig": "blindtune.evaluation.frontiers.split",
    "Trial": "blindtune.evaluation.frontiers.split",
    "SplitTuning": "blindtune.split.customer.tuning_job",
    "Study": "blindtune.offsite.model_owner.study",
    "StudyConfig": "blindtune.offsite.model_owner.study",
    "TrainingConfig": "blindtune.training.config",
    "Trust": "blindtune.exchange.packages.signing",
    "Tuning": "blindtune.offsite.data_owner.tuning",
    "TuningConfig": "blindtune.split.terms",
    "VendorLimits": "blindtune.split.terms",
    "WatchConfig": "blindtune.split.vendor.service",
    "admit": "blindtune.split.vendor.door",
    "audit_adapter": "blindtune.evaluation.audits.adapter",
    "audit_emulator": "blindtune.evaluation.audits.emulator",
    "audit_split": "blindtune.evaluation.audits.split",
    "bottom": "blindtune.split.vendor.service",
    "cancel": "blindtune.split.customer.cancellation",
    "emulate": "blindtune.offsite.model_owner.emulation",
    "evaluate": "blindtune.evaluation.utility.evaluating",
    "frontier": "blindtune.evaluation.frontiers.offsite",
    "inspect": "blindtune.evaluation.inspection",
    "open_emulator": "blindtune.offsite.emulator",
    "open_study": "blindtune.offsite.model_owner.study",
    "plant": "blindtune.training.canaries",
    "plug_in": "blindtune.offsite.model_owner.plugin",
    "predict": "blindtune.split.customer.prediction",
    "revoke": "blindtune.split.vendor.door",
    "seal": "blindtune.exchange.packages.sealing",
    "serve": "blindtune.split.vendor.service",
    "split_frontier": "blindtune.evaluation.frontiers.split",
    "split_tune": "blindtune.split.customer.tuning_job",
    "study": "blindtune.offsite.model_owner.studying",
    "tune": "blindtune.offsite.data_owner.tuning",
    "unseal": "blindtune.exchange.packages.sealing",
    "write_audit": "blindtune.evaluation.pages.audit",
}
"""Where each name is, for those that need torch."""

__all__ = [
    "AccessConfig",
    "AdapterConfig",
    "AdversaryConfig",
    "AskingConfig",
    "Audit",
    "AuditConfig",
    "BlindtuneError",
    "BottomConfig",
    "CanaryConfig",
    "Cancellation",
    "CertificateConfig",
    "ChangeBounds",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DpConfig",
    "DynamicConfig",
    "Emulation",
    "Emulator",
    "EmulatorConfig",
    "Evaluation",
    "EvaluationConfig",
    "Frontier",
    "FrontierConfig",
    "GradientConfig",
    "GuardConfig",
    "Inspection",
    "Keyring",
    "MismatchError",
    "ModelError",
    "NetworkError",
    "OutputError",
    "PackageError",
    "PassConfig",
    "Planting",
    "PlugIn",
    "PolicyError",
    "Prediction",
    "PrivacyStatement",
    "PrivatizerConfig",
    "ReadingConfig",
    "RunConfig",
    "ServerConfig",
    "Service",
    "Signer",
    "SplitFrontier",
    "SplitFrontierConfig",
    "SplitTuning",
    "Study",
    "StudyConfig",
    "TrainingConfig",
    "TrainingError",
    "Trial",
    "Trust",
    "Tuning",
    "TuningConfig",
    "UnsupportedModelError",
    "VendorLimits",
    "VerificationError",
    "WatchConfig",
    "WrittenBottom",
    "__version__",
    "admit",
    "audit_adapter",
    "audit_emulator",
    "audit_split",
    "bottom",
    "cancel",
    "emulate",
    "evaluate",
    "frontier",
    "inspect",
    "open_emulator",
    "open_study",
    "plant",
    "plug_in",
    "predict",
    "revoke",
    "seal",
    "serve",
    "split_frontier",
    "split_tune",
    "study",
    "tune",
    "unseal",
    "write_audit",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'blindtune' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
