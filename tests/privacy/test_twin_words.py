"""Words that are there twice are found; those of a usual table are not called so."""

import pytest
import torch

from blindtune.privacy.twin_words import twin_share


def table(words=200, width=16, seed=0):
    return torch.randn(words, width, generator=torch.Generator().manual_seed(seed))


def test_no_twins_in_a_usual_table():
    text = torch.arange(200).repeat(3)
    assert twin_share(table(), text) == 0


@pytest.mark.parametrize("distance", [0.0, 1e-4, 0.2])
def test_twins_are_found_whatever_row_they_stand_in(distance):
    first = table()
    aside = table(seed=1)
    twins = first + distance * aside / aside.norm(dim=1, keepdim=True)
    both = torch.cat([first, twins[:100], table(100, seed=2)])
    text = torch.arange(200).repeat(2)
    assert twin_share(both, text) == pytest.approx(0.5, abs=0.02)
    assert twin_share(both, text + 200) == pytest.approx(0.5, abs=0.02)


def test_a_text_of_one_word_has_nothing_to_be_measured_by():
    assert twin_share(table(), torch.zeros(9, dtype=torch.int64)) == 0.0
