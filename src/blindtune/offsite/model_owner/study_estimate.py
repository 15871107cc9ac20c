"""What a study will take, before it starts: memory, bytes on disk, time.

Shapes and counts come from the model's config and the data, which is read, because only that tells
how many tokens it holds; no weight is read. Times: see `models/costs.py`.

Letters: L length, D hidden, M middle layers, B batch, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from blindtune.models.costs import (
    EIGH_FLOPS,
    FLOAT,
    READ_BYTES_PER_SECOND,
    DecoderCost,
    Estimate,
    Rate,
    decoder_cost,
    estimated,
    matmul_rate,
    sketch,
    weight_bytes,
)
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_tokenizer
from blindtune.offsite.model_owner.importance import DynamicConfig
from blindtune.offsite.model_owner.study import StudyConfig
from blindtune.offsite.model_owner.studying import (
    FEWEST_WINDOWS,
    calibration_windows,
    damage_windows,
    parted,
    studied_layers,
)
from blindtune.training.text import DataConfig
from blindtune.training.windows import full_windows

GREEDY_TRIES = 3
"""Mixes that the greedy order scores for every layer that it chooses, more or less."""


def estimate_study(
    model: str | Path,
    data: str | Path,
    config: StudyConfig | None = None,
    dynamic: DynamicConfig | None = None,
) -> Estimate:
    """Estimate `study`: calibration pass, measured damage, alternations of Dynamic LayerReplace.

    Raises:
        ModelError, DataError, ConfigError: as for `study`.
    """
    config, dynamic = config or StudyConfig(), dynamic or DynamicConfig()
    full = sketch(model)
    decoder, length = Decoder(full), config.max_length
    middle = studied_layers(full, config, dynamic)
    reading = DataConfig(max_length=length)
    windows_NL = full_windows(data, load_tokenizer(model), reading, least=FEWEST_WINDOWS)
    train_NL, validation_NL = parted(windows_NL, config)
    cost, rate = decoder_cost(decoder, length), matmul_rate(decoder.hidden_size)
    damage, calibration = damage_windows(validation_NL, config).numel(), 0
    parts: dict[str, float] = {"load": weight_bytes(full) / READ_BYTES_PER_SECOND}
    tokens, states = 0, 0.0
    kept = stand_ins = _stand_in_bytes(decoder, config, len(middle))
    if config.warm_start == "regression":
        calibration = calibration_windows(train_NL, config, decoder.hidden_size).numel()
        moments, flops = _moments(decoder, middle.start, config.feed_forward)
        kept += moments * len(middle)
        fit = len(middle) * 2 * EIGH_FLOPS * decoder.hidden_size**3
        work = cost.stack(0, middle.stop).forward + len(middle) * flops
        parts["calibrate"] = rate.seconds(
            calibration * work + fit, middle.stop * calibration / length / config.batch_size
        )
        tokens += calibration
    if config.initial_scores != "zero":
        parts["measure"] = _damage_seconds(cost, middle, damage, length, config.batch_size, rate)
        tokens += damage * (len(middle) // 2 + 1)
    if config.initial_scores == "greedy":
        parts["order"] = _order_seconds(cost, middle, damage, length, config.batch_size, rate)
        states = (len(middle) + 1) * damage * decoder.hidden_size * FLOAT
        tokens += damage * (GREEDY_TRIES * len(middle) // 2)
    if dynamic.steps:
        parts["learn"] = dynamic.steps * _alternation_seconds(cost, middle, dynamic, length, rate)
        tokens += dynamic.steps * dynamic.batch_size * length * (dynamic.candidates + 1)
    batch = max(config.batch_size, dynamic.batch_size) * length
    logits = (6 if dynamic.steps else 3) * batch * decoder.config.vocab_size * FLOAT
    hidden = calibration * decoder.hidden_size * FLOAT
    stages = 1 + (config.initial_scores != "zero") + (dynamic.steps > 0)
    return estimated(
        parts,
        rate,
        memory=weight_bytes(full) + max(hidden + kept, logits + states + stand_ins),
        written=kept,
        scratch=(stages + 1) * kept,
        tokens=tokens,
    )


def _damage_seconds(
    cost: DecoderCost, middle: range, tokens: int, length: int, batch: int, rate: Rate
) -> float:
    """Every layer alone replaced: those below it run once for all, those above it each time."""
    below, above = cost.stack(0, middle.start), cost.stack(middle.stop)
    work = below.forward + (len(middle) + 1) * (above + cost.head).forward
    work += sum((k + 1) * cost.layers[i].forward for k, i in enumerate(middle))
    calls = len(middle) ** 2 / 2 + (len(middle) + 1) * middle.start
    return rate.seconds(tokens * work, calls * tokens / length / batch)


def _order_seconds(
    cost: DecoderCost, middle: range, tokens: int, length: int, batch: int, rate: Rate
) -> float:
    """The greedy order's tries, each from its layer on.

    With what choices make anew a try runs 0.6 of the middle layers (measured), about a quarter of
    them replaced: the work of `_mixed`.
    """
    tries = GREEDY_TRIES * len(middle) // 2
    work = cost.stack(0, middle.start).forward + tries * _mixed(cost, middle)
    return rate.seconds(tokens * work, 0.6 * tries * len(middle) * tokens / length / batch)


def _alternation_seconds(
    cost: DecoderCost, middle: range, dynamic: DynamicConfig, length: int, rate: Rate
) -> float:
    """A learning step (forward, activations' gradients) and the candidates of a score step."""
    below, mixed = cost.stack(0, middle.start).forward, _mixed(cost, middle)
    half = cost.stack(middle.start, middle.stop)
    above = cost.stack(middle.stop) + cost.head
    work = below + mixed + half.backward / 2 + above.backward
    if dynamic.objective == "distill":
        work += half.forward + above.forward
    if dynamic.candidates:
        work += below + dynamic.candidates * mixed
    calls = (dynamic.candidates + 4) * len(cost.layers)
    return rate.seconds(dynamic.batch_size * length * work, calls)


def _mixed(cost: DecoderCost, middle: range) -> float:
    """FLOPs a token of one mix, half of it replaced, from the first middle layer to the loss."""
    above = cost.stack(middle.stop) + cost.head
    return cost.stack(middle.start, middle.stop).forward / 2 + above.forward


def _moments(decoder: Decoder, layer: int, feed_forward: bool) -> tuple[float, float]:
    """(bytes kept, FLOPs a token) of the moments of one layer."""
    inputs = {p.in_features: p for p in decoder.projections(layer)}
    sizes = [decoder.hidden_size, *(n for n in inputs if n != decoder.hidden_size)]
    if len(sizes) == 1:
        sizes.append(decoder.hidden_size)  # the output projection reads another input
    if feed_forward:
        sizes += list({p.in_features: p for p in decoder.feed_forward(layer)})
    return FLOAT * sum(n * n for n in sizes), 2.0 * sum(n * n for n in sizes) + (
        4.0 * decoder.hidden_size**2
    )


def _stand_in_bytes(decoder: Decoder, config: StudyConfig, count: int) -> float:
    if config.stand_in == "identity":
        return 0.0
    return FLOAT * count * _harmonizer_numbers(decoder.hidden_size, config.harmonizer_rank)


def _harmonizer_numbers(hidden: int, rank: int) -> int:
    rank = min(rank, 2 * hidden)
    return 2 * hidden * rank + rank + hidden
