"""Healing works where it must, not where it cannot, and starts where the emulator stands."""

import math

import pytest
import torch

from blindtune.attacks.emulator_misuse import (
    EmulatorView,
    HealingConfig,
    heal,
    regrow,
    train_on,
)
from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.utility.loss import perplexity
from blindtune.models.blocks import Harmonizer, LowRankLinear
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import replace_layer
from blindtune.offsite.model_owner.compression import compress_layer
from tiny_models import FAMILY_NAMES, tiny_model

CHANCE = math.log(97)  # nats a token of guessing blindly
QUICK = HealingConfig(steps=40, points=3, learning_rate=3e-3, warmup_steps=2)


def tiny_emulator(name="llama"):
    """Layers 2 and 3 are harmonizers, layer 4 has low-rank attention."""
    model = tiny_model(name)
    decoder = Decoder(model)
    torch.manual_seed(0)
    for i in (2, 3):
        stand_in = Harmonizer(32, 4, returns_tuple=decoder.family.returns_tuple)
        torch.nn.init.normal_(stand_in.up.weight, std=0.3)
        replace_layer(model, i, stand_in)
    compress_layer(decoder, 4, 0.3, reading="kept")
    return model


def counting(count, length=16, seed=1):
    """Text with a rule: every id follows the one before."""
    start = torch.randint(3, 100, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(length) - 3) % 100 + 3


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None] + 3, use_cache=False).logits


@pytest.mark.parametrize("name", [n for n in FAMILY_NAMES if n != "opt-350m"])
def test_growing_beside_changes_nothing_at_first(name):
    """OPT-350M alone is left out: its layers end with a norm and are never silent."""
    emulator = tiny_emulator(name)
    before = logits(emulator)
    assert any(isinstance(m, LowRankLinear) for m in emulator.modules())
    regrow(emulator, "beside")
    torch.testing.assert_close(logits(emulator), before, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, LowRankLinear) for m in emulator.modules())
    assert all(Decoder(emulator).is_raw(i) for i in range(8))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt-350m"])
def test_neighbours_grow_in_place_of_harmonizers(name):
    emulator = tiny_emulator(name)
    regrow(emulator, "neighbour")
    layers = Decoder(emulator).layers
    assert not any(isinstance(m, Harmonizer) for m in emulator.modules())
    for grown, nearest in ((2, 1), (3, 4)):
        pairs = zip(layers[grown].parameters(), layers[nearest].parameters(), strict=True)
        assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert logits(emulator).isfinite().all()


def test_without_growing_harmonizers_stay():
    emulator = tiny_emulator()
    before = logits(emulator)
    regrow(emulator, "none")
    torch.testing.assert_close(logits(emulator), before, atol=1e-4, rtol=1e-3)
    assert sum(isinstance(m, Harmonizer) for m in emulator.modules()) == 2


@pytest.mark.parametrize("how", ["none", "neighbour", "beside"])
def test_healing_learns_what_public_text_teaches(how):
    emulator, test = tiny_emulator(), counting(8, seed=2)
    embedding = Decoder(emulator).embedding.weight.clone()
    config = HealingConfig(**{**vars(QUICK), "regrow": how})
    stops, scores = [], []
    for stop in heal(EmulatorView(model=emulator, public_NL=counting(64)), config):
        stops.append(stop.tokens)
        scores.append(perplexity(emulator, test).nats_per_token)
    assert stops == [0, 640, 1280, 2560]
    assert scores[-1] < 0.7 * scores[0]
    assert scores[-1] < 0.9 * CHANCE
    assert torch.equal(Decoder(emulator).embedding.weight, embedding)


def test_noise_teaches_nothing():
    emulator, test = tiny_emulator(), counting(8, seed=2)
    noise = torch.randint(3, 100, (64, 16), generator=torch.Generator().manual_seed(0))
    for _ in heal(EmulatorView(model=emulator, public_NL=noise), QUICK):
        pass
    assert perplexity(emulator, test).nats_per_token > 0.95 * CHANCE


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match="regrow"):
        HealingConfig(regrow="all")
    with pytest.raises(ConfigError, match="steps"):
        HealingConfig(steps=0)
    with pytest.raises(DataError, match="public text"):
        next(train_on(tiny_model("llama"), torch.zeros(0, 8, dtype=torch.int64), QUICK))
