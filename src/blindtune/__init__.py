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

if TYPE_CHECKING:
    from blindtune.evaluation.evaluating import Evaluation, EvaluationConfig, evaluate
    from blindtune.exchange.serving import ServerConfig
    from blindtune.offsite.adapter import AdapterConfig
    from blindtune.offsite.emulation import Emulation, EmulatorConfig, emulate
    from blindtune.offsite.emulator import Emulator, open_emulator
    from blindtune.offsite.importance import DynamicConfig
    from blindtune.offsite.inspection import Inspection, inspect
    from blindtune.offsite.plugin import PlugIn, plug_in
    from blindtune.offsite.study import Study, StudyConfig, open_study
    from blindtune.offsite.studying import study
    from blindtune.offsite.tuning import Tuning, tune
    from blindtune.split.door import CertificateConfig, admit
    from blindtune.split.service import (
        Bottom,
        BottomConfig,
        Service,
        WatchConfig,
        bottom,
        serve,
    )
    from blindtune.split.terms import VendorLimits
    from blindtune.training.config import RunConfig, TrainingConfig
    from blindtune.training.text import DataConfig

__version__ = "0.1.0"

_PLACES = {
    "AdapterConfig": "blindtune.offsite.adapter",
    "Bottom": "blindtune.split.service",
    "BottomConfig": "blindtune.split.service",
    "CertificateConfig": "blindtune.split.door",
    "DataConfig": "blindtune.training.text",
    "DynamicConfig": "blindtune.offsite.importance",
    "Emulation": "blindtune.offsite.emulation",
    "Emulator": "blindtune.offsite.emulator",
    "EmulatorConfig": "blindtune.offsite.emulation",
    "Evaluation": "blindtune.evaluation.evaluating",
    "EvaluationConfig": "blindtune.evaluation.evaluating",
    "Inspection": "blindtune.offsite.inspection",
    "PlugIn": "blindtune.offsite.plugin",
    "RunConfig": "blindtune.training.config",
    "ServerConfig": "blindtune.exchange.serving",
    "Service": "blindtune.split.service",
    "Study": "blindtune.offsite.study",
    "StudyConfig": "blindtune.offsite.study",
    "TrainingConfig": "blindtune.training.config",
    "Tuning": "blindtune.offsite.tuning",
    "VendorLimits": "blindtune.split.terms",
    "WatchConfig": "blindtune.split.service",
    "admit": "blindtune.split.door",
    "bottom": "blindtune.split.service",
    "emulate": "blindtune.offsite.emulation",
    "evaluate": "blindtune.evaluation.evaluating",
    "inspect": "blindtune.offsite.inspection",
    "open_emulator": "blindtune.offsite.emulator",
    "open_study": "blindtune.offsite.study",
    "plug_in": "blindtune.offsite.plugin",
    "serve": "blindtune.split.service",
    "study": "blindtune.offsite.studying",
    "tune": "blindtune.offsite.tuning",
}
"""Where each name is, for those that need torch."""

__all__ = [
    "AdapterConfig",
    "BlindtuneError",
    "Bottom",
    "BottomConfig",
    "CertificateConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DynamicConfig",
    "Emulation",
    "Emulator",
    "EmulatorConfig",
    "Evaluation",
    "EvaluationConfig",
    "Inspection",
    "MismatchError",
    "ModelError",
    "NetworkError",
    "OutputError",
    "PackageError",
    "PlugIn",
    "PolicyError",
    "RunConfig",
    "ServerConfig",
    "Service",
    "Study",
    "StudyConfig",
    "TrainingConfig",
    "TrainingError",
    "Tuning",
    "UnsupportedModelError",
    "VendorLimits",
    "VerificationError",
    "WatchConfig",
    "__version__",
    "admit",
    "bottom",
    "emulate",
    "evaluate",
    "inspect",
    "open_emulator",
    "open_study",
    "plug_in",
    "serve",
    "study",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'blindtune' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
