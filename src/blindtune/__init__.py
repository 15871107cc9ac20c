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
    from blindtune.evaluation.audit import AdversaryConfig, Audit, AuditConfig
    from blindtune.evaluation.audit_adapter import audit_adapter
    from blindtune.evaluation.audit_emulator import audit_emulator
    from blindtune.evaluation.audit_page import write_audit
    from blindtune.evaluation.audit_split import audit_split
    from blindtune.evaluation.evaluating import Evaluation, EvaluationConfig, evaluate
    from blindtune.evaluation.frontier import FrontierConfig, frontier
    from blindtune.evaluation.frontier_scores import Frontier
    from blindtune.evaluation.inspection import Inspection, inspect
    from blindtune.evaluation.split_frontier import (
        SplitFrontier,
        SplitFrontierConfig,
        Trial,
        split_frontier,
    )
    from blindtune.exchange.guard import GuardConfig
    from blindtune.exchange.keyring import Keyring
    from blindtune.exchange.sealing import seal, unseal
    from blindtune.exchange.serving import ServerConfig
    from blindtune.exchange.signing import Signer, Trust
    from blindtune.offsite.adapter import AdapterConfig
    from blindtune.offsite.emulation import Emulation, EmulatorConfig, emulate
    from blindtune.offsite.emulator import Emulator, open_emulator
    from blindtune.offsite.importance import DynamicConfig
    from blindtune.offsite.plugin import PlugIn, plug_in
    from blindtune.offsite.study import Study, StudyConfig, open_study
    from blindtune.offsite.studying import study
    from blindtune.offsite.tuning import Tuning, tune
    from blindtune.offsite.vetting import ChangeBounds
    from blindtune.split.access import AccessConfig
    from blindtune.split.cancellation import Cancellation, cancel
    from blindtune.split.customer import PassConfig
    from blindtune.split.door import CertificateConfig, admit, revoke
    from blindtune.split.prediction import AskingConfig, Prediction, predict
    from blindtune.split.privacy_statement import PrivacyStatement
    from blindtune.split.private_texts import ReadingConfig
    from blindtune.split.privatizer_config import PrivatizerConfig
    from blindtune.split.service import (
        Bottom,
        BottomConfig,
        Service,
        WatchConfig,
        bottom,
        serve,
    )
    from blindtune.split.terms import TuningConfig, VendorLimits
    from blindtune.split.tuning_job import SplitTuning, split_tune
    from blindtune.training.canaries import CanaryConfig, Planting, plant
    from blindtune.training.config import RunConfig, TrainingConfig
    from blindtune.training.dp_plan import DpConfig
    from blindtune.training.text import DataConfig

_PLACES = {
    "AccessConfig": "blindtune.split.access",
    "AdapterConfig": "blindtune.offsite.adapter",
    "AdversaryConfig": "blindtune.evaluation.audit",
    "AskingConfig": "blindtune.split.prediction",
    "Audit": "blindtune.evaluation.audit",
    "AuditConfig": "blindtune.evaluation.audit",
    "Bottom": "blindtune.split.service",
    "BottomConfig": "blindtune.split.service",
    "Cancellation": "blindtune.split.cancellation",
    "CanaryConfig": "blindtune.training.canaries",
    "CertificateConfig": "blindtune.split.door",
    "ChangeBounds": "blindtune.offsite.vetting",
    "DataConfig": "blindtune.training.text",
    "DpConfig": "blindtune.training.dp_plan",
    "DynamicConfig": "blindtune.offsite.importance",
    "Emulation": "blindtune.offsite.emulation",
    "Emulator": "blindtune.offsite.emulator",
    "EmulatorConfig": "blindtune.offsite.emulation",
    "Evaluation": "blindtune.evaluation.evaluating",
    "EvaluationConfig": "blindtune.evaluation.evaluating",
    "Frontier": "blindtune.evaluation.frontier_scores",
    "FrontierConfig": "blindtune.evaluation.frontier",
    "GuardConfig": "blindtune.exchange.guard",
    "Inspection": "blindtune.evaluation.inspection",
    "Keyring": "blindtune.exchange.keyring",
    "PassConfig": "blindtune.split.customer",
    "PlugIn": "blindtune.offsite.plugin",
    "Planting": "blindtune.training.canaries",
    "Prediction": "blindtune.split.prediction",
    "PrivacyStatement": "blindtune.split.privacy_statement",
    "PrivatizerConfig": "blindtune.split.privatizer_config",
    "ReadingConfig": "blindtune.split.private_texts",
    "RunConfig": "blindtune.training.config",
    "ServerConfig": "blindtune.exchange.serving",
    "Service": "blindtune.split.service",
    "Signer": "blindtune.exchange.signing",
    "SplitFrontier": "blindtune.evaluation.split_frontier",
    "SplitFrontierConfig": "blindtune.evaluation.split_frontier",
    "Trial": "blindtune.evaluation.split_frontier",
    "SplitTuning": "blindtune.split.tuning_job",
    "Study": "blindtune.offsite.study",
    "StudyConfig": "blindtune.offsite.study",
    "TrainingConfig": "blindtune.training.config",
    "Trust": "blindtune.exchange.signing",
    "Tuning": "blindtune.offsite.tuning",
    "TuningConfig": "blindtune.split.terms",
    "VendorLimits": "blindtune.split.terms",
    "WatchConfig": "blindtune.split.service",
    "admit": "blindtune.split.door",
    "audit_adapter": "blindtune.evaluation.audit_adapter",
    "audit_emulator": "blindtune.evaluation.audit_emulator",
    "audit_split": "blindtune.evaluation.audit_split",
    "bottom": "blindtune.split.service",
    "cancel": "blindtune.split.cancellation",
    "emulate": "blindtune.offsite.emulation",
    "evaluate": "blindtune.evaluation.evaluating",
    "frontier": "blindtune.evaluation.frontier",
    "inspect": "blindtune.evaluation.inspection",
    "open_emulator": "blindtune.offsite.emulator",
    "open_study": "blindtune.offsite.study",
    "plant": "blindtune.training.canaries",
    "plug_in": "blindtune.offsite.plugin",
    "predict": "blindtune.split.prediction",
    "revoke": "blindtune.split.door",
    "seal": "blindtune.exchange.sealing",
    "serve": "blindtune.split.service",
    "split_frontier": "blindtune.evaluation.split_frontier",
    "split_tune": "blindtune.split.tuning_job",
    "study": "blindtune.offsite.studying",
    "tune": "blindtune.offsite.tuning",
    "unseal": "blindtune.exchange.sealing",
    "write_audit": "blindtune.evaluation.audit_page",
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
    "Bottom",
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
