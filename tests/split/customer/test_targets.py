"""Labels that are drawn anew, and language models that predict what was sent."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from customer_world import OPEN, PASSES, QUICK, TUNING, write_table
from split_world import LABELS, TEXTS, World

import blindtune
from blindtune.errors import ConfigError, DataError
from blindtune.exchange.wire.messages import (
    Backward,
    Batch,
    Checkpoint,
    Forward,
    Hello,
    OpenJob,
    Step,
    equal,
)
from blindtune.exchange.wire.transcript import Recorder
from blindtune.privacy.metric_dp import Mechanism
from blindtune.privacy.randomized_response import keep_chance
from blindtune.split.customer import private_states, tuning_job
from blindtune.split.customer.private_states import PrivateStates, privatize
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig
from blindtune.split.customer.ushape import Top, customers_head, train_u_shape

PLAN = PassConfig(epochs=3, batch_size=4, precision="float32")
SENT = (Hello, OpenJob, Batch, Forward, Backward, Step, Checkpoint)
WORDS = Mechanism(eta=5.0, mode="exponential")


def tuned(world, privatizer, recorder, **options):
    return blindtune.split_tune(
        lambda: world.connect(tap=recorder), world.folder / "bottom",
        write_table(world.folder / "train.csv"), world.folder / "job", privatizer, TUNING, PASSES,
        access=QUICK, silent=True, **options,
    )  # fmt: skip


def test_two_part_sends_the_labels_that_were_drawn_in_every_pass(tmp_path):
    world, recorder = World(tmp_path), Recorder()
    done = tuned(world, replace(OPEN, label_epsilon=1e-9), recorder)
    private = PrivateStates.load(tmp_path / "job" / "private.safetensors")
    assert 0 <= private.changed_labels <= 1
    sent = [c.message for c in recorder.transcript().crossings() if isinstance(c.message, Batch)]
    order = [i for step in PASSES.steps(len(TEXTS)) for batch in step for i in batch]
    assert torch.cat([message.labels for message in sent]).tolist() == (
        private.labels[order].tolist()
    )
    assert len(order) == PASSES.epochs * len(TEXTS)
    assert "drawn anew" in str(done.privacy)
    assert "as they are" not in str(done.privacy)


def test_a_file_sorted_by_class_does_not_give_its_labels_back(tmp_path):
    """Put back into the order of the plan, the drawn labels show no border between classes."""
    world, recorder = World(tmp_path), Recorder()
    texts = [f"{TEXTS[i % len(TEXTS)]} {'so ' * (i % 3)}good" for i in range(200)]
    truth = torch.arange(200) // 100
    data = write_table(tmp_path / "sorted.csv", texts, truth)
    blindtune.split_tune(
        lambda: world.connect(tap=recorder), tmp_path / "bottom", data, tmp_path / "job",
        replace(OPEN, label_epsilon=1.0), TUNING, replace(PASSES, batch_size=50), access=QUICK,
        silent=True,
    )  # fmt: skip
    sent = [c.message for c in recorder.transcript().crossings() if isinstance(c.message, Batch)]
    order = [i for step in replace(PASSES, batch_size=50).steps(200) for b in step for i in b]
    drawn_N = torch.empty(200)
    drawn_N[order] = torch.cat([message.labels for message in sent]).float()
    halves = drawn_N[:100].mean(), drawn_N[100:].mean()
    assert abs(halves[0] - halves[1]) < 0.3  # 0.46 on average in the order of the file


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_all_that_crosses_follows_from_the_drawn_labels(tmp_path, monkeypatch, partition):
    """Two customers with opposite labels and the same draw: every request is the same."""
    drawn, order = torch.tensor([0, 1] * 5), torch.arange(10) / 10
    monkeypatch.setattr(private_states, "drawn_labels", lambda *_: drawn)
    monkeypatch.setattr(tuning_job, "system_uniforms", lambda _count: order)
    monkeypatch.setattr(tuning_job, "new_token", lambda: "ab" * 32)
    seen = []
    for name, labels in (("one", LABELS), ("two", 1 - LABELS)):
        last = int(partition == "u-shape")
        world, recorder = World(tmp_path / name, "bert", partition, last=last), Recorder()
        blindtune.split_tune(
            lambda world=world, tap=recorder: world.connect(tap=tap), world.folder / "bottom",
            write_table(world.folder / "a.csv", labels=labels), world.folder / "job",
            replace(OPEN, label_epsilon=1.0), TUNING, PASSES, access=QUICK, silent=True,
        )  # fmt: skip
        requests = [c.message for c in recorder.transcript().crossings()]
        seen.append([m for m in requests if isinstance(m, SENT)])
    assert len(seen[0]) == len(seen[1]) > 10
    assert all(equal(a, b) for a, b in zip(*seen, strict=True))


def test_states_that_are_gone_are_not_drawn_again(tmp_path):
    world = World(tmp_path)
    tuned(world, replace(OPEN, label_epsilon=1.0), Recorder())
    (tmp_path / "job" / "private.safetensors").unlink()
    with pytest.raises(DataError, match="would spend again"):
        tuned(world, replace(OPEN, label_epsilon=1.0), Recorder())


def test_a_job_of_an_earlier_version_goes_on(tmp_path):
    world = World(tmp_path)
    tuned(world, OPEN, Recorder())
    mark = tmp_path / "job" / "job.json"
    record = json.loads(mark.read_text())
    for name in ("targets", "label_epsilon"):
        del record["options"]["privatizer"][name]
    mark.write_text(json.dumps(record))
    assert tuned(world, OPEN, Recorder()).resumed_from == 4


def gradients(world, private, head, *, language_model=False, **options):
    recorder = Recorder()
    job = world.job(tap=recorder)
    top = Top(world.bottom, head)
    train_u_shape(job, top, private, PLAN, language_model=language_model, **options)
    job.close()
    found = [c.message for c in recorder.transcript().crossings()]
    return [m.gradient_TD for m in found if isinstance(m, Backward)]


@pytest.mark.parametrize("language_model", [False, True])
def test_what_leaves_the_u_shape_follows_from_what_was_drawn_alone(tmp_path, language_model):
    """Other truths with the same draw: every gradient of every pass is the same."""
    world = World(tmp_path, "smollm2", "u-shape", cut=1, last=1)
    with pytest.warns(UserWarning, match="repeat"):
        private = privatize(
            world.bottom, TEXTS, None if language_model else LABELS, mechanism=WORDS, classes=2,
            label_epsilon=None if language_model else 1.0, predict_sent=language_model,
            testing_seed=1,
        )  # fmt: skip
    others = tuple((ids_L + 1) % 50 for ids_L in private.ids)
    worlds = [
        World(tmp_path / name, "smollm2", "u-shape", cut=1, last=1) for name in ("one", "two")
    ]

    def head(world):
        return None if language_model else customers_head(world.bottom, 2, TUNING)

    one, two = (
        gradients(world, states, head(world), language_model=language_model)
        for world, states in zip(worlds, (private, replace(private, ids=others)), strict=True)
    )
    assert len(one) == PLAN.epochs * -(-len(TEXTS) // 4)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    if language_model:  # and they do differ where the true tokens are predicted
        third = World(tmp_path / "three", "smollm2", "u-shape", cut=1, last=1)
        open_states = replace(private, sent_ids=None)
        true = gradients(third, open_states, None, language_model=True, true_targets=True)
        assert not all(torch.equal(a, b) for a, b in zip(one, true, strict=True))


@pytest.mark.parametrize("mechanism", [WORDS, Mechanism(eta=5.0, mode="vector")])
def test_true_words_under_noise_are_predicted_only_when_asked_for(tmp_path, mechanism):
    """Their gradients give the text away that the noise hides, and nothing said so."""
    world, recorder = World(tmp_path, "smollm2", "u-shape", cut=1, last=1), Recorder()
    privatize(world.bottom, TEXTS, mechanism=mechanism).save(tmp_path / "states")
    private, job = PrivateStates.load(tmp_path / "states"), world.job(tap=recorder)
    with pytest.raises(ConfigError, match="privatize with predict_sent=True"):
        train_u_shape(job, Top(world.bottom, None), private, PLAN, language_model=True)
    job.close()
    assert not [c for c in recorder.transcript().crossings() if isinstance(c.message, Forward)]
    assert gradients(world, private, None, language_model=True, true_targets=True)
    unhidden = privatize(world.bottom, TEXTS, mechanism=None)
    assert gradients(world, unhidden, None, language_model=True)


def test_the_words_to_predict_are_those_that_entered_the_bottom(tmp_path):
    world = World(tmp_path, "smollm2", "u-shape", cut=0)
    private = privatize(world.bottom, TEXTS, mechanism=WORDS, predict_sent=True)
    embedding = world.bottom.stack.embedding
    for state_LD, sent_L in zip(private.states, private.targets, strict=True):
        torch.testing.assert_close(state_LD, embedding(sent_L).detach())
    private.save(tmp_path / "states")
    again = PrivateStates.load(tmp_path / "states")
    assert all(map(torch.equal, again.targets, private.targets))
    assert private.changed > 0


def test_the_share_of_labels_that_stay_is_the_formulas(tmp_path):
    world = World(tmp_path)
    texts, labels = TEXTS[:2] * 1000, torch.tensor([0, 1] * 1000)
    private = privatize(
        world.bottom, texts, labels, mechanism=None, classes=2, label_epsilon=1.0, batch_size=500
    )
    chance = 1 - keep_chance(1.0, 2)
    assert private.changed_labels == pytest.approx(chance, abs=5 * (chance / 2000) ** 0.5)
    again = privatize(
        world.bottom, texts, labels, mechanism=None, classes=2, label_epsilon=1.0, batch_size=500
    )
    assert not torch.equal(private.labels, again.labels)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label_epsilon": 0.0}, "above 0"),
        ({"label_epsilon": 31.0}, "at most 30"),
        ({"label_epsilon": 1.0, "cti_fraction": 0.01}, "got both"),
        ({"targets": "mine"}, "sent or true"),
    ],
)
def test_contradictions_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        PrivatizerConfig(**({"eta": 5.0} | changes))


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("regression", {"label_epsilon": 1.0}, "regression has none"),
        ("language-model", {"label_epsilon": 1.0}, "language-model has none"),
    ],
)
def test_options_of_another_task_are_refused(tmp_path, task, changes, said):
    world = World(tmp_path)
    config = PrivatizerConfig(**(asdict(OPEN) | changes))
    with pytest.raises(ConfigError, match=said):
        tuned(world, config, Recorder(), reading=ReadingConfig(task=task))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("privatizer", ["vector", "block-output"])
def test_words_are_not_predicted_where_vectors_are_sent(tmp_path, privatizer):
    world = World(tmp_path, "smollm2", "u-shape", cut=1)
    config, reading = PrivatizerConfig(privatizer=privatizer, eta=5.0), ReadingConfig(
        task="language-model", max_length=8
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"sends no words.*--targets true"):
        tuned(world, config, Recorder(), reading=reading)
    assert not (tmp_path / "job").exists()
    done = tuned(world, replace(config, targets="true"), Recorder(), reading=reading)
    assert "gradients computed from them are sent" in str(done.privacy)
    vectors = Mechanism(eta=5.0, mode="vector")
    with pytest.raises(ConfigError, match="no words"):
        privatize(world.bottom, TEXTS, mechanism=vectors, predict_sent=True)


@pytest.mark.parametrize("privatizer", ["exponential", "groups", "none"])
def test_a_language_model_predicts_what_was_sent_unless_told_otherwise(tmp_path, privatizer):
    world = World(tmp_path, "smollm2", "u-shape", cut=1)
    changes = {"exponential": {"eta": 0.01}, "none": {"unprotected": True}, "groups": {}}
    public = tmp_path / "public.txt"
    public.write_text("the film is good and so is the bad story it was\n" * 1500)
    if privatizer == "groups":
        changes["groups"] = {"public_text": str(public)}
    config = PrivatizerConfig(privatizer=privatizer, **changes[privatizer])
    reading = ReadingConfig(task="language-model", max_length=8)
    done = tuned(world, config, Recorder(), reading=reading)
    private = PrivateStates.load(tmp_path / "job" / "private.safetensors")
    same = [torch.equal(a, b) for a, b in zip(private.targets, private.ids, strict=True)]
    assert private.sent_ids is not None
    assert all(same) == (privatizer == "none")
    assert "gradients tell nothing beside them" in str(done.privacy)
