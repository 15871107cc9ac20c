"""Dynamic LayerReplace: the rules of the game, and what its steps change."""

import itertools

import pytest
import torch
from tiny_networks import ids
from torch import nn

from blindtune.errors import ConfigError
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder
from blindtune.offsite.model_owner.importance import (
    DynamicConfig,
    advantages,
    layer_groups,
    ordered_mix,
    run_dynamic,
    sample_mix,
    start_dynamic,
    update_scores,
)
from blindtune.offsite.model_owner.mixed_network import MixedNetwork
from tiny_models import tiny_model


def test_groups_cover_the_middle_contiguously():
    for count, number in itertools.product(range(1, 40), (1, 3, 4)):
        groups = layer_groups(count, DynamicConfig(groups=number))
        assert [i for group in groups for i in group] == list(range(count))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert len(groups) == max(1, min(number, count // 2))
    assert [len(g) for g in layer_groups(12, DynamicConfig(groups=4, grouping="size"))] == [4] * 3


@pytest.mark.parametrize("count", range(2, 12))
def test_a_mix_always_replaces_something(count):
    generator = torch.Generator().manual_seed(0)
    groups = layer_groups(count, DynamicConfig())
    assert all(sample_mix(torch.zeros(count), groups, generator) for _ in range(20))


def test_exactly_half_of_every_group_is_replaced():
    groups = layer_groups(26, DynamicConfig())
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mix = sample_mix(torch.randn(26, generator=generator).double(), groups, generator)
        assert [len(mix & set(group)) for group in groups] == [len(g) // 2 for g in groups]


def test_a_high_score_keeps_its_layer_more_often():
    scores = torch.tensor([3.0, -3.0, 0.0, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    mixes = [sample_mix(scores, [range(4)], generator) for _ in range(500)]
    replaced = [sum(i in mix for mix in mixes) for i in range(4)]
    assert replaced[0] < 0.7 * replaced[2] < 0.7 * 0.9 * replaced[1]
    assert abs(replaced[2] - replaced[3]) < 60


def test_rewards():
    losses = [2.0, 3.0, 4.0]
    paper = advantages(losses, "paper")
    expected = torch.exp(-torch.tensor(losses)).double()
    assert paper == pytest.approx((expected - expected.mean()).tolist(), abs=1e-6)
    assert advantages(losses, "scale-free") == pytest.approx([1.2247, 0, -1.2247], abs=1e-4)
    assert advantages([5.0, 5.0], "scale-free") == [0, 0]
    # where exp(-L) has vanished, only the scale-free reward still tells candidates apart
    assert max(map(abs, advantages([11.0, 12.0], "paper"))) < 1e-5
    assert advantages([11.0, 12.0], "scale-free") == pytest.approx([1, -1])


def test_only_kept_layers_move_and_by_the_formula():
    config = DynamicConfig(reward="paper", candidates=2)
    scores = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    new = update_scores(scores, [frozenset({0}), frozenset({0, 1})], [1.0, 2.0], config)
    first, second = advantages([1.0, 2.0], "paper")
    p = torch.sigmoid(scores)
    change = torch.tensor([0.0, first, first + second]) * 10 * p * (1 - p)
    torch.testing.assert_close(new, scores + change)
    assert new[0] == scores[0]
    assert new[1] > scores[1]


@pytest.mark.parametrize(("practice", "objective"), [("half", "lm"), ("ordered", "distill")])
def test_dynamic_steps_train_stand_ins_and_not_the_model(network, practice, objective):
    before = {n: p.clone() for n, p in network.decoder.model.named_parameters()}
    start = [p.clone() for p in network.stand_ins.parameters()]
    config = DynamicConfig(
        steps=6,
        learning_rate=1e-2,
        batch_size=2,
        groups=1,
        candidates=3,
        practice=practice,
        objective=objective,
    )
    state = start_dynamic(torch.zeros(len(network.stand_ins)), network.stand_ins, config, seed=0)
    steps = list(run_dynamic(state, network, ids(8), ids(4, seed=1), config))
    assert [s.step for s in steps] == list(range(1, 7))
    assert all(torch.equal(before[n], p) for n, p in network.decoder.model.named_parameters())
    after = list(network.stand_ins.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start, after, strict=True))
    assert float(state.scores_M.abs().sum()) > 0


def test_practice_mixes_are_those_of_emulators():
    scores, generator = torch.randn(11).double(), torch.Generator().manual_seed(0)
    order = scores.argsort().tolist()
    mixes = {ordered_mix(scores, generator) for _ in range(100)}
    assert mixes == {frozenset(order[:n]) for n in range(1, 6)}


def test_layer_drop_is_the_same_game_with_identities():
    decoder = Decoder(tiny_model("llama"))
    stand_ins = nn.ModuleList([nn.Identity() for _ in range(decoder.layer_count - 2)])
    network = MixedNetwork(decoder, stand_ins, 1)
    config = DynamicConfig(steps=2, batch_size=2, candidates=2)
    state = start_dynamic(torch.zeros(len(stand_ins)), stand_ins, config, seed=0)
    assert state.optimizer is None
    steps = list(run_dynamic(state, network, ids(4), ids(4), config))
    assert all(s.learning_loss != s.learning_loss for s in steps)  # NaN: nothing to learn


def test_scores_find_a_planted_important_layer():
    """One stand-in destroys the hidden states; its layer must end with the highest score."""
    decoder = Decoder(tiny_model("llama").requires_grad_(False))
    count = decoder.layer_count - 2
    stand_ins = nn.ModuleList([nn.Identity() for _ in range(count)])
    bad = Harmonizer(decoder.hidden_size, 1)
    nn.init.constant_(bad.up.bias, 30.0)
    stand_ins[3] = bad.requires_grad_(False)
    network = MixedNetwork(decoder, stand_ins, 1)
    config = DynamicConfig(steps=40, batch_size=4, groups=1, candidates=3)
    state = start_dynamic(torch.zeros(count).double(), nn.ModuleList(), config, seed=0)
    windows = ids(40, seed=5)
    with torch.no_grad():  # make the text likely under the model, so that damage shows
        windows = decoder.model.generate(windows[:, :2], max_length=12, do_sample=False)
    list(run_dynamic(state, network, windows, windows, config))
    assert int(state.scores_M.argmax()) == 3


@pytest.mark.parametrize(
    "options", [{"groups": 0}, {"candidates": 1}, {"learning_rate": 0.0}, {"reward": "none"}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        DynamicConfig(**options)
