"""What a tuning goes on from, and what it leaves behind."""

from dataclasses import replace

import pytest

from blindtune.errors import ConfigError
from blindtune.offsite import tuning
from blindtune.offsite.adapter import AdapterConfig
from blindtune.training.loop import TrainingConfig
from offsite_world import READING, SILENT

LORA = AdapterConfig(lora_rank=2)


@pytest.fixture
def tune(world, tmp_path):
    def call(adapter=LORA, **options):
        return tuning.tune(
            world.path / "emulator",
            world.path / "private.txt",
            tmp_path / "adapter",
            adapter,
            TrainingConfig(max_steps=2, learning_rate=1e-3),
            **{"reading": READING, "run": SILENT} | options,
        )

    return call


@pytest.fixture
def interrupted(tune, monkeypatch):
    """A tuning that was killed after its last step, before the package was written."""

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "write_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            tune()


@pytest.mark.usefixtures("interrupted")
def test_other_lora_settings_do_not_go_on(tune):
    with pytest.raises(ConfigError, match=r"lora_alpha 32.0 -> 1.0.*\(--resume never\)"):
        tune(replace(LORA, lora_alpha=1.0))
    with pytest.raises(ConfigError, match=r"lora_dropout 0.1 -> 0.2"):
        tune(replace(LORA, lora_dropout=0.2))
    assert tune().training.resumed_from == 2


@pytest.mark.usefixtures("interrupted")
def test_another_emulator_does_not_go_on(world, tune, monkeypatch):
    real, other = tuning.open_emulator, "sha256:" + 64 * "0"
    monkeypatch.setattr(tuning, "open_emulator", lambda *a, **o: replace(real(*a, **o), id=other))
    with pytest.raises(ConfigError, match=f"emulator {world.emulation.id} -> {other}"):
        tune()
