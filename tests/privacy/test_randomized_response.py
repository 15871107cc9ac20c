"""Labels are drawn with the chances that the formula says, and its promise holds for all pairs."""

import math

import pytest
import torch
from scipy.stats import chisquare

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.entropy import system_uniforms
from blindtune.privacy.randomized_response import drawn_labels, keep_chance

DRAWS = 40_000


def counted(classes, epsilon):
    """How often each label [K] came out as each [K]."""
    labels_N = torch.arange(classes).repeat_interleave(DRAWS)
    drawn_N = drawn_labels(labels_N, classes, epsilon, system_uniforms)
    assert drawn_N.dtype == torch.int64
    return torch.bincount(labels_N * classes + drawn_N, minlength=classes**2).view(classes, classes)


def chances(classes, epsilon):
    stays = keep_chance(epsilon, classes)
    off = (1 - stays) / (classes - 1)
    return torch.full((classes, classes), off, dtype=torch.float64).fill_diagonal_(stays)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_draws_have_the_chances_of_the_formula(classes, epsilon):
    table = counted(classes, epsilon)
    for row, wanted in zip(table, chances(classes, epsilon), strict=True):
        assert chisquare(row, wanted * DRAWS).pvalue > 1e-6


def test_the_same_test_refuses_a_label_that_stays_too_often():
    row, wanted = counted(2, 1.1)[0], chances(2, 1.0)[0]
    assert chisquare(row, wanted * DRAWS).pvalue < 1e-6


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 20.0])
def test_no_outcome_is_likelier_than_promised_under_another_label(classes, epsilon):
    chance = chances(classes, epsilon)
    torch.testing.assert_close(chance.sum(1), torch.ones(classes, dtype=torch.float64))
    largest = (chance[:, None] / chance[None]).max().item()
    assert largest == pytest.approx(math.exp(epsilon))


def test_a_large_epsilon_leaves_labels_as_they_are():
    labels_N = torch.randint(0, 5, (10_000,))
    assert torch.equal(drawn_labels(labels_N, 5, 30.0, system_uniforms), labels_N)


@pytest.mark.parametrize("first", [1e-300, 1.0])
def test_the_ends_of_the_uniforms_give_classes(first):
    def never_stays(*shape):
        return torch.full(shape, 1.0 if not calls.append(0) and len(calls) == 1 else first)

    calls = []
    drawn = drawn_labels(torch.arange(3), 3, 1.0, never_stays)
    assert sorted(drawn.tolist()) == [0, 1, 2]
    assert not (drawn == torch.arange(3)).any()


@pytest.mark.parametrize(
    ("epsilon", "classes"), [(0.0, 2), (-1.0, 2), (math.nan, 2), (31.0, 2), (1.0, 1)]
)
def test_impossible_settings_are_refused(epsilon, classes):
    with pytest.raises(ConfigError, match="above 0"):
        drawn_labels(torch.zeros(3, dtype=torch.int64), classes, epsilon, system_uniforms)


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.rand(2)])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(DataError, match="from 0 to 1"):
        drawn_labels(labels, 2, 1.0, system_uniforms)
