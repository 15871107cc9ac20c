"""The data owner's act: tune the adapter of an emulator on private data.

Only the adapter layers train (all their weights, or LoRA inside them); everything between them is
frozen. The best step is chosen by the emulator's own validation loss, because the data owner cannot
see the plug-in. Needs the emulator package and the data, nothing else.

Source: offsite-tuning (arXiv 2302.04870), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from blindtune.atomic import sole_writer
from blindtune.errors import BlindtuneError, ConfigError
from blindtune.exchange.packages.manifest import EmulatorManifest, PrivacyFacts
from blindtune.exchange.packages.signing import Signer, Trust
from blindtune.exchange.packages.writing import check_place
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.loading import preferred_device
from blindtune.offsite.adapter import AdapterConfig, write_adapter
from blindtune.offsite.emulator import Emulator, open_emulator
from blindtune.places import located
from blindtune.privacy.entropy import system_uniforms
from blindtune.training import checkpoint
from blindtune.training.dp_plan import DpConfig, DpPlan, plan_noise
from blindtune.training.loop import (
    RunConfig,
    TrainingConfig,
    TrainingResult,
    check_stopping,
    fit,
)
from blindtune.training.private_sgd import check_private, fit_private
from blindtune.training.text import DataConfig, TokenDataset, load_dataset_file, show_sample


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A finished tuning."""

    adapter_id: str
    """Package id of the adapter."""
    path: Path
    emulator: Emulator
    """The tuned emulator, in memory."""
    training: TrainingResult
    trained_parameters: int
    sample: str
    """One decoded example with its trained tokens marked."""
    privacy: DpPlan | None = None
    """What was spent, where it was tuned with differential privacy."""


def tune(
    emulator: str | Path,
    data: str | Path,
    out: str | Path,
    adapter: AdapterConfig | None = None,
    training: TrainingConfig | None = None,
    privacy: DpConfig | None = None,
    *,
    reading: DataConfig | None = None,
    run: RunConfig | None = None,
    validation: str | Path | None = None,
    overwrite: bool = False,
    on_sample: Callable[[str], None] | None = None,
    trust: Trust | None = None,
    signer: Signer | None = None,
) -> Tuning:
    """Tune the adapter of an emulator package on private data and write an adapter package.

    Interrupted, the same call goes on from the last checkpoint (in `OUT.work`; checkpoints are
    removed once the package is written). Launched as several processes (torchrun, `accelerate
    launch`), they train together and the first one writes.

    Args:
        emulator: the package's directory.
        data: private data, a file or a hub name.
        out: directory of the adapter package.
        adapter, training: what is trained, and how: what decides the result.
        privacy: with an epsilon, under differential privacy (`training.private_sgd`): nothing is
            set aside for validation, and texts are packed only where a window is the unit.
        reading, run: how the data is cut into examples; speed and bookkeeping.
        validation: a file of its own; None: a share of `data` (`DataConfig.validation_split`).
        overwrite: replace an earlier adapter.
        on_sample: gets the marked sample before training starts.
        trust, signer: whose emulators are opened (None: anybody's), what signs the adapter.

    Raises:
        PolicyError, PackageError, DataError, ConfigError, OutputError: see errors.py.
    """
    adapter, training = adapter or AdapterConfig(), training or TrainingConfig()
    privacy, out = privacy or DpConfig(), located(out)
    reading = read_privately(reading or DataConfig(), privacy, validation)
    if privacy.epsilon is not None:
        check_private(training, run or RunConfig())
    check_place(out, overwrite=overwrite, kind="adapter", inputs=(emulator, data, validation))
    opened = _opened(emulator, adapter, reading, trust)
    train, held_out = read_examples(opened.tokenizer, data, validation, reading)
    sample = _shown(train, opened, on_sample)
    plan = planned(privacy, training, train, held_out)
    trained = _trainable(opened, adapter, training.seed)
    work = out.absolute().parent / f"{out.absolute().name}.work"
    fitting = _fitting(trained, train, held_out, training, plan, work)
    write = partial(write_adapter, opened, adapter, out, overwrite=overwrite, signer=signer)
    with sole_writer(out):
        result = fitting(run=run, identity={"emulator": opened.id, **asdict(adapter)})
        adapter_id = _write_once(partial(write, privacy=_stated(plan)))
        _clear_once(work)
    return Tuning(
        adapter_id=adapter_id, path=out, emulator=opened, training=result, sample=sample,
        trained_parameters=_trained_parameters(trained), privacy=plan,
    )  # fmt: skip


def _fitting(
    model: torch.nn.Module,
    train: TokenDataset,
    held_out: TokenDataset | None,
    training: TrainingConfig,
    plan: DpPlan | None,
    work: Path,
) -> Callable[..., TrainingResult]:
    """The training, plain or by a plan of noise; it takes `run` and `identity` still.

    What the package states holds only for noise that nobody can repeat, so none comes from a seed.
    """
    if plan is None:
        return partial(fit, model, train, held_out, training, work)
    model.to(preferred_device())  # `fit` does so by itself
    return partial(fit_private, model, train, training, plan, work, system_uniforms)


def _trained_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _shown(train: TokenDataset, emulator: Emulator, on_sample: Callable[[str], None] | None) -> str:
    """One example as it is trained on, told to who asked for it."""
    sample = show_sample(train, emulator.tokenizer)
    if on_sample is not None:
        on_sample(sample)
    return sample


