"""The mechanism is the d_chi mechanism: statistics at real widths, likelihood ratios in low ones.

Every statistic is also shown the known wrong variants, and must refuse them.

Shapes: N draws, D hidden.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.entropy import SeededNoiseWarning, seeded_uniforms, system_uniforms
from blindtune.privacy.metric_dp import Mechanism, Privatizer, d_chi_noise

BATCH = 25  # tokens that a wrong variant gives one radius


def uniforms(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 1 - torch.rand(shape, generator=generator, dtype=torch.float64)


def privatizer(seed=0, table_VD=None, **mechanism):
    with pytest.warns(SeededNoiseWarning):
        return Privatizer(Mechanism(**mechanism), table_VD, testing_seed=seed)


def right(count, dimension, eta):
    return d_chi_noise(count, dimension, eta, uniforms(1))


def gamma_per_coordinate(count, dimension, eta):
    draw = uniforms(2)
    radius = -draw(count, dimension, dimension).log().sum(2) / eta if dimension < 9 else None
    if radius is None:  # Gamma(D) is close to normal
        generator = torch.Generator().manual_seed(5)
        normal = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
        radius = (dimension + math.sqrt(dimension) * normal) / eta
    return radius * (draw(count, dimension) - 0.5).sign()


def one_radius_a_batch(count, dimension, eta):
    noise = right(count, dimension, eta)
    radius = noise.norm(dim=1).view(-1, BATCH)[:, :1].expand(-1, BATCH).reshape(-1, 1)
    return noise / noise.norm(dim=1, keepdim=True) * radius


def gaussian_of_equal_norm(count, dimension, eta):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return normal * math.sqrt(dimension) / eta


def along_the_axes(count, dimension, eta):
    radius = right(count, dimension, eta).norm(dim=1)
    axis = (uniforms(4)(count) * dimension).ceil().long() - 1
    return torch.nn.functional.one_hot(axis, dimension) * radius[:, None]


def deviations(noise_ND, eta):
    """How many standard deviations each statistic is from what d_chi says (KS: x sqrt N)."""
    count, dimension = noise_ND.shape
    radius = noise_ND.norm(dim=1)
    direction = noise_ND / radius[:, None]
    mean_error = (radius.mean() - dimension / eta) / (math.sqrt(dimension / count) / eta)
    cdf = torch.special.gammainc(torch.full_like(radius, dimension), eta * radius.sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    kolmogorov = torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    centred = (radius - radius.mean()) / (radius.std() + 1e-300)
    batches = centred.view(-1, BATCH).mean(1)
    spread = batches.square().mean() * BATCH - 1
    fourth = direction.pow(4).mean() * dimension * (dimension + 2) / 3 - 1
    cosine = (direction[1:] * direction[:-1]).sum(1)
    return {
        "mean norm": mean_error.abs().item(),
        "Kolmogorov-Smirnov": kolmogorov.item() * math.sqrt(count),
        "neighbours' radii": (centred[1:] * centred[:-1]).mean().item() * math.sqrt(count),
        "batches' radii": spread.item() / math.sqrt(2 / len(batches)),
        "mean direction": abs(direction.mean(0).square().sum().item() * count - 1)
        / math.sqrt(2 / dimension),
        "fourth moment": abs(fourth.item()) * math.sqrt(count * dimension * 3 / 32),
        "neighbours' directions": abs(cosine.mean().item()) * math.sqrt(dimension * count),
        "radius and direction": abs((centred * direction[:, 0]).mean().item())
        * math.sqrt(dimension * count),
    }


LIMITS = 5.0
KS_LIMIT = 2.3  # p about 5e-5


def refused(noise_ND, eta):
    return {
        name
        for name, value in deviations(noise_ND, eta).items()
        if not abs(value) < (KS_LIMIT if name == "Kolmogorov-Smirnov" else LIMITS)
    }


@pytest.mark.parametrize(("dimension", "count"), [(384, 2000), (1024, 1000), (4096, 500)])
def test_noise_has_the_distribution_of_d_chi(dimension, count):
    assert refused(right(count, dimension, 50.0), 50.0) == set()


def test_system_entropy_makes_the_same_distribution():
    noise = d_chi_noise(1000, 384, 20.0, system_uniforms)
    assert max(deviations(noise, 20.0).values()) < 7  # fails less than once in a million runs


@pytest.mark.parametrize("mode", ["vector", "block-output"])
def test_privatizer_adds_that_noise_to_every_token_of_every_text(mode):
    machine = privatizer(eta=30.0, mode=mode)
    given_BLD = torch.randn(40, 25, 384, generator=torch.Generator().manual_seed(0))
    apply = machine.embeddings if mode == "vector" else machine.block_outputs
    out_BLD = apply(given_BLD)
    assert (out_BLD.shape, out_BLD.dtype) == (given_BLD.shape, torch.float32)
    assert refused((out_BLD.double() - given_BLD.double()).view(-1, 384), 30.0) == set()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (gamma_per_coordinate, {"mean norm", "Kolmogorov-Smirnov", "fourth moment"}),
        (one_radius_a_batch, {"neighbours' radii", "batches' radii"}),
        (gaussian_of_equal_norm, {"Kolmogorov-Smirnov"}),
        (along_the_axes, {"fourth moment"}),
        (lambda n, d, eta: right(n, d, 2 * eta), {"mean norm", "Kolmogorov-Smirnov"}),
        (lambda n, d, eta: right(n, d, eta).abs(), {"mean direction"}),
        (lambda n, d, eta: right(1, d, eta).expand(n, d), {"mean direction"}),
    ],
)
@pytest.mark.parametrize("dimension", [384, 1024])
def test_statistics_refuse_wrong_noise(wrong, expected, dimension):
    assert expected <= refused(wrong(1000, dimension, 50.0), 50.0)


# Likelihood ratios: the definition itself, where histograms can see it.


def masses(noise_ND, centre_D, eta, side):
    """Share of draws in each cell of a grid around the origin, cells of `side` / eta."""
    cell_ND = ((noise_ND + centre_D) * eta / side).round().long()
    half = 6
    inside = (cell_ND.abs() <= half).all(1)
    flat = torch.zeros(int(inside.sum()), dtype=torch.int64)
    for column in cell_ND[inside].T:
        flat = flat * (2 * half + 1) + column + half
    return torch.bincount(flat, minlength=(2 * half + 1) ** noise_ND.shape[1]) / len(noise_ND)


def exact_masses(centre_D, eta, side):
    """The same by integrating the density eta^D exp(-eta r) / (surface x Gamma(D))."""
    dimension, half, fine = len(centre_D), 6, 16
    axis = (torch.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5
    axes = torch.meshgrid(*[axis.double() * side / eta] * dimension, indexing="ij")
    points = torch.stack([a.reshape(-1) for a in axes], 1)
    constant = {1: eta / 2, 2: eta**2 / (2 * math.pi)}[dimension]
    mass = constant * torch.exp(-eta * (points - centre_D).norm(dim=1))
    mass = mass.view([2 * half + 1, fine] * dimension) * (side / eta / fine) ** dimension
    return mass.sum(list(range(1, 2 * dimension, 2))).reshape(-1)


def worst_excess(noise, other, eta, centre_D, side):
    """Largest p - exp(eta d) q over cells, in standard deviations."""
    bound = math.exp(eta * centre_D.norm().item())
    p, q = masses(noise, 0 * centre_D, eta, side), masses(other, centre_D, eta, side)
    deviation = ((p + bound**2 * q) / len(noise) + 1e-12).sqrt()
    return ((p - bound * q) / deviation).max().item()


shifts = st.floats(0.1, 1.5).flatmap(
    lambda r: st.floats(0, 2 * math.pi).map(lambda a: (r * math.cos(a), r * math.sin(a)))
)


@pytest.mark.parametrize("dimension", [1, 2])
@given(shift=shifts, eta=st.sampled_from([0.5, 3.0, 40.0]), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_likelihood_ratio_stays_below_exp_eta_distance(dimension, shift, eta, seed):
    centre_D = torch.tensor(shift[:dimension], dtype=torch.float64) / eta
    machine = privatizer(seed, eta=eta, mode="vector")
    zeros = torch.zeros(60_000, dimension, dtype=torch.float64)
    noise, other = machine.embeddings(zeros), machine.embeddings(zeros)
    assert worst_excess(noise, other, eta, centre_D, 0.5) < 5
    expected = exact_masses(centre_D, eta, 0.5)
    error = (masses(other, centre_D, eta, 0.5) - expected).abs() - 0.02 * expected
    assert (error < 5 * (expected / 60_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize(
    ("wrong", "dimension", "shift"),
    [(gaussian_of_equal_norm, 1, (1.5,)), (gamma_per_coordinate, 2, (0.5, 0.5))],
)
def test_likelihood_ratio_refuses_wrong_noise(wrong, dimension, shift):
    noise = wrong(60_000, dimension, 3.0)
    centre_D = torch.tensor(shift, dtype=torch.float64) / 3.0
    assert worst_excess(noise, noise.flip(0), 3.0, centre_D, 0.5) > 5


def test_token_mode_keeps_the_ratio_between_all_words():
    table_VD = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.0, 0.7], [-1.0, 0.2], [0.5, 0.6]])
    eta, draws = 2.0, 40_000
    machine = privatizer(0, table_VD, eta=eta)
    out = machine.tokens(torch.arange(5)[:, None].expand(5, draws))
    p = torch.stack([row.bincount(minlength=5) for row in out]) / draws
    bound = torch.exp(eta * torch.cdist(table_VD, table_VD))
    excess = p[:, None] - bound[:, :, None] * p[None]
    deviation = ((p[:, None] + bound[:, :, None] ** 2 * p[None]) / draws).sqrt()
    assert (excess < 5 * deviation).all()
    assert (p > 0.01).all()
    assert (p.argmax(1) == torch.arange(5)).all()


# Modes, factors, randomness, refusals.


def test_token_mode_is_the_nearest_row_of_the_noisy_embedding():
    table_VD = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(300).view(10, 30)
    out = privatizer(5, table_VD, eta=3.0).tokens(ids)
    noisy = privatizer(5, eta=3.0, mode="vector").embeddings(table_VD[ids].double())
    distance = (noisy.view(-1, 1, 32) - table_VD.double()).norm(dim=2)
    assert torch.equal(out.view(-1), distance.argmin(1))
    assert 0.1 < (out != ids).double().mean() < 0.95
    by_product = (noisy.view(-1, 32) @ table_VD.double().T).argmax(1)
    assert not torch.equal(out.view(-1), by_product)


def test_factor_divides_eta_and_zero_leaves_tokens_alone():
    given_BLD = torch.randn(2, 1000, 64, generator=torch.Generator().manual_seed(0)).double()
    factor_BL = torch.full((2, 1000), 0.25)
    factor_BL[1] = 0
    out = privatizer(eta=10.0, mode="vector").embeddings(given_BLD, factor_BL)
    assert refused(out[0] - given_BLD[0], 40.0) == set()
    assert torch.equal(out[1], given_BLD[1])
    table_VD = torch.randn(50, 8)
    table_VD[40] = table_VD[3]  # equal rows: a spared token keeps its own id
    ids = torch.tensor([[40, 1, 2], [7, 40, 49]])
    machine = privatizer(0, table_VD, eta=0.1)
    assert torch.equal(machine.tokens(ids, torch.zeros(2, 3)), ids)
    assert not torch.equal(machine.tokens(ids), ids)


def test_clipped_states_are_bounded_before_the_noise():
    machine = privatizer(eta=1e6, mode="block-output", clip_norm=2.0)
    hidden = torch.tensor([[[30.0, 40.0], [0.3, 0.4], [0.0, 0.0]]])
    expected = torch.tensor([[[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]]])
    assert torch.allclose(machine.block_outputs(hidden), expected, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 50.0])
def test_outputs_lie_on_a_grid_that_ignores_the_input(eta):
    given_BLD = torch.rand(1, 20, 8, dtype=torch.float64) * 1e-7
    out = privatizer(eta=eta, mode="vector").embeddings(given_BLD)
    steps = out * 2.0 ** math.ceil(math.log2(eta * 1024))
    assert torch.equal(steps, steps.round())
    assert out.unique().numel() > 150


def test_seeded_noise_warns_repeats_and_moves_on():
    given_BLD = torch.zeros(1, 3, 16)
    first = privatizer(7, eta=1.0, mode="vector")
    second = privatizer(7, eta=1.0, mode="vector")
    one = first.embeddings(given_BLD)
    assert torch.equal(one, second.embeddings(given_BLD))
    assert not torch.equal(one, first.embeddings(given_BLD))
    with pytest.warns(SeededNoiseWarning, match="nothing is protected"):
        seeded_uniforms(7)


def test_unseeded_noise_never_repeats_whatever_torch_is_seeded_with():
    given_BLD = torch.zeros(1, 3, 16)
    outs = []
    for _ in range(3):
        torch.manual_seed(0)
        machine = Privatizer(Mechanism(eta=1.0, mode="vector"))
        outs += [machine.embeddings(given_BLD), machine.embeddings(given_BLD)]
    assert len({tuple(out.view(-1).tolist()) for out in outs}) == 6


def test_system_uniforms_are_uniform_and_never_zero():
    draw = system_uniforms(100, 1000)
    assert (draw.shape, draw.dtype) == ((100, 1000), torch.float64)
    assert 0 < draw.min() < 1e-3
    assert 1 - 1e-3 < draw.max() <= 1
    histogram = (draw * 100).ceil().long().view(-1).bincount(minlength=101)[1:].double()
    assert ((histogram - 1000).square() / 1000).sum() < 99 + 7 * math.sqrt(198)
    assert system_uniforms(0, 5).shape == (0, 5)


@pytest.mark.parametrize(("byte", "expected"), [(b"\x00", 2.0**-53), (b"\xff", 1.0)])
def test_system_uniforms_at_their_ends(monkeypatch, byte, expected):
    monkeypatch.setattr("os.urandom", lambda count: byte * count)
    assert system_uniforms(2).tolist() == [expected] * 2


def test_portions_change_nothing_but_memory(monkeypatch):
    given_BLD = torch.randn(3, 5, 4)
    monkeypatch.setattr("blindtune.privacy.metric_dp.NOISE_NUMBERS", 8)
    out = privatizer(eta=1e5, mode="vector").embeddings(given_BLD)
    assert torch.allclose(out, given_BLD, atol=1e-2)
    table_VD = torch.randn(9, 4)
    ids = torch.randint(9, (4, 7))
    assert torch.equal(privatizer(0, table_VD, eta=1e5).tokens(ids), ids)


def test_gradients_stop_and_half_precision_stays():
    given_BLD = torch.randn(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    out = privatizer(eta=1.0, mode="vector").embeddings(given_BLD)
    assert (out.dtype, out.requires_grad) == (torch.bfloat16, False)


def test_empty_batches_stay_empty():
    assert privatizer(eta=1.0, mode="vector").embeddings(torch.zeros(0, 5, 4)).shape == (0, 5, 4)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    assert privatizer(0, torch.randn(3, 2), eta=1.0).tokens(ids).shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta"),
        ({"eta": math.nan}, "eta"),
        ({"eta": math.inf}, "eta"),
        ({"eta": 1.0, "mode": "text"}, "mode"),
        ({"eta": 1.0, "clip_norm": 1.0}, "no clip_norm in token mode"),
        ({"eta": 1.0, "mode": "block-output", "clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_mechanism_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        Mechanism(**options)


def test_modes_do_not_mix():
    with pytest.raises(ConfigError, match="table in token and exponential mode"):
        Privatizer(Mechanism(eta=1.0))
    with pytest.raises(ConfigError, match="none in the others"):
        Privatizer(Mechanism(eta=1.0, mode="vector"), torch.randn(3, 2))
    vector = privatizer(eta=1.0, mode="vector")
    with pytest.raises(ConfigError, match="token or exponential mode, got 'vector'"):
        vector.tokens(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="block-output mode, got 'vector'"):
        vector.block_outputs(torch.zeros(1, 1, 2))


def test_bad_inputs_are_refused():
    vector = privatizer(eta=1.0, mode="vector")
    with pytest.raises(DataError, match="finite"):
        vector.embeddings(torch.tensor([[[math.nan, 0.0]]]))
    with pytest.raises(DataError, match=r"factors \[1, 2\]"):
        vector.embeddings(torch.zeros(1, 2, 3), torch.ones(2, 1))
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(DataError, match="between 0 and 1"):
            vector.embeddings(torch.zeros(1, 1, 3), torch.tensor([[bad]]))
    with pytest.raises(DataError, match="ids below 3"):
        privatizer(0, torch.randn(3, 2), eta=1.0).tokens(torch.tensor([[3]]))
