"""Shared computation of mixes against a slow oracle: real surgery."""

import itertools

import pytest
from tiny_networks import ids, stand_ins_for

from blindtune.models.decoder import Decoder
from blindtune.models.surgery import replace_layer
from blindtune.offsite.model_owner.mixed_network import MixedNetwork
from tiny_models import tiny_model


def slow_loss(name_model, network, mix, batch):
    """Real surgery on a fresh model, and transformers' own loss."""
    model = tiny_model(name_model)
    for i in mix:
        replace_layer(model, i + network.first, network.stand_ins[i])
    return model(batch, labels=batch).loss.item()


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_shared_losses_equal_real_surgery(name):
    decoder = Decoder(tiny_model(name))
    network = MixedNetwork(decoder, stand_ins_for(decoder, decoder.layer_count - 2), 1)
    batch = ids(3)
    everything = range(len(network.stand_ins))
    mixes = [frozenset(c) for n in (0, 1, 3) for c in itertools.combinations(everything, n)][:12]
    mixes += [frozenset(everything), mixes[2]]
    found = network.losses(network.prefix(batch), mixes, batch)
    oracle = [slow_loss(name, network, mix, batch) for mix in mixes]
    assert found == pytest.approx(oracle, abs=2e-5)


def test_shared_prefixes_are_computed_once(network):
    batch, runs = ids(2), []
    original = network.decoder.run_layer
    network.decoder.run_layer = lambda i, *rest: (runs.append(i), original(i, *rest))[1]
    inputs = network.prefix(batch)
    runs.clear()
    last = len(network.stand_ins) - 1
    network.losses(inputs, [frozenset(), frozenset({last}), frozenset()], batch)
    middle = [i for i in runs if i < network.stop - 1]
    assert len(middle) == len(set(middle)) == len(network.stand_ins) - 1


def test_distillation_is_the_divergence_from_the_full_model(network):
    batch, mix = ids(3), frozenset({1, 3})
    full = network.decoder.model(batch).logits[:, 1:].log_softmax(-1)
    hidden, inputs = network.prefix(batch).hidden_BLD, network.prefix(batch)
    for i in range(network.first, network.decoder.layer_count):
        stand_in = network.stand_ins[i - network.first] if i - network.first in mix else None
        hidden = network.decoder.run_layer(i, hidden, inputs.calls[i], stand_in)
    mixed = network.decoder.logits(hidden)[:, 1:].log_softmax(-1)
    oracle = (full.exp() * (full - mixed)).sum(-1).mean()
    found = network.loss(inputs, mix, batch, "distill")
    assert found.item() == pytest.approx(oracle.item(), rel=1e-4)
    assert network.loss(inputs, frozenset(), batch, "distill").item() == pytest.approx(0, abs=1e-6)
