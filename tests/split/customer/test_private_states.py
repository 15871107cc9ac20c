"""What leaves the customer: noised once, and nothing else."""

import pytest
import torch
from spellings import spellings
from split_world import LABELS, TEXTS, World

from blindtune.errors import ConfigError, DataError
from blindtune.exchange.wire.messages import Batch, Forward, Predict
from blindtune.exchange.wire.transcript import Recorder
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.token_importance import ImportanceConfig
from blindtune.privacy.word_groups import WordGroups
from blindtune.split.customer.privacy_statement import state_privacy
from blindtune.split.customer.private_states import PrivateStates, privatize
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, predict, train
from blindtune.split.customer.ushape import Top, train_u_shape
from tiny_encoders import ENCODER_NAMES

PLAN = PassConfig(epochs=2, batch_size=4, precision="float32")


def noised(world, **options):
    with pytest.warns(UserWarning, match="repeat"):
        return world.private(testing_seed=1, **options)


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_the_wire_holds_no_text_and_no_ids(tmp_path, partition):
    world = World(tmp_path, "smollm2", partition, cut=1, last=int(partition == "u-shape"))
    recorder = Recorder()
    job = world.job(tap=recorder)
    predict_sent = partition == "u-shape"
    private = noised(world, mechanism=Mechanism(eta=5.0), predict_sent=predict_sent)
    if partition == "two-part":
        train(job, private, PLAN)
        predict(job, private)
    else:
        train_u_shape(job, Top(world.bottom, None), private, PLAN, language_model=True)
    wire = recorder.transcript().wire()
    assert len(wire) > 10_000
    long = [(t, i.tolist()) for t, i in zip(TEXTS, private.ids, strict=True) if len(i) > 5]
    assert len(long) > 5
    for text, ids in long:
        assert not any(spelling in wire for spelling in spellings(text, ids))
    job.close()
    seen = {type(c.message).__name__ for c in recorder.transcript().crossings()}
    two_part = {"Batch", "BatchResult", "Predict", "Predictions"}
    u_shape = {"Forward", "Outputs", "Backward", "Gradients"}
    both = {"Hello", "Welcome", "OpenJob", "JobState", "Step", "Stepped", "Checkpoint",
            "Checkpointed"}  # fmt: skip
    assert seen == both | (two_part if partition == "two-part" else u_shape)


def test_every_epoch_sends_the_same_draw(tmp_path):
    world, recorder = World(tmp_path), Recorder()
    job = world.job(tap=recorder)
    private = noised(world, mechanism=Mechanism(eta=5.0, mode="vector"))
    train(job, private, PassConfig(epochs=3, batch_size=1, precision="float32"))
    job.close()
    sent = [c.message for c in recorder.transcript().crossings() if isinstance(c.message, Batch)]
    assert len(sent) == 3 * len(TEXTS)
    assert len({m.hidden_TD.numpy().tobytes() for m in sent}) == len(TEXTS)
    assert not any(m.input_gradient for m in sent)
    assert not any(isinstance(c.message, Forward | Predict)
                   for c in recorder.transcript().crossings())  # fmt: skip


@pytest.mark.parametrize("mode", ["token", "exponential", "vector", "block-output"])
def test_modes(tmp_path, mode):
    world = World(tmp_path, "bert", cut=2)
    clean = world.private()
    states = {}
    for eta in (1e5, 0.5):
        states[eta] = noised(world, mechanism=Mechanism(eta=eta, mode=mode), batch_size=3)
    for exact, weak, strong in zip(
        clean.states, states[1e5].states, states[0.5].states, strict=True
    ):
        torch.testing.assert_close(weak, exact, rtol=0, atol=0.05)
        assert exact.shape == strong.shape
        assert (strong - exact).norm() > 0.1 * exact.norm()
    assert all(torch.equal(a, b) for a, b in zip(clean.ids, states[0.5].ids, strict=True))
    if mode in ("token", "exponential"):
        assert states[1e5].changed == 0
        assert states[0.5].changed > 0.8
        states[0.5].save(tmp_path / "states")
        assert PrivateStates.load(tmp_path / "states").changed == states[0.5].changed
    else:
        assert states[0.5].changed is None


