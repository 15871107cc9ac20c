"""Whole jobs of split tuning over a network that fails: each must end as an undisturbed one does.

    python benchmarks/fault_proxy.py --work DIR --fault reset --count 100 --seed 1

A job is `split-tune`, `predict` and `cancel`; two-part and U-shape take turns. What is compared:
every file in the customer's directory but its secret, the predictions, and the vendor's last
checkpoint, tensor by tensor (its seconds aside). A command that gives up is called again, as a
customer would, and that is counted ("reruns").

Faults of bytes come from `fault_network`, under TLS. Faults of whole requests are made between the
customer and the vendor's handler, since TLS lets none of them pass on one connection: a request
that comes twice, and one that comes late, from a connection that its customer has given up.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / d) for d in (".", "split")]
from customer_world import OPEN, TUNING, write_table  # noqa: E402
from served_world import SECRET, Served  # noqa: E402

import blindtune  # noqa: E402
from blindtune.errors import NetworkError  # noqa: E402
from blindtune.exchange.wire.credentials import VendorTrust, fingerprint  # noqa: E402
from blindtune.exchange.wire.messages import Busy  # noqa: E402
from blindtune.exchange.wire.network import Connection, ConnectionConfig  # noqa: E402
from blindtune.exchange.wire.resuming import RetryConfig  # noqa: E402
from blindtune.exchange.wire.transport import InProcessTransport, LostError  # noqa: E402
from blindtune.split.customer.job import CustomerJob  # noqa: E402
from blindtune.split.customer.requests import PassConfig  # noqa: E402
from fault_network import FAULTS, FaultProxy  # noqa: E402

MESSAGE_FAULTS = ("request twice", "request late")
ALL_FAULTS = (*FAULTS, *MESSAGE_FAULTS)
GAP = 12
"""Chunks, or requests, between two faults on average."""
PASSES = PassConfig(epochs=4, batch_size=4, accumulate=2, checkpoint_steps=2)
TIMES = ConnectionConfig(connect_timeout_seconds=1.0, reply_timeout_seconds=1.0)
RETRIES = RetryConfig(
    first_delay_seconds=0.01, longest_delay_seconds=0.05, give_up_after_seconds=60.0
)
ACCESS = SimpleNamespace(retries=lambda: RETRIES)
MAX_RERUNS = 200


class FaultyRequests:
    """Streams to a vendor in this process, on which requests come twice or late.

    A late request is one whose customer has lost the connection meanwhile, and is back on another
    one: it reaches the vendor on the old stream, after up to three requests of the new one.
    """

    def __init__(self, world, fault: str, *, seed: int, limit: int) -> None:
        self._world, self._late, self._limit = world, fault == "request late", limit
        self._draw = random.Random(f"{fault} {seed}")
        self._waiting: list = []  # [requests to go, handler, message]
        self.injected, self.connections = 0, 0

    def __enter__(self) -> FaultyRequests:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Deliver what is late still."""
        self._deliver(everything=True)

    def connect(self):
        """A stream."""
        self.connections += 1
        session = self._world.vendor.session("anna")
        handler, lost = session.__enter__(), []

        def handle(message):
            self._deliver()
            suffers = self.injected < self._limit and self._draw.random() < 1 / GAP
            self.injected += suffers
            if suffers and self._late:
                lost.append(session)
                self._waiting.append([self._draw.randint(1, 3), handler, message])
                return Busy(retry_after_seconds=0)  # `LosingTransport` passes it to nobody
            reply = handler(message)
            if suffers:
                handler(message)
            return reply

        return LosingTransport(handle, lost)

    def _deliver(self, *, everything: bool = False) -> None:
        for late in list(self._waiting):
            late[0] -= 1
            if late[0] <= 0 or everything:
                self._waiting.remove(late)
                late[1](late[2])


class LosingTransport:
    """An in-process transport that ends when its handler has lost a request."""

    def __init__(self, handle, lost: list) -> None:
        self._inner, self._lost = InProcessTransport(handle), lost

    def submit(self, message):
        """Answer at once, or be lost."""
        future = None if self._lost else self._inner.submit(message)
        if self._lost:
            raise LostError("this connection was lost")
        return future

    def call(self, message):
        """Answer at once, or be lost."""
        return self.submit(message).result()

    def close(self) -> None:
        """End the stream."""
        self._inner.close()


