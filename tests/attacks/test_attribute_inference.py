"""An attribute of texts is read from what crossed, and not from pure noise."""

import math
import random
from dataclasses import replace

import pytest
import torch
from attacked import observe, open_tiny_bottom, sentences

from blindtune.attacks.adversary import StatesView
from blindtune.attacks.attribute_inference import AttributeConfig, infer_attribute
from blindtune.attacks.fitting import FitConfig
from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.leakage.empirical_privacy import record_privacy
from blindtune.privacy.metric_dp import Mechanism
from blindtune.split.customer.private_states import privatize


def of_author(texts):
    """One author writes of films and stories, the other of the rest."""
    return torch.tensor([int(t.split()[1] in ("film", "story", "plot", "joke")) for t in texts])


def attack(bottom, mechanism):
    mine, known = sentences(120, seed=5), sentences(400, seed=6)
    view, _ = observe(bottom, mechanism, texts=mine)
    public = tuple(privatize(bottom, known, mechanism=None).ids)
    view = StatesView(
        model=view.model, cut=view.cut, states=view.states, mechanism=mechanism,
        margins=view.margins, public=public,
    )  # fmt: skip
    config = AttributeConfig(fit=FitConfig(epochs=60, learning_rate=3e-3, patience=10))
    guess_N, result = infer_attribute(view, of_author(known), config)
    assert result.epochs > 0
    return record_privacy(guess_N, of_author(mine))


def test_it_reads_an_attribute_of_undefended_texts_and_less_under_noise(tmp_path):
    bottom = open_tiny_bottom(tmp_path, cut=2)
    clean = attack(bottom, None)
    noisy = attack(bottom, Mechanism(eta=1e-3, mode="vector"))
    assert clean.advantage > 0.6
    assert noisy.advantage < 0.3


def test_it_reads_what_the_length_tells_under_noise_that_hides_all_else(tmp_path):
    def texts(count, seed):
        """The class is the parity of the number of words."""
        draw = random.Random(seed)
        return ["the film is" + " good" * draw.choice((3, 4)) for _ in range(count)]

    def of_length(some):
        return torch.tensor([text.count("good") % 2 for text in some])

    bottom, mechanism = open_tiny_bottom(tmp_path), Mechanism(eta=1e-3, mode="vector")
    mine, known = texts(60, 1), texts(120, 2)
    view, _ = observe(bottom, mechanism, texts=mine)
    view = replace(view, public=tuple(privatize(bottom, known, mechanism=None).ids))
    guess_N, _ = infer_attribute(view, of_length(known))
    assert record_privacy(guess_N, of_length(mine)).advantage > 0.8


def test_two_public_texts_and_constant_features_give_no_nan(tmp_path):
    view, _ = observe(open_tiny_bottom(tmp_path), public=2)
    _, result = infer_attribute(view, torch.tensor([0, 1]))
    assert math.isfinite(result.held_out_loss)


def test_bad_auxiliary_data(tmp_path):
    view, _ = observe(open_tiny_bottom(tmp_path), public=5)
    with pytest.raises(DataError, match="class from 0 for each of 5"):
        infer_attribute(view, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="at least 1"):
        AttributeConfig(draws=0)
