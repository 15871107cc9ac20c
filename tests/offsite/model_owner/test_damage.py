"""The damage of replaced layers, alone and in company."""

import pytest
import torch
from tiny_networks import ids, stand_ins_for

from blindtune.models.decoder import Decoder
from blindtune.offsite.model_owner.damage import greedy_damage, measured_damage
from blindtune.offsite.model_owner.mixed_network import MixedNetwork
from tiny_models import LAYERS, tiny_model


def test_measured_damage_is_loss_minus_base(network):
    windows = ids(5)
    damage = measured_damage(network, windows, batch_size=2)
    base = network.losses(network.prefix(windows), [frozenset()], windows)[0]
    one = network.losses(network.prefix(windows), [frozenset({1})], windows)[0]
    assert damage[1].item() == pytest.approx(one - base, abs=1e-5)


def test_greedy_order_is_the_order_of_an_exhaustive_greedy_search(network):
    windows = ids(4)
    single = measured_damage(network, windows, 4)
    count = len(network.stand_ins)
    order = greedy_damage(network, windows, 4, single, count).argsort().tolist()
    prefix, chosen = network.prefix(windows), []
    for position in order[:2]:  # the first choices, found by trying all
        left = [i for i in range(count) if i not in chosen]
        mixes = [frozenset({*chosen, i}) for i in left]
        losses = network.losses(prefix, mixes, windows)
        best = min(losses)
        assert losses[left.index(position)] <= best + 0.02
        chosen.append(position)
    assert sorted(order) == list(range(count))


def slow_greedy(network, windows, batch_size, single, count):
    """The same search, every try computed from the embedding on. Returns (costs, tries)."""
    tries = []

    def loss(mix):
        tries.append(mix)
        batches = windows.split(batch_size)
        losses = [network.losses(network.prefix(b), [mix], b)[0] * len(b) for b in batches]
        return sum(losses) / len(windows)

    current, chosen = loss(frozenset()), []
    known = {i: (float(cost), 0) for i, cost in enumerate(single)}
    costs, highest = torch.zeros(len(single), dtype=torch.float64), float("-inf")
    while len(chosen) < count:
        i = min(known, key=lambda i: (known[i][0], i))
        if known[i][1] < len(chosen):
            known[i] = (loss(frozenset({*chosen, i})) - current, len(chosen))
            continue
        cost, _ = known.pop(i)
        current, highest = current + cost, max(highest + 1e-9, cost)
        costs[i] = highest
        chosen.append(i)
    for i, (cost, _) in known.items():
        costs[i] = max(cost, highest + 1e-9)
    return costs, len(tries)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "gpt2"])
@pytest.mark.parametrize("kind", ["harmonizer", "identity"])
def test_kept_states_change_no_bit_of_the_greedy_order(name, kind):
    decoder = Decoder(tiny_model(name).requires_grad_(False))
    stand_ins = stand_ins_for(decoder, LAYERS - 2)
    if kind == "identity":
        stand_ins = torch.nn.ModuleList([torch.nn.Identity() for _ in stand_ins])
    network, windows = MixedNetwork(decoder, stand_ins, 1), ids(5)
    single, calls = measured_damage(network, windows, 2), []
    oracle, tries = slow_greedy(network, windows, 2, single, LAYERS - 2)
    original = decoder.run_layer
    decoder.run_layer = lambda i, *rest: (calls.append(i), original(i, *rest))[1]
    found = greedy_damage(network, windows, 2, single, LAYERS - 2)
    assert torch.equal(found, oracle)
    if kind == "harmonizer":  # of 3 batches; an oracle's try runs every layer
        assert len(calls) < 0.85 * 3 * tries * LAYERS
