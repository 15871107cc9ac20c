"""Whole numbers and tuples of configs, which Python takes any value for."""

import pytest

import blindtune
from blindtune.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ("PassConfig", {"epochs": 1.5}, "epochs to be a whole number, got 1.5"),
        ("TrainingConfig", {"max_steps": 2.5}, "max_steps to be a whole number"),
        ("EmulatorConfig", {"adapter_layers": 2.0}, "adapter_layers to be a whole number"),
        ("StudyConfig", {"max_length": 32.0}, "max_length to be a whole number"),
        ("StudyConfig", {"max_length": True}, "max_length to be a whole number"),
        ("FrontierConfig", {"alpha": 0.25}, r"alpha to be a tuple, got 0.25: write \(0.25,\)"),
        ("AuditConfig", {"healing_learning_rate": 1e-4}, "healing_learning_rate to be a tuple"),
        ("CanaryConfig", {"repeats": 4}, "repeats to be a tuple"),
        ("BottomConfig", {"last": 1.0}, "last to be a whole number, got 1.0"),
        ("WatchConfig", {"metrics_port": "80"}, "metrics_port to be a whole number, got '80'"),
        ("AdapterConfig", {"lora_rank": 2, "lora_targets": "q_proj"}, "lora_targets to be a tuple"),
    ],
)
def test_other_kinds_are_refused(config, options, said):
    with pytest.raises(ConfigError, match=f"expected {said}"):
        getattr(blindtune, config)(**options)


def test_what_fits_is_taken():
    assert blindtune.TrainingConfig(max_steps=None, learning_rate=1).max_steps is None
    assert blindtune.CanaryConfig(repeats=(4,)).repeats == (4,)
