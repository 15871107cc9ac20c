"""split_tune, predict and cancel: from files to files, in this process."""

import json
import pydoc_data.topics
import shutil
import stat
from dataclasses import replace

import pytest
import torch
from customer_world import NAMES, OPEN, PASSES, QUICK, TUNING, VECTOR, write_table
from split_world import LABELS, TEXTS, World

import blindtune
from blindtune.errors import (
    ConfigError,
    DataError,
    MismatchError,
    NetworkError,
    OutputError,
    PolicyError,
)
from blindtune.exchange.wire.codec import MessageLimits
from blindtune.exchange.wire.messages import Numbered
from blindtune.exchange.wire.transcript import Recorder
from blindtune.exchange.wire.transport import LostError
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.access import AccessConfig
from blindtune.split.customer.job import CustomerJob, LossLog
from blindtune.split.customer.prediction import AskingConfig
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.customer.private_texts import ReadingConfig, encode_texts
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.terms import VendorLimits
from tiny_models import tiny_tokenizer


def tune(world, data, out, privatizer=VECTOR, **options):
    connect = options.pop("connect", world.connect)
    options = {"tuning": TUNING, "passes": PASSES, "access": QUICK, "silent": True} | options
    return blindtune.split_tune(connect, world.folder / "bottom", data, out, privatizer, **options)


def ask(world, data, out=None, **options):
    job = world.folder / "job"
    return blindtune.predict(world.connect, job, data, out, access=QUICK, **options)


@pytest.fixture
def data(tmp_path):
    return write_table(tmp_path / "train.csv")


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_tune_predict_cancel(tmp_path, data, partition):
    world = World(tmp_path, "bert", partition, cut=1, last=int(partition == "u-shape"))
    told = []
    done = tune(world, data, tmp_path / "job", on_statement=told.append)
    assert told == [done.privacy]
    assert done.names == tuple(NAMES)
    assert (done.steps, len(done.losses), done.resumed_from) == (4, 6, None)
    new = write_table(tmp_path / "new.csv")
    found = ask(world, new, tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == list(found.texts)
    assert [line["row"] for line in lines] == list(range(1, len(TEXTS) + 1))
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)
    right = [line["label"] == NAMES[k] for line, k in zip(lines, LABELS.tolist(), strict=True)]
    assert found.scores == {"accuracy": pytest.approx(sum(right) / len(right))}
    ended = blindtune.cancel(world.connect, tmp_path / "job", access=QUICK)
    assert (ended.steps, ended.tokens > 0) == (4, True)
    assert not list((tmp_path / "vendor").rglob("*.pt"))
    assert blindtune.cancel(world.connect, tmp_path / "job", access=QUICK).job == ended.job
    with pytest.raises(PolicyError, match="cancelled"):
        tune(world, data, tmp_path / "job")
    with pytest.raises(DataError, match="was cancelled: begin another one"):
        ask(world, new)


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_a_batch_that_the_vendor_would_not_take_is_known_before_anything_is_sent(
    tmp_path, data, partition
):
    limits = VendorLimits(max_message_tokens=12)
    last = int(partition == "u-shape")
    world = World(tmp_path, "bert", partition, cut=1, last=last, limits=limits)
    seen = Recorder()
    with pytest.raises(ConfigError, match=r"batches of at most 12 tokens.*lower batch_size"):
        tune(world, data, tmp_path / "job", connect=lambda: world.connect(tap=seen))
    sent = {type(c.message).__name__ for c in seen.transcript().crossings()}
    assert sent.isdisjoint({"Batch", "Forward"})


def test_so_is_one_with_too_many_bytes(tmp_path, data):
    world = World(tmp_path, payload=MessageLimits(max_payload_bytes=1024))
    with pytest.raises(ConfigError, match=r"at most 1,024 bytes at .*lower batch_size"):
        tune(world, data, tmp_path / "job")


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_so_is_one_of_a_prediction(tmp_path, data, partition):
    world = World(tmp_path, "bert", partition, cut=1, last=int(partition == "u-shape"))
    tune(world, data, tmp_path / "job")
    world.options["limits"] = VendorLimits(max_message_tokens=20)
    world.start()
    seen = Recorder()
    asked = (lambda: world.connect(tap=seen), tmp_path / "job", data)
    with pytest.raises(ConfigError, match=r"batches of at most 20 tokens.*lower batch_size"):
        blindtune.predict(*asked, access=QUICK)
    assert "Predict" not in {type(c.message).__name__ for c in seen.transcript().crossings()}
    found = blindtune.predict(*asked, asking=AskingConfig(batch_size=1), access=QUICK)
    assert found.reused
    assert len(found.texts) == len(TEXTS)


