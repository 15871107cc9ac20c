"""What an act will take, before it starts: memory, bytes on disk, time.

Shapes and counts come from configs, manifests and headers; no weight is read but a study's. Data
files are read, because only that tells how many tokens they hold. Times follow from FLOPs and a
rate measured for 0.3 s: expect them within a factor of two on a machine that does nothing else.

Letters: L length, D hidden, M middle layers, B batch, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from blindtune.exchange.manifest import MANIFEST_NAME
from blindtune.exchange.package import open_package
from blindtune.models.costs import (
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
from blindtune.models.surgery import meta_model
from blindtune.models.tokenizers import FILE_NAMES, tokenizer_files, tokenizer_from_files
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.compression import compressed_rank, saves_space
from blindtune.offsite.emulation import EmulatorConfig, replaced_layers
from blindtune.offsite.emulator import DTYPES, adapter_indices, assemble, read_config
from blindtune.offsite.importance import DynamicConfig
from blindtune.offsite.study import Study, StudyConfig, open_study
from blindtune.training.config import RunConfig, TrainingConfig
from blindtune.training.text import DataConfig, TokenDataset, load_dataset_file

ADAMW_SECONDS = 5e-9
"""An optimizer step, for one parameter on one CPU thread."""
EIGH_FLOPS = 30.0
"""Eigenvectors of n x n in float64, as float32 FLOPs of a product over n^3 (measured 25 .. 47)."""
SVD_FLOPS = 40.0
"""Singular vectors of n x n in float32, in the same unit (measured 34 .. 68)."""
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
        ModelError, DataError: as for `study`.
    """
    config, dynamic = config or StudyConfig(), dynamic or DynamicConfig()
    full = sketch(model)
    decoder, length = Decoder(full), config.max_length
    text = load_dataset_file(data, load_tokenizer(model), DataConfig(max_length=length))
    first, last = config.min_adapter_layers, decoder.layer_count
    middle = range(first, max(first, last - first))
    cost, rate = decoder_cost(decoder, length), matmul_rate(decoder.hidden_size)
    damage = max(1, min(config.damage_tokens // length, len(text) // 2)) * length
    training = max(length, text.tokens - max(damage, text.tokens // 10))
    calibration = min(training, max(length, config.calibration_tokens // length * length))
    parts: dict[str, float] = {"load": weight_bytes(full) / READ_BYTES_PER_SECOND}
    tokens, kept = 0, _stand_in_bytes(decoder, config, len(middle))
    if config.warm_start == "regression":
        moments, flops = _moments(decoder, first, config.feed_forward)
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
        mixes, calls = GREEDY_TRIES * len(middle) // 2, GREEDY_TRIES * len(middle) ** 2 / 2
        work = cost.stack(0, middle.start).forward + mixes * _mixed(cost, middle)
        parts["order"] = rate.seconds(damage * work, calls * damage / length / config.batch_size)
        tokens += damage * mixes
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
        memory=weight_bytes(full) + max(hidden, logits) + kept,
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
    rank = min(rank, hidden)
    return 2 * hidden * rank + rank + hidden


def estimate_emulate(study: str | Path | Study, config: EmulatorConfig | None = None) -> Estimate:
    """Estimate `emulate`: reading the model, an eigenvalue problem or SVD a weight, writing.

    Raises:
        ConfigError: as for `emulate`.
    """
    config = config or EmulatorConfig()
    found = study if isinstance(study, Study) else open_study(study)
    replaced = replaced_layers(found, config)
    full = sketch(found.model)
    decoder, rate = Decoder(full), matmul_rate(Decoder(full).hidden_size)
    numbers, flops = float(full.num_parameters()), 0.0
    for i in range(config.adapter_layers, decoder.layer_count - config.adapter_layers):
        if i in replaced:
            numbers -= sum(p.numel() for p in decoder.layers[i].parameters())
            stand_in = found.stand_ins[i - found.first]
            numbers += sum(p.numel() for p in stand_in.parameters())
        elif config.compresses:
            saved, work = _compression(decoder, i, config)
            numbers, flops = numbers - saved, flops + work
    size = torch.empty((), dtype=DTYPES[config.dtype]).element_size()
    files = sum(len(data) for data in tokenizer_files(load_tokenizer(found.model)).values())
    written = numbers * size + files
    moments = sum(t.numel() * FLOAT for m in found.second_moments for t in m.values())
    parts = {
        "load and check": 2 * weight_bytes(full) / READ_BYTES_PER_SECOND,
        "compress": flops / rate.flops_per_second,
        "write": 2 * written / READ_BYTES_PER_SECOND,
    }
    return estimated(parts, rate, memory=weight_bytes(full) + written + moments, written=written)


def _compression(decoder: Decoder, i: int, config: EmulatorConfig) -> tuple[int, float]:
    """(numbers saved, FLOPs) of compressing one layer."""
    projections = decoder.projections(i)
    projections += decoder.feed_forward(i) if config.feed_forward else ()
    saved, flops = 0, 0.0
    for p in projections:
        ranks = tuple(
            compressed_rank((size, p.in_features), config.beta, config.reading) for size in p.sizes
        )
        if saves_space(p, ranks):
            saved += p.in_features * sum(p.sizes)
            saved -= sum(r * (p.in_features + n) for r, n in zip(ranks, p.sizes, strict=True))
        for size in p.sizes:
            small = min(size, p.in_features)
            if config.weighted:  # float64 products take twice as long
                flops += EIGH_FLOPS * size**3 + 4.0 * size * p.in_features * (p.in_features + size)
            else:
                flops += SVD_FLOPS * small**2 * max(size, p.in_features)
    return saved, flops


def estimate_tune(
    emulator: str | Path,
    data: str | Path,
    adapter: AdapterConfig | None = None,
    training: TrainingConfig | None = None,
    *,
    reading: DataConfig | None = None,
    run: RunConfig | None = None,
    validation: str | Path | None = None,
) -> Estimate:
    """Estimate `tune`: forward, activations' gradients through every layer, weights' gradients.

    The package is checked as always, but of its weights only the header is used.

    Raises:
        PackageError, DataError, ConfigError: as for `tune`.
    """
    adapter, training = adapter or AdapterConfig(), training or TrainingConfig()
    reading, run = reading or DataConfig(max_length=128), run or RunConfig()
    package = open_package(emulator, "emulator")
    manifest = package.manifest
    names = [name for name in FILE_NAMES if name in manifest.files]
    tokenizer = tokenizer_from_files({name: package.read_file(name) for name in names})
    train = load_dataset_file(data, tokenizer, reading)
    held_out = None if validation is None else load_dataset_file(validation, tokenizer, reading)
    if held_out is None and reading.validation_split:
        train, held_out = train.split(reading.validation_split, reading.seed)
    model = assemble(meta_model(read_config(manifest)), manifest.layers)
    decoder = Decoder(model)
    length = max(1, train.tokens // len(train))
    cost, rate = decoder_cost(decoder, length), matmul_rate(decoder.hidden_size)
    indices = adapter_indices(manifest.adapter_layers, len(manifest.layers))
    trained = _trained_numbers(decoder, indices, adapter)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or math.ceil(len(train) * training.num_train_epochs / batch)
    tokens, calls = steps * batch * length, steps * batch * decoder.layer_count
    calls //= training.per_device_train_batch_size
    stack, share = cost.stack(), train.trained_share
    work = stack.forward * (2 if run.gradient_checkpointing else 1) + stack.backward
    work += share * (cost.head.forward + cost.head.backward)
    if not adapter.lora_rank:
        work += sum(cost.layers[i].weights for i in indices)
    parts = {
        "load": 2 * weight_bytes(model) / READ_BYTES_PER_SECOND,
        "train": rate.seconds(tokens * work, 3 * calls) + steps * trained * ADAMW_SECONDS,
    }
    if held_out is not None:
        parts["validate"] = _validation_seconds(cost, held_out, steps, run, rate)
    micro = training.per_device_train_batch_size * length
    activations = _activation_bytes(decoder, micro, run.gradient_checkpointing, share)
    return estimated(
        parts,
        rate,
        memory=weight_bytes(model) + 3 * FLOAT * trained + activations,
        written=FLOAT * trained,
        scratch=5 * FLOAT * trained,  # weights, two moments, the best weights, one in the making
        tokens=tokens,
    )


def _trained_numbers(decoder: Decoder, indices: tuple[int, ...], adapter: AdapterConfig) -> int:
    if not adapter.lora_rank:
        return sum(p.numel() for i in indices for p in decoder.layers[i].parameters())
    return sum(
        adapter.lora_rank * (p.in_features + sum(p.sizes))
        for i in indices
        for p in (*decoder.projections(i), *decoder.feed_forward(i))
        if not adapter.lora_targets or p.path in adapter.lora_targets
    )


def _validation_seconds(
    cost: DecoderCost, held_out: TokenDataset, steps: int, run: RunConfig, rate: Rate
) -> float:
    every = run.eval_steps or max(1, steps // 10)
    batches = math.ceil(len(held_out) / run.per_device_eval_batch_size)
    return math.ceil(steps / every) * rate.seconds(
        held_out.tokens * cost.forward, batches * len(cost.layers)
    )


def _activation_bytes(
    decoder: Decoder, tokens: int, checkpointing: bool, trained_share: float
) -> float:
    """Roughly: what a layer keeps for its backward pass, and the logits with their gradient."""
    inner, vocabulary = (
        max(p.in_features for p in decoder.feed_forward(0)),
        int(decoder.config.vocab_size),
    )
    layer = tokens * (12 * decoder.hidden_size + 4 * inner)
    layers = decoder.layer_count * tokens * decoder.hidden_size + layer
    if not checkpointing:
        layers = decoder.layer_count * layer
    return FLOAT * (layers + 3 * trained_share * tokens * vocabulary)


def estimate_plug_in(model: str | Path, adapter: str | Path, *, dtype: str = "float32") -> Estimate:
    """Estimate `plug_in`: reading, hashing and writing the full model.

    Raises:
        PackageError, ModelError: as for `plug_in`.
    """
    package = open_package(adapter, "adapter")
    full = sketch(model)
    weights, rate = weight_bytes(full), matmul_rate(Decoder(full).hidden_size)
    added = sum(end - begin for _, _, begin, end in package.header.values())
    size = torch.empty((), dtype=DTYPES[dtype]).element_size()
    written = weights / FLOAT * size
    parts = {
        "load and check": 2 * weights / READ_BYTES_PER_SECOND,
        "write": 2 * written / READ_BYTES_PER_SECOND,
    }
    return estimated(parts, rate, memory=weights + 2 * added, written=written)


def estimate_evaluate(
    model: str | Path,
    data: str | Path | None = None,
    choices: str | Path | None = None,
    *,
    max_length: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Estimate:
    """Estimate scoring a model or an emulator on text and multiple-choice records.

    Raises:
        ModelError, PackageError, DataError: as for `evaluate`.
    """
    if (Path(model) / MANIFEST_NAME).is_file():
        package = open_package(model, "emulator")
        names = [name for name in FILE_NAMES if name in package.manifest.files]
        tokenizer = tokenizer_from_files({name: package.read_file(name) for name in names})
        shape = assemble(meta_model(read_config(package.manifest)), package.manifest.layers)
    else:
        tokenizer, shape = load_tokenizer(model), sketch(model)
    decoder = Decoder(shape)
    tokens = 0
    if data is not None:
        tokens = load_dataset_file(data, tokenizer, DataConfig(max_length=max_length)).tokens
        tokens = min(tokens, max_tokens or tokens)
    if choices is not None:
        text = Path(choices).read_text(encoding="utf-8", errors="replace")
        tokens += len(tokenizer(text, verbose=False).input_ids)
    cost, rate = decoder_cost(decoder, max_length), matmul_rate(decoder.hidden_size)
    calls = decoder.layer_count * tokens / max_length / batch_size
    parts = {
        "load": 2 * weight_bytes(shape) / READ_BYTES_PER_SECOND,
        "score": rate.seconds(tokens * cost.forward, calls),
    }
    batch = batch_size * max_length
    memory = weight_bytes(shape) + FLOAT * batch * (
        16 * decoder.hidden_size + decoder.config.vocab_size
    )
    return estimated(parts, rate, memory=memory, written=0, tokens=tokens)
