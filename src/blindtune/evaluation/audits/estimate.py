"""What an audit will take, before it starts: memory, time, by its parts.

Computed from shapes, from what is to be read, and from a rate measured here for 0.3 s; no weight of
a decoder is used. Training of an attack on split tuning ends when it settles, which nobody knows
beforehand, so `attack_seconds` stands for it: an upper bound.

Letters: D hidden, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from blindtune.attacks.attribute_inference import AttributeConfig
from blindtune.attacks.language_prior import TOGETHER
from blindtune.evaluation.audits.adapter import both_kinds, reading_of
from blindtune.evaluation.audits.audit import AdversaryConfig, AuditConfig
from blindtune.evaluation.audits.canaries import encoded_candidates
from blindtune.evaluation.audits.emulator import healing_attackers
from blindtune.evaluation.audits.language_attack import BEAMS, has_words
from blindtune.evaluation.audits.split import attributes, check_adversary
from blindtune.evaluation.audits.split_subject import read_audited, spread_texts
from blindtune.evaluation.leakage.misuse import check_full_model
from blindtune.evaluation.utility.estimate import check_length, package_shape, shape_of
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
    sketch,
    weight_bytes,
)
from blindtune.models.decoder import Decoder, context_limit
from blindtune.models.loading import load_tokenizer
from blindtune.offsite.data_owner.tuning_estimate import ADAMW_SECONDS
from blindtune.places import located
from blindtune.split.bottom import open_bottom
from blindtune.split.customer.job import MARK, CustomerJob
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.tuning_estimate import grouping_seconds, layer_flops
from blindtune.training.canaries import read_canaries
from blindtune.training.text import DataConfig

WRITTEN = 200_000
"""Bytes of page and JSON, about."""
TOKENS_OF_A_WORD = 7
"""In which a language model spells a word of another's, about the most."""
CHANNEL_WORDS = 64_000
"""Draws of the noise in Bayes' rule, twice (its words, their draws, once more at rehearsal)."""


