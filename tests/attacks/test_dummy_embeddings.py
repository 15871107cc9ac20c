"""Embeddings of no word are moved until they explain what was seen."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from attacked import observe, open_tiny_bottom, share_right

from blindtune.attacks import dummy_embeddings
from blindtune.attacks.dummy_embeddings import DummyConfig, tokens_by_dummies
from blindtune.errors import ConfigError, DataError
from blindtune.privacy.metric_dp import Mechanism


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dummy_embeddings_mend_a_poor_guess(tmp_path, name):
    view, private = observe(open_tiny_bottom(tmp_path, name, cut=1))
    draw = torch.Generator().manual_seed(0)
    start = tuple(
        torch.where(
            torch.rand(len(t), generator=draw) < 0.3,
            torch.randint(4, 99, (len(t),), generator=draw),
            t,
        )
        for t in private.ids
    )
    assert share_right(start, private.ids) < 0.75
    mended, done = tokens_by_dummies(view, start)
    assert share_right(mended, private.ids) > 0.9
    assert done == len(view.states)


def test_dummy_embeddings_find_nothing_in_noise(tmp_path):
    mechanism = Mechanism(eta=1e-3, mode="block-output")
    view, private = observe(open_tiny_bottom(tmp_path, cut=1), mechanism)
    guess, _ = tokens_by_dummies(view, config=DummyConfig(steps=20))
    assert share_right(guess, private.ids) < 0.2


def test_a_right_start_is_left_at_once(tmp_path, monkeypatch):
    view, private = observe(open_tiny_bottom(tmp_path, cut=1))
    steps = []
    moved = dummy_embeddings._Search._losses
    monkeypatch.setattr(
        dummy_embeddings._Search, "_losses", lambda *given: steps.append(1) or moved(*given)
    )
    guess, _ = tokens_by_dummies(view, tuple(private.ids))
    assert share_right(guess, private.ids) == 1
    assert len(steps) <= 3 * len(view.states)  # one look, and two to compare start and end


def test_a_start_that_explains_the_states_better_is_kept(tmp_path):
    view, private = observe(open_tiny_bottom(tmp_path, cut=1))
    wild = DummyConfig(steps=2, learning_rate=100.0)
    start = tuple(ids.clone() for ids in private.ids)
    start[0][1] = (start[0][1] + 1) % 100  # not all is explained, so there is something to try
    guess, _ = tokens_by_dummies(view, start, wild)
    assert share_right(guess, private.ids) >= share_right(start, private.ids)
    assert share_right(tokens_by_dummies(view, None, wild)[0], private.ids) < 0.5


def test_what_time_does_not_reach_keeps_its_start(tmp_path, monkeypatch):
    view, private = observe(open_tiny_bottom(tmp_path, cut=1))
    start = tuple(torch.full_like(ids, 7) for ids in private.ids)
    ticks = count(0.0, 1.0)
    monkeypatch.setattr(dummy_embeddings, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(dummy_embeddings, "TEXTS", 4)
    guess, done = tokens_by_dummies(view, start, DummyConfig(steps=5, limit_seconds=7.5))
    assert done == 4
    assert all(torch.equal(g, s) for g, s in zip(guess[8:], start[8:], strict=True))
    assert len(guess) > 8


@pytest.mark.parametrize("started", [True, False])
def test_when_time_is_up_nothing_more_is_searched(tmp_path, monkeypatch, started):
    view, _ = observe(open_tiny_bottom(tmp_path, cut=1))
    start = tuple(torch.full((len(state),), 7) for state in view.states) if started else None
    ticks = count(0.0, 1.0)
    monkeypatch.setattr(dummy_embeddings, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(dummy_embeddings, "TEXTS", 4)
    made, find = [], dummy_embeddings.NearestRows.find
    monkeypatch.setattr(
        dummy_embeddings._Search, "_losses", lambda *_: pytest.fail("moved after its time")
    )
    monkeypatch.setattr(
        dummy_embeddings.NearestRows, "find",
        lambda self, rows: made.append(len(rows)) or find(self, rows),
    )  # fmt: skip
    guess, done = tokens_by_dummies(view, start, DummyConfig(limit_seconds=0.5))
    assert done == 0
    assert tuple(map(len, guess)) == view.lengths
    assert len(torch.cat(guess).unique()) == 1
    assert set(made) == (set() if started else {1})


def test_bad_values(tmp_path):
    view, _ = observe(open_tiny_bottom(tmp_path, cut=1), public=3)
    with pytest.raises(DataError, match="one token for every state"):
        tokens_by_dummies(view, view.public)
    for bad in ({"steps": 0}, {"patience": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            DummyConfig(**bad)
    with pytest.raises(ConfigError, match="limit_seconds > 0"):
        DummyConfig(limit_seconds=0)
