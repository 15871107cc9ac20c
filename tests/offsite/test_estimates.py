"""Estimates against what the acts then took."""

import json
import time
from dataclasses import replace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from blindtune.errors import ConfigError, DataError, MismatchError
from blindtune.evaluation.audits.estimate import estimate_audit_adapter
from blindtune.evaluation.frontiers.estimate import estimate_frontier
from blindtune.evaluation.frontiers.offsite import FrontierConfig
from blindtune.evaluation.utility.estimate import estimate_evaluate
from blindtune.evaluation.utility.evaluating import EvaluationConfig, evaluate
from blindtune.models import costs
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.data_owner.tuning_estimate import estimate_tune
from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.package_estimates import (
    estimate_emulate,
    estimate_inspect,
    estimate_plug_in,
)
from blindtune.offsite.model_owner.study import StudyConfig
from blindtune.offsite.model_owner.study_estimate import estimate_study
from blindtune.offsite.model_owner.studying import study
from blindtune.offsite.model_owner.vetting import public_windows
from blindtune.training.config import RunConfig, TrainingConfig
from blindtune.training.dp_plan import DpConfig
from blindtune.training.text import DataConfig
from tiny_models import tiny_tokenizer

READING = DataConfig(max_length=32, max_tokens=2000)
LOOSE = 6.0  # a busy machine, and a model so small that calls cost as much as arithmetic


