"""A recorded U-shape: gradients give tokens of a language model, labels of a classification."""

import csv
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from blindtune.attacks.embedding_inversion import nearest_tokens
from blindtune.evaluation.audits.audit import AuditConfig
from blindtune.evaluation.audits.label_attacks import BY_GRADIENTS, label_findings
from blindtune.evaluation.audits.split import audit_split
from blindtune.evaluation.audits.split_attacks import SplitAttacks
from blindtune.evaluation.audits.split_subject import Pass, SeenLabels, open_subject
from blindtune.exchange.wire.transcript import Recorder
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.privacy.entropy import SeededNoiseWarning
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.private_texts import ReadingConfig, read_training, read_unseen
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, new_token, open_job
from blindtune.split.customer.ushape import Top, train_u_shape
from blindtune.split.partition import Cut, PooledHead, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from tiny_models import tiny_model, tiny_tokenizer

NOISE = PrivatizerConfig(privatizer="vector", eta=40.0, targets="true")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw"]
WORDS += ["some", "fish", "at", "home", "near", "the", "red", "door"]


@pytest.fixture(scope="module", params=["language-model", "classification"])
def run(request, tmp_path_factory):
    """(task, folder) of a tuning on twelve texts, recorded, its states noised."""
    place, task = tmp_path_factory.mktemp("run"), request.param
    record(place, task, NOISE)
    return task, place


