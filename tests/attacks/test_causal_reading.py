"""Beginnings that grow by other numbers of tokens are read as a pass over each alone would."""

import pytest
import torch

from blindtune.attacks.causal_reading import CausalReading
from blindtune.models.decoder import Decoder
from tiny_models import FAMILY_NAMES, WINDOW, tiny_model


def slowly(model, tokens, rest, asked_K, limit=None):
    """One beginning, by itself and from its start."""
    tokens = tokens[-limit:] if limit else tokens
    if not tokens:
        return torch.zeros(len(asked_K))
    with torch.no_grad():
        log_LV = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(1)
    rest = min(rest, len(tokens) - 1)
    before = sum(float(log_LV[at - 1, tokens[at]]) for at in range(len(tokens) - rest, len(tokens)))
    return log_LV[-1, asked_K] + before


def grown(model, *, steps=7, limit=None, seed=0, begin=()):
    """Beams that fork, end and go on by 0 to 4 tokens; the largest gap."""
    draw = torch.Generator().manual_seed(seed)

    def number(below):
        return int(torch.randint(below, (1,), generator=draw))

    reading = CausalReading(Decoder(model))
    beams, gaps = [begin] * 3, []
    for step in range(steps):
        words = [tuple(3 + number(90) for _ in range(number(5))) for _ in range(6)]
        beams = [beams[number(len(beams))] + word for word in words[: 6 - step // 3]]
        if step == 3:
            continue  # nothing is asked here: the next go on by two words
        rest = [max(0, len(word) - 1) for word in words[: len(beams)]]
        asked_BK = torch.randint(3, 90, (len(beams), 5), generator=draw)
        said_BK = reading.log_probabilities(beams, rest, asked_BK)
        pairs = zip(beams, rest, asked_BK, strict=True)
        true_BK = torch.stack([slowly(model, *pair, limit) for pair in pairs])
        gaps.append(float((said_BK - true_BK).abs().max()))
    return max(gaps)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("window", [WINDOW, 14, 100])
def test_ragged_beginnings_are_read_as_each_alone(name, window):
    model = tiny_model(name, sliding_window=window)
    for seed in range(3):
        gap = grown(model, seed=seed, begin=(1,) * (seed > 0))
        assert gap < 2e-4


def test_the_end_of_beginnings_that_are_too_long_is_read():
    for seed in range(3):
        gap = grown(tiny_model("gpt2", n_positions=6), limit=6, seed=seed)
        assert gap < 1e-4


def test_each_word_is_read_once(monkeypatch):
    model, shapes, real = tiny_model("smollm2"), [], []
    forward = model.forward

    def watched(**given):
        shapes.append(tuple(given["input_ids"].shape))
        real.append(int(given["attention_mask"][:, -shapes[-1][1] :].sum()))
        return forward(**given)

    monkeypatch.setattr(model, "forward", watched)
    reading = CausalReading(Decoder(model))
    asked_BK = torch.tensor([[5, 6]] * 3)
    reading.log_probabilities([(1,)] * 3, [0] * 3, asked_BK)
    reading.log_probabilities([(1, 8), (1, 20, 21, 22), (1, 8)], [0, 2, 0], asked_BK)
    after = [(1, 20, 21, 22, 9), (1, 8, 9), (1, 20, 21, 22, 30, 31)]
    said_BK = reading.log_probabilities(after, [0, 0, 1], asked_BK)
    assert shapes == [(1, 1), (2, 3), (3, 2)]
    assert real == [1, 1 + 3, 1 + 1 + 2]
    again_BK = reading.log_probabilities(after, [0, 0, 1], asked_BK)  # read from the start
    torch.testing.assert_close(again_BK, said_BK, atol=1e-4, rtol=1e-4)
    assert real[3:] == [5 + 3 + 6]
