"""`blindtune serve`: the vendor's server of split tuning."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from blindtune.cli.bottom import CUT, GROUP, partition_facts
from blindtune.cli.options import Group
from blindtune.cli.output import Facts
from blindtune.cli.printing import duration, print_pairs
from blindtune.cli.trusting import WRITING, signer_of
from blindtune.cli.verb import Settings, Verb

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate
    from blindtune.split.vendor.service import Service

HELP = """Serve a model: tune it for many customers who send privatized states.

Run by the vendor, until Ctrl-C or SIGTERM: then requests that are worked on are answered, customers
are told to come back, and it ends with code 0; while it loads, at once with code 130. One frozen
model is in memory; every job adds LoRA weights, a head and an optimizer of its own. What a job may
use is limited by the options below; whatever goes beyond is refused, and nobody else notices.

Customers need three things: the bottom package (DIR/bottom), the address with the fingerprint of a
self-signed certificate, and a token from `blindtune admit`, which works while this runs.

Killed at any moment, the same command goes on with every job from its last checkpoint; there is no
--resume to set. Lines of JSON tell on standard error what happens, without any content.

\b
Needs:   MODEL, a local directory, a hub name, or an embedded model
         (smollm2-135m, minilm); a certificate, or --self-signed.
Writes:  DIR with bottom/, customers.json, tls/ and jobs/. All but bottom/
         is the vendor's alone. --json prints one line when it serves, and
         one when it has ended.

\b
Example:
  blindtune serve smollm2-135m --cut 6 --out vendor/ --self-signed
  blindtune admit alice --out vendor/
"""


def act(settings: Settings) -> Facts:
    """Serve until a signal comes."""
    with _signals() as (serving, ended):
        from blindtune.exchange.wire.guard import GuardConfig
        from blindtune.exchange.wire.serving import ServerConfig
        from blindtune.split.terms import VendorLimits
        from blindtune.split.vendor.door import CertificateConfig
        from blindtune.split.vendor.service import BottomConfig, WatchConfig, serve

        service = serve(
            settings["model"],
            settings["out"],
            settings["cut"],
            settings.of(BottomConfig),
            access=settings.of(CertificateConfig),
            server=settings.of(ServerConfig),
            guard=settings.of(GuardConfig),
            limits=settings.of(VendorLimits),
            watch=settings.of(WatchConfig),
            signer=signer_of(settings),
        )
        try:
            serving.set()
            settings.announce(_facts(settings, service))
            while not ended.wait(0.5):  # a signal that another thread got wakes nobody here
                pass
        finally:
            service.close(settings["grace_seconds"])
    return {"state": "ended", "path": str(Path(settings["out"])), "jobs": service.open_jobs()}


def _facts(settings: Settings, service: Service) -> Facts:
    """What customers are to be told, and where everything is."""
    cut, port = service.bottom.cut, service.metrics_port
    return {
        "state": "serving",
        "addresses": service.addresses,
        "fingerprint": service.fingerprint,
        "path": str(Path(settings["out"])),
        "bottom": str(service.bottom.path),
        "bottom_id": service.bottom.id,
        "partition": cut.partition,
        "cut": cut.cut,
        "last": cut.last,
        "layers": cut.layers,
        "jobs": service.open_jobs(),
        "metrics": None if port is None else f"http://{settings['metrics_host']}:{port}/metrics",
    }


@contextmanager
def _signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """(serving, ended): once the block sets `serving`, Ctrl-C and SIGTERM set `ended`.

    Before that they interrupt, as a second Ctrl-C does.
    """
    serving, ended = threading.Event(), threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if not serving.is_set() or (ended.is_set() and number == signal.SIGINT):
            raise KeyboardInterrupt
        ended.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield serving, ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(facts: Facts, console: Console) -> None:
    """Print where it is, or that it has ended."""
    if facts["state"] == "ended":
        pairs = [("jobs open", str(facts["jobs"])), ("time", duration(facts["wall_seconds"]))]
        print_pairs(console, "Ended; the same command goes on", pairs)
        return
    pairs = [("address", "  ".join(facts["addresses"]))]
    if facts["fingerprint"]:
        pairs.append(("fingerprint", facts["fingerprint"]))
    if facts["metrics"]:
        pairs.append(("metrics", facts["metrics"]))
    pairs += [
        ("split", partition_facts(facts)),
        ("bottom", f"{facts['bottom']} (give it to customers)"),
        ("bottom id", facts["bottom_id"]),
        ("jobs open", str(facts["jobs"])),
        ("customers", f"blindtune admit NAME --out {facts['path']}"),
        ("to end", "Ctrl-C or SIGTERM"),
    ]
    print_pairs(console, "Serving", pairs)


def estimate(settings: Settings) -> Estimate:
    """Estimate the act."""
    from blindtune.split.terms import VendorLimits
    from blindtune.split.vendor.estimates import estimate_serve
    from blindtune.split.vendor.service import BottomConfig

    return estimate_serve(
        settings["model"], settings["cut"], settings.of(BottomConfig), settings.of(VendorLimits)
    )


VERB = Verb(
    name="serve",
    help=HELP,
    parameters=(
        click.Argument(["model"], metavar="MODEL"),
        CUT,
        click.Option(["--out"], required=True, metavar="DIR", help="The vendor's directory."),
        click.Option(
            ["--grace-seconds"],
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            help="Time for requests that are worked on when it is to end.",
        ),
        *WRITING,
    ),
    groups=(
        GROUP,
        Group(
            heading="Certificate", module="blindtune.split.vendor.door", name="CertificateConfig"
        ),
        Group(
            heading="Address and limits of streams",
            module="blindtune.exchange.wire.serving",
            name="ServerConfig",
        ),
        Group(
            heading="Connections, and calls a second",
            module="blindtune.exchange.wire.guard",
            name="GuardConfig",
        ),
        Group(heading="Limits of jobs", module="blindtune.split.terms", name="VendorLimits"),
        Group(heading="Watching", module="blindtune.split.vendor.service", name="WatchConfig"),
    ),
    act=act,
    show=show,
    estimate=estimate,
    goes_on=True,
    less_memory="lower --max-message-tokens, --max-jobs or --max-rank",
    interrupted="jobs are kept up to their last checkpoint: the same command goes on",
)
