"""A vendor without a model: it counts what is applied, and can crash back to its checkpoint.

And customers who call it over the network (the fixtures `serve` and `trust` are in conftest).
"""

import threading
from collections import Counter
from contextlib import contextmanager

import torch

from blindtune.errors import PolicyError
from blindtune.exchange.wire.credentials import Customers, token_hash
from blindtune.exchange.wire.delivery import Deliveries
from blindtune.exchange.wire.messages import (
    Backward,
    Batch,
    BatchResult,
    Checkpoint,
    Checkpointed,
    Forward,
    Gradients,
    Hello,
    JobState,
    OpenJob,
    Outputs,
    Predict,
    Predictions,
    ResumeJob,
    Step,
    Stepped,
    Welcome,
)
from blindtune.exchange.wire.network import Connection
from log_watch import keep_secret

TOKEN = "ab" * 32
TOKENS = {"alice": "alice-token-" + "a" * 32, "bob": "bob-token-" + "b" * 32}
keep_secret(TOKEN, *TOKENS.values())
CUSTOMERS = Customers({name: token_hash(token) for name, token in TOKENS.items()})


def address(server):
    return f"https://127.0.0.1:{server.port}"


@contextmanager
def connected(server, trust, **options):
    connection = Connection(address(server), trust, **options)
    try:
        yield connection
    finally:
        connection.close()


def opening():
    return OpenJob(
        token=TOKEN,
        partition="two-part",
        cut=2,
        bottom="00" * 32,
        task="classification",
        outputs=2,
        options={"learning_rate": 1e-3},
    )


def batch(sequence, rows=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed + sequence)
    return Batch(
        sequence=sequence,
        hidden_TD=torch.randn(rows, width, generator=generator),
        lengths=(rows - 1, 1),
        labels=torch.tensor([0, 1]),
        input_gradient=True,
    )


class CountingVendor:
    """`effects` is the state that a job would have: how often each number took effect."""

    def __init__(self):
        self.deliveries = Deliveries()
        self.effects = Counter()
        self.durable = (0, Counter(), [])
        self.opened = False
        self.requests = Counter()
        self.life = 0
        self.lock = threading.Lock()

    def crash(self):
        """kill -9 and a restart: back to the last checkpoint."""
        with self.lock:
            self.life += 1
            applied, effects, replies = self.durable
            self.effects = Counter(effects)
            self.deliveries = Deliveries(applied=applied, replies=replies)

    @contextmanager
    def session(self, customer):
        lease, life = None, self.life

        def handle(message):
            nonlocal lease
            with self.lock:
                if life != self.life:
                    raise RuntimeError("a thread of a process that crashed")
                if isinstance(message, OpenJob | ResumeJob):
                    lease = self.deliveries.take_over()
                return self.answer(message, lease)

        yield handle

    def answer(self, message, lease):
        self.requests[type(message).__name__] += 1
        match message:
            case Hello():
                return Welcome(
                    version=1, program="test", model_type="tiny", partitions=("two-part",), cut=2,
                    hidden_size=4, bottom="00" * 32, max_tokens=99, max_payload_bytes=1 << 20,
                )  # fmt: skip
            case ResumeJob() if not self.opened:
                raise PolicyError("no such job")
            case OpenJob() | ResumeJob():
                self.opened = True
                return JobState(
                    job="job", state="open", applied=self.deliveries.applied,
                    durable=self.durable[0], steps=0, tokens=0,
                )  # fmt: skip
            case Batch() | Step() | Forward() | Backward():
                return self.deliveries.deliver(message, self.apply, lease=lease)
            case Checkpoint():
                assert self.deliveries.applied >= message.sequence
                self.durable = (
                    self.deliveries.applied, Counter(self.effects), self.deliveries.remembered()
                )  # fmt: skip
                return Checkpointed(sequence=self.durable[0])
            case Predict():
                return Predictions(logits_BC=message.hidden_TD.double().sum(0, keepdim=True))
        raise RuntimeError(f"content {message.kind}")

    def apply(self, message):
        number = message.sequence
        self.effects[number] += 1
        match message:
            case Step():
                return Stepped(sequence=number, steps=number, gradient_norm=0.5)
            case Forward():
                return Outputs(sequence=number, hidden_TD=message.hidden_TD * 2)
            case Backward():
                return Gradients(sequence=number, gradient_TD=message.gradient_TD * 2)
        return BatchResult(
            sequence=number,
            loss=float(message.hidden_TD.sum()),
            metrics={"correct": 1.0},
            gradient_TD=message.hidden_TD * 3 if message.input_gradient else None,
        )
