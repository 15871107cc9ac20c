"""The exponential mechanism: its probabilities, the metric-DP bound, and draws that follow them.

Every statistic is also shown a wrong variant, and must refuse it.

Shapes: N draws, V vocabulary, D hidden.
"""

import math

import pytest
import torch

from blindtune.errors import ConfigError, DataError
from blindtune.privacy import word_sampling
from blindtune.privacy.entropy import seeded_uniforms, system_uniforms
from blindtune.privacy.metric_dp import Mechanism, Privatizer
from blindtune.privacy.nearest import NearestRows, Tiling
from blindtune.privacy.word_sampling import WordSampler, word_distances

pytestmark = pytest.mark.filterwarnings("ignore::blindtune.privacy.entropy.SeededNoiseWarning")


def table(words=23, width=8, seed=0):
    return torch.randn(words, width, generator=torch.Generator().manual_seed(seed))


def dense(table_VD, eta):
    """log P(w' | w) of all pairs [V, V], the plain way."""
    table_VD = table_VD.double()
    distance_VV = (table_VD[:, None] - table_VD[None]).norm(dim=2)
    return (-eta / 2 * distance_VV).log_softmax(1)


def deviation(drawn_N, probability_V):
    """Chi-square of counts, in standard deviations of its distribution from its mean."""
    expected_V = probability_V * len(drawn_N)
    kept = expected_V > 8
    counted_V = torch.bincount(drawn_N, minlength=len(probability_V)).double()
    rest = torch.stack((counted_V[~kept].sum(), expected_V[~kept].sum()))
    counts = torch.cat((counted_V[kept], rest[:1]))
    expected = torch.cat((expected_V[kept], rest[1:].clamp_min(1e-9)))
    if rest[1] <= 8:
        counts, expected = counts[:-1], expected[:-1]
    freedom = len(counts) - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_distances_are_exact_and_zero_to_a_word_itself(dtype):
    table_VD = table(50, 300).to(dtype) * 20
    table_VD[7] = table_VD[3]
    table_VD[9] = table_VD[4]
    table_VD[9, 0] += 0.03  # a near neighbour, far below the rounding of a squared norm in float32
    found_UV = word_distances(NearestRows(table_VD, Tiling(rows=7)), torch.arange(50))
    wide_VD = table_VD.double()
    right_UV = (wide_VD[:, None] - wide_VD[None]).norm(dim=2)
    assert torch.allclose(found_UV, right_UV, rtol=1e-10, atol=0)
    assert (found_UV.diagonal() == 0).all()
    assert found_UV[3, 7] == 0 < found_UV[4, 9]


def test_probabilities_are_those_of_the_formula(monkeypatch):
    monkeypatch.setattr(word_sampling, "PORTION_NUMBERS", 60)  # two words at a time
    table_VD = table()
    found = WordSampler(table_VD, Tiling(rows=5)).log_probabilities(torch.arange(23), 3.0)
    assert torch.allclose(found, dense(table_VD, 3.0), rtol=1e-9)
    some = torch.tensor([4, 0, 22])
    columns = WordSampler(table_VD).log_probabilities(some, 3.0, some)
    assert torch.allclose(columns, dense(table_VD, 3.0)[some][:, some], rtol=1e-9)
    assert WordSampler(table_VD).log_probabilities(some[:0], 3.0, some).shape == (0, 3)


@pytest.mark.parametrize("width", [1, 2, 8, 384])
@pytest.mark.parametrize("eta", [0.05, 1.0, 30.0])
def test_no_output_tells_two_words_apart_better_than_metric_dp_allows(width, eta):
    table_VD = table(40, width)
    distance_VV = torch.cdist(table_VD.double(), table_VD.double())
    sampler = WordSampler(table_VD)

    def excess(used):
        log_VV = sampler.log_probabilities(torch.arange(40), used)
        ratio_VV = (log_VV[:, None] - log_VV[None]).amax(2)  # the output that tells most
        return float((ratio_VV - eta * distance_VV).max())

    assert excess(eta) <= 1e-9
    assert excess(2.01 * eta) > 0  # as if the 1/2 of the exponent had been left out


