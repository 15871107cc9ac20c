"""The same numbers over a real network, with the server killed in the middle."""

from split_world import FAST, World

from blindtune.exchange.credentials import (
    Customers,
    VendorTrust,
    make_development_certificate,
    token_hash,
)
from blindtune.exchange.network import Connection
from blindtune.exchange.serving import Server, ServerConfig
from blindtune.split.customer import PassConfig, new_token, open_job, train
from blindtune.split.terms import TuningConfig
from blindtune.split.ushape import Top, train_u_shape

SECRET = "anna-token-" + "a" * 32
CONFIG = TuningConfig(lora_rank=2, learning_rate=1e-2, lora_dropout=0.1)
PLAN = PassConfig(epochs=2, batch_size=2, checkpoint_steps=3)


class Served:
    """A world behind TLS; every start has a new port."""

    def __init__(self, folder, *model, **where):
        folder.mkdir()
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
            self.world.vendor.session, Customers({"anna": token_hash(SECRET)}), self.certificate,
            config=ServerConfig(port=0, retry_after_seconds=0.01),
        )  # fmt: skip

    def connect(self):
        return Connection(f"https://127.0.0.1:{self.server.port}", self.trust)

    def job(self, **kind):
        return open_job(
            self.connect, self.world.bottom, new_token(), CONFIG, **kind, precision="float16",
            retries=FAST,
        )  # fmt: skip


def test_two_part_over_tls_with_a_restart(tmp_path):
    (tmp_path / "calm").mkdir()
    calm, served = World(tmp_path / "calm"), Served(tmp_path / "tls")
    expected = train(calm.job(CONFIG, precision="float16"), calm.private(), PLAN)

    def restart(_loss, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 5:
            served.start()

    try:
        job = served.job(task="classification", outputs=2)
        assert train(job, served.world.private(), PLAN, on_loss=restart) == expected
        job.close()
        assert served.world.life == 2
    finally:
        served.server.close(0)


def test_u_shape_over_tls(tmp_path):
    (tmp_path / "calm").mkdir()
    calm = World(tmp_path / "calm", "smollm2", "u-shape", cut=1, last=1)
    served = Served(tmp_path / "tls", "smollm2", "u-shape", cut=1, last=1)
    losses = []
    try:
        for job, world in (
            (calm.job(CONFIG, precision="float16"), calm),
            (served.job(task="hidden"), served.world),
        ):
            top = Top(world.bottom, None)
            losses.append(train_u_shape(job, top, world.private(), PLAN, language_model=True))
            job.close()
    finally:
        served.server.close(0)
    assert losses[0] == losses[1]
