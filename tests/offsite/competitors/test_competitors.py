"""Emulators by other methods: each opens as a package, tunes, plugs in, and is what it says."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny_networks import ids

from blindtune.errors import ConfigError, DataError
from blindtune.exchange.packages.manifest import (
    AdapterLayer,
    CompressedLayer,
    HarmonizerLayer,
    RawLayer,
)
from blindtune.models.decoder import Decoder
from blindtune.offsite.competitors.crash import CrashConfig, adjacent_clusters, crash, linear_cka
from blindtune.offsite.competitors.fixed_margin import (
    FixedMarginConfig,
    raise_by_margin,
    token_losses,
)
from blindtune.offsite.competitors.gradot import (
    GradotConfig,
    component_scores,
    gradot,
    kept_components,
    layer_curvature,
    start_descents,
)
from blindtune.offsite.competitors.layer_drop import (
    LayerDropConfig,
    distil,
    distillation_loss,
    drop_layers,
)
from blindtune.offsite.competitors.methods import METHODS, emulate_by
from blindtune.offsite.emulator import open_emulator
from blindtune.offsite.model_owner.plugin import plug_in
from offsite_world import save_text, save_tiny, tune_tiny
from tiny_models import FAMILY_NAMES, tiny_model

CONFIGS = {
    "uniform": LayerDropConfig(adapter_layers=1, alpha=0.5),
    "distilled": LayerDropConfig(adapter_layers=1, alpha=0.5, steps=2, batch_size=2),
    "crash": CrashConfig(adapter_layers=1, alpha=0.5, tokens=128),
    "gradot": GradotConfig(adapter_layers=1, tokens=128),
    "margin": FixedMarginConfig(adapter_layers=1, alpha=0.5, harmonizer_rank=4, steps=2),
}


def test_every_method_is_tried_here():
    assert {type(config) for config in CONFIGS.values()} == set(METHODS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "phi3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packages_open_on_every_kind_of_family(name, family, tmp_path):
    save_tiny(family, tmp_path / "model")
    save_text(tmp_path)
    made = emulate_by(
        tmp_path / "model", tmp_path / "public.txt", tmp_path / "emulator", CONFIGS[name],
        max_length=32,
    )  # fmt: skip
    opened = open_emulator(tmp_path / "emulator")
    assert opened.id == made.id
    assert opened.model.num_parameters() == made.parameters
    assert isinstance(made.layers[0], AdapterLayer)
    assert not any(isinstance(layer, AdapterLayer) for layer in made.layers[1:-1])
    full = tiny_model(family)
    tokens = torch.arange(10)[None] + 3
    with torch.no_grad():
        assert not torch.equal(opened.model(tokens).logits, full(tokens).logits)


def test_an_adapter_of_another_emulator_plugs_in(tmp_path):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    place = (tmp_path / "model", tmp_path / "public.txt", tmp_path / "emulator")
    emulate_by(*place, CONFIGS["crash"], max_length=32)
    tune_tiny(tmp_path)
    found = plug_in(tmp_path / "model", tmp_path / "adapter", None)
    assert set(found.relative_change) == {0, 7}
    assert all(change > 0 for change in found.relative_change.values())


def test_too_little_text_and_no_middle_are_refused(tmp_path):
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "short.txt").write_text("short text")
    with pytest.raises(DataError, match="one window needs 64 tokens"):
        emulate_by(
            tmp_path / "model", tmp_path / "short.txt", tmp_path / "e", CONFIGS["crash"],
            max_length=64,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="leave a middle"):
        drop_layers(tiny_model("llama"), ids(2), LayerDropConfig(adapter_layers=4))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LayerDropConfig, {"alpha": 1.0}),
        (LayerDropConfig, {"learning_rate": 0.0}),
        (CrashConfig, {"tokens": 0}),
        (GradotConfig, {"rank_kept": 0.0}),
        (GradotConfig, {"attention_lambda": -1.0}),
        (FixedMarginConfig, {"margin": -0.1}),
        (FixedMarginConfig, {"steps": 0}),
    ],
)
def test_values_out_of_range_are_refused(kind, values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))}.*got"):
        kind(**values)


def test_uniform_drop_keeps_the_right_layers():
    model, before = tiny_model("llama"), tiny_model("llama")
    layers, tokens = drop_layers(model, ids(2), CONFIGS["uniform"])
    assert tokens == 0
    assert [type(layer) for layer in layers[1:-1]] == [RawLayer] * 3
    kept = [0, 1, 3, 6, 7]  # of the middle layers 1 .. 6: round(k 5 / 2)
    for layer, i in zip(Decoder(model).layers, kept, strict=True):
        for new, old in zip(
            layer.parameters(), Decoder(before).layers[i].parameters(), strict=True
        ):
            assert torch.equal(new, old)


def test_distillation_trains_only_the_kept_layers_and_lowers_its_loss():
    model = tiny_model("llama")
    decoder, middle, kept = Decoder(model), range(1, 7), [1, 3, 6]
    before = copy.deepcopy(model.state_dict())
    students = torch.nn.ModuleList([copy.deepcopy(decoder.layers[i]) for i in kept])
    config = LayerDropConfig(steps=30, batch_size=4, learning_rate=3e-3)
    test = ids(4, seed=1)
    with torch.no_grad():
        first = distillation_loss(decoder, students, kept, middle, test, 30.0)
    losses = distil(decoder, students, kept, middle, ids(16), config)
    with torch.no_grad():
        last = distillation_loss(decoder, students, kept, middle, test, 30.0)
    assert len(losses) == 30
    assert last < 0.8 * first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_whole_middle_has_no_distillation_error():
    decoder = Decoder(tiny_model("llama"))
    middle, batch = range(1, 7), ids(3)
    with torch.no_grad():
        plain = distillation_loss(decoder, decoder.layers[1:7], list(middle), middle, batch, 0.0)
        heavy = distillation_loss(decoder, decoder.layers[1:7], list(middle), middle, batch, 1e6)
    torch.testing.assert_close(plain, heavy)


def test_crash_shares_layers_and_keeps_the_depth():
    model = tiny_model("llama")
    layers, tokens = crash(model, ids(8, 16), CONFIGS["crash"])
    assert (len(layers), tokens) == (8, 128)
    weights = [layer.mlp.up_proj.weight for layer in Decoder(model).layers]
    same = [torch.equal(a, b) for a, b in pairwise(weights[1:7])]
    assert sum(same) == 3  # of six middle layers three are kept: three places are copies
    copies = Decoder(model).layers
    assert len({id(layer) for layer in copies}) == 8
    assert [layer.self_attn.layer_idx for layer in copies] == list(range(8))
    short = tiny_model("llama")
    crash(short, ids(8, 16), CrashConfig(adapter_layers=1, alpha=0.5, share=False))
    assert Decoder(short).layer_count == 5


def test_clusters_are_of_neighbours_and_the_most_alike():
    likeness = torch.eye(5)
    likeness[0, 1] = likeness[1, 0] = 0.9
    likeness[3, 4] = likeness[4, 3] = 0.8
    likeness[0, 4] = likeness[4, 0] = 0.99  # alike, but no neighbours
    assert adjacent_clusters(likeness, 3) == [range(2), range(2, 3), range(3, 5)]
    assert adjacent_clusters(likeness, 1) == [range(5)]


def test_cka_knows_rotations_and_scales():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    other = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-4)
    assert linear_cka(x, other) < 0.2


def curvature_of(decoder, windows, layers, batch_size):
    descents = start_descents(decoder, windows, layers, batch_size)
    return {i: layer_curvature(decoder, i, descents) for i in reversed(layers)}


def test_curvature_is_what_autograd_says():
    """The gradient of a weight from hooks equals the weight's own; A and G agree with it."""
    model, windows = tiny_model("llama"), ids(4)
    found = curvature_of(Decoder(model), windows, range(1, 7), batch_size=2)
    model.requires_grad_(True)
    model(windows, labels=windows).loss.backward()
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        sums = found[3][path]
        weight = Decoder(model).layers[3].get_submodule(path).weight
        torch.testing.assert_close(sums.gradient_OI, weight.grad, atol=1e-5, rtol=1e-3)
        assert torch.linalg.eigvalsh(sums.inputs_II).min() > -1e-3
        assert torch.linalg.eigvalsh(sums.outputs_OO).min() > -1e-6


