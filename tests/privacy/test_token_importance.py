"""CTI against the formula written out, and what it does to the noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.metric_dp import Mechanism, Privatizer
from blindtune.privacy.token_importance import (
    NO_LABEL,
    ContributingTokens,
    ImportanceConfig,
    count_tokens,
    utility_importance,
)

CLS, PAD = 0, 1


def counts(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def written_out(count_CV, y, w):
    own, *others = (count_CV[o, w].item() for o in sorted(range(len(count_CV)), key=y.__ne__))
    return sum(math.log(own / (other + 1e-5)) for other in others) if own else -math.inf


@given(
    st.integers(2, 4).flatmap(
        lambda c: st.lists(
            st.lists(st.integers(0, 50), min_size=c, max_size=c), min_size=1, max_size=8
        )
    )
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_importance_is_the_formula(columns):
    count_CV = torch.tensor(columns).T
    score_CV = utility_importance(count_CV)
    for y, w in torch.cartesian_prod(*map(torch.arange, count_CV.shape)).tolist():
        assert score_CV[y, w].item() == pytest.approx(written_out(count_CV, y, w), abs=1e-9)


def test_counting():
    texts = [[2, 3, 3], torch.tensor([4]), [2], [5, 5]]
    found = count_tokens(texts, [0, 1, 1, NO_LABEL], classes=2, vocabulary_size=6)
    assert found.tolist() == [[0, 0, 1, 2, 0, 0], [0, 0, 1, 0, 1, 0]]


def test_top_fraction_of_the_vocabulary_contributes_to_its_class():
    count_CV = counts([9, 0, 8, 1, 5, 0, 0, 2, 0, 0], [9, 7, 1, 8, 5, 0, 0, 0, 0, 0])
    some = ContributingTokens(count_CV, ImportanceConfig(fraction=0.2))
    assert some.of_class(0).tolist() == [2, 7]  # 7 never occurs in class 1
    assert some.of_class(1).tolist() == [1, 3]
    everything = ContributingTokens(count_CV, ImportanceConfig(fraction=1.0))
    assert everything.of_class(0).tolist() == [0, 2, 3, 4, 7]  # never a token that never occurs
    assert ContributingTokens(count_CV, ImportanceConfig(fraction=0.0)).of_class(0).numel() == 0


def test_equal_scores_go_to_the_lowest_id():
    count_CV = counts([0, 0, 3, 3, 3, 0], [0, 0, 0, 0, 0, 5])
    chosen = ContributingTokens(count_CV, ImportanceConfig(fraction=0.4))
    assert chosen.of_class(0).tolist() == [2, 3]
    many = ContributingTokens(torch.ones(2, 5000, dtype=torch.int64))
    assert torch.equal(many.of_class(1), torch.arange(50))


def test_factors_depend_on_the_label_and_texts_without_one_get_full_noise():
    count_CV = counts([0, 0, 9, 0, 4, 4], [0, 0, 0, 9, 4, 4])
    cti = ContributingTokens(count_CV, ImportanceConfig(fraction=0.17, factor=0.25))
    ids = torch.tensor([[CLS, 2, 3, 4, PAD]] * 3)
    special = torch.tensor([[True, False, False, False, True]] * 3)
    labels = torch.tensor([0, 1, NO_LABEL])
    assert cti.factors(ids, labels, special).tolist() == [
        [0, 0.25, 1, 1, 0],
        [0, 1, 0.25, 1, 0],
        [0, 1, 1, 1, 0],
    ]
    assert cti.factors(ids, None, special).tolist() == [[0, 1, 1, 1, 0]] * 3
    assert cti.factors(ids).tolist() == [[1] * 5] * 3


def test_special_tokens_can_be_noised_and_cti_left_out():
    ids, special = torch.tensor([[CLS, 2, PAD]]), torch.tensor([[True, False, True]])
    noised = ContributingTokens(None, ImportanceConfig(special="noise"))
    assert noised.factors(ids, torch.tensor([1]), special).tolist() == [[1, 1, 1]]
    kept = ContributingTokens(None)
    assert kept.factors(ids, torch.tensor([1]), special).tolist() == [[0, 1, 0]]
    assert kept.of_class(0).numel() == 0


def test_special_places_never_contribute_whatever_stands_there():
    count_CV = counts([0, 0, 9, 0, 4, 4], [0, 0, 0, 9, 4, 4])
    ids, special = torch.tensor([[2, 2, 3]]), torch.tensor([[True, False, False]])
    for policy, first in (("noise", 1), ("keep", 0)):
        config = ImportanceConfig(fraction=0.17, factor=0.25, special=policy)
        found = ContributingTokens(count_CV, config).factors(ids, torch.tensor([0]), special)
        assert found.tolist() == [[first, 0.25, 1]]


@pytest.mark.filterwarnings("ignore::blindtune.privacy.entropy.SeededNoiseWarning")
def test_contributing_tokens_survive_the_mechanism():
    count_CV = counts([0, 0, 9, 0, 4, 4], [0, 0, 0, 9, 4, 4])
    cti = ContributingTokens(count_CV, ImportanceConfig(fraction=0.17))
    ids = torch.tensor([[CLS, 2, 3, 4, 5]]).repeat(200, 1)
    special = torch.arange(5).expand(200, -1) == 0
    machine = Privatizer(Mechanism(eta=0.01), torch.randn(6, 3), testing_seed=0)
    changed = (machine.tokens(ids, cti.factors(ids, torch.zeros(200).long(), special)) != ids).any(
        0
    )
    assert changed.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    "options", [{"fraction": -0.1}, {"factor": 1.5}, {"smoothing": 0.0}, {"special": "drop"}]
)
def test_config_refuses(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ImportanceConfig(**options)


def test_bad_inputs_are_refused():
    with pytest.raises(DataError, match="labels 0 to 1"):
        count_tokens([[1]], [2], classes=2, vocabulary_size=4)
    with pytest.raises(DataError, match="ids below 4"):
        count_tokens([[4]], [1], classes=2, vocabulary_size=4)
    with pytest.raises(DataError, match="one label for each text"):
        count_tokens([[1], [2]], [1], classes=2, vocabulary_size=4)
    with pytest.raises(DataError, match="at least 2 classes"):
        ContributingTokens(counts([1, 2]))
    cti = ContributingTokens(counts([1, 2], [2, 1]))
    with pytest.raises(DataError, match="labels 0 to 1"):
        cti.factors(torch.tensor([[0]]), torch.tensor([-2]))
    with pytest.raises(DataError, match="expected 1 labels"):
        cti.factors(torch.tensor([[0]]), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="ids below 2"):
        cti.factors(torch.tensor([[2]]), torch.tensor([0]))
