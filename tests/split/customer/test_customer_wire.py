"""All bytes of whole runs: what of a customer's texts, labels and secrets is in them."""

import pytest
import torch
from customer_world import PASSES, QUICK, TUNING, write_table
from spellings import numbers, spellings, varint
from split_world import TEXTS, World

import blindtune
from blindtune.exchange.wire.messages import Batch, OpenJob, Predict
from blindtune.exchange.wire.transcript import Recorder
from blindtune.split.customer.job import CustomerJob
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig

NAMES = ["verdrossen", "begeistert"]
ONE = PassConfig(batch_size=len(TEXTS), precision="float32")


class Run:
    """A customer's whole run, tuning and predicting, and all that crossed."""

    def __init__(self, folder, privatizer, partition="two-part", cut=1, passes=PASSES):
        self.world = World(folder, "smollm2", partition, cut=cut, last=int(partition == "u-shape"))
        recorder = Recorder()
        self.data, job = write_table(folder / "geheim.csv", names=NAMES), folder / "auftrag"

        def connect():
            return self.world.connect(tap=recorder)

        blindtune.split_tune(
            connect, folder / "bottom", self.data, job, privatizer, TUNING, passes,
            access=QUICK, silent=True,
        )  # fmt: skip
        blindtune.predict(connect, job, self.data, access=QUICK)
        self.job = CustomerJob(job)
        self.private = self.job.states()
        self.transcript = recorder.transcript()
        self.wire = self.transcript.wire()
        self.messages = [crossing.message for crossing in self.transcript.crossings()]


VECTOR, TOKEN = (PrivatizerConfig(privatizer=mode, eta=5.0) for mode in ("vector", "token"))


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_no_text_no_ids_and_no_secrets(tmp_path, partition):
    run = Run(tmp_path, VECTOR, partition)
    assert len(run.wire) > 20_000
    long = [(t, i.tolist()) for t, i in zip(TEXTS, run.private.ids, strict=True) if len(i) > 5]
    assert len(long) > 5
    for text, ids in long:
        assert not any(spelling in run.wire for spelling in spellings(text, ids))
    for word in (*NAMES, "geheim", "auftrag", "privatizer", "vector", str(tmp_path)):
        assert word.encode() not in run.wire, word
    assert b"\xa3eta" not in run.wire  # as a key of MessagePack; three letters alone may be chance
    (opening,) = {m.token: m for m in run.messages if isinstance(m, OpenJob)}.values()
    assert set(opening.options) == set(TUNING.options())
    # The job's secret goes to the vendor alone, and only where a stream names its job.
    named = sum(isinstance(m, OpenJob) or type(m).__name__ == "ResumeJob" for m in run.messages)
    assert run.wire.count(run.job.token.encode()) == named == 2


@pytest.mark.parametrize("partition", ["two-part", "u-shape"])
def test_labels_leave_in_the_two_part_split_alone(tmp_path, partition):
    run = Run(tmp_path, VECTOR, partition, passes=ONE)
    (indices,), *_ = ONE.steps(len(TEXTS))
    labels = run.private.labels[indices]
    both = [*numbers(labels.tolist()), *numbers((1 - labels).tolist())]
    assert any(spelling in run.wire for spelling in both) == (partition == "two-part")


def test_in_token_mode_the_vendor_can_find_the_tokens_that_were_drawn(tmp_path):
    """At cut 0 it looks up the nearest word. Those that changed are not the customer's."""
    run = Run(tmp_path, TOKEN, cut=0, passes=ONE)
    table_VD = run.world.model.get_input_embeddings().weight.detach()
    (batch,) = (m for m in run.messages if isinstance(m, Batch))
    drawn = torch.cdist(batch.hidden_TD, table_VD).argmin(1)
    (indices,), *_ = ONE.steps(len(TEXTS))
    true = torch.cat([run.private.ids[i] for i in indices])
    changed = float((drawn != true).float().mean())
    assert changed == pytest.approx(run.private.changed)
    assert 0.3 < changed < 1
    assert any(isinstance(m, Predict) for m in run.messages)


def test_spellings_are_found_where_they_are():
    ids = [5, 77, 120, 9, 33, 8]
    for spelling in spellings("secret", ids):
        assert any(s in b"xx" + spelling + b"yy" for s in spellings("secret", ids))
    assert (varint(1), varint(300)) == (b"\x01", b"\xac\x02")
