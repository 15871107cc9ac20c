"""Tuning under differential privacy, from the command to what is stated, shown and bounded."""

import json
from dataclasses import replace

import pytest

from blindtune.cli.main import run
from blindtune.errors import ConfigError
from blindtune.evaluation.audits.adapter import audit_adapter
from blindtune.evaluation.audits.estimate import estimate_audit_adapter
from blindtune.evaluation.inspection import inspect
from blindtune.exchange.packages.package import open_package
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.data_owner.tuning_estimate import estimate_tune
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.privacy.entropy import system_uniforms
from blindtune.training.dp_plan import DpConfig
from blindtune.training.loop import TrainingConfig
from blindtune.training.text import DataConfig, load_dataset_file
from offsite_world import SILENT, owners_world
from tiny_models import tiny_tokenizer

TRAINING = TrainingConfig(max_steps=3, learning_rate=1e-3, per_device_train_batch_size=4)
READING = DataConfig(max_length=64)
STRONG = DpConfig(epsilon=1.0, delta=1e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = owners_world(tmp_path_factory.mktemp("owners"), "llama").path
    lines = (json.dumps({"text": f"the cat number {i} eats rice at home"}) for i in range(40))
    (place / "records.jsonl").write_text("\n".join(lines))
    lines = (json.dumps({"text": f"the fish number {i} sits on some mat"}) for i in range(6))
    (place / "others.jsonl").write_text("\n".join(lines))
    return place


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_what_is_spent_is_planned_stated_and_shown(world, tmp_path, lora_rank):
    found = tune(
        world / "emulator", world / "records.jsonl", tmp_path / "adapter",
        AdapterConfig(lora_rank=lora_rank), TRAINING, STRONG, reading=READING, run=SILENT,
    )  # fmt: skip
    assert found.training.best_step is None
    assert (found.privacy.sampling_rate, found.privacy.steps) == (0.1, 3)  # none set aside
    assert 0.9 < found.privacy.epsilon <= 1.0
    stated = open_package(tmp_path / "adapter", "adapter").manifest.privacy
    assert (stated.epsilon, stated.delta, stated.unit) == (found.privacy.epsilon, 1e-3, "record")
    shown = inspect(tmp_path / "adapter").privacy
    assert shown == {"epsilon": found.privacy.epsilon, "delta": 1e-3, "unit": "record"}
    assert plug_in(world / "model", tmp_path / "adapter", None).model is not None
    assert not (tmp_path / "adapter.work").exists()
    asked = (tmp_path / "adapter", world / "emulator", world / "records.jsonl")
    options = {"others": world / "others.jsonl", "reading": READING}
    assert READING.pack
    assert READING.validation_split  # and yet all are one record each, and none is a stranger
    audit = audit_adapter(*asked, **options)
    assert audit.facts["trained records"] == "40 different of 40 in records.jsonl"
    assert audit.facts["other records"] == "6 of others.jsonl"
    read = sum(
        load_dataset_file(
            world / name, tiny_tokenizer(), DataConfig(max_length=64, pack=False)
        ).tokens
        for name in ("records.jsonl", "others.jsonl")
    )
    assert estimate_audit_adapter(*asked, **options).tokens == 2 * read
    options["reading"] = replace(READING, validation_split=0.3)
    assert estimate_audit_adapter(*asked, **options).tokens == 2 * read
    assert "epsilon 1.00" in audit.guarantee[0] or "epsilon 0.99" in audit.guarantee[0]
    assert "with a chance above 3%" in audit.guarantee[1]


def test_noise_that_could_be_repeated_is_never_stated_as_private(world, tmp_path, monkeypatch):
    drawn = []

    def noted(*shape):
        drawn.append(shape)
        return system_uniforms(*shape)

    monkeypatch.setattr("blindtune.offsite.data_owner.tuning.system_uniforms", noted)
    asked = (world / "emulator", world / "records.jsonl")
    options = {"reading": READING, "run": SILENT}
    ids = {
        tune(*asked, tmp_path / name, None, TRAINING, STRONG, **options).adapter_id
        for name in ("a", "b")
    }
    assert len(ids) == 2
    assert drawn.count((40,)) == 2 * 3  # who is in each step, and noise besides
    assert len(drawn) > 6
    with pytest.raises(TypeError, match="testing_seed"):
        DpConfig(epsilon=1.0, testing_seed=1)


def test_without_an_epsilon_nothing_is_stated(world):
    assert inspect(world / "adapter").privacy is None


def test_a_text_file_is_one_record_unless_windows_are_the_unit(world, tmp_path):
    text = world / "private.txt"
    with pytest.raises(ConfigError, match="plain text"):
        tune(
            world / "emulator", text, tmp_path / "a", None, TRAINING, STRONG,
            reading=READING, run=SILENT,
        )  # fmt: skip
    windows = DpConfig(epsilon=1.0, delta=1e-3, unit="window")
    found = tune(
        world / "emulator", text, tmp_path / "a", None, TRAINING, windows,
        reading=READING, run=SILENT,
    )  # fmt: skip
    assert found.privacy.unit == "window"
    audit = audit_adapter(
        tmp_path / "a", world / "emulator", text, others=world / "public.txt", reading=READING
    )
    packed = load_dataset_file(text, tiny_tokenizer(), READING)
    assert (
        audit.facts["trained records"] == f"{len(packed)} different of {len(packed)} in private.txt"
    )
    for audit_of in (audit_adapter, estimate_audit_adapter):
        with pytest.raises(ConfigError, match="expected --others for an adapter tuned with diff"):
            audit_of(tmp_path / "a", world / "emulator", text, reading=READING)
    assert inspect(tmp_path / "a").privacy["unit"] == "window"


def test_private_validation_data_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="--validation"):
        tune(
            world / "emulator", world / "records.jsonl", tmp_path / "a", None, TRAINING, STRONG,
            reading=READING, run=SILENT, validation=world / "records.jsonl",
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("cut", [{"max_tokens": 330}, {"max_samples": 20}, {"split": "train[:20]"}])
def test_a_head_of_the_data_is_refused(world, tmp_path, cut):
    """Where a head ends depends on every record before it, so one more changes many others."""
    reading = DataConfig(max_length=64, **cut)
    asked = (world / "emulator", world / "records.jsonl")
    with pytest.raises(
        ConfigError, match=f"no .*{next(iter(cut))} with differential privacy.*file"
    ):
        tune(
            *asked, tmp_path / "a", None, TRAINING, STRONG, reading=reading, run=SILENT,
        )  # fmt: skip
    with pytest.raises(ConfigError, match=next(iter(cut))):
        estimate_tune(*asked, None, TRAINING, STRONG, reading=reading)
    assert not (tmp_path / "a").exists()
    assert estimate_tune(*asked, None, TRAINING, DpConfig(), reading=reading).tokens


def test_the_command_says_what_was_spent(world, tmp_path, capsys):
    options = [
        "tune", str(world / "emulator"), "--data", str(world / "records.jsonl"), "--out",
        str(tmp_path / "a"), "--max-steps", "2", "--per-device-train-batch-size", "4",
        "--dp-epsilon", "2", "--dp-delta", "1e-3", "--allow-unsigned", "--unsigned",
    ]  # fmt: skip
    assert run(options) == 0
    told = capsys.readouterr().out
    assert "differential privacy" in told
    assert "delta 1.0e-03 a record" in told
    assert run(["inspect", str(tmp_path / "a")]) == 0
    assert "as its maker states" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--max-grad-norm", 0.5, "to --dp-max-grad-norm"),
        ("--eval-steps", 1, "--eval-steps"),
        ("--logging-steps", 2, "--logging-steps"),
        ("--validation-split", 0.2, "trains on all records"),
    ],
)
def test_options_that_a_private_tuning_would_not_use_are_refused(
    world, tmp_path, capsys, option, value, says
):
    asked = [
        "tune", str(world / "emulator"), "--data", str(world / "records.jsonl"), "--out",
        str(tmp_path / "a"), "--max-steps", "2", "--per-device-train-batch-size", "4",
        option, str(value), "--allow-unsigned", "--unsigned",
    ]  # fmt: skip
    private = ["--dp-epsilon", "2", "--dp-delta", "1e-3"]
    assert run([*asked, "--dry-run"]) == 0
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        assert run([*asked, *private, *more]) == 2
        said = capsys.readouterr().err
        assert f"expected no {option} with differential privacy" in said
        assert says in said
    assert not (tmp_path / "a").exists()
