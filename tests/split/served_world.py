"""A vendor behind TLS, for customers in this process and in others."""

import time
from contextlib import contextmanager

from split_world import FAST, World

from blindtune.exchange.wire.credentials import (
    Customers,
    VendorTrust,
    make_development_certificate,
    token_hash,
)
from blindtune.exchange.wire.guard import GuardConfig
from blindtune.exchange.wire.messages import Batch, Forward
from blindtune.exchange.wire.network import Connection
from blindtune.exchange.wire.serving import Server, ServerConfig
from blindtune.split.customer.requests import PassConfig, new_token, open_job
from blindtune.split.terms import TuningConfig
from log_watch import keep_secret

SECRET = "anna-token-" + "a" * 32
keep_secret(SECRET)
CONFIG = TuningConfig(lora_rank=2, learning_rate=1e-2, lora_dropout=0.1)
PLAN = PassConfig(epochs=2, batch_size=2, checkpoint_steps=3)


class Served:
    """A world behind TLS; every start has a new port."""

    def __init__(self, folder, *model, pause=0.0, server=None, guard=None, **where):
        folder.mkdir()
        self.pause = pause  # of every batch, in seconds
        self.config = ServerConfig(port=0, retry_after_seconds=0.01, **(server or {}))
        self.guard = GuardConfig(**(guard or {}))
        self.world = World(folder, *model, **where)
        self.certificate = make_development_certificate(folder / "tls")
        self.trust = VendorTrust(token=SECRET, roots=self.certificate.certificate)
        self.server = None
        self.start()

    def start(self):
        if self.server is not None:
            self.server.close(0)
            self.world.start()
        self.server = Server(
            self.session, Customers({"anna": token_hash(SECRET)}), self.certificate,
            config=self.config, guard=self.guard,
        )  # fmt: skip

    @contextmanager
    def session(self, customer):
        with self.world.vendor.session(customer) as handler:

            def handle(message):
                time.sleep(self.pause if isinstance(message, Batch | Forward) else 0)
                return handler(message)

            yield handle

    @property
    def url(self):
        return f"https://127.0.0.1:{self.server.port}"

    def connect(self):
        return Connection(self.url, self.trust)

    def job(self, **kind):
        return open_job(
            self.connect, self.world.bottom, new_token(), CONFIG, **kind, precision="float16",
            retries=FAST,
        )  # fmt: skip
