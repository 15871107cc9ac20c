"""What attacks on split tuning found, weighed by a causal language model that the adversary has.

Candidates are words of the bottom; a model with other words reads them as it would spell them
(`attacks.spelled_prior`). How far to trust it is rehearsed, as for every prior
(`attacks.language_prior`). Half of the time that it is given goes to
that at most, and texts that it does not finish keep what the likelihoods say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess, right_tokens
from blindtune.attacks.language_prior import (
    TOGETHER,
    WEIGHTS,
    CausalPrior,
    Prior,
    decode,
    right_by_weight,
)
from blindtune.attacks.spelled_prior import SpelledPrior, spelling_of
from blindtune.errors import ConfigError
from blindtune.evaluation.utility.loss import loss_on_targets
from blindtune.models.decoder import Decoder, context_limit
from blindtune.models.loading import load_model, load_tokenizer, preferred_device
from blindtune.split.bottom import Bottom
from blindtune.training.dataset import IGNORED_LABEL

BEAMS = 8
"""Texts in the making that are kept; each costs the model a pass."""


def open_prior(name: str | Path, bottom: Bottom, texts: Sequence[Tensor] = ()) -> Prior:
    """Load the language model.

    Args:
        name: a directory, a hub name, an embedded model.
        bottom: whose words are to be weighed.
        texts: public ones, which say what stands best before a text's first word.

    Raises:
        ConfigError: it has the bottom's words and does not predict all of them. ModelError: it
            cannot be had.
    """
    tokenizer, model = load_tokenizer(name), load_model(name, device=preferred_device())
    decoder, texts = Decoder(model), texts[:TOGETHER]
    marks = (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    if not has_words(tokenizer, bottom.tokenizer):
        spelling = spelling_of(bottom.tokenizer, tokenizer)
        spelled = [[i for word in text_L.tolist() for i in spelling[word]] for text_L in texts]
        begin = _best_begin(decoder, [torch.tensor(ids) for ids in spelled], marks)
        return SpelledPrior(decoder, spelling, begin)
    words = 1 + max(bottom.tokenizer.get_vocab().values())
    if model.config.vocab_size < words:
        raise ConfigError(
            f"expected a prior that predicts all {words:,} words of the bottom, got {name} with "
            f"{model.config.vocab_size:,}: give the model of this tokenizer"
        )
    if bottom.margins.before:
        return CausalPrior(decoder)  # every text begins as it should
    return CausalPrior(decoder, _best_begin(decoder, texts, marks))


def _best_begin(model: Decoder, texts: Sequence[Tensor], marks: Sequence[int | None]) -> int | None:
    """What stands before texts for the model to expect most of their words but the first.

    Models differ: one was trained with a start token, one with the end of the text before, one
    with neither. The first of equals. Texts are cut to what the model reads at once.
    """
    limit = context_limit(model.config)
    room = None if limit is None else max(1, limit - 1)  # one for the mark
    texts = [text_L[:room] for text_L in texts if len(text_L[:room]) > 1]
    if not texts:
        return marks[0]

    def nats(mark: int | None) -> float:
        before = [] if mark is None else [mark]
        unscored = [IGNORED_LABEL] * (1 + len(before))
        rows = (text_L.tolist() for text_L in texts)
        examples = [{"input_ids": before + ids, "labels": unscored + ids[1:]} for ids in rows]
        return loss_on_targets(model.model, examples).nats_per_token

    return min(dict.fromkeys(marks), key=nats)


def has_words(tokenizer: Any, words: Any) -> bool:
    """Whether a tokenizer has all words of another one, by the same numbers."""
    its = tokenizer.get_vocab()
    return all(its.get(word) == place for word, place in words.get_vocab().items())


def weighed(
    found: Candidates,
    rehearsed: Candidates,
    known: Sequence[Tensor],
    prior: Prior,
    seconds: float,
) -> tuple[Guess, str]:
    """What the candidates are with the prior, and a sentence on how far to trust that, or "".

    A prior with which no more was read in the rehearsal than the attack reads alone is left out; so
    is one that is too slow to read a text of it.

    Args:
        found: an attack's candidates.
        rehearsed: the same attack's of texts that the adversary noised itself.
        known: those texts.
        prior: not learned from them.
        seconds: for all of it: no word is read after that time.
    """
    begin = time.monotonic()
    weight, tried = _rehearse(rehearsed, known, prior, begin + seconds / 2)
    if not weight:
        why = "In the rehearsal the language model read no more"
        if not tried:
            why = "--attack-seconds ended the language model's rehearsal before it read a text"
        return found.first(), f"{why}: it is left out."
    guess: list[Tensor] = []
    for some in _parts(found, TOGETHER):
        try:
            guess += decode(some, prior, beams=BEAMS, weight=weight, until=begin + seconds)
        except TimeoutError:
            break
    done, count = len(guess), len(found.words)
    if done == count:
        return tuple(guess), ""
    rest = Candidates(words=found.words[done:], log_likelihoods=found.log_likelihoods[done:])
    guess += rest.first()
    return tuple(guess), (
        f"--attack-seconds ended it after {done:,} of {count:,} texts; the others are read "
        "without the language model."
    )


def _rehearse(
    rehearsed: Candidates, known: Sequence[Tensor], prior: Prior, until: float
) -> tuple[float, int]:
    """How far to trust the prior, 0 where likelihoods read as much alone; and of how many texts."""
    right, alone, tried = [0] * len(WEIGHTS), 0, 0
    for some, text in zip(_parts(rehearsed, 1), known, strict=True):
        try:
            counts = right_by_weight(some, [text], prior, beams=BEAMS, until=until)
        except TimeoutError:
            break
        right = [a + b for a, b in zip(right, counts, strict=True)]
        alone += right_tokens(some.first(), [text])
        tried += 1
    return (0.0 if alone >= max(right) else WEIGHTS[right.index(max(right))]), tried


def _parts(found: Candidates, size: int) -> Iterator[Candidates]:
    """Candidates of so many texts at once."""
    for at in range(0, len(found.words), size):
        some = slice(at, at + size)
        yield Candidates(words=found.words[some], log_likelihoods=found.log_likelihoods[some])
