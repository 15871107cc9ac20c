"""FLOPs of decoders against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blindtune.models.blocks import Harmonizer
from blindtune.models.costs import Cost, Rate, decoder_cost, matmul_rate, sketch
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import replace_layer
from tiny_models import FAMILY_NAMES, VOCAB, tiny_model

LENGTH = 16


def counted(model, backward=False):
    """FLOPs a token; the counter takes attention as full, not causal, and so do we for it."""
    model.config._attn_implementation = "eager"
    ids = torch.randint(3, VOCAB, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
    return counter.get_total_flops() / ids.numel()


def full_attention(cost):
    return Cost(linear=cost.linear, attention=2 * cost.attention)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_forward_is_what_torch_counts(name):
    model = tiny_model(name)
    cost = decoder_cost(Decoder(model), LENGTH)
    ours = full_attention(cost.stack() + cost.head).forward
    between = (
        getattr(model.get_submodule("model.decoder"), "project_in", None)
        if (name == "opt-350m")
        else None
    )
    if between is not None:  # counted with the embedding, which we leave out
        ours += 2 * between.weight.numel()
    assert ours == pytest.approx(counted(model), rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_is_what_torch_counts(name):
    model = tiny_model(name)
    decoder = Decoder(model)
    for module in (decoder.head, decoder.embedding):
        module.requires_grad_(False)
    cost = decoder_cost(decoder, LENGTH)
    stack = full_attention(cost.stack())
    ours = stack.forward + stack.backward + stack.weights
    ours += cost.head.forward + cost.head.backward
    first = decoder.layers[0]  # its input needs no gradient: only part of it is saved
    slack = 2 * sum(p.numel() for p in first.parameters() if p.ndim == 2)
    found = counted(model, backward=True)
    assert ours - slack <= found <= ours * 1.02
    assert cost.training == pytest.approx(ours, rel=0.2)  # causal attention, half of full


def test_surgery_makes_it_cheaper():
    model = tiny_model("llama")
    before = decoder_cost(Decoder(model), LENGTH)
    replace_layer(model, 3, Harmonizer(32, 4))
    after = decoder_cost(Decoder(model), LENGTH)
    assert after.layers[3] == Cost(linear=2.0 * 2 * 32 * 4)
    assert after.layers[2] == before.layers[2]
    assert after.forward < before.forward


def test_a_sketch_costs_what_the_model_costs(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the config is enough
    drawn = sketch(tmp_path)
    assert next(drawn.parameters()).is_meta
    assert decoder_cost(Decoder(drawn), LENGTH) == decoder_cost(Decoder(model), LENGTH)


def test_the_rate_is_measured():
    rate = matmul_rate(128, seconds=0.02)
    assert 1e7 < rate.flops_per_second < 1e15
    assert rate.threads == torch.get_num_threads()


def test_seconds_grow_with_work():
    rate = Rate(flops_per_second=1e9, threads=1)
    assert 1.0 < rate.seconds(1e9) < 2.0
    assert rate.seconds(0, layer_calls=1000) == pytest.approx(0.3)