def record(place, task, privatizer, predict_sent=False, cut=1):
    """Tune on twelve texts, and write what crossed to run.bin; returns the private states."""
    model = tiny_model("smollm2")
    stack = stack_of(model)
    parts = Cut(partition="u-shape", layers=stack.layer_count, cut=cut, last=1)
    write_bottom(model, tiny_tokenizer(), place / "bottom", parts)
    bottom, recorder = open_bottom(place / "bottom"), Recorder()
    with (place / "train.csv").open("w", newline="") as file:
        rows = [(" ".join(WORDS[i : i + 5]), i % 2) for i in range(12)]
        csv.writer(file).writerows([("text", "label"), *rows])
    texts = read_training(bottom, place / "train.csv", ReadingConfig(task=task, max_length=16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeededNoiseWarning)
        private = privatize(
            bottom, texts.ids, texts.labels, mechanism=privatizer.mechanism(privatizer.eta),
            predict_sent=predict_sent, testing_seed=1,
        )  # fmt: skip
    vendor = Vendor(stack, parts, bottom.id, place / "vendor")
    head = None if task == "language-model" else PooledHead(stack.hidden_size, 2, "last")
    torch.manual_seed(0)
    with vendor.session("anna") as handler:
        job = open_job(
            lambda: InProcessTransport(handler, tap=recorder), bottom, new_token(),
            TuningConfig(lora_rank=2), task="hidden", outputs=0, precision="float32",
        )  # fmt: skip
        plan = PassConfig(epochs=2, batch_size=4, precision="float32")
        train_u_shape(
            job, Top(bottom, head), private, plan,
            language_model=head is None, true_targets=not predict_sent,
        )  # fmt: skip
        job.close()
    recorder.transcript().save(place / "run.bin")
    return private


def write_public(path, count=40):
    with path.open("w", newline="") as file:
        rows = [[" ".join(WORDS[i % 9 : i % 9 + 6])] for i in range(count)]
        csv.writer(file).writerows([("text",), *rows])
    return path


def audited(run, **options):
    task, place = run
    options.setdefault("reading", ReadingConfig(task=task, max_length=16))
    return audit_split(
        place / "run.bin", bottom=place / "bottom", data=place / "train.csv",
        privatizer=options.pop("privatizer", NOISE),
        config=AuditConfig(fresh_draws=1, attack_seconds=5.0), **options,
    )  # fmt: skip


def test_what_was_recorded_is_attacked(run):
    found = audited(run)
    assert "gradients" not in {skipped.attack for skipped in found.not_run}
    by = {(f.attack, f.measure): f for f in found.findings}
    if run[0] == "language-model":
        read = by["gradients", "EP"]
        assert read.value < 0.35  # all but the first token of each text
        assert read.value < by["nearest neighbour", "EP"].value
        assert found.findings[found.strongest].attack == "gradients"
        assert ("gradients, grouped", "EP, labels") not in by
    else:
        labels = by["gradients, grouped", "EP, labels"]
        assert labels.value < 0.1
        assert "50.0%" in labels.meaning
        assert ("gradients", "EP") not in by


@pytest.mark.parametrize(("cut", "other"), [(0, "nearest neighbour"), (1, "trained inverter")])
def test_whole_texts_are_read_without_noise(tmp_path, cut, other):
    """The first token of a text, of which gradients say nothing, is in the states."""
    none = PrivatizerConfig(privatizer="none", unprotected=True, targets="true")
    record(tmp_path, "language-model", none, cut=cut)
    options = {"public": write_public(tmp_path / "public.csv")} if cut else {}
    found = audited(("language-model", tmp_path), privatizer=none, **options)
    by = {f.measure: f for f in found.findings if f.attack == "gradients"}
    assert f"the word of the {other}" in by["EP"].knew
    assert by["EP"].value < 0.05
    assert by["EP, whole texts"].value < 0.4  # an inverter of five seconds errs at few first tokens


def test_recorded_gradients_of_words_that_were_sent_are_where_bayes_begins(tmp_path):
    token = PrivatizerConfig(privatizer="token", eta=8.0)
    private = record(tmp_path, "language-model", token, predict_sent=True)
    reading = ReadingConfig(task="language-model", max_length=16)
    subject = open_subject(
        tmp_path / "run.bin", bottom=tmp_path / "bottom", data=tmp_path / "train.csv",
        privatizer=token, reading=reading, tokens=10_000, trust=None,
    )  # fmt: skip
    bottom = open_bottom(tmp_path / "bottom")
    texts = read_unseen(bottom, write_public(tmp_path / "public.csv"), reading).ids
    config = AuditConfig(fresh_draws=1, attack_seconds=5.0)
    attacks = SplitAttacks(subject, texts, config, lambda *_: None, offered=len(texts))
    attacks.run()
    words = attacks._words_view
    assert words.cut == 0
    places = [
        next(k for k, mine in enumerate(private.states) if torch.equal(mine, state))
        for state in subject.states
    ]
    sent = [private.sent_ids[k] for k in places]
    assert share_of(nearest_tokens(words), sent) > 0.9
    assert share_of(sent, [private.ids[k] for k in places]) < 0.8
    assert {"Bayes", "gradients"} <= {attempt.attack for attempt in attacks.attempts}


def share_of(guess, truth):
    return float((torch.cat(list(guess)) == torch.cat(list(truth))).double().mean())


def test_without_labels_there_is_nothing_to_compare_with(run):
    task, place = run
    if task == "language-model":
        return
    bare = place / "bare.csv"
    with (place / "train.csv").open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    bare.write_text("\n".join(["text", *texts]))
    found = audit_split(
        place / "run.bin", bottom=place / "bottom", data=bare, privatizer=NOISE,
        config=AuditConfig(fresh_draws=1), reading=ReadingConfig(max_length=16),
    )  # fmt: skip
    assert "labels" in next(s.needs for s in found.not_run if s.attack == "gradients")


def test_before_a_run_too_gradients_are_taken_to_give_what_is_predicted(run, tmp_path):
    task, place = run
    public = write_public(tmp_path / "public.csv")

    def foretold(privatizer):
        found = audit_split(
            place / "bottom", data=place / "train.csv", public=public, privatizer=privatizer,
            config=AuditConfig(fresh_draws=1, attack_seconds=2.0),
            reading=ReadingConfig(task=task, max_length=16),
        )  # fmt: skip
        return found, {f.attack: f for f in found.findings if f.measure == "EP"}

    token = PrivatizerConfig(privatizer="token", changed_share=0.4)
    found, by = foretold(token)
    if task == "classification":
        assert "gradients of the tuning" not in by
        assert "gradients" in {skipped.attack for skipped in found.not_run}
        return
    assert "gradients" not in {skipped.attack for skipped in found.not_run}
    assert 0.1 < by["gradients of the tuning"].value < 0.8  # the share that came out changed
    assert by["Bayes"].value < by["gradients of the tuning"].value + 0.1
    assert by["gradients of the tuning"].value < by["nearest neighbour"].value
    found, by = foretold(replace(token, targets="true"))
    assert by["gradients of the tuning"].value == 0
    assert found.findings[found.strongest].attack == "gradients of the tuning"


def test_noise_on_every_pass_is_averaged_away():
    """Labels are told by the first gradient or by the sum of all, whichever tells more."""
    draw = torch.Generator().manual_seed(0)
    labels_N = torch.arange(200) % 2
    direction_D = torch.nn.functional.normalize(torch.randn(4, generator=draw), dim=0)

    def seen(passes, turned):
        for label in labels_N.tolist():
            sent = (2 * label - 1) * direction_D + torch.randn(passes, 4, generator=draw)
            own = torch.full_like(sent[:1], float(turned)) if turned else 0 * sent[:1]
            yield Pass(
                output_LD=sent[:1], last_LD=sent[:1], gradient_LD=sent[:1],
                all_LD=sent.sum(0, keepdim=True) + own,
            )  # fmt: skip

    def read(passes, turned=0.0):
        labels = SeenLabels(true_N=labels_N)
        subject = SimpleNamespace(passes=tuple(seen(passes, turned)), labels=labels)
        return {f.attack: f for f in label_findings(subject, 0.95)}[BY_GRADIENTS].value

    once, often = read(1), read(25)
    assert 0.1 < once < 0.4
    assert often < 0.01
    assert read(1, turned=100.0) == pytest.approx(once, abs=0.1)  # a sum that tells nothing