def folder_bytes(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model wide enough for its arithmetic to count, and text."""
    place = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    config = LlamaConfig(vocab_size=128, num_attention_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    (place / "text.txt").write_text("the cat sat on the mat. " * 1200)
    return place


def assert_close(estimate, seconds):
    assert estimate.seconds / LOOSE < seconds < estimate.seconds * LOOSE, estimate


def test_all_acts_against_reality(wide):
    """Each act is run right after it was estimated, so both see the same machine."""
    model, text = wide / "model", wide / "text.txt"
    config = StudyConfig(
        max_length=64, calibration_tokens=8192, damage_tokens=1024, harmonizer_rank=16
    )
    dynamic = DynamicConfig(steps=3)
    estimate = estimate_study(model, text, config, dynamic)
    found = study(model, text, wide / "study", config, dynamic)
    assert_close(estimate, sum(found.seconds.values()))
    assert estimate.written_bytes == pytest.approx(folder_bytes(wide / "study"), rel=0.05)
    assert estimate.parts.keys() >= {"calibrate", "measure", "order", "learn"}

    for options in ({}, {"weighted": False, "dtype": "bfloat16"}, {"feed_forward": False}):
        triplet = EmulatorConfig(adapter_layers=1, **options)
        estimate = estimate_emulate(wide / "study", triplet)
        made = emulate(wide / "study", wide / "emulator", triplet, overwrite=True)
        size = folder_bytes(wide / "emulator")
        assert estimate.written_bytes == pytest.approx(size, rel=0.02)
    assert_close(estimate, made.seconds)

    training = TrainingConfig(max_steps=6)
    reading = DataConfig(max_length=64)
    estimate = estimate_tune(wide / "emulator", text, training=training, reading=reading)
    silent = RunConfig(silent=True)
    tuned = tune(
        wide / "emulator", text, wide / "adapter", training=training, reading=reading, run=silent
    )
    assert_close(estimate, tuned.training.seconds)
    assert estimate.tokens == pytest.approx(tuned.training.tokens, rel=0.05)
    assert estimate.written_bytes == pytest.approx(folder_bytes(wide / "adapter"), rel=0.02)

    start = time.perf_counter()
    scored = EvaluationConfig(max_tokens=500)
    evaluated = estimate_evaluate(wide / "emulator", data=text, config=scored)
    assert evaluated.tokens == 500
    assert time.perf_counter() - start < 20
    items = [json.dumps({"question": "q", "choices": ["a", "b"], "label": 0})] * 40
    (wide / "items.jsonl").write_text("\n".join(items))
    every, some = (
        estimate_evaluate(wide / "emulator", choices=wide / "items.jsonl", config=config).tokens
        for config in (EvaluationConfig(), EvaluationConfig(max_items=10))
    )
    assert some == pytest.approx(every / 4, rel=0.05)
    read = estimate_inspect(wide / "emulator").parts["read and check"]
    assert read == pytest.approx(2 * folder_bytes(wide / "emulator") / 1e9)
    assert estimate_plug_in(model, wide / "adapter").written_bytes == pytest.approx(
        (model / "model.safetensors").stat().st_size, rel=0.01
    )


def estimated(world, training=None, **options):
    return estimate_tune(
        world.path / "emulator",
        world.path / "private.txt",
        options.pop("adapter", None),
        training or TrainingConfig(max_steps=4),
        reading=READING,
        **options,
    )


def test_tuning_takes_what_is_asked_for(world):
    plain = estimated(world)
    assert plain.tokens == 4 * 8 * 32
    assert plain.written_bytes == 4 * world.full.trained_parameters
    lora = estimated(world, adapter=AdapterConfig(lora_rank=4))
    assert lora.written_bytes == 4 * world.lora.trained_parameters
    epochs = estimated(world, TrainingConfig(num_train_epochs=2.0))
    assert epochs.tokens == 14 * 8 * 32  # 56 examples left for training, twice
    assert "validate" not in estimated_without_validation(world).parts
    saving = estimated(world, run=RunConfig(gradient_checkpointing=True))
    assert saving.memory_bytes <= plain.memory_bytes + (8 << 20)


@pytest.mark.parametrize("rank", [0, 4])
def test_bfloat16_halves_what_is_not_trained(world, rank, monkeypatch):
    monkeypatch.setattr(costs, "_resident_bytes", lambda: 0)
    adapter = AdapterConfig(lora_rank=rank)
    runs = (RunConfig(precision=precision) for precision in ("float32", "bfloat16"))
    whole, half = (estimated(world, adapter=adapter, run=run).memory_bytes for run in runs)
    made = world.lora if rank else world.full
    numbers = sum(p.numel() for p in made.emulator.model.parameters())
    frozen = numbers - (0 if rank else world.full.trained_parameters)
    if rank:
        frozen -= world.lora.trained_parameters  # PEFT put them into the model
    copies = 0 if rank else world.full.trained_parameters
    assert whole - half == 2 * frozen - 2 * copies


def test_memory_is_of_the_longest_record_and_time_of_padded_batches(world, tmp_path, monkeypatch):
    """A batch is as wide as its longest record: one of 61 widens one batch of 8."""
    monkeypatch.setattr(costs, "_resident_bytes", lambda: 0)
    lines = [json.dumps({"text": text}) for text in ["ab"] * 60 + ["a long one " * 40]]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    (tmp_path / "short.jsonl").write_text("\n".join(lines[:-1]))
    reading = replace(READING, pack=False, validation_split=0.0)
    mixed, short = (
        estimate_tune(
            world.path / "emulator", tmp_path / name, reading=reading,
            training=TrainingConfig(num_train_epochs=1.0),
        )
        for name in ("mixed.jsonl", "short.jsonl")
    )  # fmt: skip
    assert mixed.memory_bytes > short.memory_bytes
    width = short.tokens // 64
    assert width < 8
    wide = [8 * ((8 - batches) * width + batches * 32) for batches in (1, 2)]
    assert mixed.tokens in wide  # twice, if it comes first in the next epoch too


def estimated_without_validation(world):
    return estimate_tune(
        world.path / "emulator",
        world.path / "private.txt",
        training=TrainingConfig(max_steps=1),
        reading=replace(READING, validation_split=0.0),
    )


def test_what_an_act_refuses_its_estimate_refuses(world):
    with pytest.raises(ConfigError, match="kept middle layer"):
        estimate_emulate(world.study, EmulatorConfig(alpha=1.0))
    without_moments = replace(world.study, second_moments=())
    with pytest.raises(ConfigError, match="expected a study with moments"):
        estimate_emulate(without_moments, EmulatorConfig(adapter_layers=1, beta=0.5))
    with pytest.raises(MismatchError, match="expected an adapter package"):
        estimate_plug_in(world.path / "model", world.path / "emulator")
    with pytest.raises(ConfigError, match="expected a package's directory"):
        estimate_inspect(world.path / "none")
    with pytest.raises(ConfigError, match="without gradient_checkpointing"):
        estimate_tune(
            world.path / "emulator",
            world.path / "private.txt",
            privacy=DpConfig(epsilon=8.0),
            run=RunConfig(gradient_checkpointing=True),
        )


MISSPELT = AdapterConfig(lora_rank=2, lora_targets=("self_attn.q",))
TOO_LONG = replace(READING, max_length=129)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reading": TOO_LONG}, "max_length up to 128"),
        ({"adapter": MISSPELT}, "lora_targets among self_attn.q_proj, .* got self_attn.q"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_data_is_read(world, tmp_path, options, says):
    options = {"reading": READING} | options
    asked = (world.path / "emulator", tmp_path / "no data.txt")
    with pytest.raises(ConfigError, match=says):
        tune(*asked, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match=says):
        estimate_tune(*asked, **options)


@pytest.mark.parametrize(
    ("training", "privacy", "says"),
    [
        ({"early_stopping_patience": 2}, {"epsilon": 8.0}, "expected no early_stopping_patience"),
        ({"per_device_train_batch_size": 99}, {"epsilon": 8.0}, "expected at least 198 records"),
        ({}, {"epsilon": 1e-9}, "expected an epsilon that some noise reaches in 4 steps"),
        ({"early_stopping_patience": 2}, None, "early_stopping_patience needs a validation set"),
    ],
)
def test_plans_that_a_tuning_refuses_are_refused_dry(world, tmp_path, training, privacy, says):
    asked = {
        "training": TrainingConfig(max_steps=4, **training),
        "privacy": None if privacy is None else DpConfig(unit="window", **privacy),
        "reading": DataConfig(max_length=32, validation_split=0.0),
    }
    files = (world.path / "emulator", world.path / "private.txt")
    with pytest.raises(ConfigError, match=says):
        tune(*files, tmp_path / "out", **asked)
    with pytest.raises(ConfigError, match=says):
        estimate_tune(*files, **asked)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"max_length": 129, "calibration_tokens": 129, "damage_tokens": 129}, "up to 128"),
        ({"min_adapter_layers": 4}, "expected min_adapter_layers to leave a middle, got 4"),
        ({"min_adapter_layers": 5}, "expected min_adapter_layers to leave a middle, got 5"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_text_is_read(world, tmp_path, config, says):
    files = (world.path / "model", tmp_path / "no data.txt")
    with pytest.raises(ConfigError, match=says):
        study(*files, tmp_path / "out", StudyConfig(**config))
    with pytest.raises(ConfigError, match=says):
        estimate_study(*files, StudyConfig(**config))


def test_too_little_public_text_is_refused_dry(world, tmp_path):
    (tmp_path / "short.txt").write_text("the cat sat on the mat. " * 2)
    config = StudyConfig(max_length=16, calibration_tokens=16, damage_tokens=16)
    for text, says in (
        (tmp_path / "short.txt", "expected at least 64 tokens"),
        (world.path / "public.txt", "give at least --calibration-tokens 32"),
    ):
        with pytest.raises(DataError, match=says):
            study(world.path / "model", text, tmp_path / "out", config)
        with pytest.raises(DataError, match=says):
            estimate_study(world.path / "model", text, config)


@pytest.mark.parametrize(
    ("options", "refusal", "says"),
    [
        ({}, ConfigError, "expected something to score"),
        ({"config": {"max_length": 129}, "data": "public.txt"}, ConfigError, "up to 128"),
        ({"adapter": "emulator", "data": "public.txt"}, MismatchError, "an adapter package"),
        ({"adapter": "none", "data": "public.txt"}, ConfigError, "no such directory"),
        ({"choices": "none.jsonl"}, DataError, "none.jsonl"),
    ],
)
def test_what_cannot_be_scored_is_refused_dry(world, options, refusal, says):
    config = EvaluationConfig(**options.get("config", {}))
    files = {name: world.path / value for name, value in options.items() if name != "config"}
    for act in (evaluate, estimate_evaluate):
        with pytest.raises(refusal, match=says):
            act(world.path / "emulator", **files, config=config)


def test_adapters_to_be_scored_are_opened_and_counted(world, tmp_path):
    text = world.path / "public.txt"
    for model in ("emulator", "model"):
        bare, tuned = (
            estimate_evaluate(world.path / model, adapter=adapter, data=text)
            for adapter in (None, world.path / "adapter")
        )
        size = 4 * world.full.trained_parameters
        assert tuned.parts["load"] - bare.parts["load"] == pytest.approx(2 * size / 1e9)
    emulate(world.study, tmp_path / "other", EmulatorConfig(adapter_layers=1, alpha=0.2, beta=1.0))
    for act in (evaluate, estimate_evaluate):
        with pytest.raises(MismatchError, match="expected an adapter tuned on this emulator"):
            act(tmp_path / "other", adapter=world.path / "adapter", data=text)


def test_other_acts_refuse_long_windows_dry_too(world, tmp_path):
    with pytest.raises(ConfigError, match="max_length up to 128"):
        estimate_audit_adapter(
            world.path / "adapter", world.path / "emulator", tmp_path / "none", reading=TOO_LONG
        )
    config = FrontierConfig(max_length=129)
    with pytest.raises(ConfigError, match="max_length up to 128"):
        estimate_frontier(
            world.path / "model", tmp_path / "none", config, made_study=tmp_path / "none"
        )


def test_public_text_counts_in_plugging_in(world):
    files = (world.path / "model", world.path / "adapter")
    text = world.path / "public.txt"
    bare, scored = (estimate_plug_in(*files, data=data) for data in (None, text))
    model, tokenizer = LlamaForCausalLM.from_pretrained(files[0]), tiny_tokenizer()
    assert (bare.tokens, scored.tokens) == (
        0, 2 * public_windows(model, tokenizer, text).tokens
    )  # fmt: skip
    assert scored.parts["score"] > 0
    assert "score" not in bare.parts


def test_a_study_costs_more_with_more_in_it(world):
    arguments = (world.path / "model", world.path / "public.txt")
    config = StudyConfig(max_length=32, calibration_tokens=1024, damage_tokens=256)
    bare = replace(config, warm_start="none", initial_scores="zero")
    nothing = estimate_study(*arguments, bare, DynamicConfig(steps=0))
    assert set(nothing.parts) == {"load"}
    assert nothing.tokens == 0
    full = estimate_study(*arguments, config, DynamicConfig(steps=5))
    assert full.written_bytes > nothing.written_bytes
    assert full.tokens > 1024
    identity = estimate_study(
        *arguments, replace(bare, stand_in="identity"), DynamicConfig(steps=0)
    )
    assert identity.written_bytes == 0
