"""A vendor's service on a tiny model, and customers who call it over the network."""

import urllib.request
from pathlib import Path

from split_world import CONFIG, FAST, LABELS, TEXTS, build

from blindtune.exchange.wire.credentials import VendorTrust
from blindtune.exchange.wire.network import Connection
from blindtune.exchange.wire.serving import ServerConfig
from blindtune.split.bottom import open_bottom
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.requests import PassConfig, new_token, open_job
from blindtune.split.vendor.door import CertificateConfig, admit
from blindtune.split.vendor.service import WatchConfig, serve
from tiny_models import tiny_tokenizer

PLAN = PassConfig(epochs=3, batch_size=3, precision="float16", checkpoint_steps=2)
SELF_SIGNED = CertificateConfig(self_signed=True)


def write_model(place: Path, name="bert") -> Path:
    build(name).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


class VendorWorld:
    """Files of a vendor; `start` serves from them."""

    def __init__(self, folder, name="bert", cut=1):
        self.model = write_model(folder / "model", name)
        self.out, self.cut = folder / "vendor", cut
        self.log = folder / "log.jsonl"
        self.tokens = {}
        self.shown = None  # the customers' certificate and key, if they show any

    def start(self, *, port=0, config=None, limits=None, access=SELF_SIGNED, **server):
        server = {"retry_after_seconds": 0.01, **server}
        return serve(
            self.model, self.out, self.cut, config, access=access, limits=limits,
            server=ServerConfig(port=port, **server),
            watch=WatchConfig(metrics_port=0, log_file=str(self.log)),
        )  # fmt: skip

    def trust(self, service, customer="anna"):
        if customer not in self.tokens:
            self.tokens[customer] = admit(customer, self.out)
        own = {} if self.shown is None else {"certificate": self.shown[0], "key": self.shown[1]}
        return VendorTrust(token=self.tokens[customer], fingerprint=service.fingerprint, **own)

    def connect(self, service, customer="anna", **options):
        return Connection(service.addresses[0], self.trust(service, customer), **options)

    def job(self, service, customer="anna", *, config=CONFIG, token=None):
        return open_job(
            lambda: self.connect(service, customer), open_bottom(service.bottom.path),
            token or new_token(), config, task="classification", outputs=2, retries=FAST,
        )  # fmt: skip

    def private(self, texts=TEXTS, labels=LABELS):
        return privatize(open_bottom(self.out / "bottom"), texts, labels, mechanism=None)


def page(service, path="/metrics"):
    url = f"http://127.0.0.1:{service.metrics_port}{path}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def metric(text, name, **labels):
    """The value of one series."""
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    wanted = f"blindtune_{name}" + (f"{{{inside}}}" if inside else "")
    return next(float(line.split()[-1]) for line in text.splitlines()
                if line.rpartition(" ")[0] == wanted)  # fmt: skip
