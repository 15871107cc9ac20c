"""What a U-shape's gradients tell: the true next tokens, and which texts have one label."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attacked import observe, open_tiny_bottom, sentences, share_right

from blindtune.attacks.adversary import unigram
from blindtune.attacks.averaging import averaged_tokens, fresh_draws, weighed_draws
from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.attacks.gradient_matching import (
    NO_GUESS,
    GradientsView,
    SolveConfig,
    tokens_from_gradients,
)
from blindtune.attacks.label_inference import (
    groups_of_activations,
    groups_of_gradients,
    labels_from_activations,
)
from blindtune.attacks.likelihoods import ChannelConfig
from blindtune.attacks.observation import seen_gradients, seen_texts
from blindtune.errors import ConfigError, DataError
from blindtune.evaluation.leakage.empirical_privacy import record_privacy
from blindtune.exchange.wire.transcript import Recorder, Transcript
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.models.decoder import Decoder
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.randomized_response import drawn_labels, keep_chance
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.requests import PassConfig, new_token, open_job
from blindtune.split.customer.ushape import Top, train_u_shape
from blindtune.split.partition import Cut, PooledHead, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from tiny_models import tiny_model, tiny_tokenizer

PURE_NOISE = Mechanism(eta=1e-3, mode="vector")


def u_shape(
    folder, name, last, *, labels=None, precision="float32", epochs=1, mechanism=PURE_NOISE
):
    """A run of the U-shape: model, transcript, and the customer's private states."""
    model = tiny_model(name)
    stack = stack_of(model)
    cut = Cut(partition="u-shape", layers=stack.layer_count, cut=1, last=last)
    write_bottom(model, tiny_tokenizer(), folder / "bottom", cut)
    bottom, recorder = open_bottom(folder / "bottom"), Recorder()
    vendor = Vendor(stack, cut, bottom.id, folder / "vendor")
    texts = sentences(10, seed=1) if labels is None else sentences(len(labels), seed=1)
    private = privatize(bottom, texts, labels, mechanism=mechanism)
    head = None if labels is None else PooledHead(stack.hidden_size, 2, "last")
    with vendor.session("anna") as handler:
        job = open_job(
            lambda: InProcessTransport(handler, tap=recorder), bottom, new_token(),
            TuningConfig(lora_rank=2, learning_rate=1e-3), task="hidden", outputs=0,
            precision=precision,
        )  # fmt: skip
        plan = PassConfig(epochs=epochs, batch_size=4, precision=precision)
        train_u_shape(
            job, Top(bottom, head), private, plan, language_model=labels is None, true_targets=True
        )
        job.close()
    return model, recorder.transcript(), private


def place_of(seen, private):
    """Which private text each seen one is."""
    return [
        next(i for i, mine in enumerate(private.states)
             if mine.shape == state.shape and torch.allclose(mine, state, rtol=1e-2, atol=1.0))
        for state in seen.states
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "last", "precision"),
    [
        ("smollm2", 0, "float32"), ("smollm2", 0, "float16"), ("smollm2", 2, "float32"),
        ("gpt2", 1, "float32"), ("gemma2", 1, "float32"), ("phi", 0, "float32"),
        ("opt-350m", 1, "float32"),
    ],
)  # fmt: skip
def test_gradients_tell_the_text_whatever_the_noise(tmp_path, name, last, precision):
    model, transcript, private = u_shape(tmp_path, name, last, precision=precision)
    seen = seen_texts(transcript)
    place = place_of(seen, private)
    for step in seen_gradients(transcript, seen):
        view = GradientsView(
            model=Decoder(model), last=last, outputs=step.outputs, gradients=step.gradients
        )
        guess = tokens_from_gradients(view)
        truth = [private.ids[place[i]] for i in step.texts]
        assert all(int(text[0]) == NO_GUESS for text in guess)
        assert share_right([g[1:] for g in guess], [t[1:] for t in truth]) > 0.9


def test_noise_in_place_of_gradients_tells_nothing(tmp_path):
    model, transcript, private = u_shape(tmp_path, "smollm2", 1)
    seen = seen_texts(transcript)
    step, place = seen_gradients(transcript, seen)[0], place_of(seen, private)
    draw = torch.Generator().manual_seed(0)
    noise = tuple(torch.randn(g.shape, generator=draw) for g in step.gradients)
    view = GradientsView(model=Decoder(model), last=1, outputs=step.outputs, gradients=noise)
    guess = tokens_from_gradients(view, SolveConfig(iterations=20))
    assert share_right(guess, [private.ids[place[i]] for i in step.texts]) < 0.1


