"""The names that users import from the package."""

import subprocess
import sys

import pytest

import blindtune

ACTS = ["study", "emulate", "inspect", "tune", "plug_in", "evaluate", "open_study", "open_emulator"]
ACTS += [
    "frontier",
    "split_frontier",
    "split_tune",
    "predict",
    "cancel",
    "audit_adapter",
    "audit_emulator",
    "audit_split",
    "write_audit",
    "plant",
]
SPLIT = [
    "bottom", "serve", "admit", "revoke", "WrittenBottom", "BottomConfig", "Service",
    "CertificateConfig", "ServerConfig", "GuardConfig", "VendorLimits", "WatchConfig",
]  # fmt: skip
KEYS = ["Keyring", "Signer", "Trust", "seal", "unseal"]
CONFIGS = [
    "StudyConfig", "DynamicConfig", "EmulatorConfig", "AdapterConfig", "TrainingConfig",
    "RunConfig", "DataConfig", "EvaluationConfig", "PrivatizerConfig", "TuningConfig", "PassConfig",
    "FrontierConfig", "SplitFrontierConfig", "ReadingConfig", "AccessConfig", "AskingConfig",
    "ChangeBounds", "AuditConfig", "AdversaryConfig", "DpConfig", "CanaryConfig", "Trial",
    "GradientConfig",
]  # fmt: skip
RESULTS = ["Study", "Emulation", "Inspection", "Tuning", "PlugIn", "Evaluation", "Emulator"]
RESULTS += [
    "Frontier",
    "SplitFrontier",
    "SplitTuning",
    "PrivacyStatement",
    "Prediction",
    "Cancellation",
    "Audit",
    "Planting",
]
ERRORS = [
    "BlindtuneError", "ConfigError", "DataError", "ModelError", "UnsupportedModelError",
    "OutputError", "TrainingError", "VerificationError", "PackageError", "MismatchError",
    "PolicyError", "NetworkError",
]  # fmt: skip


def test_the_names_are_these():
    assert sorted(blindtune.__all__) == sorted(
        [*ACTS, *SPLIT, *KEYS, *CONFIGS, *RESULTS, *ERRORS, "__version__"]
    )
    assert set(blindtune.__all__) <= set(dir(blindtune))


@pytest.mark.parametrize("name", blindtune.__all__)
def test_every_name_is_there(name):
    found = getattr(blindtune, name)
    assert name == "__version__" or name == "Inspection" or found.__name__ == name


def test_every_error_has_an_exit_code():
    codes = {name: getattr(blindtune, name).exit_code for name in ERRORS}
    verification = {"VerificationError", "PackageError", "MismatchError"}
    assert {name for name, code in codes.items() if code == 3} == verification
    assert (codes["PolicyError"], codes["NetworkError"]) == (4, 5)
    assert set(codes.values()) == {2, 3, 4, 5}


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'stduy'"):
        blindtune.stduy  # noqa: B018


def test_nothing_heavy_is_imported_before_it_is_asked_for():
    program = (
        "import sys, blindtune; assert 'torch' not in sys.modules;"
        "from blindtune import StudyConfig, study; assert 'torch' in sys.modules;"
        "assert callable(study); import blindtune.offsite.model_owner.studying;"
        "assert callable(study)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
