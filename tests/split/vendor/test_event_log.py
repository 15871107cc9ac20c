"""A vendor's log: what no customer can fill the disk with."""

import json
import logging

import pytest

from blindtune.exchange.wire.events import (
    Answered,
    JobCancelled,
    JobClosed,
    JobOpened,
    JobSaved,
    StreamEnded,
    StreamOpened,
    TurnedAway,
)
from blindtune.split.vendor import event_log
from blindtune.split.vendor.event_log import EventLog

NO_SECONDS = {"wait_seconds": 0.0, "seconds": 0.0}
FLOODS = {
    "refused": lambda who: Answered(customer=who, kind="batch", answer="limit", **NO_SECONDS),
    "busy": lambda who: Answered(customer=who, kind="batch", answer="busy", **NO_SECONDS),
    "opened": lambda who: StreamOpened(customer=who),
    "ended": lambda who: StreamEnded(
        customer=who, reason="customer", requests=1, bytes_in=1, bytes_out=1, seconds=0.0
    ),
    "no room": lambda who: TurnedAway(customer=who, reason="room"),
    "too often": lambda who: TurnedAway(customer=who, reason="rate"),
    "saved": lambda who: JobSaved(customer=who, job=f"job_{who}", request=1, seconds=0.0),
}


class Written:
    """A log on a clock that stands still until it is moved."""

    def __init__(self, folder, monkeypatch):
        self.now, self.path = 0.0, folder / "log.jsonl"
        monkeypatch.setattr(event_log.time, "monotonic", lambda: self.now)
        self.log = EventLog(self.path)

    def lines(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def written(tmp_path, monkeypatch):
    found = Written(tmp_path, monkeypatch)
    yield found
    found.log.close()


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_has_a_line_a_second_that_says_what_was_left_out(written, name):
    flood = FLOODS[name]
    for _ in range(100):
        written.log(flood("eve"))
    assert len(written.lines()) == 1
    assert "left_out" not in written.lines()[0]
    written.log(flood("anna"))  # of another customer, so none is missing
    assert [line["customer"] for line in written.lines()] == ["eve", "anna"]
    written.now += 1.0
    written.log(flood("eve"))
    written.log(flood("eve"))
    assert [line.get("left_out") for line in written.lines()] == [None, None, 99]
    written.now += 5.0
    written.log(flood("eve"))
    written.log(flood("anna"))
    assert [line.get("left_out") for line in written.lines()[3:]] == [1, None]


def test_a_flood_of_one_kind_hides_no_other(written):
    for _ in range(10):
        for flood in FLOODS.values():
            written.log(flood("eve"))
    assert len(written.lines()) == len(FLOODS)


def test_every_beginning_and_end_of_a_job_has_its_line(written):
    for kind in (JobOpened, JobCancelled, JobClosed):
        for number in range(3):
            written.log(kind(customer="anna", job=f"job_{number}"))
    assert len(written.lines()) == 9


def test_faults_that_a_customer_can_cause_at_will_are_not_a_flood(written):
    logger = logging.getLogger("blindtune.exchange.wire.transport")

    def fail(kind):
        try:
            raise kind("a secret of mine"[::-1])
        except kind:
            logger.exception("a fault")

    for _ in range(100):
        fail(ValueError)
    fail(KeyError)
    assert [line["error"] for line in written.lines()] == ["ValueError", "KeyError"]
    assert "a secret of mine"[::-1] not in written.path.read_text()
    written.now += 1.0
    fail(ValueError)
    assert written.lines()[-1]["left_out"] == 99
    for job in "abc":  # by the vendor's own doing, so each is told
        logging.getLogger("blindtune.split.vendor").error("job %s is left out", job)
    assert [line["message"][4] for line in written.lines()[-3:]] == ["a", "b", "c"]
