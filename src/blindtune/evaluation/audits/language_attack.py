"""What attacks on split tuning found, weighed by a causal language model that the adversary has.

Its words must be the bottom's, as candidates are words of the bottom. How far to trust it is
rehearsed, as for every prior (`attacks.language_prior`). Half of the time that it is given goes to
that at most, and texts that it does not finish keep what the likelihoods say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from blindtune.attacks.adversary import Candidates, Guess
from blindtune.attacks.language_prior import (
    TOGETHER,
    WEIGHTS,
    CausalPrior,
    Prior,
    decode,
    right_by_weight,
)
from blindtune.errors import ConfigError
from blindtune.evaluation.utility.loss import loss_on_targets
from blindtune.models.decoder import Decoder, context_limit
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.split.bottom import Bottom
from blindtune.training.dataset import IGNORED_LABEL

BEAMS = 8
"""Texts in the making that are kept; each costs the model a pass."""


def open_prior(name: str | Path, bottom: Bottom, texts: Sequence[Tensor] = ()) -> CausalPrior:
    """Load the language model.

    Args:
        name: a directory, a hub name, an embedded model.
        bottom: whose words are to be weighed.
        texts: public ones, which say what stands best before a text's first word.

    Raises:
        ConfigError: its words are not the bottom's. ModelError: it cannot be had.
    """
    tokenizer = check_words(name, bottom)
    model = load_model(name)
    words = 1 + max(bottom.tokenizer.get_vocab().values())
    if model.config.vocab_size < words:
        raise ConfigError(
            f"expected a prior that predicts all {words:,} words of the bottom, got {name} with "
            f"{model.config.vocab_size:,}: give the model of this tokenizer"
        )
    decoder = Decoder(model)
    if bottom.margins.before:
        return CausalPrior(decoder)  # every text begins as it should
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return CausalPrior(decoder, _best_begin(decoder, texts[:TOGETHER], (None, *marks)))


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


def check_words(name: str | Path, bottom: Bottom) -> Any:
    """The model's tokenizer; refuse one whose words are not the bottom's, without its weights.

    Raises:
        ConfigError, ModelError: as for `open_prior`.
    """
    tokenizer = load_tokenizer(name)
    mine, its = bottom.tokenizer.get_vocab(), tokenizer.get_vocab()
    other = sum(its.get(word) != place for word, place in mine.items())
    if other:
        raise ConfigError(
            f"expected a prior with the words of the bottom, got {name}, which lacks {other:,} of "
            f"its {len(mine):,} words or numbers them otherwise: give a causal language model with "
            "the bottom's own tokenizer, such as the vendor's"
        )
    return tokenizer


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
        alone += int((some.first()[0] == text.cpu()).sum())
        tried += 1
    return (0.0 if alone >= max(right) else WEIGHTS[right.index(max(right))]), tried


def _parts(found: Candidates, size: int) -> Iterator[Candidates]:
    """Candidates of so many texts at once."""
    for at in range(0, len(found.words), size):
        some = slice(at, at + size)
        yield Candidates(words=found.words[some], log_likelihoods=found.log_likelihoods[some])
