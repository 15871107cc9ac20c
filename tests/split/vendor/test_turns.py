"""Turns at the model: one at a time, and nobody starves."""

import threading
import time

import pytest
from split_world import CONFIG, World

from blindtune.errors import BlindtuneError
from blindtune.exchange.wire.events import Worked
from blindtune.exchange.wire.messages import Predict
from blindtune.split.vendor.turns import Turns


class Queue:
    """Turns of customers who wait, on a clock that moves only when somebody works."""

    def __init__(self):
        self.now, self.order, self.threads = 0.0, [], []
        self.turns = Turns(clock=lambda: self.now)

    def ask(self, customer, seconds=1.0, then=lambda: None):
        def work():
            with self.turns.take(customer) as waited:
                self.order.append((customer, waited))
                then()
                self.now += seconds

        waiting = self.waiting()
        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()
        while self.waiting() == waiting:
            time.sleep(0.001)

    def waiting(self):
        return sum(map(len, self.turns._waiting.values()))

    def names(self):
        for thread in self.threads:
            thread.join(10)
        return "".join(customer for customer, _ in self.order)


def test_one_at_a_time_in_order():
    queue = Queue()
    with queue.turns.take("first"):
        for _ in range(5):
            queue.ask("a")
    assert queue.names() == "aaaaa"
    assert [waited for _, waited in queue.order] == [0, 1, 2, 3, 4]
    with pytest.raises(BlindtuneError), queue.turns.take("a"):
        raise BlindtuneError
    with queue.turns.take("a") as waited:
        assert waited == 0
    assert not queue.turns._used


def test_many_requests_of_one_customer_do_not_hold_up_another():
    queue = Queue()
    with queue.turns.take("first"):
        for _ in range(6):
            queue.ask("a")
        queue.ask("b")
        queue.ask("c")
        queue.ask("b")
    assert queue.names() == "abcabaaaa"


def test_time_is_shared_not_the_number_of_requests():
    queue = Queue()
    with queue.turns.take("first"):
        for _ in range(3):
            queue.ask("a", seconds=3)
        for _ in range(6):
            queue.ask("b", seconds=1)
    assert queue.names() == "abbbabbba"


def test_who_was_away_has_no_credit():
    queue = Queue()
    with queue.turns.take("first"):
        for _ in range(3):
            queue.ask("a", seconds=5)
        # b comes when a has worked for ten seconds, and does not work for ten seconds now.
        comes = threading.Event()
        queue.ask("a", then=lambda: (queue.ask("b"), queue.ask("b"), queue.ask("a"), comes.set()))
    assert comes.wait(10)
    assert queue.names() == "aaaabab"


def test_one_request_beside_four_busy_streams(tmp_path):
    """Four streams of one customer are in the queue; another customer's request is the second."""
    worked = []
    world = World(tmp_path, observer=worked.append)
    rows, lengths = world.private().rows([0])
    jobs = [world.job(CONFIG, customer="anna") for _ in range(4)]
    jobs.append(world.job(CONFIG, customer="bert"))
    threads = []

    def ask(job):
        job.call(Predict(precision="float32", hidden_TD=rows, lengths=lengths))

    turns = world.vendor._model._turns
    with turns.take("vendor"):
        for job in jobs:
            threads.append(threading.Thread(target=ask, args=(job,)))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) < len(threads):
                time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    for job in jobs:
        job.close()
    done = [event.customer for event in worked if isinstance(event, Worked)]
    assert done == ["anna", "bert", "anna", "anna", "anna"]
