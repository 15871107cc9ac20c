"""The model owner's first act: study a model on public text, once.

Three stages, each kept when it is done: calibrate (harmonizers in closed form), measure (what
replacing each layer alone costs), learn (Dynamic LayerReplace).

Shapes: N windows, L length, M middle layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from blindtune.atomic import atomic_directory, check_free
from blindtune.errors import ConfigError, DataError
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.fingerprint import fingerprint
from blindtune.models.loading import load_model, load_tokenizer, preferred_device
from blindtune.offsite.calibration import Calibration, calibrate
from blindtune.offsite.importance import (
    DynamicConfig,
    MixedNetwork,
    greedy_damage,
    measured_damage,
    run_dynamic,
    start_dynamic,
)
from blindtune.offsite.study import (
    FACTS_NAME,
    Study,
    StudyConfig,
    WorkDirectory,
    save_study,
)
from blindtune.training.text import DataConfig, load_dataset_file

OnStage = Callable[[str, int, int], None]
"""Progress: (what is being done, how much is done, how much there is)."""

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
    out = Path(out)
    check_free(out, overwrite=overwrite, mark=FACTS_NAME)
    network_model = load_model(model, device=preferred_device())
    network_model.requires_grad_(False)
    decoder = Decoder(network_model)
    check_context(config.max_length, context_limit(network_model.config))
    windows_NL = _windows(model, data, config)
    partial = _begin(model, decoder, config, dynamic)
    work = WorkDirectory(out, partial, windows_NL, fresh=resume == "never")
    _warm_up(partial, decoder, windows_NL, work, on_stage)
    _measure(partial, decoder, windows_NL, work, on_stage)
    _learn(partial, decoder, windows_NL, work, on_stage)
    with atomic_directory(out, overwrite=overwrite, mark=FACTS_NAME) as directory:
        save_study(partial, directory)
    work.remove()
    return partial


def _begin(
    model: str | Path, decoder: Decoder, config: StudyConfig, dynamic: DynamicConfig
) -> Study:
    """The study before its first stage; ConfigError if no middle layer is left."""
    middle = range(config.min_adapter_layers, decoder.layer_count - config.min_adapter_layers)
    if not middle:
        raise ConfigError(
            f"expected min_adapter_layers to leave a middle, got {config.min_adapter_layers} at "
            f"each end of {decoder.layer_count} layers: choose a smaller number"
        )
    return Study(
        model=str(Path(model).absolute()) if Path(model).is_dir() else str(model),
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


def _windows(model: str | Path, data: str | Path, config: StudyConfig) -> Tensor:
    """All full windows of the public text [N, L], shuffled."""
    dataset = load_dataset_file(
        data, load_tokenizer(model), DataConfig(max_length=config.max_length)
    )
    full = [ids for ids in dataset.input_ids if len(ids) == config.max_length]
    if len(full) < 4:
        raise DataError(
            f"{data}: a study needs at least {4 * config.max_length} tokens of text, got "
            f"{dataset.tokens}: give more text, or a smaller --max-length"
        )
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(config.seed))
    return torch.stack(full)[order]


def _split(study: Study, windows_NL: Tensor) -> tuple[Tensor, Tensor]:
    """(training, validation) windows: a tenth, and what measuring damage needs, is validation."""
    length = study.config.max_length
    count = max(1, len(windows_NL) // 10)
    count = min(max(count, study.config.damage_tokens // length), len(windows_NL) // 2)
    return windows_NL[count:], windows_NL[:count]


def _warm_up(
    study: Study,
    decoder: Decoder,
    windows_NL: Tensor,
    work: WorkDirectory,
    on_stage: OnStage | None,
) -> None:
    if work.load(study, "calibrated"):
        return
    config, start = study.config, time.perf_counter()
    train_NL, _ = _split(study, windows_NL)
    train_NL = train_NL[: max(1, config.calibration_tokens // config.max_length)]
    if train_NL.numel() < decoder.hidden_size:
        raise DataError(
            f"expected at least {decoder.hidden_size} tokens to calibrate on, got "
            f"{train_NL.numel()}: give more public text"
        )
    found: Calibration | None = None
    if config.warm_start == "regression":
        found = calibrate(
            decoder,
            train_NL,
            study.middle,
            rank=config.harmonizer_rank,
            batch_size=config.batch_size,
            feed_forward=config.feed_forward,
            on_layer=_report(on_stage, "calibrate (layers)", study.middle.stop),
        )
        study.explained, study.second_moments = found.explained, found.second_moments
        study.tokens["calibrate"] = train_NL.numel()
    if config.stand_in == "harmonizer":
        study.stand_ins = nn.ModuleList(
            found.harmonizers if found else _untrained_harmonizers(study, decoder)
        )
    study.seconds["calibrate"] = time.perf_counter() - start
    work.save(study, "calibrated")


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


def _measure(
    study: Study,
    decoder: Decoder,
    windows_NL: Tensor,
    work: WorkDirectory,
    on_stage: OnStage | None,
) -> None:
    if study.config.initial_scores == "zero" or work.load(study, "measured"):
        return
    start = time.perf_counter()
    _, validation_NL = _split(study, windows_NL)
    windows = validation_NL[: max(1, study.config.damage_tokens // study.config.max_length)]
    report, done = _report(on_stage, "measure damage (windows)", len(windows)), 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        report(done - 1)

    network = _network(study, decoder)
    batch_size = study.config.batch_size
    cost_M = study.damage_M = measured_damage(network, windows, batch_size, on_batch)
    if study.config.initial_scores == "greedy":
        count = len(study.stand_ins) // 2
        report = _report(on_stage, "order layers (choices)", count)
        cost_M = greedy_damage(
            network, windows, batch_size, cost_M, count, lambda chosen: report(chosen - 1)
        )
    study.scores_M = standard_scores(cost_M)
    study.tokens["measure"] = windows.numel()
    study.seconds["measure"] = time.perf_counter() - start
    work.save(study, "measured")


def _network(study: Study, decoder: Decoder) -> MixedNetwork:
    study.stand_ins.to(decoder.model.device)
    return MixedNetwork(decoder, list(study.stand_ins), study.first)


def standard_scores(damage_M: Tensor) -> Tensor:
    """Scores [M] with the order of the damage, mean 0 and spread 1 on a logarithmic scale.

    Damage spans orders of magnitude while a score acts through a sigmoid, hence the logarithm.
    """
    floor = damage_M.abs().max() * 1e-3 + 1e-9
    logs_M = torch.log((damage_M - damage_M.min()) + floor)
    return (logs_M - logs_M.mean()) / logs_M.std(correction=0).clamp_min(1e-9)


def _learn(
    study: Study,
    decoder: Decoder,
    windows_NL: Tensor,
    work: WorkDirectory,
    on_stage: OnStage | None,
) -> None:
    dynamic = study.dynamic
    if dynamic.steps == 0:
        return
    network = _network(study, decoder)
    state = start_dynamic(study.scores_M, study.stand_ins, dynamic, study.config.seed)
    work.load_dynamic(study, state)
    train_NL, validation_NL = _split(study, windows_NL)
    report, start = _report(on_stage, "learn (alternations)", dynamic.steps), time.perf_counter()
    before = study.seconds.get("learn", 0.0)
    for step in run_dynamic(state, network, train_NL, validation_NL, dynamic):
        study.scores_M = state.scores_M
        study.history.append(asdict(step))
        study.seconds["learn"] = before + time.perf_counter() - start
        study.tokens["learn"] = state.step * dynamic.batch_size * train_NL.shape[1]
        report(step.step - 1)
        if step.step % SAVE_EVERY == 0:
            work.save_dynamic(study, state)


def _report(on_stage: OnStage | None, stage: str, total: int) -> Callable[[int], None]:
    def report(index: int) -> None:
        if on_stage is not None:
            on_stage(stage, index + 1, total)

    return report
