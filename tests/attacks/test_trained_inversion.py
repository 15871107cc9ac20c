"""A trained inverter reads undefended states of any cut, and none that are all noise."""

from collections import Counter

import pytest
import torch
from attacked import observe, open_tiny_bottom, share_right

import blindtune.attacks.trained_inversion as trained_inversion_module
from blindtune.attacks.adversary import StatesView, unigram
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.fitting import FitConfig
from blindtune.attacks.imitation import Imitation
from blindtune.attacks.trained_inversion import (
    InverterConfig,
    candidates,
    train_inverter,
    trained_inversion,
)
from blindtune.errors import ConfigError, DataError
from blindtune.privacy.metric_dp import Mechanism

STATES = Imitation.states
SHORT = FitConfig(epochs=6, learning_rate=3e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "gru"])
@pytest.mark.parametrize("name", ["bert", "smollm2"])
def test_depth_alone_hides_nothing_from_it(tmp_path, name, kind):
    view, private = observe(open_tiny_bottom(tmp_path, name, cut=2), public=120)
    guess = trained_inversion(view, InverterConfig(kind=kind, fit=SHORT))
    assert share_right(guess, private.ids) > (0.8 if kind == "linear" else 0.97)
    assert share_right(nearest_tokens(view), private.ids) < 0.6


@pytest.mark.parametrize("mode", ["token", "exponential", "vector", "block-output"])
def test_pure_noise_leaves_the_prior_alone(tmp_path, mode):
    bottom = open_tiny_bottom(tmp_path, cut=1)
    view, private = observe(bottom, Mechanism(eta=1e-3, mode=mode), public=120)
    guess = trained_inversion(view, InverterConfig(kind="linear", fit=SHORT))
    prior = unigram(view.public, len(view.table_VD))
    share_of_best = share_right([torch.full_like(t, int(prior.argmax())) for t in private.ids],
                                private.ids)  # fmt: skip
    assert share_right(guess, private.ids) < share_of_best + 0.1


@pytest.mark.parametrize("mode", ["token", "vector", "block-output"])
def test_under_noise_it_reads_more_than_the_nearest_neighbour(tmp_path, mode):
    eta = {"token": 6.0, "vector": 6.0, "block-output": 4.0}[mode]
    view, private = observe(open_tiny_bottom(tmp_path), Mechanism(eta=eta, mode=mode), public=150)
    nearest = share_right(nearest_tokens(view), private.ids)
    trained = share_right(trained_inversion(view, InverterConfig(fit=SHORT)), private.ids)
    assert 0.1 < nearest < trained - 0.1


def test_knowing_the_noise_helps(tmp_path):
    mechanism = Mechanism(eta=4.0, mode="vector")
    view, private = observe(open_tiny_bottom(tmp_path, cut=1), mechanism, public=120)
    adaptive, naive = (
        share_right(
            trained_inversion(view, InverterConfig(kind="linear", adaptive=adaptive, fit=SHORT)),
            private.ids,
        )
        for adaptive in (True, False)
    )
    assert naive < adaptive - 0.05


def test_words_that_the_public_text_lacks_are_found(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    draw = torch.Generator().manual_seed(0)
    public = tuple(torch.randint(4, 80, (20,), generator=draw) for _ in range(60))
    secret = torch.arange(80, 128)
    view = StatesView(
        model=bottom.stack,
        cut=0,
        states=tuple(Imitation(bottom.stack, 0).states([secret])),
        public=public,
    )
    guess = trained_inversion(view, InverterConfig(kind="linear", fit=SHORT))
    assert share_right(guess, [secret]) > 0.95


def test_it_learns_and_gives_ranked_candidates(tmp_path):
    mechanism = Mechanism(eta=5.0, mode="vector")
    view, private = observe(open_tiny_bottom(tmp_path, cut=1), mechanism, public=80)
    inverter, result = train_inverter(view, InverterConfig(kind="gru", fit=SHORT))
    assert 1 <= result.epochs <= 6
    found = candidates(inverter, view.states, count=5)
    assert [w.shape for w in found.words] == [(len(t), 5) for t in private.ids]
    posterior = found.log_likelihoods[0] + inverter.log_prior()[found.words[0]]
    assert bool((posterior.diff(dim=1) <= 1e-4).all())
    in_five = torch.cat([(w == t[:, None]).any(1) for w, t in zip(found.words, private.ids,
                                                                 strict=True)])  # fmt: skip
    assert float(in_five.float().mean()) > share_right(found.first(), private.ids)


@pytest.mark.parametrize("mode", [None, "vector", "exponential", "block-output"])
def test_the_same_seed_gives_the_same_guess_with_noise_too(tmp_path, mode):
    mechanism = None if mode is None else Mechanism(eta=6.0, mode=mode)
    view, _ = observe(open_tiny_bottom(tmp_path, cut=1), mechanism, public=30)
    config = InverterConfig(kind="mlp", fit=FitConfig(epochs=6, seed=4))
    first, second = (train_inverter(view, config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("mode", "drawn", "most"), [(None, 1, 10), ("vector", 10, 1), ("token", 2 + 4, 2)]
)
def test_no_epoch_after_epoch_learns_from_the_same_noise(tmp_path, monkeypatch, mode, drawn, most):
    """10 epochs: noise on vectors is new in each; of words two draws are kept, and renewed."""
    mechanism = None if mode is None else Mechanism(eta=6.0, mode=mode)
    view, _ = observe(open_tiny_bottom(tmp_path), mechanism, public=30)
    config = InverterConfig(kind="linear", draws=2, fit=FitConfig(epochs=10, patience=99))
    made, used, learned = [], [], trained_inversion_module._loss

    def states(self, texts, batch_size=32):
        made.append(STATES(self, texts, batch_size))
        return made[-1]

    def loss(inverter, some, ids, word_C):
        used.append(next(k for k, one in enumerate(made) if any(some[0] is row for row in one)))
        return learned(inverter, some, ids, word_C)

    monkeypatch.setattr(Imitation, "states", states)
    monkeypatch.setattr(trained_inversion_module, "_loss", loss)
    assert train_inverter(view, config)[1].epochs == 10
    epochs = Counter(used[k] for k in range(1, len(used), 3))  # two batches an epoch, then held-out
    assert len(made) == drawn + 1  # and the held-out texts
    assert len(epochs) == drawn
    assert max(epochs.values()) <= most


def test_bad_options_and_no_public_text(tmp_path):
    view, _ = observe(open_tiny_bottom(tmp_path))
    with pytest.raises(DataError, match="public texts for a trained inverter"):
        train_inverter(view)
    for bad in ({"kind": "tree"}, {"hidden": 0}, {"draws": 0}, {"context": -1}):
        with pytest.raises(ConfigError, match="expected"):
            InverterConfig(**bad)
    for bad in ({"epochs": 0}, {"held_out": 1.0}, {"learning_rate": 0.0}, {"limit_seconds": 0}):
        with pytest.raises(ConfigError, match="expected"):
            FitConfig(**bad)
