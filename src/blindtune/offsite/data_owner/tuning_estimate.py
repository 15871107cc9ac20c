"""What tuning an emulator's adapter will take, before it starts: memory, bytes on disk, time.

Shapes and counts come from the package's manifest and header and from the data, which is read; no
weight is used. Times: see `models/costs.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.models.costs import (
    FLOAT,
    READ_BYTES_PER_SECOND,
    DecoderCost,
    Estimate,
    Rate,
    decoder_cost,
    estimated,
    matmul_rate,
    weight_bytes,
)
from blindtune.models.decoder import Decoder
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import (
    check_fits,
    lora_targets,
    planned,
    read_examples,
    read_privately,
)
from blindtune.offsite.emulator import adapter_indices, package_sketch, tokenizer_of
from blindtune.training.batches import BatchOrder
from blindtune.training.config import RunConfig, TrainingConfig
from blindtune.training.dp_plan import DpConfig
from blindtune.training.private_sgd import check_private
from blindtune.training.text import DataConfig, TokenDataset

ENOUGH_STEPS = 1000
"""From which on the mean width of a batch is known."""
ADAMW_SECONDS = 5e-9
"""An optimizer step, for one parameter on one CPU thread."""


def estimate_tune(
    emulator: str | Path,
    data: str | Path,
    adapter: AdapterConfig | None = None,
    training: TrainingConfig | None = None,
    privacy: DpConfig | None = None,
    *,
    reading: DataConfig | None = None,
    run: RunConfig | None = None,
    validation: str | Path | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `tune`: forward, activations' gradients through every layer, weights' gradients.

    With differential privacy the noise to be added, which takes no time to speak of, is not
    counted; the gradients of single records, which take memory, are. Times are those of float32,
    and so is the memory of activations.

    The package is checked as always, but of its weights only the header is used.

    Raises:
        PackageError, DataError, ConfigError: as for `tune`.
    """
    adapter, training = adapter or AdapterConfig(), training or TrainingConfig()
    privacy, run = privacy or DpConfig(), run or RunConfig()
    reading = read_privately(reading or DataConfig(), privacy, validation)
    if private := privacy.epsilon is not None:
        check_private(training, run)
    package = open_package(emulator, "emulator", trust=trust)
    model, manifest = package_sketch(package), package.manifest
    check_fits(model, manifest, adapter, reading)
    train, held_out = read_examples(tokenizer_of(package, model), data, validation, reading)
    planned(privacy, training, train, held_out)
    decoder, share = Decoder(model), train.trained_share
    micro, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    batch = micro * accumulated
    steps = training.max_steps or math.ceil(len(train) * training.num_train_epochs / batch)
    length, longest = _padded(train, training, steps)
    cost, rate = decoder_cost(decoder, round(length)), matmul_rate(decoder.hidden_size)
    indices = adapter_indices(manifest.adapter_layers, len(manifest.layers))
    trained = _trained_numbers(decoder, indices, adapter)
    tokens, calls = round(steps * batch * length), steps * accumulated * decoder.layer_count
    work = _training_flops(cost, () if adapter.lora_rank else indices, share, run)
    parts = {
        "load": 2 * weight_bytes(model) / READ_BYTES_PER_SECOND,
        "train": rate.seconds(tokens * work, 3 * calls) + steps * trained * ADAMW_SECONDS,
    }
    if held_out is not None:
        parts["validate"] = _validation_seconds(cost, held_out, steps, run, rate)
    copies = 3 + (micro if private else 0)
    activations = _activation_bytes(decoder, micro * longest, run.gradient_checkpointing, share)
    memory = _weight_bytes(model, 0 if adapter.lora_rank else trained, run) + activations
    return estimated(
        parts,
        rate,
        memory=max(memory + copies * FLOAT * trained, weight_bytes(model)),
        written=FLOAT * trained,
        scratch=5 * FLOAT * trained,  # weights, two moments, the best weights, one in the making
        tokens=tokens,
    )


def _padded(train: TokenDataset, training: TrainingConfig, steps: int) -> tuple[float, int]:
    """Tokens of an example in its batch, mean over the first batches; and of the longest."""
    lengths = [len(ids_L) for ids_L in train.input_ids]
    order = BatchOrder(
        examples=len(train),
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        steps=min(steps, ENOUGH_STEPS),
        seed=training.seed,
    )
    widest = [max(lengths[i] for i in batch) for batch in order]
    return sum(widest) / len(widest), max(lengths)


def _weight_bytes(model: nn.Module, trained: int, run: RunConfig) -> int:
    """Of the model, in which that many numbers are trained, once it is loaded (in float32).

    In bfloat16 what is trained is there twice: autocast keeps its copies for the backward pass.
    """
    whole = weight_bytes(model)
    return whole // 2 + FLOAT * trained if run.precision == "bfloat16" else whole


def _training_flops(
    cost: DecoderCost, trained: tuple[int, ...], trained_share: float, run: RunConfig
) -> float:
    """A token, with gradients of the weights of some layers; the head runs where labels are."""
    stack = cost.stack()
    forward = stack.forward * (2 if run.gradient_checkpointing else 1)
    head = trained_share * (cost.head.forward + cost.head.backward)
    return forward + stack.backward + head + sum(cost.layers[i].weights for i in trained)


def _trained_numbers(decoder: Decoder, indices: tuple[int, ...], adapter: AdapterConfig) -> int:
    if not adapter.lora_rank:
        return sum(p.numel() for i in indices for p in decoder.layers[i].parameters())
    targets = lora_targets(decoder, adapter)
    return sum(
        adapter.lora_rank * (p.in_features + sum(p.sizes))
        for i in indices
        for p in (*decoder.projections(i), *decoder.feed_forward(i))
        if p.path in targets
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
