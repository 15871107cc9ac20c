"""Sums of what is spent, per token, record and run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtune.errors import ConfigError, DataError
from blindtune.privacy.accounting import Releases, account
from blindtune.privacy.metric_dp import Mechanism

FULL = [torch.ones(3), torch.ones(5)]


def test_one_draw_reused_spends_once():
    spent = account(Mechanism(eta=2.0), FULL, 0.5, Releases(epochs=10))
    assert (spent.draws, spent.eta_per_token, spent.epsilon_per_token) == (1, 2.0, 1.0)
    assert (spent.epsilon_per_record_mean, spent.epsilon_per_record_max) == (4.0, 5.0)
    assert (spent.epsilon_per_run, spent.records, spent.tokens) == (8.0, 2, 8)
    assert (spent.weakened_tokens, spent.unprotected_tokens) == (0, 0)
    assert account(Mechanism(eta=2.0), FULL, 0.5) == spent


def test_fresh_draws_spend_every_time():
    once = account(Mechanism(eta=2.0), FULL, 0.5)
    often = account(Mechanism(eta=2.0), FULL, 0.5, Releases(epochs=10, redraw=True))
    for name in ("eta_per_token", "epsilon_per_token", "epsilon_per_record_max", "epsilon_per_run"):
        assert getattr(often, name) == pytest.approx(10 * getattr(once, name))


@given(
    st.lists(st.lists(st.floats(0.01, 1), max_size=5), max_size=5),
    st.floats(0.1, 100),
    st.floats(0.1, 10),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sums_are_sums(factors, eta, distance):
    spent = account(Mechanism(eta=eta), map(torch.tensor, factors), distance)
    by_record = [sum(eta * distance / f for f in record) for record in factors]
    assert spent.epsilon_per_run == pytest.approx(sum(by_record), rel=1e-5)
    assert spent.epsilon_per_record_max == pytest.approx(max(by_record, default=0), rel=1e-5)


def test_less_noise_spends_more_and_no_noise_everything():
    weak = account(Mechanism(eta=2.0), [torch.tensor([1.0, 0.5])], 1.0)
    assert (weak.epsilon_per_run, weak.weakened_tokens) == (6.0, 1)
    none = account(Mechanism(eta=2.0), [torch.tensor([1.0, 0.0]), torch.ones(2)], 1.0)
    assert none.epsilon_per_token == 2.0
    assert none.epsilon_per_record_max == none.epsilon_per_run == math.inf
    assert none.unprotected_tokens == 1


def test_the_text_says_per_what():
    text = str(account(Mechanism(eta=2.0), [torch.tensor([1.0, 0.5, 0.0])], 0.5, Releases()))
    for words in ("per unit of distance", "per token", "per record", "per run", "one draw, reused"):
        assert words in text
    assert "1 tokens have no noise" in text
    assert "1 tokens with less noise" in text
    redrawn = account(Mechanism(eta=2.0), FULL, 0.5, Releases(epochs=3, redraw=True))
    assert "3 fresh draws" in str(redrawn)


def test_block_outputs_need_a_bound():
    with pytest.raises(ConfigError, match="clip_norm in block-output mode"):
        account(Mechanism(eta=1.0, mode="block-output"), FULL, 1.0)
    clipped = Mechanism(eta=1.0, mode="block-output", clip_norm=2.0)
    assert account(clipped, FULL, 4.0).epsilon_per_run == 32.0
    with pytest.raises(ConfigError, match="2 clip_norm = 4"):
        account(clipped, FULL, 5.0)


def test_bad_inputs_are_refused():
    with pytest.raises(ConfigError, match="distance"):
        account(Mechanism(eta=1.0), FULL, 0.0)
    with pytest.raises(DataError, match="between 0 and 1"):
        account(Mechanism(eta=1.0), [torch.tensor([2.0])], 1.0)
    with pytest.raises(ConfigError, match="epochs"):
        Releases(epochs=0)
