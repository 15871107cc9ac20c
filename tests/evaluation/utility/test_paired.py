"""Lower ends of differences and ratios: against formulas, and how often they hold."""

import math

import pytest
import torch

from blindtune.evaluation.utility.paired import mean_of, ratio_low, student


@pytest.mark.parametrize(
    ("degrees", "factor"),  # a printed table
    [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (10, 1.812), (30, 1.697), (10**6, 1.645)],
)
def test_students_factor(degrees, factor):
    assert student(degrees) == pytest.approx(factor, abs=2e-3)


@pytest.mark.parametrize(
    ("degrees", "factor"),
    [(1, 63.657), (2, 9.925), (3, 5.841), (7, 3.499), (30, 2.750), (10**6, 2.576)],
)
def test_students_factor_at_another_confidence(degrees, factor):
    assert student(degrees, 0.995) == pytest.approx(factor, rel=2e-3)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_texts_of_one_length_have_the_usual_standard_error():
    nats_KN = 3 + random(1, 7)
    found = mean_of(nats_KN, torch.full((7,), 10.0))
    assert found.value == pytest.approx(float(nats_KN.mean()) / 10)
    error = float(nats_KN.std()) / math.sqrt(7) / 10
    assert found.low == pytest.approx(found.value - student(6) * error)


def test_texts_of_any_length_are_left_out_one_by_one():
    nats_N, tokens_N = random(5).exp(), torch.tensor([3.0, 50.0, 8.0, 1.0, 9.0])
    found = mean_of(nats_N[None], tokens_N)
    mean = float(nats_N.sum() / tokens_N.sum())
    without = [
        float((nats_N.sum() - nats) / (tokens_N.sum() - tokens))
        for nats, tokens in zip(nats_N, tokens_N, strict=True)
    ]
    error = math.sqrt(4 / 5 * sum((other - mean) ** 2 for other in without))
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - student(4) * error)


def test_seeds_add_their_own_spread():
    tokens_N = torch.full((6,), 4.0)
    nats_KN = random(1, 6) + torch.tensor([[1.0], [2.0], [4.0]])
    found = mean_of(nats_KN, tokens_N)
    texts = mean_of(nats_KN.mean(0, keepdim=True), tokens_N)
    seeds = student(2) * float(torch.tensor([1.0, 2.0, 4.0]).std()) / math.sqrt(3) / 4
    assert found.value == pytest.approx(texts.value)
    assert found.value - found.low == pytest.approx(math.hypot(texts.value - texts.low, seeds))


def test_one_text_tells_nothing():
    assert mean_of(torch.ones(2, 1), torch.ones(1)).low == -math.inf


def test_a_ratios_lower_end_is_where_the_difference_may_be_0():
    tokens_N = torch.tensor([3.0, 5.0, 8.0, 4.0, 9.0, 6.0], dtype=torch.float64)
    whole_KN = tokens_N + 0.3 * random(2, 6)
    part_KN = 0.7 * whole_KN + 0.2 * random(2, 6, seed=1)
    low = ratio_low(mean_of(part_KN, tokens_N), mean_of(whole_KN, tokens_N))
    assert low < float(part_KN.sum() / whole_KN.sum())

    def least(share):
        return mean_of(part_KN - share * whole_KN, tokens_N).low

    assert least(low) == pytest.approx(0, abs=1e-9)
    assert least(low - 1e-4) > 0 > least(low + 1e-4)
    exact = ratio_low(mean_of(0.7 * whole_KN, tokens_N), mean_of(whole_KN, tokens_N))
    assert exact == pytest.approx(0.7)


@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize(("texts", "by_seed"), [(5, 0.05), (5, 0.3), (40, 0.0), (40, 0.1)])
def test_lower_ends_hold_as_often_as_they_say(seeds, texts, by_seed):
    """Texts of any length, some hard for all; each seed good or bad on all texts, and on some."""
    generator = torch.Generator().manual_seed(17 * texts + seeds)
    by_seed = by_seed if seeds > 1 else 0.0  # of one seed the spread over seeds is not covered

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rounds, held, recovered = 1000, 0, 0
    for _ in range(rounds):
        tokens_N = 20 + 80 * torch.rand(texts, generator=generator, dtype=torch.float64)

        def per_token(mean, apart):
            of_text, of_seed, of_both = noise(1, texts), noise(seeds, 1), noise(seeds, texts)
            return mean + apart * of_text + by_seed * of_seed + 0.02 * of_both

        gain_KN = per_token(1.0, 0.3) * tokens_N
        part_KN = 0.8 * gain_KN + per_token(0.0, 0.1) * tokens_N
        part, gain = mean_of(part_KN, tokens_N), mean_of(gain_KN, tokens_N)
        held += gain.low <= 1.0
        recovered += gain.low <= 0 or ratio_low(part, gain) <= 0.8
    least = 0.95 - 3 * math.sqrt(0.05 * 0.95 / rounds)
    assert held / rounds > least
    assert recovered / rounds > least
    if by_seed == 0.0 and texts == 40 and seeds == 1:
        assert held / rounds < 0.98  # nor wider than they need be
