"""What a tuning goes on from, and what it leaves behind."""

import shutil
from dataclasses import replace

import msgspec
import pytest

from blindtune.errors import ConfigError, OutputError
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner import tuning
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


@pytest.mark.parametrize(
    "given", [{"lora_targets": ("self_attn.q_proj",)}, {"lora_alpha": 8.0}, {"lora_dropout": 0.2}]
)
def test_lora_settings_without_a_rank_are_refused(given):
    """All weights were trained instead, far more than was asked for."""
    with pytest.raises(ConfigError, match=f"lora_rank above 0 with {next(iter(given))}"):
        AdapterConfig(**given)
    AdapterConfig(lora_rank=2, **given)
    AdapterConfig(lora_alpha=32.0, lora_dropout=0.1, lora_targets=())
    AdapterConfig(lora_dropout=0)


@pytest.mark.usefixtures("interrupted")
def test_another_emulator_does_not_go_on(world, tune, monkeypatch):
    real, other = tuning.open_emulator, "sha256:" + 64 * "0"
    monkeypatch.setattr(tuning, "open_emulator", lambda *a, **o: replace(real(*a, **o), id=other))
    with pytest.raises(ConfigError, match=f"emulator {world.emulation.id} -> {other}"):
        tune()


def test_nothing_fitted_to_private_text_stays_but_the_adapter(tune, tmp_path):
    tune()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    again = tune(replace(LORA, lora_alpha=1.0), overwrite=True)
    assert again.training.resumed_from is None


def test_tensorboard_logs_stay(tune, tmp_path):
    tune(run=replace(SILENT, tensorboard=True))
    work = tmp_path / "adapter.work"
    assert [path.name for path in work.iterdir()] == ["tensorboard"]
    assert list((work / "tensorboard").iterdir())


def test_checkpoints_that_cannot_be_removed_are_told(tune, tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    clear = tuning.checkpoint.clear

    def refused(work):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", refuse)
            clear(work)

    monkeypatch.setattr(tuning.checkpoint, "clear", refused)
    with pytest.raises(OutputError, match=r"adapter.work: .*Permission denied.*fitted to the data"):
        tune()
    assert (tmp_path / "adapter" / "manifest.json").is_file()


@pytest.mark.parametrize(("package", "longest"), [(None, 128), (48, 48), (500, 128)])
def test_examples_longer_than_the_emulator_reads_are_refused(tune, monkeypatch, package, longest):
    def limited(*arguments, **options):
        opened = real(*arguments, **options)
        return replace(
            opened, manifest=msgspec.structs.replace(opened.manifest, max_length=package)
        )

    real = tuning.open_emulator
    monkeypatch.setattr(tuning, "open_emulator", limited)
    with pytest.raises(ConfigError, match=f"max_length up to {longest}, .* got {longest + 1}"):
        tune(reading=replace(READING, max_length=longest + 1))
