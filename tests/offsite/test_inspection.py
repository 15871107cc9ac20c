"""What `inspect` tells, against the opened packages themselves."""

import dataclasses

import msgspec
import pytest
import torch

from blindtune.errors import ConfigError, MismatchError, PackageError
from blindtune.evaluation.inspection import inspect
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.writing import write_package
from blindtune.models.decoder import Decoder
from blindtune.models.tokenizers import FILE_NAMES
from blindtune.offsite.emulator import open_emulator, package_tensors
from blindtune.offsite.inspected_adapter import InspectedAdapter
from blindtune.offsite.inspected_emulator import InspectedEmulator
from blindtune.offsite.model_owner.emulation import EmulatorConfig, emulate
from blindtune.offsite.package_facts import spans
from tiny_models import tiny_model

FILES = ["manifest.json", "manifest.sha256"]


def test_an_emulator(world):
    found = inspect(world.path / "emulator")
    opened = open_emulator(world.path / "emulator")
    assert isinstance(found, InspectedEmulator)
    assert (found.id, found.model) == (opened.id, world.study.fingerprint)
    assert found.parameters == sum(t.numel() for t in package_tensors(opened.model).values())
    assert found.full_parameters == tiny_model("llama").num_parameters()
    for layer, module in zip(found.layers, Decoder(opened.model).layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in module.parameters())
        assert layer.bytes == 4 * layer.parameters
    kinds = [layer.kind for layer in found.layers]
    assert kinds[0] == kinds[-1] == "adapter"
    assert kinds.count("harmonizer") == 2
    assert kinds.count("compressed") == 4
    on_disk = sum(p.stat().st_size for p in found.path.iterdir() if p.name not in FILES)
    assert found.bytes == on_disk
    assert found.max_length == 128
    assert found.tokenizer == "WordLevel, 100 tokens"


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.8])
def test_what_is_unchanged_is_counted(world, tmp_path, beta):
    """Against the values: every parameter of the package that the full model has too."""
    emulate(
        world.study,
        tmp_path / "e",
        EmulatorConfig(adapter_layers=1, alpha=0.4, beta=beta, reading="removed"),
    )
    found = inspect(tmp_path / "e")
    full = package_tensors(tiny_model("llama"))
    emulator = package_tensors(open_emulator(tmp_path / "e").model)
    same = sum(t.numel() for n, t in emulator.items() if n in full and torch.equal(t, full[n]))
    assert found.unchanged_parameters == same
    kinds = {layer.kind for layer in found.layers}
    assert kinds == {"adapter", "harmonizer", "raw" if beta == 0 else "compressed"}
    assert any(f"{same / found.full_parameters:.1%}" in line for line in found.reveals)


@pytest.mark.parametrize(
    ("beta", "factored"),
    [(0.3, set()), (0.7, {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})],
)
def test_weights_stored_as_a_dense_product_are_not_called_unchanged(
    world, tmp_path, beta, factored
):
    """With feed-forward compression: told where the manifest can tell, else an upper bound."""
    config = EmulatorConfig(
        adapter_layers=1, alpha=0.4, beta=beta, reading="removed", weighted=False, feed_forward=True
    )
    emulate(world.study, tmp_path / "e", config)
    found = inspect(tmp_path / "e")
    compressed = [layer for layer in found.layers if layer.kind == "compressed"]
    feed_forward = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    for layer in compressed:
        assert set(layer.ranks) & feed_forward == factored
        attention = {f"self_attn.{x}_proj" for x in "qkvo"}
        assert set(layer.dense) | set(layer.ranks) == attention | factored
        assert not set(layer.dense) & set(layer.ranks)
    full = package_tensors(tiny_model("llama"))
    emulator = package_tensors(open_emulator(tmp_path / "e").model)
    same = sum(t.numel() for n, t in emulator.items() if n in full and torch.equal(t, full[n]))
    line = next(line for line in found.reveals if "parameters are in the package" in line)
    story = next(line for line in found.reveals if "dense product" in line)
    if factored:
        assert found.unchanged_parameters == same
        assert "at most" not in line
        assert "attention and feed-forward weights" in story
    else:
        assert found.unchanged_parameters > same
        assert line.startswith("at most")
        assert "the manifest does not tell" in story


