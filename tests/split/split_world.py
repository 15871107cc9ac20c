"""A vendor and its customers in one process, on tiny models."""

import copy

import torch

from blindtune.exchange.wire.resuming import RetryConfig
from blindtune.exchange.wire.transport import InProcessTransport, LostError
from blindtune.split.bottom import open_bottom, write_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.requests import new_token, open_job
from blindtune.split.partition import Cut, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.handler import Vendor
from log_watch import keep_secret
from tiny_encoders import ENCODER_NAMES, tiny_encoder
from tiny_models import tiny_model, tiny_tokenizer

FAST = RetryConfig(first_delay_seconds=0.001, longest_delay_seconds=0.002)
TEXTS = [
    "the film is good", "a bad film", "very good", "it was bad, so bad", "good fun",
    "nothing here is good", "bad", "a truly good story", "bad acting", "so good",
]  # fmt: skip
keep_secret(*TEXTS)
LABELS = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 0, 1])
CONFIG = TuningConfig(lora_rank=2, learning_rate=1e-2, seed=3)


def build(name):
    return tiny_encoder(name) if name in ENCODER_NAMES else tiny_model(name)


class World:
    """A vendor that can be killed, and customers' connections to it."""

    def __init__(self, folder, name="bert", partition="two-part", cut=1, last=0, **vendor):
        self.folder, self.options = folder, vendor
        self.model = build(name)
        count = stack_of(self.model).layer_count
        self.cut = Cut(partition=partition, layers=count, cut=cut, last=last)
        write_bottom(self.model, tiny_tokenizer(), folder / "bottom", self.cut)
        self.bottom = open_bottom(folder / "bottom")
        self.life = 0
        self.start()

    def start(self):
        """Start the vendor, or start it again after it was killed: only its files are left."""
        self.life += 1
        self.vendor = Vendor(
            stack_of(copy.deepcopy(self.model)), self.cut, self.bottom.id,
            self.folder / "vendor", **self.options,
        )  # fmt: skip

    def connect(self, customer="anna", tap=None):
        """A connection that is lost when the vendor is killed."""
        life, session = self.life, self.vendor.session(customer)
        handler = session.__enter__()

        def handle(message):
            if life != self.life:
                raise AssertionError("the old vendor is dead")
            return handler(message)

        inner = InProcessTransport(handle, tap=tap)
        submit = inner.submit

        def submit_while_alive(message):
            if life != self.life:
                raise LostError("the vendor was killed")
            return submit(message)

        inner.submit = submit_while_alive
        inner.call = lambda message: submit_while_alive(message).result()
        return inner

    def job(self, config=CONFIG, *, customer="anna", token=None, tap=None, precision="float32"):
        """An open job of this world's partition."""
        headless = self.cut.partition == "u-shape"
        return open_job(
            lambda: self.connect(customer, tap), self.bottom, token or new_token(), config,
            task="hidden" if headless else "classification", outputs=0 if headless else 2,
            precision=precision, retries=FAST,
        )  # fmt: skip

    def private(self, mechanism=None, **options):
        """The texts' states, without noise unless asked for."""
        return privatize(self.bottom, TEXTS, LABELS, mechanism=mechanism, **options)
