"""What a sweep of settings will take, before it starts: memory and time, by its parts.

Computed from shapes, from the data, which is read, and from a rate measured here for 0.3 s. Rows
that an earlier run kept are counted as if they were missing. An attack's training ends when it
settles, which nobody knows beforehand, so `attack_seconds` stands for it: an upper bound.

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from blindtune.evaluation.audits.estimate import (
    CHANNEL_WORDS,
    WRITTEN,
    weighing,
    weighing_bytes,
)
from blindtune.evaluation.audits.language_attack import has_words
from blindtune.evaluation.frontiers.offsite import FrontierConfig
from blindtune.evaluation.frontiers.split import (
    SplitFrontierConfig,
    Trial,
    check_files,
    check_tried,
)
from blindtune.models.costs import (
    FLOAT,
    READ_BYTES_PER_SECOND,
    Estimate,
    Rate,
    decoder_cost,
    estimated,
    matmul_rate,
    matrix_numbers,
    sketch,
    weight_bytes,
)
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.loading import load_tokenizer, model_source, open_tokenizer
from blindtune.offsite.data_owner.tuning_estimate import ADAMW_SECONDS
from blindtune.offsite.model_owner.study import StudyConfig
from blindtune.offsite.model_owner.study_estimate import estimate_study
from blindtune.split.customer.labelled_text import read_texts
from blindtune.split.customer.own_groups import public_words
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.tuning_estimate import grouping_seconds
from blindtune.split.partition import stack_of
from blindtune.training.text import DataConfig, load_dataset_file

PASSES_A_SEED = 2
"""Scorings of a setting for each seed, tuned and plugged in; once for all, untuned."""


def estimate_frontier(
    model: str | Path,
    data: str | Path,
    config: FrontierConfig | None = None,
    *,
    public: str | Path | None = None,
    made_study: str | Path | None = None,
    test: str | Path | None = None,
) -> Estimate:
    """Estimate `frontier`; an emulator is counted with the layers that are left of the model.

    Raises:
        ModelError, DataError, ConfigError: as for `frontier`.
    """
    config = config or FrontierConfig()
    full, tokenizer = sketch(model), load_tokenizer(model)
    decoder, length = Decoder(full), config.max_length
    check_context(length, context_limit(full.config))
    cost, rate = decoder_cost(decoder, length), matmul_rate(decoder.hidden_size)
    read = load_dataset_file(test or data, tokenizer, DataConfig(max_length=length))
    scored = read.tokens * (1.0 if test is not None else config.test_share)
    tokens = config.steps * config.batch_size * length
    calls = 3 * config.steps * decoder.layer_count
    numbers = weight_bytes(full) / FLOAT
    whole = rate.seconds(tokens * cost.training, calls) + config.steps * numbers * ADAMW_SECONDS
    score = rate.seconds(scored * cost.forward, decoder.layer_count * scored / length)
    seeds = len(config.runs)
    loads = 1 + seeds * (1 + len(config.ends) + len(config.triplets)) + len(config.triplets)
    parts: dict[str, float] = {"load": loads * weight_bytes(full) / READ_BYTES_PER_SECOND}
    if made_study is None:
        study = StudyConfig(max_length=length, min_adapter_layers=min(config.ends))
        parts["study"] = estimate_study(model, public or data, study).seconds
    parts["the full model, tuned whole"] = seeds * (whole + score) + score
    parts["its adapter layers"] = seeds * len(config.ends) * (whole + score)
    left = [1 - t.alpha * (1 - 2 * t.adapter_layers / decoder.layer_count) for t in config.triplets]
    parts["settings"] = sum(left) * (seeds * (whole + PASSES_A_SEED * score) + score)
    rows = seeds * (1 + len(config.ends) + len(config.triplets))
    words = int(decoder.config.vocab_size)
    batch = (
        config.batch_size * length * (16 * decoder.hidden_size * decoder.layer_count + 3 * words)
    )
    return estimated(
        parts, rate, memory=5 * weight_bytes(full) + FLOAT * batch, written=WRITTEN,
        scratch=5 * weight_bytes(full), tokens=rows * tokens,
    )  # fmt: skip


def estimate_split_frontier(
    model: str | Path,
    data: str | Path,
    test: str | Path,
    config: SplitFrontierConfig | None = None,
    *,
    public: str | Path | None = None,
    trial: Trial | None = None,
) -> Estimate:
    """Estimate `split_frontier`.

    Raises:
        ModelError, DataError: as for `split_frontier`.
    """
    config, trial = config or SplitFrontierConfig(), trial or Trial()
    reading, trying, epochs = trial.reading, trial.trying, trial.passes.epochs
    check_files(data, test, public, config.public_text)
    check_tried(trial.adversary, config.cut, public)
    loaded, tokenizer = sketch(model), open_tokenizer(model_source(model))
    if config.public_text is not None:
        public_words(tokenizer, config.public_text)  # refuses what no groups are made of
    stack = stack_of(loaded)
    table_VD = stack.embedding.weight
    assert isinstance(table_VD, Tensor)
    lengths = [_lengths(path, tokenizer, reading) for path in (data, test)]
    trained, asked = map(sum, lengths)
    layers = [layer for layer in stack.layers if isinstance(layer, nn.Module)]
    layer = 2.0 * sum(map(matrix_numbers, layers)) / stack.layer_count
    rate, search = matmul_rate(table_VD.shape[1]), 2.0 * table_VD.numel()
    rows, noised, grouped = _rows_of_a_cut(config)
    below, cuts = sum(set(config.cut)), len(set(config.cut))
    privatized = rows * (trained + asked) * below * layer
    above = cuts * stack.layer_count - below
    tuned = rows * (2 * epochs * trained + asked) * above * layer
    settings, deep = rows * cuts, sum(cut > 0 for cut in set(config.cut))
    sent = noised * cuts * (trained + asked)
    parts = {
        "load": settings * weight_bytes(loaded) / READ_BYTES_PER_SECOND,
        "privatize": rate.seconds(privatized + sent * search),
        "tune and predict": rate.seconds(tuned),
        "nearest neighbour": rate.seconds(settings * trying.test_tokens * search),
    }
    if public is not None:
        learned = CHANNEL_WORDS + trying.public_tokens
        parts["attacks that learn"] = rate.seconds(2 * settings * learned * search)
        twice = grouped + noised * (config.privatizer != "vector")
        parts["training, at most"] = (settings + twice * deep) * trying.attack_seconds
    if config.public_text is not None:
        parts["word groups"] = _grouping(config, table_VD, layer, rate)
    longest = max(map(max, lengths))
    asked_for, more = _asked_for(trial, tokenizer, rate, settings, rows * deep, longest)
    parts |= asked_for
    states = (trained + asked + 3 * trying.public_tokens) * table_VD.shape[1]
    memory = 2 * weight_bytes(loaded) + FLOAT * (states + 12 * table_VD.numel()) + more
    return estimated(
        parts, rate, memory=memory, written=WRITTEN, scratch=weight_bytes(loaded) + FLOAT * states,
        tokens=int(settings * (epochs * trained + asked)),
    )  # fmt: skip


def _asked_for(
    trial: Trial,
    tokenizer: PreTrainedTokenizerBase,
    rate: Rate,
    settings: int,
    deep: int,
    longest: int,
) -> tuple[dict[str, float], int]:
    """Seconds of the attacks that a sweep runs if it is asked to, and bytes of a language model.

    `deep`: settings behind layers. `longest`: tokens of a text.
    """
    adversary, parts = trial.adversary, {}
    if adversary.dummies:
        parts["dummy embeddings, at most"] = deep * trial.trying.attack_seconds
    if adversary.prior is None:
        return parts, 0
    model = sketch(adversary.prior)
    spelled = not has_words(load_tokenizer(adversary.prior), tokenizer)
    parts |= weighing(
        rate, model, trial.trying.test_tokens, longest, trial.trying, 2 * settings, spelled=spelled
    )
    return parts, weighing_bytes(model, longest, spelled=spelled)


def _lengths(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, reading: ReadingConfig
) -> list[int]:
    """Tokens of the texts of a file, as they are read."""
    longest = reading.max_length or tokenizer.model_max_length
    found = read_texts(path, text_column=reading.text_column, label_column=reading.label_column)
    return [min(len(ids), longest) for ids in tokenizer(list(found.texts))["input_ids"]]


def _rows_of_a_cut(config: SplitFrontierConfig) -> tuple[int, int, int]:
    """How many there are: all, with noise, with word groups."""
    kinds = [privatizer.privatizer for privatizer in config.privatizers]
    grouped = kinds.count("groups")
    return len(kinds), len(kinds) - 1 - grouped, grouped


def _grouping(config: SplitFrontierConfig, table_VD: Tensor, layer: float, rate: Rate) -> float:
    """Seconds of making word groups, anew for every setting."""
    return sum(
        grouping_seconds(grouping, table_VD, cut * layer, rate)
        for privatizer in config.privatizers
        if (grouping := privatizer.grouping()) is not None
        for cut in set(config.cut)
    )
