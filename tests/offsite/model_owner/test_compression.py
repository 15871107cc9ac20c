"""Rank compression against dense oracles, on every layout of projections."""

import pytest
import torch

from blindtune.models.blocks import LowRankLinear
from blindtune.models.decoder import Decoder
from blindtune.offsite.model_owner import compression
from blindtune.offsite.model_owner.compression import (
    compress_layer,
    compressed_rank,
    low_rank_factors,
)
from tiny_models import FAMILY_NAMES, tiny_model


@pytest.mark.parametrize(
    ("shape", "beta", "reading", "rank"),
    [
        ((576, 576), 0.8, "removed", 115),
        ((192, 576), 0.8, "removed", 38),  # grouped-query keys: the smaller side counts
        ((576, 576), 0.8, "kept", 460),
        ((10, 10), 0.9, "removed", 1),
        ((10, 10), 1.0, "removed", 1),  # never 0
        ((10, 10), 0.0, "removed", 10),
        ((10, 10), 0.7, "removed", 3),  # 0.3 * 10 is 2.999... in floating point
    ],
)
def test_compressed_rank(shape, beta, reading, rank):
    assert compressed_rank(shape, beta, reading) == rank


def test_plain_factors_are_the_truncated_svd():
    torch.manual_seed(0)
    weight = torch.randn(20, 14)
    up, down = low_rank_factors(weight, 5)
    u, s, v = torch.linalg.svd(weight)
    oracle = u[:, :5] @ torch.diag(s[:5]) @ v[:5]
    torch.testing.assert_close(up @ down, oracle, atol=1e-5, rtol=1e-4)


def test_randomised_svd_is_close_and_repeatable():
    torch.manual_seed(0)
    weight = torch.randn(1100, 60) @ torch.randn(60, 1100) + 0.1 * torch.randn(1100, 1100)
    first, again = low_rank_factors(weight, 60), low_rank_factors(weight, 60)
    torch.testing.assert_close(first[0] @ first[1], again[0] @ again[1], rtol=0, atol=0)
    s = torch.linalg.svdvals(weight)
    best = s[60:].pow(2).sum().sqrt()
    assert (weight - first[0] @ first[1]).norm() <= 1.005 * best


def test_weighted_factors_beat_plain_ones_on_the_inputs():
    torch.manual_seed(0)
    inputs = torch.randn(500, 14) * torch.logspace(-2, 1, 14)
    weight = torch.randn(20, 14)
    moment = inputs.T @ inputs / 500

    def error(factors):
        return ((weight - factors[0] @ factors[1]) @ inputs.T).norm()

    weighted = error(low_rank_factors(weight, 5, moment))
    assert weighted < 0.9 * error(low_rank_factors(weight, 5))
    # No map of rank 5 does better: the whitened problem solved by a full SVD.
    root = torch.linalg.cholesky(moment.double() + 1e-12 * torch.eye(14).double())
    s = torch.linalg.svdvals(weight.double() @ root)
    assert weighted == pytest.approx((s[5:].pow(2).sum() * 500).sqrt().item(), rel=1e-3)


def factors_by_outputs(weight, rank, moment):
    """The plain way for any shape: eigenvectors of W S W^T, outputs x outputs."""
    moment = moment.double()
    moment = moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment)).double()
    wide = weight.double()
    _, vectors = torch.linalg.eigh(wide @ moment @ wide.T)
    up = vectors[:, -rank:].flip(-1)
    down = up.T @ wide
    balance = (down.norm() / up.norm()).sqrt()
    return (up * balance).to(weight.dtype), (down / balance).to(weight.dtype)


def moments_of(kind, size):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, size, generator=generator) * torch.logspace(-2, 1, size)
    if kind == "flat":  # a few directions hold everything
        inputs = inputs[:, :4] @ torch.randn(4, size, generator=generator)
    if kind == "one direction, rounded":  # float32 leaves eigenvalues below 0
        inputs = 100 * inputs[:, :1] @ torch.randn(1, size, generator=generator)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("kind", ["full", "flat", "one direction, rounded"])
