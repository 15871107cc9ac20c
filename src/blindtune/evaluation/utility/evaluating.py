"""Score any model of either party: a full model, an emulator, either of them with an adapter.

What is scored follows from what is given: text gives perplexity, records with targets give the loss
on the targets, multiple-choice records give accuracy, tasks go to lm-evaluation-harness.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ConfigError
from blindtune.evaluation.utility.choices import MultipleChoice, multiple_choice, read_items
from blindtune.evaluation.utility.harness import TaskResult, run_tasks
from blindtune.evaluation.utility.loss import Perplexity, Progress, loss_on_targets, perplexity
from blindtune.exchange.packages.manifest import MANIFEST_NAME
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Trust
from blindtune.kinds import check_kinds
from blindtune.models.decoder import check_context, context_limit
from blindtune.models.loading import load_model, load_tokenizer, preferred_device
from blindtune.offsite.adapter import tuned_emulator
from blindtune.offsite.emulator import open_emulator
from blindtune.offsite.model_owner.plugin import merge
from blindtune.places import located
from blindtune.training.text import DataConfig, TokenDataset, load_dataset_file


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is scored, and how much of it."""

    max_length: int = 128
    """Tokens of a window of plain text, and the most tokens of any other record: a longer one
    loses a part, as in tuning."""
    max_tokens: int | None = None
    """Score at most this many tokens of the data, spread evenly over it."""
    max_items: int | None = None
    """Score at most this many multiple-choice items, and of every task (the first ones)."""
    tasks: tuple[str, ...] = ()
    """lm-evaluation-harness tasks, by name or as local YAML files."""
    batch_size: int = 8
    """Windows, examples or prompts with all their choices of one forward pass; changes speed and
    memory only."""

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, least in (("max_length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"expected {name} >= {least}, got {getattr(self, name)}")
        for name in ("max_tokens", "max_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"expected {name} >= 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model scored; a field is None where nothing of the kind was asked."""

    model: str
    perplexity: Perplexity | None
    choices: MultipleChoice | None
    tasks: tuple[TaskResult, ...]
    seconds: float
    truncated: int | None = None
    """Records of the data that lost a part because they were longer than max_length."""
    dropped: int | None = None
    """Records of the data that were left out, with nothing to score."""

    def facts(self) -> dict[str, Any]:
        """Plain JSON values, without the record of every item."""
        facts = asdict(self)
        if self.choices is not None:
            facts["choices"].pop("answers", None)
        return facts


def evaluate(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    data: str | Path | None = None,
    choices: str | Path | None = None,
    config: EvaluationConfig | None = None,
    on_progress: Progress | None = None,
    trust: Trust | None = None,
) -> Evaluation:
    """Score a model, an emulator, or either of them with an adapter.

    Args:
        model: a model (directory, hub name, `smollm2-135m`) or an emulator package.
        adapter: an adapter package to put in first, in memory.
        data: text or records, for perplexity or the loss on targets.
        choices: a .jsonl file of question, choices, label, for accuracy.
        config: how much is scored, and harness tasks.
        on_progress: called with (done, total) while scoring.
        trust: whose packages are opened; None: anybody's.

    Raises:
        PolicyError: `trust` refuses a package.
        ConfigError: nothing to score was given, or max_length exceeds what the model can read.
        ModelError, DataError, PackageError, MismatchError: see errors.py.
    """
    config, start = config or EvaluationConfig(), time.perf_counter()
    check_asked(data, choices, config)
    loaded, tokenizer, limits = open_any(model, adapter, trust=trust)
    dataset = None
    if data is not None:
        check_context(config.max_length, *limits)
        dataset = load_dataset_file(data, tokenizer, DataConfig(max_length=config.max_length))
    loaded.to(preferred_device())
    return Evaluation(
        model=str(model),
        truncated=None if dataset is None else dataset.truncated,
        dropped=None if dataset is None else dataset.dropped,
        perplexity=None if dataset is None else _score_data(loaded, dataset, config, on_progress),
        choices=None
        if choices is None
        else multiple_choice(
            loaded,
            tokenizer,
            read_items(choices)[: config.max_items],
            batch_size=config.batch_size,
            on_progress=on_progress,
        ),
        tasks=() if not config.tasks else _score_tasks(loaded, tokenizer, config),
        seconds=time.perf_counter() - start,
    )


def check_asked(
    data: str | Path | None, choices: str | Path | None, config: EvaluationConfig
) -> None:
    """Raise ConfigError where nothing is to be scored."""
    if data is None and choices is None and not config.tasks:
        raise ConfigError("expected something to score: give --data, --choices or --tasks")


def open_any(
    model: str | Path, adapter: str | Path | None = None, *, trust: Trust | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[int | None, ...]]:
    """A full model or an emulator, with an adapter in it if one is given.

    Returns:
        The model, its tokenizer, and what limits the tokens that it reads at once.
    """
    if (located(model) / MANIFEST_NAME).is_file():
        emulator = open_emulator(model, dtype=torch.float32, trust=trust)
        if adapter is not None:
            emulator = tuned_emulator(emulator, adapter, trust=trust)
        limits = context_limit(emulator.model.config), emulator.manifest.max_length
        return emulator.model, emulator.tokenizer, limits
    full = load_model(model)
    if adapter is not None:
        merge(full, open_package(adapter, "adapter", trust=trust))
    return full, load_tokenizer(model), (context_limit(full.config),)


def _score_data(
    model: PreTrainedModel,
    dataset: TokenDataset,
    config: EvaluationConfig,
    on_progress: Progress | None,
) -> Perplexity:
    wanted = _spread_evenly(len(dataset), config.max_tokens, dataset.tokens)
    if all(len(dataset.input_ids[i]) == config.max_length for i in wanted) and (
        dataset.trained_tokens == dataset.tokens
    ):
        windows_NL = torch.stack([dataset.input_ids[i] for i in wanted])
        return perplexity(model, windows_NL, batch_size=config.batch_size, on_progress=on_progress)
    return loss_on_targets(
        model,
        [dataset[i] for i in wanted],
        batch_size=config.batch_size,
        on_progress=on_progress,
    )


def _score_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig
) -> tuple[TaskResult, ...]:
    size, limit = config.batch_size, config.max_items
    return tuple(run_tasks(model, tokenizer, config.tasks, batch_size=size, limit=limit))


def _spread_evenly(count: int, max_tokens: int | None, tokens: int) -> Sequence[int]:
    """Indices of examples that hold about `max_tokens` of the data's `tokens` together."""
    if max_tokens is None or max_tokens >= tokens:
        return range(count)
    kept = max(1, count * max_tokens // tokens)
    return [i * count // kept for i in range(kept)]