def _opened(
    emulator: str | Path, adapter: AdapterConfig, reading: DataConfig, trust: Trust | None
) -> Emulator:
    """The emulator, once it is known that it can be tuned so."""
    opened = open_emulator(emulator, dtype=torch.float32, trust=trust)
    check_fits(opened.model, opened.manifest, adapter, reading)
    return opened


def check_fits(
    model: PreTrainedModel, manifest: EmulatorManifest, adapter: AdapterConfig, reading: DataConfig
) -> None:
    """Whether an emulator, or the sketch of it, can be tuned so; asked before data is read.

    Raises:
        ConfigError: examples longer than it reads; a LoRA target that its layers do not have.
    """
    check_context(reading.max_length, context_limit(model.config), manifest.max_length)
    lora_targets(Decoder(model), adapter)


def read_privately(
    reading: DataConfig, privacy: DpConfig, validation: str | Path | None
) -> DataConfig:
    """How data is read under differential privacy: one example a unit, all of them, none held out.

    Raises:
        ConfigError: validation data, or a share for it; a head of the data, whose end moves with
            any one record: one long record more can push many others out of it, and the account is
            of one.
    """
    if privacy.epsilon is None:
        return reading
    cuts = [name for name in ("max_tokens", "max_samples") if getattr(reading, name) is not None]
    cuts += ["slice in split"] * ("[" in reading.split)
    if cuts:
        raise ConfigError(
            f"expected no {' or '.join(cuts)} with differential privacy: one record more would "
            "change which others are read, which epsilon does not cover; leave it out, and give a "
            "file of the records that are wanted, chosen without a look at their lengths"
        )
    if validation is not None:
        raise ConfigError(
            "expected no validation data with differential privacy: choosing the best step by it "
            "would tell of it; leave --validation out"
        )
    if reading.validation_split not in (0.0, DataConfig().validation_split):
        raise ConfigError(
            "expected no validation_split with differential privacy, which trains on all records: "
            "leave it out"
        )
    pack = reading.pack and privacy.unit == "window"
    return replace(reading, validation_split=0.0, pack=pack)


def planned(
    privacy: DpConfig, training: TrainingConfig, train: TokenDataset, held_out: TokenDataset | None
) -> DpPlan | None:
    """The noise of a private tuning; None: it is none.

    Raises:
        ConfigError: as `plan_noise`; early stopping where nothing is validated on.
    """
    if privacy.epsilon is not None:
        return plan_noise(privacy, training, len(train))
    check_stopping(training, validated=held_out is not None)
    return None


def _stated(plan: DpPlan | None) -> PrivacyFacts | None:
    """What the package says of it."""
    if plan is None:
        return None
    unit: Any = plan.unit
    return PrivacyFacts(epsilon=plan.epsilon, delta=plan.delta, unit=unit)


def _trainable(emulator: Emulator, adapter: AdapterConfig, seed: int) -> torch.nn.Module:
    """The model to train; LoRA's first factors are drawn from the seed."""
    model: torch.nn.Module = emulator.model
    if not adapter.lora_rank:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return add_lora(emulator, adapter)


def _write_once(write: Callable[[], str]) -> str:
    """Write the package; of several launched processes, the first writes and tells the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return write()
    outcome: list[str | BlindtuneError] = [""]
    if torch.distributed.get_rank() == 0:
        try:
            outcome = [write()]
        except BlindtuneError as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], BlindtuneError):
        raise outcome[0]
    return outcome[0]


def _clear_once(work: Path) -> None:
    """Remove the checkpoints; of several processes the first does, once all have read theirs."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        if torch.distributed.get_rank() > 0:
            return
    checkpoint.clear(work)


def read_examples(
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    validation: str | Path | None,
    reading: DataConfig,
) -> tuple[TokenDataset, TokenDataset | None]:
    """(trained on, validated on): the validation file, or a share of the data, or nothing."""
    train = load_dataset_file(data, tokenizer, reading)
    if validation is not None:
        return train, load_dataset_file(validation, tokenizer, reading)
    if reading.validation_split == 0:
        return train, None
    return train.split(reading.validation_split, reading.seed)


def add_lora(emulator: Emulator, config: AdapterConfig) -> torch.nn.Module:
    """Put LoRA into the adapter layers, by PEFT; returns the wrapped model.

    Raises:
        ConfigError: a target is not a linear map of the family's layers.
    """
    from peft import LoraConfig, get_peft_model

    decoder = Decoder(emulator.model)
    prefix, targets = decoder.family.layers, lora_targets(decoder, config)
    names = [f"{prefix}.{i}.{path}" for i in emulator.adapter_indices for path in targets]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(decoder.projections(0)[0].module, Conv1D),
        task_type="CAUSAL_LM",
    )
    wrapped: torch.nn.Module = get_peft_model(emulator.model, lora)
    return wrapped


def lora_targets(decoder: Decoder, config: AdapterConfig) -> tuple[str, ...]:
    """Paths inside a layer of the linear maps that LoRA is put into.

    Raises:
        ConfigError: a target is not a linear map of the family's layers.
    """
    known = tuple(p.path for p in (*decoder.projections(0), *decoder.feed_forward(0)))
    if unknown := sorted(set(config.lora_targets) - set(known)):
        raise ConfigError(
            f"expected lora_targets among {', '.join(known)}, got {', '.join(unknown)}"
        )
    return config.lora_targets or known
