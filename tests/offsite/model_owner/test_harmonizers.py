"""The closed form against slow oracles."""

import pytest
import torch

from blindtune.offsite.model_owner.harmonizers import Moments, fit_harmonizer

D, N = 12, 400


def normalize(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator) * torch.linspace(0.2, 3, D) + 0.5


def moments_of(x, residual, batches=1):
    moments = Moments(D)
    for a, b in zip(normalize(x).chunk(batches), residual.chunk(batches), strict=True):
        moments.add(a, b)
    return moments


def test_a_linear_residual_of_low_rank_is_found_exactly(states):
    torch.manual_seed(1)
    residual = normalize(states) @ torch.randn(D, 3) @ torch.randn(3, D) + torch.randn(D)
    harmonizer, explained = fit_harmonizer(moments_of(states, residual), 6, ridge=1e-9)
    assert explained == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(harmonizer(states), states + residual, atol=2e-3, rtol=2e-3)


def test_it_is_the_best_linear_map_of_its_rank(states):
    """Against gradient descent on the same objective, started from the closed form itself."""
    torch.manual_seed(2)
    features = normalize(states)
    residual = torch.tanh(features @ torch.randn(D, D)) + 0.1 * torch.randn(N, D)
    harmonizer, explained = fit_harmonizer(moments_of(states, residual), 8, ridge=1e-9)
    achieved = (harmonizer(states) - states - residual).pow(2).mean().item()
    variance = (residual - residual.mean(0)).pow(2).mean().item()
    assert 1 - achieved / variance == pytest.approx(explained, abs=1e-3)
    down = torch.linalg.qr(torch.randn(D, 4)).Q.contiguous().requires_grad_()
    up, bias = torch.zeros(4, D).requires_grad_(), torch.zeros(D).requires_grad_()
    optimizer = torch.optim.LBFGS([down, up, bias], max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (features @ down @ up + bias - residual).pow(2).mean()
        loss.backward()
        return loss

    found = optimizer.step(closure).item()
    assert achieved <= found * 1.001


def test_the_map_is_linear_on_every_input(states):
    """Even far outside of the calibration data: the two units of a direction add up to it."""
    torch.manual_seed(3)
    harmonizer, _ = fit_harmonizer(moments_of(states, torch.randn(N, D)), 10)
    strange = torch.randn(2000, D) * torch.logspace(-3, 4, D)
    features = harmonizer.normalize(strange)
    half = harmonizer.down.weight[:5].T @ harmonizer.up.weight[:, :5].T
    expected = strange + features @ half + harmonizer.up.bias
    torch.testing.assert_close(harmonizer(strange), expected, rtol=1e-5, atol=1e-4)


def test_every_unit_can_learn(states):
    """No unit of a fitted harmonizer is dead, and none is a constant."""
    torch.manual_seed(4)
    harmonizer, _ = fit_harmonizer(moments_of(states, torch.randn(N, D)), 10)
    harmonizer(states).pow(2).sum().backward()
    assert bool((harmonizer.down.weight.grad.norm(dim=1) > 0).all())
    assert bool((harmonizer.up.weight.grad.norm(dim=0) > 0).all())


def test_moments_do_not_depend_on_batches(states):
    residual = states.roll(1, 1)
    one, many = moments_of(states, residual), moments_of(states, residual, batches=8)
    torch.testing.assert_close(one.features_DD, many.features_DD, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(one.cross_DD, many.cross_DD, rtol=1e-5, atol=1e-3)
    assert one.tokens == many.tokens == N


def test_rank_is_capped_at_twice_the_width(states):
    harmonizer, _ = fit_harmonizer(moments_of(states, states), 10 * D)
    assert harmonizer.down.out_features == 2 * D
