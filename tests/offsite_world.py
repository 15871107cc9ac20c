"""A tiny model on disk, public and private text, and the packages made from them."""

import pydoc_data.topics
from dataclasses import replace
from types import SimpleNamespace

from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import tune
from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.study import StudyConfig
from blindtune.offsite.model_owner.studying import study
from blindtune.training.loop import RunConfig, TrainingConfig
from blindtune.training.text import DataConfig
from tiny_models import tiny_model, tiny_tokenizer

STUDY = StudyConfig(
    harmonizer_rank=8, max_length=32, calibration_tokens=2048, damage_tokens=256, batch_size=4
)
READING = DataConfig(max_length=32, max_tokens=2000)
TRIPLET = EmulatorConfig(adapter_layers=1, alpha=0.4, beta=0.8, reading="removed")
SILENT = RunConfig(silent=True)


def save_tiny(name, directory):
    tiny_model(name).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_text(directory):
    text = "\n".join(pydoc_data.topics.topics.values())
    (directory / "public.txt").write_text(text[:6000])
    (directory / "private.txt").write_text(text[6000:10000])


def study_tiny(directory, dynamic=None, **changes):
    dynamic = dynamic or DynamicConfig(steps=2, batch_size=2)
    place = (directory / "model", directory / "public.txt", directory / "study")
    return study(*place, replace(STUDY, **changes), dynamic)


def tune_tiny(directory, out="adapter", lora_rank=0, steps=3, run=SILENT, **changes):
    return tune(
        directory / "emulator",
        directory / "private.txt",
        directory / out,
        AdapterConfig(lora_rank=lora_rank),
        TrainingConfig(max_steps=steps, learning_rate=1e-3, **changes),
        reading=READING,
        run=run,
    )


def owners_world(directory, name, config=None):
    """Everything up to a full and a LoRA adapter, for one family."""
    save_tiny(name, directory / "model")
    save_text(directory)
    found = study_tiny(directory, DynamicConfig(steps=1, batch_size=2))
    config = config or TRIPLET
    made = emulate(found, directory / "emulator", config)
    full = tune_tiny(directory)
    lora = tune_tiny(directory, "lora", lora_rank=4)
    return SimpleNamespace(path=directory, study=found, emulation=made, full=full, lora=lora)