def estimate_audit_emulator(
    emulator: str | Path,
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    reading: DataConfig | None = None,
    config: AuditConfig | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `audit_emulator`; the test text is taken to hold all of `test_tokens`.

    Raises:
        ModelError, PackageError: as for `audit_emulator`.
        MismatchError: the emulator was made of a model of another size.
    """
    config, reading = config or AuditConfig(), reading or DataConfig()
    length, full = reading.max_length, sketch(model)
    package = open_package(emulator, "emulator", trust=trust)
    check_full_model(full, package.manifest, model)
    decoder, emulated = Decoder(full), Decoder(package_shape(package)[1])
    rate, cost = matmul_rate(decoder.hidden_size), decoder_cost(decoder, length)
    small = decoder_cost(emulated, length)
    raw = sum(emulated.is_raw(i) for i in range(emulated.layer_count)) / decoder.layer_count
    # The emulator untouched; tuned, if there is an adapter; and healed, once a rate.
    kinds = 1 + (adapter is not None)
    attackers = healing_attackers(config)
    tries = len(attackers)
    parts = {
        "load": 2 * (1 + kinds + tries) * weight_bytes(full) / READ_BYTES_PER_SECOND,
        "score as they are": _pass(rate, cost, config.test_tokens, decoder, config, length)
        + kinds * _pass(rate, small, config.test_tokens, decoder, config, length),
    }
    tokens = (1 + kinds) * config.test_tokens
    if attackers:
        trained = config.healing_steps * config.healing_batch_size * length
        once = rate.seconds(trained * cost.training, 3 * config.healing_steps * len(cost.layers))
        once += config.healing_steps * _numbers(full) * ADAMW_SECONDS
        scored = (1 + len(attackers[0].stops)) * config.test_tokens
        score = _pass(rate, cost, scored, decoder, config, length)
        parts |= {"heal": tries * once, "control": raw * once}
        parts["score on the way"] = (tries + raw) * score
        tokens += (1 + tries) * (trained + scored)
    batch = max(config.batch_size, config.healing_batch_size) * length
    activations = batch * (20 * decoder.hidden_size * decoder.layer_count + 3 * _words(full))
    memory = 5 * weight_bytes(full) + FLOAT * activations
    return estimated(parts, rate, memory=memory, written=WRITTEN, tokens=tokens)


def estimate_audit_adapter(
    adapter: str | Path,
    model: str | Path,
    data: str | Path,
    *,
    others: str | Path | None = None,
    canaries: str | Path | None = None,
    reading: DataConfig | None = None,
    config: AuditConfig | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `audit_adapter`; data and canaries are read.

    Raises:
        DataError, ConfigError, ModelError, PackageError: as for `audit_adapter`.
    """
    config, reading = config or AuditConfig(), reading or DataConfig()
    stated = open_package(adapter, "adapter", trust=trust).manifest.privacy
    reading = reading_of(stated, reading, others)
    tokenizer, shape, package = shape_of(model, trust)
    check_length(reading.max_length, shape, package)
    decoder = Decoder(shape)
    tokens = 0
    for found in both_kinds(tokenizer, data, others, reading):
        tokens += found.tokens * min(len(found), config.max_records) // max(1, len(found))
    rate, length = matmul_rate(decoder.hidden_size), reading.max_length
    passes, cost = 2 * tokens, decoder_cost(decoder, length)  # of both models
    parts = {
        "load": 4 * weight_bytes(shape) / READ_BYTES_PER_SECOND,
        "score": _pass(rate, cost, passes, decoder, config, length),
    }
    if canaries is not None:
        planted = 2 * sum(
            encoded_candidates(canary, tokenizer, reading).tokens
            for canary in read_canaries(canaries)
        )
        parts["canaries"] = _pass(rate, cost, planted, decoder, config, length)
        passes += planted
    batch = config.batch_size * length * (16 * decoder.hidden_size + _words(shape))
    memory = 2 * weight_bytes(shape) + FLOAT * batch
    return estimated(parts, rate, memory=memory, written=WRITTEN, tokens=passes)


def estimate_audit_split(
    subject: str | Path,
    *,
    bottom: str | Path | None = None,
    data: str | Path | None = None,
    public: str | Path | None = None,
    privatizer: PrivatizerConfig | None = None,
    reading: ReadingConfig | None = None,
    config: AuditConfig | None = None,
    adversary: AdversaryConfig | None = None,
    trust: Trust | None = None,
) -> Estimate:
    """Estimate `audit_split`: searches in the vocabulary, and the time that trainings may take.

    Raises:
        DataError, ConfigError, ModelError, PackageError, PolicyError: as for `audit_split`.
    """
    config, reading = config or AuditConfig(), reading or ReadingConfig()
    adversary, privatizer = adversary or AdversaryConfig(), privatizer or PrivatizerConfig()
    job = CustomerJob(subject) if (located(subject) / MARK).is_file() else None
    if job is not None:
        bottom = bottom or job.record.bottom_path
        privatizer = job.config(PrivatizerConfig, "privatizer")
    privatizer.check_whole()
    package = open_bottom(bottom or subject, trust=trust)
    check_adversary(adversary, package, public=public, data=data, reading=reading)
    table_VD = package.stack.embedding.weight
    assert isinstance(table_VD, Tensor)
    mine = () if data is None else read_audited(package, data, reading).ids
    read = adversary.attribute_column is not None or adversary.prior is not None
    theirs = read_audited(package, public, reading).ids if read and public is not None else ()
    chosen, attacked, longest = _attacked(mine, config.test_tokens)
    rate, search = matmul_rate(package.hidden_size), 2.0 * table_VD.numel()  # of one token
    parts = {
        "open": weight_bytes(package.stack.model) / READ_BYTES_PER_SECOND,
        "nearest neighbour": rate.seconds(attacked * search + 40 * longest * table_VD.numel()),
    }
    grouping, bottom_flops = privatizer.grouping(), package.cut.cut * layer_flops(package, longest)
    if grouping is not None and job is None:
        parts["word groups"] = grouping_seconds(grouping, table_VD, bottom_flops, rate)
    parts |= _by_privatizer(
        privatizer, config, rate, search, attacked, deep=package.cut.cut > 0, learns=bool(public)
    )
    memory: float = FLOAT * (3 * config.public_tokens * table_VD.shape[1] + 12 * table_VD.numel())
    if adversary.dummies:
        parts["dummy embeddings, at most"] = config.attack_seconds
    if adversary.attribute_column is not None:
        # Of a transcript any text may be attacked. Raises as the audit would.
        some = chosen if located(subject).is_dir() else range(len(mine))
        known = spread_texts(theirs, config.public_tokens)
        attributes(adversary, some, known, public, data, reading)
        made = rate.seconds(AttributeConfig().draws * config.public_tokens * search)
        parts["attribute inference, at most"] = made + config.attack_seconds
    if adversary.prior is not None:
        model = sketch(adversary.prior)
        same = has_words(load_tokenizer(adversary.prior), package.tokenizer)
        attacks = 3 if grouping is not None and privatizer.draws else 2
        parts |= weighing(rate, model, attacked, longest, config, attacks, spelled=not same)
        memory += weighing_bytes(model, max(longest, *map(len, theirs)), spelled=not same)
    return estimated(parts, rate, memory=memory, written=WRITTEN, tokens=attacked)


def _attacked(mine: Sequence[Tensor], tokens: int) -> tuple[list[int], int, int]:
    """Which texts are attacked, their tokens, and the longest; without texts about so many."""
    if not mine:
        return [], tokens, 1
    chosen = spread_texts(mine, tokens)
    lengths = [len(mine[i]) for i in chosen]
    return chosen, sum(lengths), max(lengths)


def _by_privatizer(
    privatizer: PrivatizerConfig,
    config: AuditConfig,
    rate: Rate,
    search: float,
    attacked: int,
    *,
    deep: bool,
    learns: bool,
) -> dict[str, float]:
    """Seconds of the attacks that fit a privatizer."""
    mechanism = privatizer.mechanism(privatizer.eta or 1.0) if privatizer.draws else None
    drawn = mechanism is not None and mechanism.replaces_words
    parts = {}
    if mechanism is not None and config.fresh_draws > 1:
        parts["fresh draws"] = rate.seconds(2 * attacked * config.fresh_draws * search)
    if learns and mechanism is not None:
        parts["noise of public text"] = rate.seconds(3 * config.public_tokens * search)
    if learns and drawn:
        of_draws = 2 if config.fresh_draws > 1 else 1
        parts["Bayes"] = rate.seconds(2 * of_draws * CHANNEL_WORDS * search)
    if learns:
        # Behind layers one network reads the true words, and one those that were sent.
        twice = deep and (drawn or privatizer.grouping() is not None)
        parts["training, at most"] = (1 + twice) * config.attack_seconds
    return parts


def weighing(
    rate: Rate,
    model: PreTrainedModel,
    attacked: int,
    longest: int,
    config: AuditConfig,
    attacks: float,
    *,
    spelled: bool,
) -> dict[str, float]:
    """Seconds to load a language model and to weigh the candidates of so many attacks with it.

    `spelled`: it has other words, and reads several tokens for one of them.
    """
    cost = decoder_cost(Decoder(model), longest)
    calls = len(cost.layers) * attacked * (1 + 1 / TOGETHER)  # rehearsed one by one
    flops = 2 * BEAMS * attacked * cost.forward * (TOKENS_OF_A_WORD if spelled else 1)
    weighed = min(config.attack_seconds, rate.seconds(flops, calls))
    return {
        "load the language model": weight_bytes(model) / READ_BYTES_PER_SECOND,
        "language model, at most": attacks * weighed,
    }


def weighing_bytes(model: PreTrainedModel, longest: int, *, spelled: bool = False) -> int:
    """Of a language model that weighs texts of up to so many tokens.

    Weights; logits and their log-softmax of every beam; its keys and values, twice while they are
    put in another order; where texts exceed what it reads at once, passes over all that it reads;
    where it has other words (`spelled`), all that of several tokens a word.
    """
    decoder = Decoder(model)
    length = min(longest, context_limit(model.config) or longest)
    kept = sum(
        size
        for i in range(decoder.layer_count)
        if decoder.is_raw(i)
        for projection in decoder.projections(i)
        for part, size in zip(projection.parts, projection.sizes, strict=True)
        if part in ("key", "value")
    )
    read = length if longest > length else 1
    of_word = 2 * (_words(model) + length * kept) + 16 * read * decoder.hidden_size
    beam = of_word * (TOKENS_OF_A_WORD if spelled else 1)
    return weight_bytes(model) + FLOAT * TOGETHER * BEAMS * beam


def _pass(
    rate: Rate, cost: DecoderCost, tokens: int, decoder: Decoder, config: AuditConfig, length: int
) -> float:
    """Seconds of forward passes over so many tokens."""
    calls = decoder.layer_count * tokens / length / config.batch_size
    return rate.seconds(tokens * cost.forward, calls)


def _numbers(model: PreTrainedModel) -> int:
    return weight_bytes(model) // FLOAT


def _words(model: PreTrainedModel) -> int:
    return int(model.config.vocab_size)
