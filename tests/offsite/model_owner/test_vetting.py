"""Poisoned adapters: what would ruin the model is refused, and honest ones pass."""

import msgspec
import pytest
import torch

from blindtune.errors import ConfigError, DataError, MismatchError, ModelError, PolicyError
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.writing import write_package
from blindtune.models.decoder import Decoder
from blindtune.models.loading import load_model, load_tokenizer
from blindtune.offsite.model_owner import plugin
from blindtune.offsite.model_owner.plugin import plug_in
from blindtune.offsite.model_owner.vetting import (
    ChangeBounds,
    LayerChange,
    _largest_singular_value,
    check_changes,
    check_loss,
    measure_changes,
    public_windows,
)


def poison(world, out, change, name="adapter"):
    """An adapter of the world with some of its tensors changed, well-formed as any other."""
    package = open_package(world.path / name, "adapter")
    expected = {n: (facts.shape, facts.dtype) for n, facts in package.header.items()}
    tensors = package.read_tensors(expected)
    write_package(out, package.manifest, {n: change(n, t) for n, t in tensors.items()}, {})
    return out


@pytest.mark.parametrize("name", ["adapter", "lora"])
def test_honest_adapters_pass_and_are_measured(world, name):
    plugged = plug_in(world.path / "model", world.path / name, None)
    assert [change.layer for change in plugged.changes] == list(plugged.relative_change)
    for change in plugged.changes:
        assert change.relative == pytest.approx(plugged.relative_change[change.layer], rel=1e-4)
        assert 0 < change.spectral < 1
        assert 0 < change.concentration <= 1
    assert plugged.public_loss is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # the network is silenced
        (lambda n, t: torch.zeros_like(t) + (0 if t.ndim > 1 else t), "of its (size|norm)"),
        # its weights are noise
        (lambda n, t: t + t.std() * torch.randn_like(t) * (t.ndim > 1), "of its (size|norm)"),
        # one projection is turned around
        (lambda n, t: -t if n == "layers.0.self_attn.o_proj.weight" else t, "o_proj"),
        # a norm's gain is raised tenfold
        (lambda n, t: 10 * t if n.endswith("0.input_layernorm.weight") else t, "input_layernorm"),
        # one row answers to one trigger, as a rank-one edit would make it
        (
            lambda n, t: t + 100 * torch.eye(*t.shape)[:1].T @ torch.eye(*t.shape)[:1]
            if n == "layers.0.mlp.down_proj.weight" and t.shape[0] == t.shape[1]
            else (t + 50 * torch.nn.functional.one_hot(torch.tensor(0), t.shape[1])[None]
                  if n == "layers.0.mlp.down_proj.weight" else t),
            "down_proj",
        ),
    ],
    ids=["zeros", "noise", "reversed", "gain", "rank one"],
)  # fmt: skip
def test_harmful_adapters_are_refused(world, tmp_path, change, message):
    torch.manual_seed(0)
    adapter = poison(world, tmp_path / "poisoned", change)
    with pytest.raises(PolicyError, match=rf"{message}.*--accept-large-change"):
        plug_in(world.path / "model", adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["poisoned"]
    accepted = plug_in(world.path / "model", adapter, None, accept_large_change=True)
    assert max(c.spectral for c in accepted.changes) > 1 or (
        max(c.relative for c in accepted.changes) > 0.5
    )


def test_a_poisoned_lora_is_refused(world, tmp_path):
    adapter = poison(world, tmp_path / "poisoned", lambda n, t: t * 100, name="lora")
    with pytest.raises(PolicyError, match=r"layer \d+"):
        plug_in(world.path / "model", adapter, None)


def test_harm_within_the_norms_shows_on_public_text(world, tmp_path):
    public = world.path / "public.txt"
    plugged = plug_in(world.path / "model", world.path / "adapter", None, data=public)
    before, after = plugged.public_loss
    assert 0 < after < before + 0.5
    with pytest.raises(PolicyError, match=r"raise the loss on the public text from \d"):
        plug_in(
            world.path / "model",
            poison(world, tmp_path / "reversed", lambda n, t: -t if t.ndim > 1 else t),
            tmp_path / "out",
            data=public,
            bounds=ChangeBounds(
                max_spectral_change=10, max_layer_change=10, max_loss_increase=1e-6
            ),
        )
    assert not (tmp_path / "out").exists()


def test_a_little_public_text_is_enough(world, tmp_path):
    text = (world.path / "public.txt").read_text()
    for size in (1, 100, 127):
        (tmp_path / "little.txt").write_text(text[:size])
        plugged = plug_in(
            world.path / "model", world.path / "adapter", None, data=tmp_path / "little.txt"
        )
        assert min(plugged.public_loss) > 0
    (tmp_path / "none.txt").write_text(" ")
    with pytest.raises(DataError, match=r"none.txt: .* give records .* or text"):
        plug_in(world.path / "model", world.path / "adapter", None, data=tmp_path / "none.txt")


def test_public_text_is_read_within_the_models_context(world):
    model, tokenizer = load_model(world.path / "model"), load_tokenizer(world.path / "model")
    wanted = public_windows(model, tokenizer, world.path / "public.txt", max_length=64)
    model.config.max_position_embeddings = 64
    read = public_windows(model, tokenizer, world.path / "public.txt")
    assert read.fingerprint() == wanted.fingerprint()


@pytest.fixture
def read_and_scored(monkeypatch):
    """What is done with public text, in order."""
    done = []

    def noted(name):
        real = getattr(plugin, name)
        monkeypatch.setattr(plugin, name, lambda *a: done.append(name) or real(*a))

    noted("public_windows")
    noted("public_loss")
    return done


def test_public_text_is_read_once_and_scored_when_an_adapter_fits(
    world, tmp_path, monkeypatch, read_and_scored
):
    asked = {"data": world.path / "public.txt"}
    plug_in(world.path / "model", world.path / "adapter", None, **asked)
    assert read_and_scored == ["public_windows", "public_loss", "public_loss"]
    read_and_scored.clear()
    harmful = poison(world, tmp_path / "harmful", lambda n, t: 9 * t)
    with pytest.raises(PolicyError):
        plug_in(world.path / "model", harmful, None, **asked)
    monkeypatch.setattr(plugin, "fingerprint", lambda model: 64 * "0")
    with pytest.raises(MismatchError, match="expected an adapter for this model"):
        plug_in(world.path / "model", world.path / "adapter", None, **asked)
    assert read_and_scored == ["public_windows"] * 2


@pytest.mark.parametrize("dry", [True, False])
def test_own_weights_too_large_for_the_written_dtype_are_refused(world, tmp_path, monkeypatch, dry):
    """The adapter is finite in it; an embedding of the model is not."""

    def large(place):
        model = load_model(place)
        model.get_input_embeddings().weight.data[0, 0] = 1e6
        return model

    stated = open_package(world.path / "adapter", "adapter").manifest.model
    monkeypatch.setattr(plugin, "load_model", large)
    monkeypatch.setattr(plugin, "fingerprint", lambda model: stated)
    files, out = (world.path / "model", world.path / "adapter"), tmp_path / "out"
    with pytest.raises(ModelError, match=r"finite in float16, .*embed_tokens.*wider dtype"):
        plug_in(*files, None if dry else out, dtype="float16")
    assert not out.exists()
    plug_in(*files, None if dry else out, dtype="bfloat16")


def test_an_adapter_of_another_emulator_is_refused(world, tmp_path):
    identity = open_package(world.path / "adapter", "adapter").manifest.emulator
    plug_in(world.path / "model", world.path / "adapter", None, emulator=identity)
    with pytest.raises(MismatchError, match="expected an adapter tuned on sha256:00000"):
        plug_in(world.path / "model", world.path / "adapter", None, emulator="sha256:" + "0" * 64)


def test_an_adapter_is_held_to_the_layers_of_the_emulator_that_was_shipped(world, tmp_path):
    place, shipped = world.path / "model", world.path / "emulator"
    plugged = plug_in(place, world.path / "adapter", None, emulator=shipped)
    assert plugged.adapter_layers == 1
    lora = open_package(world.path / "lora", "adapter")
    own = lora.read_tensors({n: (f.shape, f.dtype) for n, f in lora.header.items()})
    first = {n: t for n, t in own.items() if n.startswith("layers.0.")}
    wider = own | {
        n.replace("layers.0.", f"layers.{i}."): t for n, t in first.items() for i in (1, 6)
    }
    claimed = msgspec.structs.replace(lora.manifest, adapter_layers=2)
    write_package(tmp_path / "wide", claimed, wider, {})
    plug_in(place, tmp_path / "wide", None, emulator=lora.manifest.emulator)  # by its own word
    with pytest.raises(MismatchError, match="expected 1 adapter layers at each end of 8"):
        plug_in(place, tmp_path / "wide", None, emulator=shipped)
    with pytest.raises(ConfigError, match="expected a package, no such directory"):
        plug_in(place, tmp_path / "wide", None, emulator=tmp_path / "none")


def test_singular_values_against_a_full_decomposition():
    torch.manual_seed(0)
    for weight in (torch.randn(30, 50), torch.randn(50, 30) * 1e20, torch.eye(8), torch.ones(1, 4)):
        exact = float(torch.linalg.matrix_norm(weight.double(), 2))
        assert 0.97 * exact <= _largest_singular_value(weight) <= exact * 1.0001
    assert _largest_singular_value(torch.zeros(3, 4)) == 0.0


def test_no_change_is_made_for_the_start_of_the_measure():
    """An edit at right angles to where a known iteration begins would be seen by none of it."""
    known = torch.randn(50, generator=torch.Generator().manual_seed(0))
    blind = torch.zeros(50)
    blind[3], blind[7] = known[7], -known[3]
    weight = torch.outer(torch.randn(30), blind)
    exact = float(torch.linalg.matrix_norm(weight, 2))
    assert _largest_singular_value(weight) == pytest.approx(exact, rel=1e-3)


def test_changes_against_plain_formulas(world):
    decoder = Decoder(load_model(world.path / "model"))
    own = dict(decoder.layers[0].named_parameters())
    name = "self_attn.q_proj.weight"
    weight = own[name].detach()
    edit = 0.1 * torch.outer(torch.ones(weight.shape[0]), torch.ones(weight.shape[1]))
    (found,) = measure_changes(decoder, {0: {name: weight + edit}})
    total = sum(float(p.detach().norm()) ** 2 for p in own.values()) ** 0.5
    assert found.weight == name
    assert found.relative == pytest.approx(float(edit.norm()) / total, rel=1e-3)
    share = float(edit.norm()) / float(torch.linalg.matrix_norm(weight, 2))
    assert found.spectral == pytest.approx(share, rel=0.03)
    assert found.concentration == pytest.approx(1.0, abs=1e-3)  # a rank-one edit
    (none,) = measure_changes(decoder, {0: {name: weight}})
    assert (none.relative, none.spectral) == (0.0, 0.0)


def test_bounds():
    change = LayerChange(layer=3, relative=0.4, spectral=0.9, weight="w", concentration=1.0)
    check_changes([change], ChangeBounds(), "a")
    with pytest.raises(PolicyError, match="move w of layer 3"):
        check_changes([change], ChangeBounds(max_spectral_change=0.8), "a")
    with pytest.raises(PolicyError, match="change layer 3"):
        check_changes([change], ChangeBounds(max_layer_change=0.3), "a")
    check_loss(3.0, 3.4, ChangeBounds(), "a")
    for after in (3.6, float("nan"), float("inf")):
        with pytest.raises(PolicyError):
            check_loss(3.0, after, ChangeBounds(), "a")
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="above 0"):
            ChangeBounds(max_layer_change=value)
