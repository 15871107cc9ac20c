"""What scoring will take, before it starts: memory and time.

Shapes and counts come from configs, manifests and headers, and from the data, which is read; no
weight is used. Times: see `models/costs.py`.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.evaluation.utility.choices import read_items
from blindtune.evaluation.utility.evaluating import EvaluationConfig, check_asked
from blindtune.exchange.packages.manifest import MANIFEST_NAME, EmulatorManifest
from blindtune.exchange.packages.package import Package, open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.models.costs import (
    FLOAT,
    READ_BYTES_PER_SECOND,
    Estimate,
    decoder_cost,
    estimated,
    matmul_rate,
    sketch,
    weight_bytes,
)
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.loading import load_tokenizer
from blindtune.offsite import package_facts
from blindtune.offsite.adapter import check_tuned_on
from blindtune.offsite.emulator import package_sketch, tokenizer_of
from blindtune.places import located
from blindtune.training.records import token_ids
from blindtune.training.text import DataConfig, load_dataset_file


def estimate_evaluate(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    data: str | Path | None = None,
    choices: str | Path | None = None,
    config: EvaluationConfig | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `evaluate`, harness tasks left out.

    An adapter is checked as always, but whether it is of a full model only the weights tell.

    Raises:
        PolicyError, ConfigError, ModelError, PackageError, MismatchError, DataError: as for
            `evaluate`.
    """
    config = config or EvaluationConfig()
    check_asked(data, choices, config)
    tokenizer, shape, emulator = shape_of(model, trust)
    added = 0 if adapter is None else _adapter_bytes(adapter, emulator, trust)
    decoder, length, tokens = Decoder(shape), config.max_length, 0
    if data is not None:
        check_length(length, shape, emulator)
        tokens = load_dataset_file(data, tokenizer, DataConfig(max_length=length)).tokens
        tokens = min(tokens, config.max_tokens or tokens)
    if choices is not None:
        items = read_items(choices)[: config.max_items]
        texts = ("".join([item.prompt, *item.continuations]) for item in items)
        tokens += sum(len(token_ids(text, tokenizer)) for text in texts)
    cost, rate = decoder_cost(decoder, length), matmul_rate(decoder.hidden_size)
    calls = decoder.layer_count * tokens / length / config.batch_size
    parts = {
        "load": 2 * (weight_bytes(shape) + added) / READ_BYTES_PER_SECOND,
        "score": rate.seconds(tokens * cost.forward, calls),
    }
    batch = config.batch_size * length
    scoring = FLOAT * batch * (16 * decoder.hidden_size + decoder.config.vocab_size)
    memory = weight_bytes(shape) + max(2 * added, scoring)
    return estimated(parts, rate, memory=memory, written=0, tokens=tokens)


def _adapter_bytes(
    adapter: str | Path, emulator: Package[EmulatorManifest] | None, trust: Trust | None
) -> int:
    """Of an adapter's tensors, once it is known that it was tuned on the emulator."""
    package = open_package(adapter, "adapter", trust=trust)
    if emulator is not None:
        check_tuned_on(package, emulator.id)
    return package_facts.weight_bytes(package.header)


def shape_of(
    model: str | Path, trust: Trust | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Package[EmulatorManifest] | None]:
    """Tokenizer of a model or an emulator package, its layers without weights, and the package.

    Raises:
        ModelError, PackageError: as for `evaluate`.
    """
    if not (located(model) / MANIFEST_NAME).is_file():
        return load_tokenizer(model), sketch(model), None
    package = open_package(model, "emulator", trust=trust)
    return *package_shape(package), package


def package_shape(
    package: Package[EmulatorManifest],
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """`shape_of` an emulator package that is open: opening it hashes all of its files."""
    shape = package_sketch(package)
    return tokenizer_of(package, shape), shape


def check_length(
    max_length: int, shape: PreTrainedModel, emulator: Package[EmulatorManifest] | None
) -> None:
    """Raise ConfigError for texts longer than a model, or an emulator, reads."""
    stated = None if emulator is None else emulator.manifest.max_length
    check_context(max_length, context_limit(shape.config), stated)