def test_tensors_that_the_manifest_does_not_describe_are_refused(world, tmp_path):
    package = open_package(world.path / "emulator", "emulator")
    tensors = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    files = {name: package.read_file(name) for name in FILE_NAMES if name in package.manifest.files}
    name = next(n for n in tensors if ".down.0" in n)
    wrong = {
        "more": tensors | {"model.secret": torch.ones(3)},
        "less": {n: t for n, t in tensors.items() if n != name},
        "other": tensors | {name: tensors[name][:-1].clone()},
    }
    for case, changed in wrong.items():
        write_package(tmp_path / case, package.manifest, changed, files)
        with pytest.raises(MismatchError, match="tensors do not fit"):
            inspect(tmp_path / case)


def test_an_adapter_with_a_tensor_of_another_layer_is_refused(world, tmp_path):
    package = open_package(world.path / "adapter", "adapter")
    tensors = package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})
    for name in ("layers.3.mlp.up_proj.weight", "lm_head.weight"):
        odd = tensors | {name: torch.ones(2, 2)}
        write_package(tmp_path / name, package.manifest, odd, {})
        with pytest.raises(PackageError, match=rf"adapter layers 0, 7 only, got {name}"):
            inspect(tmp_path / name)


def test_dropped_layers_are_told_by_number_only(world, tmp_path):
    study = dataclasses.replace(
        world.study, stand_ins=torch.nn.ModuleList([torch.nn.Identity() for _ in range(6)])
    )
    emulate(study, tmp_path / "e", EmulatorConfig(adapter_layers=1, alpha=0.4, beta=1.0))
    found = inspect(tmp_path / "e")
    assert len(found.layers) == 6
    assert any("2 dropped layers" in line for line in found.reveals)


def test_a_full_adapter(world):
    found = inspect(world.path / "adapter")
    assert isinstance(found, InspectedAdapter)
    assert (found.id, found.emulator) == (world.full.adapter_id, world.emulation.id)
    assert (found.training, found.lora_rank) == ("full", None)
    assert [layer.index for layer in found.layers] == [0, 7]
    layers = Decoder(world.full.emulator.model).layers
    for layer in found.layers:
        squares = sum(
            float(p.detach().double().pow(2).sum()) for p in layers[layer.index].parameters()
        )
        assert layer.norm == pytest.approx(squares**0.5)


def test_a_lora_adapter(world):
    found = inspect(world.path / "lora")
    lora = open_package(world.path / "lora", "adapter")
    tensors = lora.read_tensors({n: (f.shape, f.dtype) for n, f in lora.header.items()})
    assert (found.training, found.lora_rank, found.lora_alpha) == ("lora", 4, 32.0)
    for layer in found.layers:
        total = 0.0
        for path in found.lora_targets:
            stem = f"layers.{layer.index}.{path}"
            product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            total += float((8.0 * product.double()).pow(2).sum())
        assert layer.norm == pytest.approx(total**0.5, rel=1e-5)
        assert layer.norm > 0


@pytest.mark.parametrize("change", ["alone", "ranks", "name"])
def test_lora_factors_that_do_not_fit_are_refused(world, tmp_path, change):
    lora = open_package(world.path / "lora", "adapter")
    tensors = lora.read_tensors({n: (f.shape, f.dtype) for n, f in lora.header.items()})
    name = next(n for n in tensors if ".lora_B." in n)
    factor = tensors.pop(name)
    if change == "ranks":
        tensors[name] = torch.zeros(len(factor), 1)
    elif change == "name":
        tensors[name.replace("lora_B", "lora_C")] = factor
    write_package(tmp_path / "odd", lora.manifest, tensors, {})
    with pytest.raises(PackageError, match="ask for the package again"):
        inspect(tmp_path / "odd")


@pytest.mark.parametrize("rank", [3, 5, 40_000])
def test_no_product_of_factors_is_larger_than_they_are(world, tmp_path, rank):
    """A rank above both sides is legal; what is formed then is the small product."""
    lora = open_package(world.path / "lora", "adapter")
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(5, rank, generator=draw), torch.randn(rank, 4, generator=draw)
    tensors = {"layers.0.x.lora_A.weight": down, "layers.0.x.lora_B.weight": up}
    stated = msgspec.structs.replace(lora.manifest.lora, rank=rank, alpha=float(rank))
    write_package(
        tmp_path / "odd", msgspec.structs.replace(lora.manifest, lora=stated), tensors, {}
    )
    expected = float((up.double() @ down.double()).norm())
    assert inspect(tmp_path / "odd").layers[0].norm == pytest.approx(expected)


def test_no_package(tmp_path):
    with pytest.raises(ConfigError, match="expected a package, no such directory"):
        inspect(tmp_path / "none")


@pytest.mark.parametrize(
    ("indices", "words"),
    [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")],
)
def test_spans(indices, words):
    assert spans(indices) == words
