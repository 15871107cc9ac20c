import dataclasses

import pytest
import torch
from torch import nn

from blindtune.errors import ConfigError, ModelError, UnsupportedModelError
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder, check_context, context_limit
from blindtune.models.surgery import replace_layer
from tiny_models import FAMILY_NAMES, PAD, VOCAB, WINDOW, tiny_config, tiny_model

LENGTH = 3 * WINDOW


def batch(padded):
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5], mask[0, :5] = PAD, 0
    return ids, (mask if padded else None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_parts_compose_to_the_whole_model(name, padded):
    model = tiny_model(name)
    decoder = Decoder(model)
    ids, mask = batch(padded)
    before = list(decoder.layers)
    with torch.no_grad():
        inputs = decoder.begin(ids, mask)
        half = decoder.run_layers(inputs.hidden_BLD, inputs.calls, 0, 3)
        full = decoder.run_layers(half, inputs.calls, 3, decoder.layer_count)
        logits = decoder.logits(full)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert list(decoder.layers) == before
    assert inputs.hidden_BLD.shape == (2, LENGTH, decoder.hidden_size)


def test_layers_of_different_types_get_different_calls():
    decoder = Decoder(tiny_model("gemma3"))
    inputs = decoder.begin(batch(False)[0])
    sliding, full = inputs.calls[0].kwargs, inputs.calls[2].kwargs
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])
    assert sliding["attention_mask"] is not None
    assert full["attention_mask"] is None or not torch.equal(
        sliding["attention_mask"], full["attention_mask"]
    )


def test_begin_restores_the_layers_after_an_error():
    decoder = Decoder(tiny_model("llama"))
    before = list(decoder.layers)
    with pytest.raises(IndexError):
        decoder.begin(torch.full((1, 4), VOCAB + 5))
    assert list(decoder.layers) == before


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_begin_sees_a_wrong_return_type_in_the_table(name):
    decoder = Decoder(tiny_model(name))
    wrong = not decoder.family.returns_tuple
    decoder.family = dataclasses.replace(decoder.family, returns_tuple=wrong)
    with pytest.raises(UnsupportedModelError, match="returns_tuple"):
        decoder.begin(batch(False)[0])


def test_begin_sees_a_config_that_disagrees_with_the_layers():
    decoder = Decoder(tiny_model("llama"))
    decoder.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="all 8 layers, got 3"):
        decoder.begin(batch(False)[0])


def test_a_model_without_the_named_parts_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"head 'lm_head'|layers 'model.layers'"):
        Decoder(model.model)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_projection_weights_are_the_maps_the_layer_computes(name):
    """Oracle: feed the module the identity; part p of its output must be weight p transposed."""
    decoder = Decoder(tiny_model(name))
    for projection in decoder.projections(2) + decoder.feed_forward(2):
        weights = projection.weights()
        eye = torch.eye(projection.in_features)
        bias = projection.bias_O
        rows = projection.module(eye) - (0 if bias is None else bias)
        for weight, size in zip(weights, projection.sizes, strict=True):
            assert weight.shape == (size, projection.in_features)
        if projection.heads is None:
            expected = rows
        else:
            heads, parts = projection.heads, len(projection.parts)
            expected = rows.view(-1, heads, parts, rows.shape[1] // heads // parts)
            expected = expected.transpose(1, 2).reshape(rows.shape)
        torch.testing.assert_close(torch.cat(weights).T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_full_rank_replacement_of_every_projection_changes_nothing(name):
    model = tiny_model(name)
    decoder = Decoder(model)
    ids, mask = batch(True)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        for projection in decoder.projections(2) + decoder.feed_forward(2):
            ranks = [min(size, projection.in_features) for size in projection.sizes]
            low = projection.low_rank(ranks)
            for part, weight in enumerate(projection.weights()):
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                low.set_factors(part, u * s, vh)
            decoder.layers[2].set_submodule(projection.path, low)
        got = model(input_ids=ids, attention_mask=mask).logits
    assert not any(isinstance(p.module, nn.Linear) for p in decoder.projections(2))
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        decoder.projections(2)[0].weights()[0],
        Decoder(tiny_model(name)).projections(2)[0].weights()[0],
        atol=1e-4,
        rtol=1e-4,
    )


def test_fused_query_key_value_are_told_apart():
    """Zeroing the value part of layer 0 must silence its attention, and nothing else does."""
    for name in ("gpt2", "gpt_neox", "bloom", "phi3"):
        decoder = Decoder(tiny_model(name))
        projection = decoder.projections(0)[0]
        weights = [weight.clone() for weight in projection.weights()]
        weights[2].zero_()
        ranks = [min(size, projection.in_features) for size in projection.sizes]
        low = projection.low_rank(ranks)
        for part, weight in enumerate(weights):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            low.set_factors(part, u * s, vh)
        if low.bias is not None:
            low.bias.data.zero_()
        decoder.layers[0].set_submodule(projection.path, low)
        heard = {}
        output = decoder.projections(0)[-1].module
        output.register_forward_pre_hook(lambda _, args, heard=heard: heard.update(x=args[0]))
        with torch.no_grad():
            decoder.model(batch(False)[0])
        assert heard["x"].abs().max() < 1e-5, name


def test_a_replaced_layer_has_no_projections():
    model = tiny_model("llama")
    replace_layer(model, 3, Harmonizer(32, 4))
    assert Decoder(model).is_raw(2)
    assert not Decoder(model).is_raw(3)
    with pytest.raises(ModelError, match="layer 3"):
        Decoder(model).projections(3)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_says_how_much_it_reads(name):
    assert context_limit(tiny_config(name)) == (None if name == "bloom" else 128)


def test_the_lowest_limit_counts():
    check_context(10_000, None, None)
    check_context(64, 64, None, 128)
    with pytest.raises(ConfigError, match=r"max_length up to 64, .* got 65: .*--max-length 64"):
        check_context(65, 128, None, 64)
