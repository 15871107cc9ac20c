"""The nearest neighbour reads everything where there is no noise, and nothing where it is all."""

import pytest
import torch
from attacked import observe, open_tiny_bottom, sentences, share_right

from blindtune.attacks.adversary import StatesView
from blindtune.attacks.embedding_inversion import depends_on_place, nearest_tokens
from blindtune.attacks.imitation import Imitation
from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.leakage.empirical_privacy import empirical_privacy
from blindtune.models.margins import Margins
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.customer.private_states import privatize
from tiny_encoders import ENCODER_NAMES
from tiny_models import FAMILY_NAMES


@pytest.mark.parametrize("name", [*ENCODER_NAMES, *FAMILY_NAMES])
def test_without_noise_every_family_is_read_at_cut_0(tmp_path, name):
    bottom = open_tiny_bottom(tmp_path, name)
    view, private = observe(bottom, texts=["a good film", "bad", "the plot is odd"])
    score = empirical_privacy(nearest_tokens(view), private.ids, margins=bottom.margins)
    assert score.content.value == 0


@pytest.mark.parametrize("mode", ["token", "exponential", "vector", "block-output"])
@pytest.mark.parametrize("name", ["bert", "smollm2"])
def test_pure_noise_gives_nothing(tmp_path, name, mode):
    view, private = observe(open_tiny_bottom(tmp_path, name), Mechanism(eta=1e-4, mode=mode))
    score = empirical_privacy(nearest_tokens(view), private.ids).content
    assert score.value > 0.9
    assert score.high > 0.95


@pytest.mark.parametrize(("name", "eta"), [("bert", 8.0), ("gpt2", 8.0), ("gemma", 2.0)])
def test_it_finds_the_rows_that_comparing_with_all_finds(tmp_path, monkeypatch, name, eta):
    monkeypatch.setattr("blindtune.attacks.embedding_inversion.PORTION_NUMBERS", 10_000)
    view, private = observe(open_tiny_bottom(tmp_path, name), Mechanism(eta=eta, mode="vector"))
    found = nearest_tokens(view)
    assert 0 < share_right(found, private.ids) < 1
    words = torch.arange(len(view.table_VD))
    imitation = Imitation(view.model, 0)
    for state_LD, guess_L in zip(view.states, found, strict=True):
        ids_VL = words[:, None].expand(-1, len(state_LD))
        made_VLD = torch.stack(imitation.states(list(ids_VL)))
        assert torch.equal((made_VLD - state_LD).norm(dim=2).argmin(0), guess_L)


@pytest.mark.parametrize(("mode", "eta"), [("token", 8.0), ("exponential", 5.0)])
def test_words_are_read_as_they_were_sent(tmp_path, mode, eta):
    bottom = open_tiny_bottom(tmp_path)
    view, private = observe(bottom, Mechanism(eta=eta, mode=mode))
    score = empirical_privacy(nearest_tokens(view), private.ids, margins=bottom.margins)
    assert 0.1 < private.changed < 0.9
    assert score.content.value == pytest.approx(private.changed)


def test_positions_are_known_where_a_model_has_them(tmp_path):
    placed = {
        name: depends_on_place(open_tiny_bottom(tmp_path, name).stack, 5)
        for name in ("bert", "mpnet", "gpt2", "deberta", "smollm2", "bloom")
    }
    assert placed == {
        "bert": True, "mpnet": True, "gpt2": True, "deberta": False, "smollm2": False,
        "bloom": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*ENCODER_NAMES, "smollm2", "gpt2", "gemma3", "opt-350m"])
def test_the_imitation_computes_what_the_customer_computes(tmp_path, name):
    bottom = open_tiny_bottom(tmp_path, name, cut=2)
    view, private = observe(bottom)
    made = Imitation(view.model, view.cut).states(private.ids, batch_size=5)
    for ours, sent in zip(made, private.states, strict=True):
        torch.testing.assert_close(ours, sent, atol=1e-4, rtol=1e-4)


def test_the_imitation_noises_words_and_keeps_what_stands_around_them(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    ids_L = torch.tensor([1, 40, 1, 2])  # a text may spell what stands around it
    clean_LD = bottom.stack.embedding(ids_L)
    with pytest.warns(UserWarning, match="repeat"):
        noisy = Imitation(
            bottom.stack, 0, Mechanism(eta=1.0, mode="vector"), Margins((1,), (2,)), testing_seed=3
        )
    moved_L = (noisy.states([ids_L])[0] - clean_LD).norm(dim=1) > 0
    assert moved_L.tolist() == [False, True, True, False]
    assert not torch.equal(noisy.states([ids_L])[0], noisy.states([ids_L])[0])


@pytest.mark.parametrize("mechanism", [None, Mechanism(eta=9.0), Mechanism(eta=9.0, mode="vector")])
def test_the_imitation_replaces_words_by_their_groups_as_the_customer_does(tmp_path, mechanism):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    groups = WordGroups(torch.arange(128) // 2 * 2)
    ids = privatize(bottom, sentences(200, seed=3), mechanism=None).ids
    sent = torch.cat(privatize(bottom, ids, mechanism=mechanism, groups=groups).states)
    imitation = Imitation(bottom.stack, 0, mechanism, groups=groups)
    made = torch.cat(imitation.states(ids))
    if mechanism is None:
        assert torch.equal(made, sent)
        return
    table_VD = bottom.stack.embedding.weight
    counts = []
    for state_TD in (made, sent):
        word_T = torch.cdist(state_TD, table_VD).argmin(1)
        if mechanism.replaces_words:
            assert (word_T % 2 == 0).all()
        truth_T = groups.apply(torch.cat(ids))
        counts.append(float((word_T == truth_T).float().mean()))
    assert 0.05 < counts[1] < 0.95
    assert counts[0] == pytest.approx(counts[1], abs=0.03)


def test_the_imitation_keeps_what_is_around_a_text_from_its_group(tmp_path):
    bottom = open_tiny_bottom(tmp_path, "smollm2")
    groups = WordGroups(torch.arange(128) // 2 * 2)
    imitation = Imitation(bottom.stack, 0, Mechanism(eta=1e5), Margins((1,), (3,)), groups)
    made_LD = imitation.states([torch.tensor([1, 1, 41, 3])])[0]
    assert torch.equal(made_LD, bottom.stack.embedding(torch.tensor([1, 0, 40, 3])))


def test_views_refuse_what_is_not_of_the_model(tmp_path):
    stack = open_tiny_bottom(tmp_path).stack
    good = torch.zeros(3, stack.hidden_size)
    with pytest.raises(ConfigError, match="cut from 0 to 1"):
        StatesView(model=stack, cut=4, states=(good,))
    for states in ((), (torch.zeros(3, 5),), (good[:0],), (good / 0,)):
        with pytest.raises(DataError, match="expected"):
            StatesView(model=stack, cut=0, states=states)
    with pytest.raises(DataError, match="public texts as ids"):
        StatesView(model=stack, cut=0, states=(good,), public=(torch.tensor([4, 900]),))
    with pytest.raises(DataError, match="at least 2 public texts for such, got 0"):
        StatesView(model=stack, cut=0, states=(good,)).require_public("such", 2)
