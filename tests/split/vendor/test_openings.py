"""Jobs that are opened at once: one customer's queue, and what it leaves to the others."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
from split_world import World
from test_vendor import Stream, opening

from blindtune.exchange.wire.events import JobOpened
from blindtune.exchange.wire.messages import Predict, ResumeJob
from blindtune.split.customer.requests import new_token
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor import job_book, store
from blindtune.split.vendor.store import JobStore

PREDICT = Predict(hidden_TD=torch.ones(3, 32), lengths=(3,))


class Crowd:
    """Customers who ask while somebody else has the turn at the model."""

    def __init__(self, world):
        self.world, self.threads, self.results = world, [], {}

    @contextmanager
    def busy_model(self):
        """The model works for another; who asks meanwhile is answered when the block is left."""
        with self.world.vendor._model.turn("another"):
            yield
        for thread in self.threads:
            thread.join(20)

    def begin(self, name, act):
        def run():
            self.results[name] = act()

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def open(self, customer, token=None, name=None):
        wanted = opening(self.world, token=token or new_token())
        self.begin(name or customer, lambda: Stream(self.world, customer, wanted).opened)

    def waiting(self, customer):
        waiting = self.world.vendor._model._turns._waiting
        return len(waiting.get(customer, ()))

    def wait_for(self, customer, count=1):
        """Until so many requests of a customer wait for their turn."""
        until(lambda: self.waiting(customer) == count)


def until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_one_customers_queue_delays_nobody_elses_opening(tmp_path):
    told = []
    world = World(tmp_path, observer=told.append)
    streams = [Stream(world, "anna", opening(world)) for _ in range(3)]
    told.clear()
    crowd = Crowd(world)
    with crowd.busy_model():
        for i, stream in enumerate(streams):
            crowd.begin(i, lambda stream=stream: stream.ask(PREDICT))
        crowd.wait_for("anna", 3)
        crowd.open("anna")
        crowd.wait_for("anna", 4)
        crowd.open("bert")
        crowd.wait_for("bert")
        crowd.begin("kept", world.vendor.expire)
        until(lambda: "kept" in crowd.results)
    assert [e.customer for e in told if isinstance(e, JobOpened)] == ["bert", "anna"]
    assert crowd.results["anna"].state == crowd.results["bert"].state == "open"


def test_a_job_that_the_vendor_ends_does_not_queue_behind_its_customer(tmp_path, monkeypatch):
    world, token = World(tmp_path), new_token()
    Stream(world, "anna", opening(world))
    Stream(world, "anna", opening(world, token=token))
    clock = time.time() + 31 * 86400
    monkeypatch.setattr(store.time, "time", lambda: clock)
    world.vendor.expire()  # has seen that both are overdue
    monkeypatch.setattr(job_book, "EXPIRY_GRACE_SECONDS", 0.0)
    busy = Stream(world, "anna", ResumeJob(token=token))
    crowd = Crowd(world)
    with crowd.busy_model():
        crowd.begin("work", lambda: busy.ask(PREDICT))
        crowd.wait_for("anna")
        crowd.begin("kept", world.vendor.expire)
        crowd.wait_for(job_book.NO_CUSTOMER)
        assert crowd.waiting("anna") == 1
    assert world.vendor.open_jobs() == 1


def test_two_openings_of_one_job_make_one(tmp_path):
    told, token = [], new_token()
    world = World(tmp_path, observer=told.append)
    crowd = Crowd(world)
    with crowd.busy_model():
        crowd.open("anna", token, "first")
        crowd.wait_for("anna")
        crowd.open("anna", token, "second")
        crowd.threads[-1].join(0.2)
        assert crowd.waiting("anna") == 1
    assert crowd.results["first"].job == crowd.results["second"].job
    assert sum(isinstance(event, JobOpened) for event in told) == 1
    assert len(list((tmp_path / "vendor" / "jobs").iterdir())) == world.vendor.open_jobs() == 1


@pytest.mark.parametrize(
    ("limits", "third"),
    [({"max_jobs": 2}, "carl"), ({"max_jobs_per_customer": 1}, "anna")],
)
def test_openings_that_wait_take_room(tmp_path, limits, third):
    world = World(tmp_path, limits=VendorLimits(**limits))
    crowd = Crowd(world)
    with crowd.busy_model():
        for customer in ("anna", "bert"):
            crowd.open(customer)
            crowd.wait_for(customer)
        assert Stream(world, third, opening(world)).opened.code == "limit"
    assert world.vendor.open_jobs() == 2
    assert Stream(world, third, opening(world)).opened.code == "limit"


def test_an_opening_that_fails_gives_its_room_back(tmp_path, monkeypatch):
    world, token = World(tmp_path, limits=VendorLimits(max_jobs=1)), new_token()
    write, refusals = JobStore.write, [OSError(28, "No space left on device")]

    def refuse_once(self, record):
        if refusals:
            raise refusals.pop()
        write(self, record)

    monkeypatch.setattr(JobStore, "write", refuse_once)
    crowd = Crowd(world)
    with crowd.busy_model():
        crowd.open("anna", token, "first")
        crowd.wait_for("anna")
        crowd.open("anna", token, "second")  # waits for the first, and then opens the job itself
    assert crowd.results["first"].code == "internal"
    assert crowd.results["second"].state == "open"
    assert not world.vendor._jobs._opening