@pytest.mark.parametrize("shape", [(90, 30), (31, 30), (30, 30), (20, 30)])
def test_weighted_factors_are_those_of_the_problem_in_the_outputs(kind, shape):
    rows, columns = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    moment = moments_of(kind, columns)
    for rank in (1, 3, min(shape) - 4):
        if rows <= columns:
            for new, old in zip(
                low_rank_factors(weight, rank, moment),
                factors_by_outputs(weight, rank, moment),
                strict=True,
            ):
                assert torch.equal(new, old)
            continue
        weight = weight.double()
        new, old = (
            up @ down
            for up, down in (
                low_rank_factors(weight, rank, moment),
                factors_by_outputs(weight, rank, moment),
            )
        )
        if kind == "full":
            assert (new - old).norm() < 1e-9 * old.norm()
        # Where directions hold nothing it does not matter which is kept.
        values, vectors = torch.linalg.eigh(moment.double())
        root = vectors * values.clamp_min(0).sqrt()
        assert ((weight - new) @ root).norm() < 1.001 * ((weight - old) @ root).norm()


@pytest.mark.parametrize("flat", ["weight", "moment", "both"])
def test_tall_weights_without_enough_directions_keep_what_they_have(flat):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator)
    if flat != "moment":
        weight = weight[:, :3] @ torch.randn(3, 16, generator=generator)
    moment = torch.zeros(16, 16) if flat != "weight" else torch.eye(16)
    up, down = low_rank_factors(weight, 8, moment)
    assert bool(up.isfinite().all() and down.isfinite().all())
    if flat == "weight":
        torch.testing.assert_close(up @ down, weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_runs_and_full_rank_changes_nothing(name):
    model = tiny_model(name)
    decoder = Decoder(model)
    ids = torch.arange(12)[None] % 100 + 3
    before = model(ids).logits
    with torch.no_grad():
        compress_layer(decoder, 2, 0.0, reading="removed", feed_forward=True)
    torch.testing.assert_close(model(ids).logits, before, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_small_ranks_are_shipped_as_factors(name):
    model = tiny_model(name)
    decoder = Decoder(model)
    count = sum(p.numel() for p in decoder.layers[2].parameters())
    ranks = compress_layer(decoder, 2, 0.9, reading="removed")
    assert ranks
    for projection in decoder.projections(2):
        assert isinstance(projection.module, LowRankLinear) == (projection.path in ranks)
        for weight, rank in zip(projection.weights(), ranks.get(projection.path, ()), strict=False):
            assert torch.linalg.matrix_rank(weight, rtol=1e-4) <= rank
    assert sum(p.numel() for p in decoder.layers[2].parameters()) < count
    assert bool(model(torch.arange(8)[None] + 3).logits.isfinite().all())


def test_factors_that_would_not_be_smaller_stay_dense_but_lose_the_rank():
    model = tiny_model("llama")
    decoder = Decoder(model)
    count = model.num_parameters()
    assert compress_layer(decoder, 2, 0.3, reading="removed") == {}
    assert model.num_parameters() == count
    weight = decoder.projections(2)[0].weights()[0]
    rank = compressed_rank(tuple(weight.shape), 0.3, "removed")
    assert torch.linalg.matrix_rank(weight, rtol=1e-4) == rank


def test_projections_that_read_the_same_input_share_one_root(monkeypatch):
    """Gate and up are tall; the root of the moment of what they read is found once for both."""
    found, real = [], compression.moment_root
    monkeypatch.setattr(compression, "moment_root", lambda *a: found.append(1) or real(*a))
    shared, apart = tiny_model("llama"), tiny_model("llama")
    decoder = Decoder(shared)
    paths = [p.path for p in (*decoder.projections(2), *decoder.feed_forward(2))]
    moments = {p: moments_of("full", s) for p, s in zip(paths, sizes_of(decoder), strict=True)}
    moments["mlp.up_proj"] = moments["mlp.gate_proj"]
    copies = {path: moment.clone() for path, moment in moments.items()}
    calls = []
    for model, by_path in ((shared, moments), (apart, copies)):
        found.clear()
        compress_layer(
            Decoder(model), 2, 0.5, reading="kept", second_moments=by_path, feed_forward=True
        )
        calls.append(len(found))
    assert calls[0] == calls[1] - 1
    for one, other in zip(shared.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


def sizes_of(decoder):
    return [p.in_features for p in (*decoder.projections(2), *decoder.feed_forward(2))]
