"""The judge of healing: curves on one scale, and a control of as many layers."""

from dataclasses import replace

import pytest
import torch

from blindtune.attacks.emulator_misuse import HealingConfig
from blindtune.evaluation.leakage.misuse import drop_to, judge_misuse
from blindtune.models.decoder import Decoder
from blindtune.offsite.model_owner.emulation import EmulatorConfig
from offsite_world import owners_world
from tiny_models import tiny_model


def test_judge_scores_attack_and_control(tmp_path):
    owners_world(tmp_path, "llama")
    draw = torch.Generator().manual_seed(0)
    start = torch.randint(3, 90, (40, 1), generator=draw)
    text = (start + torch.arange(16)) % 90 + 3
    seen = []
    found = judge_misuse(
        tmp_path / "emulator", tmp_path / "model", text[:32], text[32:],
        [HealingConfig(steps=30, points=2, learning_rate=3e-3)], adapter=tmp_path / "adapter",
        on_stop=lambda *stop: seen.append(stop),
    )  # fmt: skip
    assert [tokens for tokens, _ in found.healed] == [0, 15 * 64, 30 * 64]
    assert [tokens for tokens, _ in found.control] == [0, 15 * 64, 30 * 64]
    healed = [loss.nats_per_token for _, loss in found.healed]
    control = [loss.nats_per_token for _, loss in found.control]
    assert healed[0] == pytest.approx(found.emulator.nats_per_token, abs=1e-3)
    assert healed[-1] < healed[0]
    assert control[-1] < control[0]
    assert found.healed_best.nats_per_token == min(healed)
    assert found.tuned not in (None, found.emulator)
    assert len(seen) == 6
    assert found.learning_rate == 3e-3
    assert found.lead.nats == pytest.approx(min(control) - min(healed), abs=1e-6)
    assert 0 < found.lead.reach < 10


def test_of_several_rates_the_best_counts_each_from_the_emulator_as_shipped(tmp_path):
    owners_world(tmp_path, "llama")
    draw = torch.Generator().manual_seed(0)
    text = (torch.randint(3, 90, (40, 1), generator=draw) + torch.arange(16)) % 90 + 3
    place = (tmp_path / "emulator", tmp_path / "model", text[:32], text[32:])
    slow, seen = HealingConfig(steps=8, points=1, learning_rate=1e-6), []
    fast = replace(slow, learning_rate=3e-3)
    found = judge_misuse(*place, [slow, fast], on_stop=lambda *stop: seen.append(stop))
    alone = judge_misuse(*place, [fast])
    assert found == alone
    assert found.learning_rate == 3e-3
    began = [nats for name, tokens, nats in seen if name != "control" and not tokens]
    assert began[0] == began[1]  # the second was not healed on top of the first


def test_an_emulator_with_all_layers_whole_has_no_control(tmp_path):
    config = EmulatorConfig(adapter_layers=1, alpha=0.0, beta=0.5)
    owners_world(tmp_path, "llama", config)
    text = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(0))
    place = (tmp_path / "emulator", tmp_path / "model", text, text)
    found = judge_misuse(*place, [HealingConfig(steps=1, points=1)])
    assert (len(found.healed), found.control) == (2, ())
    unhealed = judge_misuse(*place, [])
    assert (unhealed.healed, unhealed.control) == ((), ())
    assert unhealed.emulator == found.emulator


def test_the_control_keeps_both_ends():
    small, full = drop_to(tiny_model("llama"), 5), tiny_model("llama")
    layers, originals = Decoder(small).layers, Decoder(full).layers
    assert len(layers) == 5
    for mine, theirs in ((layers[0], originals[0]), (layers[-1], originals[-1])):
        assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
