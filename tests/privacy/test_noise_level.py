"""The closed form of critical eta against running the mechanism, and its inverse."""

import math

import pytest
import torch

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.entropy import seeded_uniforms
from blindtune.privacy.metric_dp import Mechanism, Privatizer, d_chi_noise
from blindtune.privacy.nearest import NearestRows, Tiling
from blindtune.privacy.noise_level import NoiseSurvey, sampled_words

pytestmark = pytest.mark.filterwarnings("ignore::blindtune.privacy.entropy.SeededNoiseWarning")

TABLE_VD = torch.randn(400, 48, generator=torch.Generator().manual_seed(0))
SPREAD = (torch.arange(300) * 4 + 2) // 3
"""300 of 400 words, evenly spread."""


def survey(table_VD=TABLE_VD, **options):
    return NoiseSurvey(table_VD, testing_seed=3, **({"samples": 300} | options))


def test_shares_are_those_of_the_mechanism_with_the_same_noise():
    found = survey(tiling=Tiling(rows=37))
    noise_ND = d_chi_noise(300, 48, 1.0, seeded_uniforms(3))
    for eta in (2.0, 4.0, 6.0, 10.0, 20.0):
        nearest = NearestRows(TABLE_VD).find(TABLE_VD[SPREAD].double() + noise_ND / eta)
        level = found.at(eta)
        assert level.changed_share == pytest.approx((nearest != SPREAD).double().mean().item())
        assert level.mean_norm == 48 / eta


def test_shares_agree_with_fresh_noise_within_their_error():
    level = survey().at(3.5)
    ids = torch.arange(400).repeat(5)
    out = Privatizer(Mechanism(eta=3.5), TABLE_VD, testing_seed=9).tokens(ids)
    assert 0.1 < level.changed_share < 0.9
    assert abs(level.changed_share - (out != ids).double().mean()) < 4 * level.changed_share_error
    assert level.changed_share_error == pytest.approx(
        math.sqrt(level.changed_share * (1 - level.changed_share) / 300), rel=0.05
    )
    assert 0 < survey().at(1e6).changed_share_error < 0.01


def test_neighbour_distance_is_the_median_to_another_word():
    distance = torch.cdist(TABLE_VD.double(), TABLE_VD.double()).fill_diagonal_(torch.inf)
    expected = distance.amin(1)[SPREAD]
    assert torch.allclose(survey().neighbour_distance_N, expected)
    assert survey().at(1.0).neighbour_distance == pytest.approx(expected.median().item())


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_eta_for_a_share_is_what_bisection_finds(share):
    found = survey()
    eta = found.eta_for(share)
    assert found.at(eta).changed_share == pytest.approx(share, abs=0.5 / 300)
    low, high = 1e-3, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if found.at(middle).changed_share > share else (low, middle)
    assert low == pytest.approx(eta, rel=0.05)


def test_equal_rows_are_one_word():
    doubled = torch.cat((TABLE_VD, TABLE_VD))
    assert torch.allclose(
        survey(doubled, token_ids=torch.arange(400)).critical_eta_N, survey().critical_eta_N
    )


def test_sampled_tokens_can_be_those_of_a_text():
    table_VD = torch.tensor([[0.0], [1.0], [10.0]])
    assert survey(table_VD, token_ids=torch.tensor([[2]])).at(1.0).neighbour_distance == 9
    assert survey(table_VD, token_ids=torch.tensor([0, 1])).at(1.0).neighbour_distance == 1


def test_sampled_tokens_are_evenly_spread_and_always_the_same():
    text = torch.tensor([7, 3, 3, 9]).repeat(64)  # a template that beats against any even spacing
    for samples in (2, 8, 64, 100, 300):
        words = sampled_words(TABLE_VD, text, samples)
        assert torch.equal(words, sampled_words(TABLE_VD, text.flip(0), samples))
        for word, share in ((3, 0.5), (7, 0.25), (9, 0.25)):
            assert abs((words == word).sum() - share * samples) < 1
    assert torch.equal(sampled_words(TABLE_VD, None, 400), torch.arange(400))
    assert sampled_words(TABLE_VD, None, 800).bincount().tolist() == [2] * 400
    assert sampled_words(TABLE_VD, torch.tensor([5]), 3).tolist() == [5, 5, 5]


def test_the_text_names_eta_distance_and_share():
    text = str(survey().at(5.0))
    for words in ("eta 5 per token", "median distance", "of tokens", "+-"):
        assert words in text


def test_unreachable_shares_and_bad_inputs_are_refused():
    line = survey(torch.tensor([[0.0], [1.0]]))  # half of all directions lead away from the other
    assert line.at(1e-5).changed_share < 0.7
    with pytest.raises(ConfigError, match="no noise changes"):
        line.eta_for(0.9)
    for share in (0.0, 1.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="changed share"):
            line.eta_for(share)
    with pytest.raises(ConfigError, match="positive"):
        line.at(0.0)
    with pytest.raises(ConfigError, match="2 samples"):
        survey(samples=1)
    with pytest.raises(DataError, match="token ids"):
        survey(token_ids=torch.tensor([400]))
    with pytest.raises(DataError, match="two different"):
        survey(torch.ones(5, 3))
