"""The damage of replaced layers, alone and in company."""

import pytest
from tiny_networks import ids

from blindtune.offsite.damage import greedy_damage, measured_damage


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
