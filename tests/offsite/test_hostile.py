"""Packages whose hashes are right and whose content is hostile: refused, cheaply, by name."""

import pytest
import torch

from blindtune.errors import PackageError
from blindtune.exchange.package import open_package, write_package
from blindtune.models.loading import load_model
from blindtune.offsite.plugin import merge, plug_in

Q_PROJ = "self_attn.q_proj"


def forged_adapter(world, out, name, tensors):
    """A copy of the adapter package `name`, with some of its tensors replaced."""
    package = open_package(world.path / name, "adapter")
    own = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    assert set(tensors) <= set(own)
    write_package(out, package.manifest, own | tensors, {})
    return open_package(out, "adapter")


def huge_factors(world, value=1e30):
    package = open_package(world.path / "lora", "adapter")
    return {
        n: torch.full(f.shape, value)
        for n, f in package.header.items()
        if n.startswith(f"layers.7.{Q_PROJ}")
    }


def huge_weight(value=1e38):
    return {f"layers.7.{Q_PROJ}.weight": torch.full((32, 32), value)}


def test_factors_with_an_infinite_product_leave_the_model_unchanged(world, tmp_path):
    package = forged_adapter(world, tmp_path / "odd", "lora", huge_factors(world))
    model = load_model(world.path / "model")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PackageError, match=rf"float32.* layer 7, {Q_PROJ}.weight"):
        merge(model, package)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(PackageError, match="layer 7"):
        plug_in(world.path / "model", tmp_path / "odd", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_weights_too_large_for_the_written_dtype_are_refused(world, tmp_path, dry):
    forged_adapter(world, tmp_path / "odd", "adapter", huge_weight())
    out = None if dry else tmp_path / "tuned"
    with pytest.raises(PackageError, match=rf"float16.* layer 7, {Q_PROJ}.weight"):
        plug_in(world.path / "model", tmp_path / "odd", out, dtype="float16")
    assert not (tmp_path / "tuned").exists()


def test_large_finite_weights_change_by_a_finite_amount(world, tmp_path):
    forged_adapter(world, tmp_path / "odd", "adapter", huge_weight())
    change = plug_in(world.path / "model", tmp_path / "odd", None).relative_change
    assert 1e30 < change[7] < float("inf")