def test_gradients_group_texts_by_their_label(tmp_path):
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0])
    _, transcript, private = u_shape(tmp_path, "smollm2", 0, labels=labels)
    seen = seen_texts(transcript)
    place, gradients, order = place_of(seen, private), [], []
    for step in seen_gradients(transcript, seen):
        gradients += step.gradients
        order += [place[i] for i in step.texts]
    found = record_privacy(groups_of_gradients(gradients, 2), labels[order], unnamed=True)
    assert found.accuracy == 1.0
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(g.shape, generator=draw) for g in gradients]
    assert record_privacy(groups_of_gradients(noise, 2), labels[order], unnamed=True).accuracy < 0.9


def test_activations_that_tuning_drew_apart_are_grouped():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    centre_CD = torch.randn(3, 16, generator=draw) * 4
    activation_ND = centre_CD[labels] + torch.randn(30, 16, generator=draw)
    groups_N = groups_of_activations(activation_ND, 3)
    assert record_privacy(groups_N, labels, unnamed=True).accuracy == 1.0
    nothing_N = groups_of_activations(torch.randn(30, 16, generator=draw), 3)
    assert record_privacy(nothing_N, labels, unnamed=True).accuracy < 0.7


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 1.0), (6, 2.0)])
def test_drawn_labels_are_corrected_by_activations_and_by_nothing_else(classes, epsilon):
    draw = torch.Generator().manual_seed(0)
    labels_N = torch.arange(600) % classes
    told_N = drawn_labels(
        labels_N, classes, epsilon, lambda *shape: torch.rand(shape, generator=draw)
    )
    right, told = keep_chance(epsilon, classes), float((told_N == labels_N).float().mean())
    noise_ND = torch.randn(600, 32, generator=draw)
    apart_ND = (
        noise_ND
        + 8
        * torch.nn.functional.normalize(torch.randn(classes, 32, generator=draw), dim=1)[labels_N]
    )

    def share(activation_ND, chance=right):
        found_N = labels_from_activations(activation_ND, told_N, classes, right=chance)
        return record_privacy(found_N, labels_N).accuracy

    assert told < 0.8
    assert share(apart_ND) > 0.9
    assert share(noise_ND) == pytest.approx(told, abs=0.04)
    # Who takes told labels for true corrects none.
    assert share(apart_ND, 1 - 1e-12) == pytest.approx(told)


def test_told_labels_must_fit():
    activation_ND = torch.zeros(8, 4)
    with pytest.raises(DataError, match="from 0 to 1"):
        labels_from_activations(activation_ND, torch.arange(8), 2, right=0.7)
    with pytest.raises(DataError, match="5 texts"):
        labels_from_activations(activation_ND[:4], torch.zeros(4).long(), 2, right=0.7)


@pytest.mark.parametrize(("mode", "eta"), [("token", 9.0), ("vector", 5.0)])
def test_averaging_reads_fresh_draws_and_nothing_more_of_reused_ones(tmp_path, mode, eta):
    bottom, mechanism = open_tiny_bottom(tmp_path, "smollm2"), Mechanism(eta=eta, mode=mode)
    view, private = observe(bottom, mechanism)
    fresh = [observe(bottom, mechanism, seed=seed)[0].states for seed in range(2, 26)]
    shares = [
        share_right(averaged_tokens(view, fresh[:count]), private.ids) for count in (0, 4, 24)
    ]
    assert shares[0] < shares[1] - 0.1
    assert shares[2] > 0.95
    reused = averaged_tokens(view, [view.states] * 24)
    assert share_right(reused, private.ids) == shares[0]
    assert len(fresh_draws([view.states] * 24)) == 1


@pytest.mark.parametrize(("mode", "eta"), [("vector", 2.5), ("token", 7.0), ("exponential", 3.0)])
def test_all_draws_by_bayes_rule_read_more_than_their_mean_or_majority(tmp_path, mode, eta):
    bottom, mechanism = open_tiny_bottom(tmp_path, "smollm2"), Mechanism(eta=eta, mode=mode)
    view, private = observe(bottom, mechanism, public=150)
    fresh = [observe(bottom, mechanism, seed=seed)[0].states for seed in range(2, 10)]
    averaged = share_right(averaged_tokens(view, fresh), private.ids)
    config = ChannelConfig(draws=1024)  # what is estimated must be known well to be multiplied
    weighed = [
        share_right(weighed_draws(view, fresh[:count], config=config).first(), private.ids)
        for count in (0, 3, 8)
    ]
    assert averaged + 0.05 < weighed[2] < 1
    assert weighed[0] < weighed[1] - 0.05 < weighed[2] - 0.1
    one = weighed_draws(view, [view.states] * 8, config=config)  # drawn once, sent nine times
    assert share_right(one.first(), private.ids) == pytest.approx(weighed[0], abs=0.03)


