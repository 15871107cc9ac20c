"""Scores of guesses: counted right, and intervals that cover what they say."""

import random

import pytest
import torch

from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.leakage.empirical_privacy import (
    common_words,
    contributing_masks,
    empirical_privacy,
    record_privacy,
    scored,
)
from blindtune.models.margins import Margins
from blindtune.privacy.token_importance import ContributingTokens, ImportanceConfig, count_tokens

AROUND, START = Margins((1,), (2,)), Margins((1,))


def ids(*texts):
    return [torch.tensor(text) for text in texts]


def test_kinds_of_tokens_are_counted_apart():
    truth = ids([1, 10, 11, 2], [1, 12, 2])
    guess = ids([1, 10, 99, 2], [0, 12, 2])
    spared = [torch.tensor([False, True, False, False]), torch.tensor([False, False, False])]
    found = empirical_privacy(guess, truth, margins=AROUND, contributing=spared)
    assert (found.content.right, found.content.of) == (2, 3)
    assert found.content.value == pytest.approx(1 / 3)
    assert (found.special.right, found.special.of) == (3, 4)
    assert (found.contributing.right, found.contributing.of) == (1, 1)
    assert (found.other.right, found.other.of) == (1, 2)
    assert (found.whole_texts.right, found.whole_texts.of) == (1, 2)
    assert str(found.content).startswith("EP 0.333 [")


def test_what_stands_around_a_text_is_content_inside_it():
    truth, guess = ids([1, 1, 2, 10, 2]), ids([1, 0, 2, 0, 2])
    found = empirical_privacy(guess, truth, margins=AROUND)
    assert (found.content.right, found.content.of) == (1, 3)
    assert common_words(ids([1, 1, 1, 2, 2], [1, 9, 2]), AROUND).tolist() == [1]


def test_without_cti_or_special_tokens_there_is_nothing_to_say_of_them():
    found = empirical_privacy(ids([5, 6]), ids([5, 6]))
    assert (found.special, found.contributing, found.other) == (None, None, None)
    assert found.content.value == 0


def test_rarer_words_are_those_beside_the_commonest_half():
    public = ids([1, 7, 7, 7, 8, 2], [1, 7, 8, 9, 10, 11, 2])
    common = common_words(public, margins=AROUND)
    assert common.tolist() == [7, 8]  # 4 of 9 tokens are not yet half, 6 are
    truth = ids([1, 7, 8, 9, 12, 2], [1, 7, 2])
    guess = ids([1, 0, 0, 9, 13, 2], [1, 0, 2])
    found = empirical_privacy(guess, truth, margins=AROUND, common=common)
    assert (found.content.right, found.content.of) == (1, 5)
    assert (found.rare.right, found.rare.of) == (1, 2)
    assert empirical_privacy(guess, truth, common=torch.tensor([1, 2, 7, 8, 9, 12])).rare is None


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_intervals_hold_the_value_and_shrink(share):
    wide, narrow = (scored([(round(share * 10), 10)] * texts, 0.95) for texts in (4, 400))
    for found in (wide, narrow):
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert narrow.high - narrow.low < (wide.high - wide.low) / 4


@pytest.mark.parametrize("texts", [3, 8, 40])
def test_the_interval_holds_for_few_texts_of_many_tokens_too(texts):
    """Texts differ in how much of them is read; of few, little is known of how much they do."""
    draws, missed = random.Random(0), 0
    for _ in range(2000):
        counts = [(round(draws.betavariate(3, 3) * 500), 500) for _ in range(texts)]
        missed += scored(counts, 0.95).low > 0.5
    assert missed <= 1.3 * 0.025 * 2000


@pytest.mark.parametrize("share", [0, 1])
def test_all_or_nothing_counts_texts_and_not_tokens(share):
    few = scored([(share * 100, 100)] * 20, 0.95)
    assert few.high - few.low == pytest.approx(0.161, abs=0.001)  # Wilson's interval of 20
    one = scored([(500, 1000)], 0.95)
    assert one.high - one.low > 0.5


def test_intervals_cover_texts_like_these():
    """Texts differ in how readable they are; the interval is to cover the mean over all texts."""
    draw = torch.Generator().manual_seed(0)
    covered = naive = 0
    for _ in range(300):
        ease_N = torch.rand(40, generator=draw)  # mean 1/2
        right_NL = torch.rand(40, 20, generator=draw) < ease_N[:, None]
        found = scored([(int(n), 20) for n in right_NL.sum(1)], 0.9)
        covered += found.low <= 0.5 <= found.high
        alone = scored([(int(hit), 1) for hit in right_NL.flatten()], 0.9)
        naive += alone.low <= 0.5 <= alone.high
    assert 0.84 < covered / 300 < 0.96
    assert naive / 300 < 0.6  # as if tokens were independent: far too sure


def test_cti_masks_are_those_of_the_privatizer():
    texts, labels = ids([1, 10, 11], [1, 12, 13, 12, 1]), torch.tensor([0, 1])
    config = ImportanceConfig(fraction=0.075)
    masks = contributing_masks(texts, labels, START, config, classes=2, vocabulary_size=40)
    counts = count_tokens([text[1:] for text in texts], [0, 1], classes=2, vocabulary_size=40)
    chosen = ContributingTokens(counts, config)
    assert masks[0].tolist() == [False, True, True]
    assert masks[1].tolist() == [False, True, True, True, True]
    for mask, text, label in zip(masks, texts, labels, strict=True):
        special = torch.arange(len(text)) == 0
        factors = chosen.factors(text[None], label[None], special[None])[0]
        assert torch.equal(mask, (factors == 0) & ~special)
    none = contributing_masks(
        texts, torch.tensor([-1, -1]), START, config, classes=2, vocabulary_size=40
    )
    assert not any(bool(mask.any()) for mask in none)


def test_records_are_scored_beside_blind_guessing():
    truth = torch.tensor([0, 0, 0, 1])
    blind = record_privacy(torch.zeros(4, dtype=torch.int64), truth)
    assert (blind.accuracy, blind.blind_accuracy, blind.advantage) == (0.75, 0.75, 0.0)
    assert record_privacy(truth, truth).advantage == 1.0
    assert record_privacy(1 - truth, truth).advantage < 0
    assert record_privacy(torch.zeros(3), torch.zeros(3)).advantage == 0.0


def test_other_texts_are_refused():
    with pytest.raises(DataError, match="guess for each of 1 texts"):
        empirical_privacy(ids([1, 2]), ids([1, 2, 3]))
    with pytest.raises(DataError, match="mask"):
        empirical_privacy(ids([1]), ids([1]), contributing=[])
    with pytest.raises(DataError, match="special ones"):
        empirical_privacy(ids([1]), ids([1]), margins=Margins((1,)))
    with pytest.raises(DataError, match="one class"):
        record_privacy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ConfigError, match="confidence"):
        scored([(1, 2)], 1.0)
    assert scored([(0, 0)], 0.9) is None
