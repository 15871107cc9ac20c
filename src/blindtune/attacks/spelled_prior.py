"""A causal language model of other words as a prior: the bottom's words are spelled in its own.

Every word of the bottom stands for a fixed row of the model's tokens, its spelling; a text is their
concatenation. Of a word after a beginning the first token's probability is told at once, for all
words by one pass over the beginning; what is left of a long spelling is told with the word after
it, for by then the model has read it. So the scores of a finished text add up to the model's own
of that spelling, but for the rest of its last word.

A text may have another spelling that the model likes better (pieces of a word that it knows whole);
that errs to the defender's side.

Shapes: B beams, K candidates, L words before, V words.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, final

import torch
from torch import Tensor

from blindtune.attacks.causal_reading import CausalReading
from blindtune.attacks.language_prior import NO_WORD
from blindtune.models.decoder import Decoder

Spelling = tuple[tuple[int, ...], ...]
"""The tokens of every word, by the word's id; none for words that are never said."""


@final
class SpelledPrior:
    """What a causal language model says of the next word, through its spelling (see `Prior`).

    Args:
        model: the language model.
        spelling: of every word of the bottom in the model's tokens.
        begin_id: what stands before a text's first token; None: the first word gets no prior.
    """

    def __init__(self, model: Decoder, spelling: Spelling, begin_id: int | None = None) -> None:
        self._reading, self._spelling = CausalReading(model), spelling
        self._begin = () if begin_id is None else (begin_id,)
        first = [tokens[0] if tokens else -1 for tokens in spelling]
        self._first_V = torch.tensor([*first, -1])  # the last stands for rows that are no words

    def log_probabilities(self, before_BL: Tensor, word_BK: Tensor) -> Tensor:
        """See `Prior`."""
        spelled = [[self._spelt(word) for word in row] for row in before_BL.tolist()]
        before = [(*self._begin, *chain.from_iterable(words)) for words in spelled]
        rest = [len(words[-1]) - 1 if words else 0 for words in spelled]
        first_BK = self._first_V[word_BK.clamp(max=len(self._spelling))]
        said_BK = self._reading.log_probabilities(before, rest, first_BK.clamp(min=0))
        return said_BK.masked_fill(first_BK < 0, NO_WORD)

    def forget(self) -> None:
        """See `Prior`."""
        self._reading.forget()

    def _spelt(self, word: int) -> tuple[int, ...]:
        return self._spelling[word] if word < len(self._spelling) else ()


def spelling_of(words: Any, model: Any) -> Spelling:
    """How each word of one tokenizer is spelled in another's tokens.

    A word is spelled as it stands after another one: with the space before it, or, if it goes on
    with that one, without. Words of either end of a text are never said, nor those of which the
    model's tokenizer makes nothing (a line's end, where it drops white space).

    Args:
        words: the bottom's tokenizer.
        model: the language model's.
    """
    anchor = words("a", add_special_tokens=False)["input_ids"][-1]
    size = 1 + max(words.get_vocab().values())
    pairs = [[anchor, word] for word in range(size)]
    before = words.decode([anchor], clean_up_tokenization_spaces=True)
    shown = words.batch_decode(pairs, clean_up_tokenization_spaces=True)
    never = set(words.all_special_ids)
    texts = [
        "" if word in never else text[len(before) :] if text.startswith(before) else text
        for word, text in enumerate(shown)
    ]
    alone = model(texts, add_special_tokens=False)["input_ids"]
    (start,) = model([before], add_special_tokens=False)["input_ids"]
    # Some tokenizers begin every text with a space of their own: not where another word stands.
    after = model([before + text for text in texts], add_special_tokens=False)["input_ids"]
    return tuple(
        tuple(both[len(start) :] if both[: len(start)] == start else ids)
        for ids, both in zip(alone, after, strict=True)
    )