def test_noise_without_a_likelihood_is_refused_before_anything_is_read(tmp_path):
    mechanism = Mechanism(eta=5.0, mode="block-output")
    view, _ = observe(open_tiny_bottom(tmp_path, "smollm2", cut=2), mechanism, public=20)
    with pytest.raises(ConfigError, match="expected vector mode at cut 0"):
        weighed_draws(view, [view.states], sent=lambda _: pytest.fail("it was read"))


def test_draws_are_weighed_as_their_joint_probability(tmp_path):
    bottom, mechanism = (
        open_tiny_bottom(tmp_path, "smollm2"), Mechanism(eta=3.0, mode="exponential")
    )  # fmt: skip
    view, _ = observe(bottom, mechanism, public=40)
    fresh = [observe(bottom, mechanism, seed=seed)[0].states for seed in (2, 3)]
    table_VD = view.table_VD.double()
    channel_VV = (-1.5 * (table_VD[:, None] - table_VD[None]).norm(dim=2)).log_softmax(1)
    log_VT = unigram(view.public, len(table_VD))[:, None].double()
    for states in (view.states, *fresh):
        log_VT = log_VT + channel_VV[:, torch.cat(nearest_tokens(replace(view, states=states)))]
    found = weighed_draws(view, fresh, config=ChannelConfig(words=128)).first()
    assert torch.equal(torch.cat(found), log_VT.argmax(0))


def test_of_words_read_equally_often_the_nearest_to_the_mean_is_taken(tmp_path):
    view, _ = observe(open_tiny_bottom(tmp_path, "smollm2"), Mechanism(eta=9.0, mode="token"))
    table_VD = view.table_VD.clone().zero_()
    table_VD[:, 0] = torch.arange(len(table_VD))
    plain = SimpleNamespace(
        embedding=SimpleNamespace(weight=table_VD), layer_count=1, hidden_size=32
    )
    view = replace(view, model=plain, states=(torch.zeros(1, 32),))
    readings = iter([0, 10, 0, 10, 12])  # two votes each for 0 and 10, the mean is 6.4
    again = [(torch.full((1, 32), float(k)),) for k in range(1, 5)]
    guess = averaged_tokens(view, again, lambda _: (torch.tensor([next(readings)]),))
    assert guess[0].tolist() == [10]


def test_epochs_of_split_tuning_are_one_draw(tmp_path):
    _, transcript, private = u_shape(tmp_path, "smollm2", 0, epochs=3)
    seen = seen_texts(transcript)
    assert len(seen.states) == len(private)
    assert set(seen.times) == {3}
    assert set(seen.labels) == {None}


def test_bad_views(tmp_path):
    model = Decoder(tiny_model("smollm2"))
    rows = torch.zeros(3, 32)
    with pytest.raises(ConfigError, match="customer's top"):
        GradientsView(model=model, last=model.layer_count + 1, outputs=(rows,), gradients=(rows,))
    with pytest.raises(DataError, match="gradient for every row"):
        GradientsView(model=model, last=0, outputs=(rows,), gradients=(rows[:2],))
    with pytest.raises(DataError, match="outputs"):
        GradientsView(model=model, last=0, outputs=(), gradients=())
    with pytest.raises(DataError, match="without hidden states"):
        seen_texts(Transcript(()))
    for gradients, classes in (([], 2), ([rows + 1], 2), ([rows + 1, rows + 2], 1)):
        with pytest.raises(DataError, match="at least 2 classes"):
            groups_of_gradients(gradients, classes)
    with pytest.raises(DataError, match="zeros alone"):
        groups_of_gradients([rows, rows], 2)
    view, _ = observe(open_tiny_bottom(tmp_path))
    with pytest.raises(DataError, match="same texts"):
        averaged_tokens(view, [view.states[:1]])
    with pytest.raises(ConfigError, match="at least 1"):
        SolveConfig(iterations=0)
