"""What an eta of the exponential mechanism does to a vocabulary, and its inverse."""

import math

import pytest
import torch

from blindtune.errors import ConfigError, DataError
from blindtune.privacy import draw_level
from blindtune.privacy.draw_level import DrawSurvey
from blindtune.privacy.metric_dp import Mechanism, Privatizer

pytestmark = pytest.mark.filterwarnings("ignore::blindtune.privacy.entropy.SeededNoiseWarning")

TABLE_VD = torch.randn(400, 48, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(400)


def test_share_and_distance_are_those_of_the_formula(monkeypatch):
    monkeypatch.setattr(draw_level, "WORDS", 7)
    found = DrawSurvey(TABLE_VD, torch.tensor([5]), samples=20)
    distance_V = (TABLE_VD.double() - TABLE_VD[5].double()).norm(dim=1)
    for eta in (0.1, 1.0, 3.0):
        right_V = (-eta / 2 * distance_V).softmax(0)
        level = found.at(eta)
        assert level.changed_share == pytest.approx(1 - float(right_V[5]), abs=1e-6)
        assert level.mean_norm == pytest.approx(float(right_V @ distance_V), rel=1e-4)
    distance_V[5] = torch.inf
    assert found.at(1.0).neighbour_distance == pytest.approx(float(distance_V.min()))


def test_shares_agree_with_draws_within_their_error():
    level = DrawSurvey(TABLE_VD, samples=200).at(1.3)
    machine = Privatizer(Mechanism(eta=1.3, mode="exponential"), TABLE_VD, testing_seed=9)
    drawn = machine.tokens(IDS.repeat(10))
    share = (drawn != IDS.repeat(10)).double().mean()
    assert 0.1 < level.changed_share < 0.9
    error = level.changed_share_error + 0.5 / math.sqrt(4000)
    assert abs(level.changed_share - share) < 4 * error


@pytest.mark.parametrize("share", [0.01, 0.4, 0.95])
def test_eta_for_a_share_is_its_inverse(share):
    found = DrawSurvey(TABLE_VD, samples=100)
    assert found.at(found.eta_for(share)).changed_share == pytest.approx(share, rel=1e-2)


def test_the_text_says_that_words_are_drawn():
    text = str(DrawSurvey(TABLE_VD, samples=20).at(1.0))
    assert "words drawn at a mean distance of" in text
    assert "noise" not in text


def test_equal_rows_are_one_word_to_their_neighbours():
    doubled = torch.cat((TABLE_VD, TABLE_VD))
    twice = DrawSurvey(doubled, IDS, samples=50)
    once = DrawSurvey(TABLE_VD, IDS, samples=50)
    assert torch.allclose(twice.neighbour_distance_N, once.neighbour_distance_N)


def test_unreachable_shares_and_bad_inputs_are_refused():
    found = DrawSurvey(TABLE_VD[:2], samples=10)
    for share in (0.0, 0.6, 1.0, math.nan):  # of two words at most half change
        with pytest.raises(ConfigError, match="changed share"):
            found.eta_for(share)
    with pytest.raises(ConfigError, match="positive"):
        found.at(0.0)
    with pytest.raises(DataError, match="two different"):
        DrawSurvey(torch.ones(5, 3), samples=5)
    with pytest.raises(DataError, match="token ids"):
        DrawSurvey(TABLE_VD, torch.tensor([400]))