@pytest.mark.parametrize("width", [384, 1024, 4096])
def test_draws_have_these_probabilities(width):
    table_VD = table(101, width)  # blocks of 11 words, the last one short
    eta = 2 * math.log(101) / math.sqrt(2 * width)
    sampler, right = WordSampler(table_VD), dense(table_VD, eta).exp()
    word, other = 4, 100
    for seed, (mine, theirs) in enumerate(((word, other), (other, word))):
        ids = torch.full((20_000,), mine)
        drawn = sampler.draw(ids, eta, seeded_uniforms(seed))
        assert abs(deviation(drawn, right[mine])) < 5
        assert deviation(drawn, right[theirs]) > 50
        assert deviation(drawn, dense(table_VD, 1.2 * eta).exp()[mine]) > 50


def test_tokens_of_one_text_are_drawn_independently():
    table_VD = table(4, 3)
    right = dense(table_VD, 1.0)[0].exp()
    pairs = (right[:, None] * right).reshape(-1)

    def deviates(drawn):
        return abs(deviation(4 * drawn[:-1] + drawn[1:], pairs))

    sampler = WordSampler(table_VD)
    drawn = sampler.draw(torch.zeros(20_000, dtype=torch.int64), 1.0, seeded_uniforms(5))
    assert deviates(drawn[: len(drawn) // 2 * 2]) < 8  # overlapping pairs vary a little more
    assert deviates(drawn[:10_000].repeat_interleave(2)) > 50


def test_system_entropy_draws_the_same_and_differently_each_time():
    table_VD = table(101, 16)
    ids, sampler = torch.full((10_000,), 4), WordSampler(table_VD)
    first, second = (sampler.draw(ids, 1.5, system_uniforms) for _ in range(2))
    assert abs(deviation(first, dense(table_VD, 1.5)[4].exp())) < 7
    assert not torch.equal(first, second)


def test_portions_leave_every_token_its_own_words(monkeypatch):
    monkeypatch.setattr(word_sampling, "PORTION_NUMBERS", 250)
    monkeypatch.setattr(word_sampling, "DRAWN_NUMBERS", 64)
    ids = torch.randint(0, 101, (3000,), generator=torch.Generator().manual_seed(1))
    sampler = WordSampler(table(101, 16))
    assert torch.equal(sampler.draw(ids, 1e6, seeded_uniforms(0)), ids)
    share = (sampler.draw(ids, 2.0, seeded_uniforms(0)) == ids).double().mean()
    right = dense(table(101, 16), 2.0).exp().diagonal()[ids]
    assert abs(share - right.mean()) < 5 * math.sqrt(0.25 / 3000)
    assert sampler.draw(ids[:0], 1.0, seeded_uniforms(0)).shape == (0,)


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_extremes_are_stable(scale):
    sampler = WordSampler(table() * scale)
    for eta in (1e-6, 1e6):
        log_VV = sampler.log_probabilities(torch.arange(23), eta)
        assert torch.allclose(log_VV.exp().sum(1), torch.ones(23, dtype=torch.float64))
        drawn = sampler.draw(torch.arange(23), eta, lambda *s: torch.ones(s, dtype=torch.float64))
        assert 0 <= int(drawn.min()) <= int(drawn.max()) < 23


def privatizer(eta, table_VD, seed=0):
    return Privatizer(Mechanism(eta=eta, mode="exponential"), table_VD, testing_seed=seed)


def test_factors_scale_eta_token_by_token():
    table_VD = table()
    ids = torch.full((3, 20_000), 6)
    factors = torch.tensor([1.0, 0.5, 0.0])[:, None].expand(3, 20_000)
    drawn = privatizer(1.0, table_VD).tokens(ids, factors)
    assert drawn.shape == ids.shape
    assert abs(deviation(drawn[0], dense(table_VD, 1.0)[6].exp())) < 5
    assert abs(deviation(drawn[1], dense(table_VD, 2.0)[6].exp())) < 5
    assert torch.equal(drawn[2], ids[2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="ids below 23"):
        privatizer(1.0, table()).tokens(torch.tensor([[23]]))
    with pytest.raises(ConfigError, match="vector mode, got 'exponential'"):
        privatizer(1.0, table()).embeddings(torch.zeros(1, 8))
    with pytest.raises(ConfigError, match="expected an embedding table"):
        Privatizer(Mechanism(eta=1.0, mode="exponential"))
    with pytest.raises(DataError, match="finite rows"):
        WordSampler(torch.full((3, 2), torch.nan))
