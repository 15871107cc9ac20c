"""Labels that were drawn anew: what a vendor learns of them beside what was promised."""

import csv
import warnings

import pytest

from blindtune.evaluation.audits.audit import AuditConfig
from blindtune.evaluation.audits.label_attacks import (
    BY_ACTIVATIONS,
    BY_GRADIENTS,
    CORRECTED,
)
from blindtune.evaluation.audits.split import audit_split
from blindtune.exchange.wire.transcript import Recorder
from blindtune.exchange.wire.transport import InProcessTransport
from blindtune.privacy.entropy import SeededNoiseWarning
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.private_texts import ReadingConfig, read_training
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, new_token, open_job, train
from blindtune.split.customer.ushape import Top, train_u_shape
from blindtune.split.partition import Cut, PooledHead, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from tiny_models import tiny_model, tiny_tokenizer

DRAWN = PrivatizerConfig(privatizer="none", unprotected=True, label_epsilon=1.0)
AS_THEY_ARE = PrivatizerConfig(privatizer="none", unprotected=True)
READING = ReadingConfig(max_length=64)
WORDS = (("fish", "home", "red"), ("mat", "door", "saw"))  # of each class


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Bottom packages of both partitions, and 320 different texts whose words tell their class."""
    place = tmp_path_factory.mktemp("labels")
    model = tiny_model("smollm2")
    for partition, last in (("two-part", 0), ("u-shape", 1)):
        cut = Cut(partition=partition, layers=stack_of(model).layer_count, cut=0, last=last)
        write_bottom(model, tiny_tokenizer(), place / partition, cut)
    with (place / "train.csv").open("w", newline="") as file:
        rows = [
            (f"{' '.join(WORDS[label][n // 3**k % 3] for k in range(5))}", label)
            for n in range(160)
            for label in (0, 1)
        ]
        csv.writer(file).writerows([("text", "label"), *rows])
    return place


def record(place, partition, privatizer, path):
    """Tune once over the texts, and write what crossed."""
    model, recorder = tiny_model("smollm2"), Recorder()
    bottom = open_bottom(place / partition)
    texts = read_training(bottom, place / "train.csv", READING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeededNoiseWarning)
        private = privatize(
            bottom, texts.ids, texts.labels, mechanism=None, classes=2,
            label_epsilon=privatizer.label_epsilon, testing_seed=1,
        )  # fmt: skip
    vendor = Vendor(stack_of(model), bottom.cut, bottom.id, path.with_suffix(".vendor"))
    mine = partition == "u-shape"
    with vendor.session("anna") as handler:
        job = open_job(
            lambda: InProcessTransport(handler, tap=recorder), bottom, new_token(),
            TuningConfig(lora_rank=2), task="hidden" if mine else "classification",
            outputs=0 if mine else 2, precision="float32",
        )  # fmt: skip
        plan = PassConfig(epochs=2, batch_size=8, precision="float32")
        if mine:
            top = Top(bottom, PooledHead(stack_of(model).hidden_size, 2, "last"))
            train_u_shape(job, top, private, plan, language_model=False)
        else:
            train(job, private, plan)
        job.close()
    recorder.transcript().save(path)


def label_findings(found):
    return {f.attack: f for f in found.findings if f.measure == "EP, labels"}


def audited(place, subject, privatizer, bottom=None):
    return audit_split(
        subject, bottom=bottom, data=place / "train.csv", privatizer=privatizer, reading=READING,
        config=AuditConfig(fresh_draws=1),
    )  # fmt: skip


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_a_sample_shows_that_texts_correct_drawn_labels(world, partition):
    by = label_findings(audited(world, world / partition, DRAWN))
    assert by.keys() == {CORRECTED}
    assert by[CORRECTED].value < 0.12  # a draw at 1 changes 27 %
    assert "the states" in by[CORRECTED].knew
    assert not label_findings(audited(world, world / partition, AS_THEY_ARE))


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_a_transcript_does_too(world, tmp_path, partition):
    record(world, partition, DRAWN, tmp_path / "run.bin")
    by = label_findings(audited(world, tmp_path / "run.bin", DRAWN, world / partition))
    assert by[CORRECTED].value < 0.12
    if partition == "two-part":
        assert by.keys() == {CORRECTED}
    else:
        assert by.keys() == {BY_GRADIENTS, BY_ACTIVATIONS, CORRECTED}
        assert 0.15 < by[BY_GRADIENTS].value < 0.4  # the drawn labels, as promised