def one_pass(model, windows, layers, batch_size):
    """(A, G, gradient) of every projection by layer and path, from one backward pass through all.

    All activations of a batch and all curvatures are alive at a time.
    """
    decoder, inputs, found, handles = Decoder(model), {}, {}, []

    def watch(key, module):
        def forward(_module, args):
            inputs[key] = args[0].detach().flatten(0, -2)

        def backward(_module, _inputs, outputs):
            x, g = inputs[key], outputs[0].detach().flatten(0, -2)
            new = (x.T @ x, g.T @ g, g.T @ x)
            old = found.get(key, [torch.zeros_like(t) for t in new])
            found[key] = [a + b for a, b in zip(old, new, strict=True)]

        handles.append(module.register_forward_pre_hook(forward))
        handles.append(module.register_full_backward_hook(backward))

    for i in layers:
        for projection in (*decoder.projections(i), *decoder.feed_forward(i)):
            watch((i, projection.path), projection.module)
    for batch in windows.split(batch_size):
        start = decoder.begin(batch)
        hidden = start.hidden_BLD.detach().requires_grad_(True)
        hidden = decoder.run_layers(hidden, start.calls, 0, decoder.layer_count)
        logits = decoder.logits(hidden[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        (loss / windows[:, 1:].numel()).backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_curvature_layer_by_layer_is_that_of_one_pass_to_the_bit(family):
    model, windows = tiny_model(family).requires_grad_(False), ids(5)
    oracle = one_pass(model, windows, range(1, 7), 2)
    found = curvature_of(Decoder(model), windows, range(1, 7), 2)
    assert {(i, path) for i, known in found.items() for path in known} == set(oracle)
    for (i, path), tensors in oracle.items():
        sums = found[i][path]
        for new, old in zip(
            (sums.inputs_II, sums.outputs_OO, sums.gradient_OI), tensors, strict=True
        ):
            assert torch.equal(new, old), (i, path)


def test_component_scores_are_those_of_removing_each_alone():
    generator = torch.Generator().manual_seed(0)
    weight, gradient, x, g = (torch.randn(6, 5, generator=generator) for _ in range(4))
    inputs, outputs = x.T @ x, g @ g.T
    scores, up, down = component_scores(weight, outputs, inputs, gradient, 0.0)
    torch.testing.assert_close(up @ down, weight)
    for k in range(5):
        delta = -torch.outer(up[:, k], down[k])
        torch.testing.assert_close(scores[k], (outputs @ delta @ inputs).abs().sum())


def test_gradot_beats_plain_svd_in_its_own_objective():
    model, windows = tiny_model("llama"), ids(8)
    decoder = Decoder(model)
    found = curvature_of(decoder, windows, range(1, 7), batch_size=4)
    better = 0
    for i in range(1, 7):
        for projection in decoder.projections(i):
            sums, (weight,) = found[i][projection.path], projection.weights()
            scores, _, _ = component_scores(
                weight, sums.outputs_OO, sums.inputs_II, sums.gradient_OI, 1.0
            )
            rank = len(scores) // 2
            kept = kept_components(scores, rank)
            assert len(set(kept.tolist())) == rank
            assert 0 in kept
            ours, plain = scores.sum() - scores[kept].sum(), scores[rank:].sum()
            assert ours <= plain + 1e-4 * scores.abs().sum()
            better += bool(ours < plain - 1e-4 * scores.abs().sum())
    assert better > 12


def test_gradot_takes_rank_and_channels_away():
    model = tiny_model("llama")
    config = GradotConfig(adapter_layers=1, tokens=64, rank_kept=0.4, channels_kept=0.75)
    layers, tokens = gradot(model, ids(8, 16), config)
    assert tokens == 64
    assert all(isinstance(layer, CompressedLayer) for layer in layers[1:-1])
    layer = Decoder(model).layers[3]
    for projection in Decoder(model).projections(3):
        rank = torch.linalg.matrix_rank(projection.weights()[0], rtol=1e-4)
        assert rank <= int(0.4 * min(projection.in_features, projection.sizes[0]))
    gone = (layer.mlp.down_proj.weight == 0).all(0)
    assert int(gone.sum()) == 12  # a quarter of 48
    assert (layer.mlp.up_proj.weight[gone] == 0).all()
    assert (layer.mlp.gate_proj.weight[~gone] != 0).any(1).all()


def test_gradot_holds_the_curvature_of_one_layer_at_a_time(monkeypatch):
    import gc

    from blindtune.offsite.competitors import gradot as module

    alive = []

    def counted(*arguments):
        gc.collect()
        alive.append(sum(type(o) is module.Curvature for o in gc.get_objects()))
        return decide(*arguments)

    decide = module._decide
    monkeypatch.setattr(module, "_decide", counted)
    gradot(tiny_model("llama"), ids(4, 16), GradotConfig(adapter_layers=1, tokens=64))
    assert alive == [7] * 6  # q, k, v, o, gate, up, down


def test_the_margin_is_approached():
    model, windows = tiny_model("llama"), ids(16)
    full = token_losses(Decoder(model), windows, {}).detach()
    config = FixedMarginConfig(
        adapter_layers=1, alpha=0.34, margin=0.5, harmonizer_rank=16, steps=60, learning_rate=1e-2
    )

    def miss(emulator):
        losses = token_losses(Decoder(emulator), windows, {}).detach()
        return float((losses - full - 0.5).square().mean())

    untrained = tiny_model("llama")
    drop_layers(untrained, windows, LayerDropConfig(adapter_layers=1, alpha=0.34))
    layers, _ = raise_by_margin(model, windows, config)
    assert sum(isinstance(layer, HarmonizerLayer) for layer in layers) == 2
    assert miss(model) < 0.6 * miss(untrained)