class Site:
    """A vendor of one partition, its customer's files, and what an undisturbed job gives."""

    def __init__(self, folder: Path, partition: str) -> None:
        self.folder = folder
        options = {
            "server": {"keepalive_seconds": 2.0, "max_streams_per_customer": 32},
            "guard": {"max_calls_per_second": 1000.0},  # these customers come back at once
        }
        self.served = Served(
            folder, "bert", partition, cut=1, last=int(partition == "u-shape"), **options
        )
        certificate = self.served.certificate.certificate
        pin = fingerprint(certificate.read_bytes())
        self.trust = {"pinned": VendorTrust(token=SECRET, fingerprint=pin),
                      "roots": self.served.trust}  # fmt: skip
        self.data = write_table(folder / "train.csv")
        self.calm, _ = self.job(folder / "calm", self.served.connect)

    def connect(self, port: int, known_by: str):
        """A connection by way of a port, to a vendor that is known by "roots" or "pinned"."""
        return Connection(f"https://127.0.0.1:{port}", self.trust[known_by], config=TIMES)

    def job(self, place: Path, connect) -> tuple[dict, int]:
        """Tune, predict, cancel; what came of it, and how often a command was called again."""
        bottom, store = self.folder / "bottom", self.served.world.vendor._jobs.store
        options = {"access": ACCESS, "silent": True}
        tuned, first = again(lambda: blindtune.split_tune(
            connect, bottom, self.data, place, OPEN, TUNING, PASSES, **options
        ))  # fmt: skip
        (name,) = [r.name for r in store.records() if r.state == "open"]
        states = store.states(name)
        last = states.numbers()[-1]
        vendor = nameless(states.load(last), name)
        asked, second = again(lambda: blindtune.predict(connect, place, self.data, access=ACCESS))
        files = own_files(place)
        _, third = again(lambda: blindtune.cancel(connect, place, access=ACCESS))
        assert CustomerJob(place).record.state == "cancelled"
        return {
            "files": files, "losses": tuned.losses, "steps": tuned.steps, "texts": asked.texts,
            "vendor": vendor, "last": last, "left": sorted(p.name for p in self.left()),
        }, first + second + third  # fmt: skip

    def left(self) -> list[Path]:
        """Files that should not stay: half-written ones, and states of jobs that ended."""
        return [p for p in self.folder.rglob("*") if "partial" in p.name or "at-" in p.name]

    def close(self) -> None:
        """End the server."""
        self.served.server.close(0)


def own_files(place: Path) -> dict:
    """What a customer's files hold, without its secrets, by their names.

    Bytes, or for states of PyTorch (whose archive names itself) values.
    """
    return {
        path.name: torch.load(path, weights_only=True)
        if path.suffix == ".pt"
        else path.read_bytes()
        for path in place.iterdir()
        if path.name not in ("token", "lock")
    }


def nameless(state: dict, name: str) -> dict:
    """A vendor's checkpoint without its seconds, and without the name of its job in it."""
    del state["seconds"]
    weights = state["lora"]["parameters"]
    state["lora"]["parameters"] = {key.replace(name, ""): weights[key] for key in weights}
    return state


def again(act):
    """Call a command until it ends well: its result, and how often it gave up."""
    for reruns in range(MAX_RERUNS):
        with suppress(NetworkError):
            return act(), reruns
    return act(), MAX_RERUNS


def same(one, other) -> bool:
    """Whether two results are equal, to the last bit of every tensor."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@contextmanager
def open_sites(folder: Path) -> Iterator[list[Site]]:
    """A vendor of each partition, under an empty directory."""
    sites = []
    try:
        for partition in ("two-part", "u-shape"):
            sites.append(Site(folder / partition, partition))
        yield sites
    finally:
        for site in sites:
            site.close()


def proxy_row(folder: Path, fault: str, count: int, seed: int) -> dict:
    """Jobs over a network with one fault, until it was injected `count` times.

    Args:
        folder: an empty directory.
        fault: one of ALL_FAULTS.
        count: how often.
        seed: of the moments.

    Returns:
        injected, jobs, connections, reruns; equal: whether every job ended as an undisturbed one;
        different: what did not, by job.
    """
    with open_sites(folder) as sites:
        return disturb(sites, fault, count, seed)


def disturb(sites: list[Site], fault: str, count: int, seed: int) -> dict:
    """As `proxy_row`, at vendors that are there."""
    row = {"injected": 0, "jobs": 0, "connections": 0, "reruns": 0, "different": []}
    while row["injected"] < count:
        number, site = row["jobs"], sites[row["jobs"] % len(sites)]
        settings = {"seed": 10_000 * seed + number, "limit": count - row["injected"]}
        if fault in FAULTS:
            network = FaultProxy(site.served.server.port, fault, gap=GAP, **settings)
            known_by = ("pinned", "roots")[number // len(sites) % 2]
            connect = partial(site.connect, network.port, known_by)
        else:
            network = FaultyRequests(site.served.world, fault, **settings)
            connect = network.connect
        with network:
            found, reruns = site.job(site.folder / f"{fault}-{seed}-{number}", connect)
        row["different"] += [
            f"{number}: {key}" for key in found if not same(found[key], site.calm[key])
        ]
        row["jobs"] += 1
        row["reruns"] += reruns
        row["injected"] += network.injected
        row["connections"] += network.connections
    return row | {"equal": not row["different"]}


def main() -> None:
    """Run one row, or all, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--fault", choices=ALL_FAULTS, action="append", help="default: all")
    parser.add_argument("--count", type=int, default=10, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for fault in options.fault or ALL_FAULTS:
        folder = options.work / fault.replace(" ", "-")
        folder.mkdir(parents=True)
        print(fault, json.dumps(proxy_row(folder, fault, options.count, options.seed)), flush=True)


if __name__ == "__main__":
    main()