def test_batches_change_nothing_without_noise(tmp_path):
    world = World(tmp_path, "roberta", cut=2)
    one, many = (world.private(batch_size=n) for n in (1, 10))
    for a, b in zip(one.states, many.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_contributing_tokens_get_no_noise_in_training_texts_of_their_class(tmp_path):
    world = World(tmp_path, cut=0)
    mechanism = Mechanism(eta=1.0, mode="vector")
    importance = ImportanceConfig(fraction=0.05, factor=0.0)
    clean = world.private()
    spared = noised(world, mechanism=mechanism, importance=importance, classes=2)
    equal = [
        (torch.isclose(a, b, atol=1e-5).all(1), ids)
        for a, b, ids in zip(clean.states, spared.states, clean.ids, strict=True)
    ]
    share = sum(int(e.sum()) for e, _ in equal) / sum(len(e) for e, _ in equal)
    assert 0.02 < share < 0.6
    for labels, classes, said in ((None, 2, "got no labels"), (LABELS, 0, "got no classes")):
        with pytest.raises(ConfigError, match=said):
            privatize(
                world.bottom, TEXTS, labels, mechanism=mechanism, importance=importance,
                classes=classes,
            )  # fmt: skip


def pairs_of_words(world):
    """Every even word stands for itself and the next; special tokens are not spared here."""
    return WordGroups(torch.arange(len(world.bottom.stack.embedding.weight)) // 2 * 2)


def test_words_of_a_group_leave_as_the_same_states(tmp_path):
    world = World(tmp_path, "bert", cut=2)
    groups, letters = pairs_of_words(world), "abcdefgh"
    ids = [world.bottom.tokenizer(x, add_special_tokens=False)["input_ids"][-1] for x in letters]
    by_group = {}
    for letter, word in zip(letters, ids, strict=True):
        by_group.setdefault(word // 2, []).append(letter)
    first, second = next(pair for pair in by_group.values() if len(pair) == 2)
    texts = [f"so {first} film", f"so {second} film"]
    plain = privatize(world.bottom, texts, mechanism=None)
    assert not torch.equal(plain.states[0], plain.states[1])
    hidden = privatize(world.bottom, texts, mechanism=None, groups=groups)
    assert torch.equal(hidden.states[0], hidden.states[1])
    assert not torch.equal(hidden.ids[0], hidden.ids[1])  # what stays at home is the truth
    assert 0 < hidden.changed < 1


def test_token_mode_picks_among_representatives(tmp_path):
    world = World(tmp_path, "smollm2", cut=0)
    groups = pairs_of_words(world)
    table_VD = world.bottom.stack.embedding.weight
    for eta, least in ((1e5, 0.0), (5.0, 0.5)):
        made = noised(world, mechanism=Mechanism(eta=eta), groups=groups)
        sent_T = torch.cdist(torch.cat(made.states), table_VD).argmin(1)
        assert (sent_T % 2 == 0).all()
        away = (sent_T != groups.apply(torch.cat(made.ids))).float().mean()
        assert least <= away <= (0 if eta == 1e5 else 1)


def test_two_calls_draw_twice(tmp_path):
    world = World(tmp_path, cut=0)
    first, second = (world.private(Mechanism(eta=1.0, mode="vector")) for _ in range(2))
    assert not torch.equal(first.states[0], second.states[0])


def test_states_are_kept_and_read_back(tmp_path):
    world = World(tmp_path)
    private = world.private()
    private.save(tmp_path / "states")
    again = PrivateStates.load(tmp_path / "states")
    assert torch.equal(again.labels, LABELS)
    for kind in ("states", "ids"):
        pairs = zip(getattr(private, kind), getattr(again, kind), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    (tmp_path / "states").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot read"):
        PrivateStates.load(tmp_path / "states")


def test_bad_texts(tmp_path):
    world = World(tmp_path)
    with pytest.raises(DataError, match="as many labels"):
        privatize(world.bottom, TEXTS, LABELS[:3], mechanism=None)
    with pytest.raises(DataError, match="expected texts"):
        privatize(world.bottom, [], mechanism=None)
    with pytest.raises(DataError, match="text 1 holds no token"):
        privatize(world.bottom, ["a", ""], mechanism=None)
    with pytest.raises(DataError, match="labels"):
        train(world.job(), privatize(world.bottom, TEXTS, mechanism=None), PLAN)
    with pytest.raises(ConfigError):
        PassConfig(epochs=0)
    with pytest.raises(ConfigError, match="u-shape"):
        Top(world.bottom, None)


@pytest.mark.parametrize(("name", "longest"), [("bert", 64), ("roberta", 62), ("opt", 128)])
def test_long_texts_are_cut_to_what_the_model_takes(tmp_path, name, longest):
    world = World(tmp_path, name)
    long = privatize(world.bottom, ["a" * 500], mechanism=None)
    assert len(long.states[0]) == longest
    assert predict(world.job(), long).shape == (1, 2)


@pytest.mark.parametrize("eta", [6.0, 9.0, 14.0])
def test_the_statement_knows_that_representatives_are_drawn_among_themselves(tmp_path, eta):
    world = World(tmp_path, "smollm2", cut=0)
    groups, public = pairs_of_words(world), str(tmp_path / "unread")
    config = PrivatizerConfig(privatizer="groups", eta=eta, public_text=public)
    texts = TEXTS * 30
    made = privatize(world.bottom, texts, mechanism=config.mechanism(eta), groups=groups)
    told = state_privacy(world.bottom, made, config, eta, groups=groups, training=False)
    assert told.changed == made.changed
    assert told.expected_change == pytest.approx(made.changed, abs=0.08)
    table_VD = world.bottom.stack.embedding.weight[groups.representatives]
    distance_GG = torch.cdist(table_VD, table_VD).fill_diagonal_(torch.inf)
    place_T = torch.searchsorted(groups.representatives, groups.apply(torch.cat(made.ids)))
    typical = distance_GG.min(1).values[place_T].median().item()
    assert told.typical_norm == pytest.approx(typical, rel=0.1)
    assert told.spending["distance"] == told.typical_norm
    assert "representatives" in str(told).splitlines()[1]


def test_words_that_stand_for_no_group_always_change(tmp_path):
    world = World(tmp_path, "smollm2", cut=0)
    groups = pairs_of_words(world)
    odd = [torch.arange(9, 99, 2)]
    assert (groups.apply(odd[0]) != odd[0]).all()
    config = PrivatizerConfig(privatizer="groups", eta=1e5, public_text="unread")
    made = privatize(world.bottom, odd, mechanism=config.mechanism(1e5), groups=groups)
    told = state_privacy(world.bottom, made, config, 1e5, groups=groups, training=False)
    assert (told.expected_change, told.changed) == (1.0, 1.0)


@pytest.mark.parametrize("name", [*ENCODER_NAMES, "smollm2", "opt", "gpt2"])
def test_noised_embeddings_do_not_show_which_words_are_the_models_padding(tmp_path, name):
    """Such a word would move the positions of all behind it; which it is, a config says."""
    world = World(tmp_path, name, cut=0)
    padding = world.bottom.stack.config.pad_token_id
    texts = [torch.tensor([40, word, 41, 42]) for word in (padding, 43)]
    weight = world.bottom.stack.embedding.weight
    assert not weight.requires_grad
    weight[padding] = weight[43]  # equal words: under equal noise all that is sent is equal
    one, two = (noised_texts(world, [text], Mechanism(eta=5.0, mode="vector")) for text in texts)
    torch.testing.assert_close(one.states[0], two.states[0])


def noised_texts(world, texts, mechanism):
    with pytest.warns(UserWarning, match="repeat"):
        return privatize(world.bottom, texts, mechanism=mechanism, testing_seed=1)