def test_so_is_one_that_is_too_large_with_its_padding(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    uneven = write_table(tmp_path / "new.csv", ["bad"] * 9 + ["a new film " * 3], labels=None)
    world.options["limits"] = VendorLimits(max_message_tokens=60)
    world.start()
    with pytest.raises(ConfigError, match=r"at most 120 tokens with padding.*lower batch_size"):
        ask(world, uneven, asking=AskingConfig(batch_size=10))
    assert len(ask(world, uneven, asking=AskingConfig(batch_size=3)).texts) == 10


def test_a_job_that_the_vendor_never_had_is_cancelled_as_often_as_one_likes(tmp_path, data):
    world = World(tmp_path)

    def gone():
        raise LostError("nobody is there")

    with pytest.raises(NetworkError):
        tune(world, data, tmp_path / "job", connect=gone)
    for _ in range(2):
        assert blindtune.cancel(world.connect, tmp_path / "job", access=QUICK).job is None


def test_a_head_that_is_gone_is_said_to_be(tmp_path, data):
    world = World(tmp_path, "bert", "u-shape", cut=1, last=1)
    tune(world, data, tmp_path / "job")
    for path in (tmp_path / "job").glob("top-*.pt"):
        path.unlink()
    with pytest.raises(DataError, match="head is gone"):
        ask(world, write_table(tmp_path / "new.csv", ["a new film"], labels=None))


def test_a_job_is_its_owners_and_whole(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    job = tmp_path / "job"
    names = {"job.json", "token", "private.safetensors", "privacy.json", "losses.jsonl", "lock"}
    assert {path.name for path in job.iterdir()} == names
    assert stat.S_IMODE(job.stat().st_mode) == 0o700
    for name in names - {"lock"}:
        assert stat.S_IMODE((job / name).stat().st_mode) == 0o600, name
    again = tune(world, data, job, connect=unreachable)  # it is done: nobody is asked
    assert (again.resumed_from, again.tokens, len(again.losses)) == (4, 0, 6)
    statement = json.loads((job / "privacy.json").read_text())["tuning"]
    assert statement["eta"] == 20.0
    assert statement["spending"]["draws"] == 1
    assert statement["spending"]["records"] == len(TEXTS)


def unreachable():
    raise LostError("nobody there")


def test_other_options_are_refused_by_name(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    with pytest.raises(ConfigError, match=r"passes.epochs 2 -> 3"):
        tune(world, data, tmp_path / "job", passes=replace(PASSES, epochs=3))
    with pytest.raises(ConfigError, match=r"privatizer.eta 20.0 -> 21.0"):
        tune(world, data, tmp_path / "job", PrivatizerConfig(privatizer="vector", eta=21.0))
    with pytest.raises(ConfigError, match="data "):
        tune(world, write_table(tmp_path / "b.csv", TEXTS[:5]), tmp_path / "job")
    with pytest.raises(OutputError, match="spend again"):
        tune(world, data, tmp_path / "job", resume="never")
    with (
        CustomerJob(tmp_path / "job").working(),
        pytest.raises(OutputError, match="another process"),
    ):
        tune(world, data, tmp_path / "job")


def test_a_job_waits_for_a_vendor_that_is_away(tmp_path, data):
    world = World(tmp_path)
    with pytest.raises(NetworkError, match="run the same command again"):
        tune(world, data, tmp_path / "job", connect=unreachable)
    drawn = (tmp_path / "job" / "private.safetensors").read_bytes()
    done = tune(world, data, tmp_path / "job")
    assert (tmp_path / "job" / "private.safetensors").read_bytes() == drawn
    assert done.resumed_from is None
    (tmp_path / "other").mkdir()
    with pytest.raises(PolicyError, match="no such job of yours"):
        blindtune.predict(World(tmp_path / "other").connect, tmp_path / "job", data, access=QUICK)


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
@pytest.mark.parametrize("noted", [0, 1, 3])
def test_a_killed_run_trains_nothing_twice(tmp_path, data, partition, noted, monkeypatch):
    """The process dies with replies that it never noted."""
    calm, world = (
        World(make(tmp_path / name), "bert", partition, cut=1, last=int(partition == "u-shape"))
        for name in ("calm", "cut")
    )
    expected = tune(calm, data, tmp_path / "a", OPEN)
    with monkeypatch.context() as patched:
        patched.setattr(LossLog, "add", dying(LossLog.add, noted))
        with pytest.raises(KeyboardInterrupt):
            tune(world, data, tmp_path / "b", OPEN)
    assert len(CustomerJob(tmp_path / "b").losses()) == noted
    seen = Recorder()
    done = tune(world, data, tmp_path / "b", OPEN, connect=lambda: world.connect(tap=seen))
    assert done.losses == expected.losses
    jobs = [next(iter(w.vendor._jobs)).state() for w in (calm, world)]
    assert (jobs[0].steps, jobs[0].tokens) == (jobs[1].steps, jobs[1].tokens)
    numbers = {c.message.sequence for c in seen.transcript().crossings()
               if isinstance(c.message, Numbered)}  # fmt: skip
    last = 10 if partition == "two-part" else 16
    assert numbers <= set(range(1, last + 1))
    if noted == 3 or (noted and partition == "two-part"):  # the U-shape goes on at a whole step
        assert 1 not in numbers


@pytest.mark.parametrize(
    ("partition", "left"), [("two-part", None), ("u-shape", None), ("u-shape", "at-1.pt")]
)
def test_a_job_whose_states_the_vendor_has_lost_is_not_to_be_tried_again(
    tmp_path, data, partition, left, monkeypatch
):
    world = World(tmp_path, "bert", partition, cut=1, last=int(partition == "u-shape"))
    with monkeypatch.context() as patched:
        patched.setattr(LossLog, "add", dying(LossLog.add, 3))
        with pytest.raises(KeyboardInterrupt):
            tune(world, data, tmp_path / "job")
    newest, *others = sorted((tmp_path / "vendor").rglob("at-*.pt"), reverse=True)
    for path in others:
        path.unlink()
    newest.rename(newest.with_name(left or "gone"))
    world.start()
    files = {path.name for path in (tmp_path / "job").iterdir()}
    with pytest.raises(PolicyError, match="begin another job with another --out"):
        tune(world, data, tmp_path / "job")
    assert {path.name for path in (tmp_path / "job").iterdir()} == files


def dying(add, left):
    """Notes some losses, then the process is interrupted."""
    real, lefts = add, iter(range(left))

    def note(log, number, loss):
        if next(lefts, None) is None:
            raise KeyboardInterrupt
        real(log, number, loss)

    return note


def make(folder):
    folder.mkdir()
    return folder


def test_predicting_again_sends_the_same_draw(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    new = write_table(tmp_path / "new.csv", ["a new film", "bad"], labels=None)
    first, second = ask(world, new, tmp_path / "1"), ask(world, new, tmp_path / "2")
    assert first.texts == second.texts
    assert (first.reused, second.reused, first.scores) == (False, True, {})
    (asked,) = (tmp_path / "job").glob("asked-*")
    assert PrivateStates.load(asked).labels is None
    assert len(json.loads((tmp_path / "job" / "privacy.json").read_text())) == 2
    with pytest.raises(OutputError, match="something is there"):
        ask(world, new, tmp_path / "1")
    (tmp_path / "bottom").rename(tmp_path / "moved")
    assert ask(world, new, bottom=tmp_path / "moved").texts == first.texts


def test_a_lost_draw_is_not_drawn_again(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    new = write_table(tmp_path / "new.csv", ["a new film", "bad"], labels=None)
    ask(world, new)
    (asked,) = (tmp_path / "job").glob("asked-*")
    asked.unlink()
    with pytest.raises(DataError, match="another draw would spend again"):
        ask(world, new)


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_the_place_in_a_file_is_not_told(tmp_path, data, partition):
    world = World(tmp_path, "bert", partition, cut=1, last=int(partition == "u-shape"))
    tune(world, data, tmp_path / "job", OPEN)
    texts = ["a " * n + "film" for n in range(1, 13)]  # sorted by length
    seen = Recorder()
    found = blindtune.predict(
        lambda: world.connect(tap=seen), tmp_path / "job",
        write_table(tmp_path / "new.csv", texts, labels=None), access=QUICK,
    )  # fmt: skip
    assert [line["row"] for line in found.texts] == list(range(1, 13))
    asked = [c.message for c in seen.transcript().crossings()]
    sent = [n for m in asked if type(m).__name__ == "Predict" for n in m.lengths]
    assert sorted(sent) == sorted(set(sent))
    assert sent != sorted(sent)
    for text, line in zip(texts, found.texts, strict=True):
        alone = ask(world, write_table(tmp_path / "one.csv", [text], labels=None)).texts[0]
        assert line["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-2)


def test_another_bottom_is_refused_before_it_is_built(tmp_path, data, monkeypatch):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    World(make(tmp_path / "other"), "roberta")
    monkeypatch.setattr("blindtune.split.bottom._load", None)
    with pytest.raises(MismatchError, match="expected the bottom package that the job was made"):
        ask(world, data, bottom=tmp_path / "other" / "bottom")


def test_contributing_tokens_are_spared_in_training_alone(tmp_path, data):
    world = World(tmp_path)
    spared = replace(VECTOR, cti_fraction=0.05)
    done = tune(world, data, tmp_path / "job", spared)
    assert done.privacy.spending["unprotected_tokens"] > 0
    assert done.privacy.spending["epsilon_per_run"] == "inf"
    assert CustomerJob(tmp_path / "job").statements()["tuning"] == done.privacy
    assert any("contributing" in note for note in done.privacy.notes)
    assert "between contributing tokens and others nothing is bounded" in done.privacy.account
    for factor in (0.0, 0.9):
        half = replace(
            spared, eta=None, changed_share=0.6, privatizer="token", cti_fraction=0.1,
            cti_factor=factor,
        )  # fmt: skip
        told = tune(world, data, tmp_path / f"half-{factor}", half).privacy
        assert told.expected_change == pytest.approx(told.changed, abs=0.2)
        assert (told.expected_change < 0.35) == (factor == 0.0)  # of 0.6 without CTI
    asked = ask(world, data)
    assert asked.privacy.spending["unprotected_tokens"] == 0
    with pytest.raises(ConfigError, match="contributing"):
        tune(world, data, tmp_path / "x", spared, reading=ReadingConfig(task="regression"))


def test_changed_share_chooses_eta(tmp_path, data):
    world = World(tmp_path)
    half = PrivatizerConfig(changed_share=0.5)
    done = tune(world, data, tmp_path / "job", half)
    assert done.privacy.eta > 0
    assert done.privacy.expected_change == pytest.approx(0.5, abs=0.15)
    assert 0.2 < done.privacy.changed < 0.8
    assert CustomerJob(tmp_path / "job").record.eta == done.privacy.eta
    assert tune(world, data, tmp_path / "job", half).privacy == done.privacy
    assert ask(world, data).privacy.eta == done.privacy.eta


def test_regression(tmp_path):
    world = World(tmp_path)
    data = write_table(tmp_path / "d.csv", names=["-0.5", "1.5"])
    reading = ReadingConfig(task="regression", max_length=9)
    done = tune(world, data, tmp_path / "job", reading=reading)
    assert done.names == ()
    assert done.tokens <= 2 * 9 * len(TEXTS)
    found = ask(world, data)
    errors = [(line["value"] - (1.5 if k else -0.5)) ** 2
              for line, k in zip(found.texts, LABELS.tolist(), strict=True)]  # fmt: skip
    assert found.scores["mean_squared_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_language_model_in_the_u_shape(tmp_path):
    world = World(tmp_path, "smollm2", "u-shape", cut=1, last=1)
    text = tmp_path / "text.txt"
    text.write_text(pydoc_data.topics.topics["while"][:600])
    reading = ReadingConfig(task="language-model", max_length=32)
    passes = replace(PASSES, epochs=8, accumulate=1)
    true = replace(OPEN, targets="true")
    done = tune(world, text, tmp_path / "job", true, reading=reading, passes=passes)
    assert done.losses[-1] < done.losses[0] - 0.2
    found = ask(world, text)
    mean = sum(line["nats_per_token"] * line["tokens"] for line in found.texts) / sum(
        line["tokens"] for line in found.texts
    )
    assert found.scores["nats_per_token"] == pytest.approx(mean)
    assert found.scores["nats_per_token"] < done.losses[0]
    assert any("true tokens stay here, but gradients" in note for note in done.privacy.notes)


def test_a_language_model_needs_the_u_shape(tmp_path):
    world = World(tmp_path, "smollm2")
    (tmp_path / "text.txt").write_text("a b c " * 100)
    with pytest.raises(ConfigError, match="would go to the vendor as labels"):
        tune(world, tmp_path / "text.txt", tmp_path / "job",
             reading=ReadingConfig(task="language-model"))  # fmt: skip
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"privatizer": "none"}, "unprotected"),
        ({"eta": 1.0, "unprotected": True}, "unprotected"),
        ({"privatizer": "none", "unprotected": True, "eta": 1.0}, "no eta"),
        ({"privatizer": "none", "unprotected": True, "clip_norm": 1.0}, "no eta"),
        ({"privatizer": "none", "unprotected": True, "public_text": "p.txt"}, "no eta"),
        ({"privatizer": "none", "unprotected": True, "cti_factor": 2.0}, "factor"),
        ({"eta": 1.0, "changed_share": 0.5}, "got both"),
        ({"changed_share": 1.0}, "between 0 and 1"),
        ({"privatizer": "block-output", "cti_fraction": 0.1}, "none can be spared"),
        ({"privatizer": "block-output", "changed_share": 0.1}, "none can be spared"),
        ({"privatizer": "blur"}, "expected privatizer"),
        ({"eta": -1.0}, "expected eta"),
        ({"eta": 1.0, "clip_norm": 1.0}, "no clip_norm"),
        ({"eta": 1.0, "cti_factor": 2.0}, "factor"),
        ({"eta": 1.0, "cti_fraction": 0.1, "cti_factor": 2.0}, "factor between 0 and 1"),
        ({"eta": 1.0, "cti_factor": 0.5}, "expected cti_fraction above 0"),
        ({"eta": 1.0, "wrong_guesses": 0.5}, "expected public_text with wrong_guesses"),
    ],
)
def test_contradictions_of_privacy_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PrivatizerConfig(**options)


def test_the_privatizer_follows_from_what_is_given():
    assert PrivatizerConfig(eta=1.0).privatizer == "exponential"
    assert PrivatizerConfig(eta=1.0, wrong_guesses=0.75, cti_factor=0.0) == PrivatizerConfig(
        eta=1.0
    )
    assert PrivatizerConfig(public_text="public.txt").privatizer == "groups"
    assert PrivatizerConfig(public_text="public.txt", eta=1.0).privatizer == "groups"
    with pytest.raises(ConfigError, match="public_text with privatizer groups"):
        PrivatizerConfig(privatizer="token", eta=1.0, public_text="public.txt")
    with pytest.raises(ConfigError, match="follows from wrong_guesses"):
        PrivatizerConfig(public_text="public.txt", changed_share=0.5)


def test_some_amount_of_noise_must_be_chosen(tmp_path, data):
    with pytest.raises(ConfigError, match=r"changed_share 0\.5 finds"):
        tune(World(tmp_path), data, tmp_path / "job", PrivatizerConfig())
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("config", "epsilon"),
    [
        (PrivatizerConfig(privatizer="block-output", eta=5.0), None),
        (PrivatizerConfig(privatizer="block-output", eta=5.0, clip_norm=2.0), 20.0),
    ],
)
def test_statement_of_block_outputs(tmp_path, data, config, epsilon):
    stated = tune(World(tmp_path), data, tmp_path / "job", config).privacy
    assert (stated.expected_change, stated.changed) == (None, None)
    assert stated.noise_norm == pytest.approx(32 / 5)
    if epsilon is None:
        assert stated.spending is None
        assert "no epsilon can be stated" in str(stated)
    else:
        assert stated.spending["epsilon_per_token"] == pytest.approx(epsilon)
        assert stated.spending["tokens"] == sum(map(len, TEXTS))


def test_schedules_get_the_length_of_the_run(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job", tuning=replace(TUNING, schedule="linear"))
    record = next(iter(world.vendor._jobs)).record
    assert record.options["max_steps"] == 4


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("BLINDTUNE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="BLINDTUNE_TOKEN or in token_file"):
        AccessConfig().trust()
    monkeypatch.setenv("BLINDTUNE_TOKEN", "e" * 40)
    assert AccessConfig().trust().token == "e" * 40
    (tmp_path / "token").write_text("f" * 40 + "\n")
    assert AccessConfig(token_file=str(tmp_path / "token")).trust().token == "f" * 40
    assert "f" * 40 not in repr(AccessConfig(token_file=str(tmp_path / "token")).trust())
    with pytest.raises(ConfigError, match="cannot read it"):
        AccessConfig(token_file=str(tmp_path / "none")).trust()


def test_no_job_and_a_damaged_one(tmp_path, data):
    world = World(tmp_path)
    with pytest.raises(DataError, match="there is none"):
        ask(world, data)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        ask(world, data)


@pytest.mark.parametrize("part", ["reading", "privatizer", "tuning", "passes"])
def test_a_job_of_another_version_is_said_to_be(tmp_path, data, part):
    world = World(tmp_path, partition="u-shape")
    tune(world, data, tmp_path / "job")
    path = tmp_path / "job" / "job.json"
    record = json.loads(path.read_text())
    record["options"][part]["a_later_option"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="use the version that began the job"):
        ask(world, data)


def test_losses_survive_a_cut_off_line(tmp_path, data):
    world = World(tmp_path)
    tune(world, data, tmp_path / "job")
    job = CustomerJob(tmp_path / "job")
    before = job.losses()
    with (job.path / "losses.jsonl").open("a") as file:
        file.write('{"request": 99, "lo')
    assert job.losses() == before
    with job.loss_log(4) as log:
        assert sorted(log.losses) == sorted(n for n in before if n <= 4)


def test_what_is_prepared_is_told(tmp_path, data):
    world, told = World(tmp_path), []
    text = "\n".join(pydoc_data.topics.topics.values())
    (tmp_path / "public.txt").write_text(text[:60_000])
    grouped = PrivatizerConfig(privatizer="groups", public_text=str(tmp_path / "public.txt"))
    tune(world, data, tmp_path / "job", grouped, on_part=lambda *part: told.append(part))
    parts = {part: (done, total) for part, done, total in told}
    assert list(parts) == ["meanings of words", "grouping words", "texts privatized"]
    assert all(done == total for done, total in parts.values())
    assert parts["texts privatized"] == (len(TEXTS), len(TEXTS))


def test_word_groups_that_are_gone_are_not_done_without(tmp_path, data):
    world = World(tmp_path)
    text = "\n".join(pydoc_data.topics.topics.values())
    (tmp_path / "public.txt").write_text(text[:60_000])
    grouped = PrivatizerConfig(privatizer="groups", public_text=str(tmp_path / "public.txt"))
    with pytest.raises(ConfigError, match="wrong_guesses"):
        PrivatizerConfig(privatizer="groups", public_text="x", wrong_guesses=2.0)
    wrong = replace(grouped, public_text=str(tmp_path / "none.txt"))
    with pytest.raises(DataError):
        tune(world, data, tmp_path / "job", wrong)
    assert not (tmp_path / "job").exists()
    tune(world, data, tmp_path / "job", grouped)
    (tmp_path / "job" / "groups.safetensors").unlink()
    new = write_table(tmp_path / "new.csv", ["a new film"], labels=None)
    for act in (lambda: ask(world, new), lambda: tune(world, data, tmp_path / "job", grouped)):
        with pytest.raises(DataError, match="put groups"):
            act()
    assert not list((tmp_path / "job").glob("asked-*"))


def test_a_vocabulary_of_twins_is_refused_or_warned_of(tmp_path, data):
    world = World(tmp_path, cut=0)
    count = len(tiny_tokenizer())
    with torch.no_grad():
        rows = world.model.get_input_embeddings().weight
        ids = torch.cat(encode_texts(world.bottom, TEXTS)).unique()
        free = torch.arange(count, len(rows))[: len(ids)]
        assert len(free) == len(ids)
        rows[free] = rows[ids] + 1e-4
    write_bottom(world.model, tiny_tokenizer(), tmp_path / "bottom", world.cut, overwrite=True)
    world.bottom = open_bottom(tmp_path / "bottom")
    shutil.rmtree(tmp_path / "vendor")
    world.start()
    for privatizer in ("exponential", "token", "vector"):
        half = PrivatizerConfig(privatizer=privatizer, changed_share=0.5)
        with pytest.raises(ConfigError, match="another word in nearly the same place"):
            tune(world, data, tmp_path / privatizer, half)
    given = tune(world, data, tmp_path / "job", VECTOR).privacy
    assert given.notes[0].startswith("WARNING: ")


def test_the_statement_counts_texts_that_lose_their_end(tmp_path, data):
    world = World(tmp_path, "bert", cut=1)
    lengths = [len(ids) for ids in encode_texts(world.bottom, TEXTS)]
    cut = sum(length > 5 for length in lengths)
    assert 0 < cut < len(TEXTS)
    done = tune(world, data, tmp_path / "job", reading=ReadingConfig(max_length=5))
    said = f"longer than what is read of each: {cut} lose their end"
    assert sum(said in note for note in done.privacy.notes) == 1
    asked = ask(world, write_table(tmp_path / "new.csv", labels=None))
    assert any(said in note for note in asked.privacy.notes)
    whole = tune(World(tmp_path / "b", "bert", cut=1), data, tmp_path / "whole")
    assert not any("longer than" in note for note in whole.privacy.notes)
