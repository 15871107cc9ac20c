"""The model owner's first act: study a model on public text, once.

Three stages, each kept when it is done: calibrate (harmonizers in closed form), measure (what
replacing each layer alone costs), learn (Dynamic LayerReplace).

Shapes: N windows, L length, M middle layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blindtune.atomic import atomic_directory, check_free, sole_writer
from blindtune.errors import ConfigError, DataError
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer, preferred_device
from blindtune.offsite.model_owner.calibration import Calibration, calibrate
from blindtune.offsite.model_owner.damage import greedy_damage, measured_damage
from blindtune.offsite.model_owner.importance import DynamicConfig, run_dynamic, start_dynamic
from blindtune.offsite.model_owner.mixed_network import MixedNetwork
from blindtune.offsite.model_owner.study import (
    FACTS_NAME,
    Study,
    StudyConfig,
    WorkDirectory,
    save_study,
)
from blindtune.places import located
from blindtune.training.text import DataConfig
from blindtune.training.windows import full_windows, shuffled

OnStage = Callable[[str, int, int], None]
"""Progress: (what is being done, how much is done, how much there is)."""

FEWEST_WINDOWS = 4
"""Of public text, for calibrating and validating."""
SAVE_EVERY = 20
"""Alternations of Dynamic LayerReplace between checkpoints."""


def study(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: StudyConfig | None = None,
    dynamic: DynamicConfig | None = None,
    *,
    resume: Literal["auto", "never"] = "auto",
    overwrite: bool = False,
    on_stage: OnStage | None = None,
) -> Study:
    """Study a model on public text and write the result to `out`.

    Interrupted at any point, the same call goes on from the last finished stage (or alternation of
    Dynamic LayerReplace) and ends with the same study.

    Args:
        model: a local directory, a hub name, or `smollm2-135m`.
        data: public text (see `DataConfig` for the formats).
        out: the study's directory.
        config, dynamic: how; defaults are chosen by measurement (LOG.md).
        resume: auto continues an interrupted study in `out`; never starts anew.
        overwrite: replace an earlier, finished study.
        on_stage: progress.

    Raises:
        ModelError, DataError, ConfigError, OutputError: see errors.py.
    """
    config, dynamic = config or StudyConfig(), dynamic or DynamicConfig()
    out = located(out)
    check_free(out, overwrite=overwrite, mark=FACTS_NAME, inputs=(model, data))
    network_model = load_model(model, device=preferred_device())
    network_model.requires_grad_(False)
    decoder, middle = Decoder(network_model), studied_layers(network_model, config, dynamic)
    reading = DataConfig(max_length=config.max_length)
    windows_NL = full_windows(data, load_tokenizer(model), reading, least=FEWEST_WINDOWS)
    windows_NL = shuffled(windows_NL, config.seed)
    partial = _begin(model, decoder, middle, config, dynamic)
    with sole_writer(out):
        work = WorkDirectory(out, partial, windows_NL, fresh=resume == "never")
        stages = _Stages(partial, decoder, windows_NL, work, on_stage)
        stages.calibrate()
        partial.second_moments = ()  # nothing reads them until they are saved
        stages.measure()
        stages.learn()
        partial.second_moments = work.second_moments()
        with atomic_directory(out, overwrite=overwrite, mark=FACTS_NAME) as directory:
            save_study(partial, directory)
        work.remove()
    return partial


def studied_layers(model: PreTrainedModel, config: StudyConfig, dynamic: DynamicConfig) -> range:
    """The middle layers of a model, or of the sketch of it, that can be studied so.

    Raises:
        ConfigError: windows longer than it reads; too few middle layers.
    """
    check_context(config.max_length, context_limit(model.config))
    layer_count = Decoder(model).layer_count
    middle = range(config.min_adapter_layers, layer_count - config.min_adapter_layers)
    if not middle:
        raise ConfigError(
            f"expected min_adapter_layers to leave a middle, got {config.min_adapter_layers} at "
            f"each end of {layer_count} layers: choose a smaller number"
        )
    halved = dynamic.candidates or dynamic.practice == "half"
    if dynamic.steps and halved and len(middle) < 2:
        raise ConfigError(
            "expected at least two middle layers, of which half can be replaced, got one: give "
            "--dynamic-steps 0, or a smaller --min-adapter-layers"
        )
    return middle


def parted(windows_NL: Tensor, config: StudyConfig) -> tuple[Tensor, Tensor]:
    """(training, validation): a tenth, and what measuring damage needs, is validation."""
    count = max(len(windows_NL) // 10, config.damage_tokens // config.max_length, 1)
    count = min(count, len(windows_NL) // 2)
    return windows_NL[count:], windows_NL[:count]


def calibration_windows(train_NL: Tensor, config: StudyConfig, least: int) -> Tensor:
    """What is calibrated on [N, L]; DataError below the `least`, a token a hidden unit."""
    windows_NL = train_NL[: config.calibration_tokens // config.max_length]
    if windows_NL.numel() < least:
        remedy = "give more public text"
        if train_NL.numel() >= least:
            enough = math.ceil(least / config.max_length) * config.max_length
            remedy = f"give at least --calibration-tokens {enough}"
        raise DataError(
            f"expected at least {least} tokens to calibrate on, got {windows_NL.numel()}: "
            f"{remedy}, or --warm-start none"
        )
    return windows_NL


def damage_windows(validation_NL: Tensor, config: StudyConfig) -> Tensor:
    """What damage is measured on."""
    return validation_NL[: max(1, config.damage_tokens // config.max_length)]


def _begin(
    model: str | Path,
    decoder: Decoder,
    middle: range,
    config: StudyConfig,
    dynamic: DynamicConfig,
) -> Study:
    """The study before its first stage."""
    return Study(
        model=str(located(model).absolute()) if located(model).is_dir() else str(model),
        fingerprint=fingerprint(decoder.model),
        layer_count=decoder.layer_count,
        first=middle.start,
        scores_M=torch.zeros(len(middle), dtype=torch.float64),
        damage_M=None,
        stand_ins=nn.ModuleList([nn.Identity() for _ in middle]),
        explained=(),
        second_moments=(),
        config=config,
        dynamic=dynamic,
    )


@final
class _Stages:
    """The stages of one study: each takes up what an interrupted run kept, or runs and keeps it.

    Args:
        study: filled in stage by stage.
        decoder: the model, frozen.
        windows_NL: the public text, shuffled.
        work: keeps finished stages.
        on_stage: progress.
    """

    def __init__(
        self,
        study: Study,
        decoder: Decoder,
        windows_NL: Tensor,
        work: WorkDirectory,
        on_stage: OnStage | None,
    ) -> None:
        self.study, self.decoder, self.work, self.on_stage = study, decoder, work, on_stage
        self.train_NL, self.validation_NL = parted(windows_NL, study.config)

    def calibrate(self) -> None:
        """Stand-ins: harmonizers in closed form, untrained ones, or identities."""
        study, config = self.study, self.study.config
        if self.work.load(study, "calibrated"):
            return
        start = time.perf_counter()
        found: Calibration | None = None
        if config.warm_start == "regression":
            train_NL = calibration_windows(self.train_NL, config, self.decoder.hidden_size)
            found = calibrate(
                self.decoder,
                train_NL,
                study.middle,
                rank=config.harmonizer_rank,
                batch_size=config.batch_size,
                feed_forward=config.feed_forward,
                on_layer=self._report("calibrate (layers)", study.middle.stop),
            )
            study.explained, study.second_moments = found.explained, found.second_moments
            study.tokens["calibrate"] = train_NL.numel()
        if config.stand_in == "harmonizer":
            study.stand_ins = nn.ModuleList(
                found.harmonizers if found else _untrained_harmonizers(study, self.decoder)
            )
        study.seconds["calibrate"] = time.perf_counter() - start
        self.work.save(study, "calibrated")

    def measure(self) -> None:
        """Initial scores: what replacing each layer costs, alone or in company."""
        study, config = self.study, self.study.config
        if config.initial_scores == "zero" or self.work.load(study, "measured"):
            return
        start = time.perf_counter()
        windows_NL = damage_windows(self.validation_NL, config)
        report, done = self._report("measure damage (windows)", len(windows_NL)), 0

        def on_batch(count: int) -> None:
            nonlocal done
            done += count
            report(done - 1)

        network, batch_size = self._network(), config.batch_size
        cost_M = study.damage_M = measured_damage(network, windows_NL, batch_size, on_batch)
        if config.initial_scores == "greedy":
            count = len(study.stand_ins) // 2
            report = self._report("order layers (choices)", count)
            cost_M = greedy_damage(
                network, windows_NL, batch_size, cost_M, count, lambda chosen: report(chosen - 1)
            )
        study.scores_M = standard_scores(cost_M)
        study.tokens["measure"] = windows_NL.numel()
        study.seconds["measure"] = time.perf_counter() - start
        self.work.save(study, "measured")

    def learn(self) -> None:
        """Dynamic LayerReplace."""
        study, dynamic = self.study, self.study.dynamic
        if dynamic.steps == 0:
            return
        network = self._network()
        state = start_dynamic(study.scores_M, study.stand_ins, dynamic, study.config.seed)
        self.work.load_dynamic(study, state)
        report, start = self._report("learn (alternations)", dynamic.steps), time.perf_counter()
        before = study.seconds.get("learn", 0.0)
        batches = (state.optimizer is not None) + (dynamic.candidates > 0)
        tokens = batches * dynamic.batch_size * self.train_NL.shape[1]
        steps = run_dynamic(state, network, self.train_NL, self.validation_NL, dynamic)
        for step in steps:
            study.scores_M = state.scores_M
            study.history.append(asdict(step))
            study.seconds["learn"] = before + time.perf_counter() - start
            study.tokens["learn"] = state.step * tokens
            report(step.step - 1)
            if step.step % SAVE_EVERY == 0:
                self.work.save_dynamic(study, state)

    def _network(self) -> MixedNetwork:
        self.study.stand_ins.to(self.decoder.model.device)
        return MixedNetwork(self.decoder, list(self.study.stand_ins), self.study.first)

    def _report(self, stage: str, total: int) -> Callable[[int], None]:
        def report(index: int) -> None:
            if self.on_stage is not None:
                self.on_stage(stage, index + 1, total)

        return report


def _untrained_harmonizers(study: Study, decoder: Decoder) -> list[Harmonizer]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(study.config.seed)
        return [
            Harmonizer(
                decoder.hidden_size,
                study.config.harmonizer_rank,
                returns_tuple=decoder.family.returns_tuple,
            )
            for _ in study.middle
        ]


def standard_scores(damage_M: Tensor) -> Tensor:
    """Scores [M] with the order of the damage, mean 0 and spread 1 on a logarithmic scale.

    Damage spans orders of magnitude while a score acts through a sigmoid, hence the logarithm.
    """
    floor = damage_M.abs().max() * 1e-3 + 1e-9
    logs_M = torch.log((damage_M - damage_M.min()) + floor)
    return (logs_M - logs_M.mean()) / logs_M.std(correction=0).clamp_min(1e-9)
