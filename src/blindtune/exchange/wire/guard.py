"""What a server takes from strangers before it knows them, and from customers a second.

Connections are gRPC's: how many there are, how long a handshake, an idle one and any one may last.
Rates are counted here, in buckets that hold ten seconds' worth: whoever was quiet may come with as
much at once. Whoever is above its rate is told when to come again; nobody else waits for it.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from blindtune.errors import ConfigError
from blindtune.kinds import check_kinds

PUSHBACK = "grpc-retry-pushback-ms"
"""gRPC's own name for the time after which a refused call may be tried again."""
BURST_SECONDS = 10.0
MAX_KEYS = 10_000
AGE_GRACE_MS = 10_000
"""Work that an old connection may end; its customer goes on in any case."""
_SPARE_FILES = 256  # checkpoints, packages, logs, and what the libraries open


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """How many connections and calls a server takes, and how long connections may last."""

    max_connections: int = 2000
    """Connections at once, with a customer behind them or not; further ones are closed."""
    handshake_timeout_seconds: float = 10.0
    """Time for a new connection to agree on TLS and to begin HTTP/2."""
    connection_idle_seconds: float = 60.0
    """A connection without a call is closed after this; one whose call never gets whole, too."""
    connection_age_seconds: float = 86400.0
    """Any connection is closed after about this; customers come back and go on."""
    max_calls_per_second: float = 10.0
    """Streams that one customer may begin."""
    max_requests_per_second: float = 1000.0
    """Requests of one customer; what is above waits, and so does who sent it."""
    max_unknown_calls_per_second: float = 10.0
    """Calls of one address without a known token, health checks too; of IPv6, one /64."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_kinds(self)
        for name in self.__dataclass_fields__:
            if not 0 < (value := getattr(self, name)) < 2**31 / 1000:
                raise ConfigError(f"expected {name} above 0 and below 2147483, got {value}")

    def channel_options(self) -> list[tuple[str, int]]:
        """What of this gRPC enforces."""
        return [
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_timeout_seconds * 1000)),
            ("grpc.max_connection_idle_ms", int(self.connection_idle_seconds * 1000)),
            ("grpc.max_connection_age_ms", int(self.connection_age_seconds * 1000)),
            ("grpc.max_connection_age_grace_ms", AGE_GRACE_MS),
            ("grpc.http2.ping_timeout_ms", 10_000),
            ("grpc.http2.settings_timeout", int(self.handshake_timeout_seconds * 1000)),
        ]


class Rates:
    """One bucket a key; a key that was not seen for long, or too long ago, has a full one.

    Args:
        per_second: tokens that come to every bucket.
        clock: seconds, for tests.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._most = max(1.0, per_second * BURST_SECONDS)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> float:
        """Take a token: 0 if there was one, else the seconds until there will be."""
        now = self._clock()
        with self._lock:
            left, since = self._buckets.pop(key, (self._most, now))
            left = min(self._most, left + max(0.0, now - since) * self._per_second)
            wait = 0.0 if left >= 1 else (1 - left) / self._per_second
            self._buckets[key] = (left if wait else left - 1, now)
            if len(self._buckets) > MAX_KEYS:
                self._buckets.popitem(last=False)
        return wait

    def __len__(self) -> int:
        return len(self._buckets)


class Guard:
    """The rates of one server.

    Args:
        config: how much is allowed.

    Attributes:
        calls: streams begun, by customer.
        requests: by customer.
        strangers: calls without a known token, by `network_of` their peer.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.calls = Rates(config.max_calls_per_second)
        self.requests = Rates(config.max_requests_per_second)
        self.strangers = Rates(config.max_unknown_calls_per_second)


def network_of(peer: str) -> str:
    """What counts as one address, of a peer as gRPC names it (`ipv4:1.2.3.4:567`)."""
    _, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = mapped
    return str(address)


def allow_files(connections: int) -> None:
    """Let this process have so many connections beside its own files.

    Raises:
        ConfigError: the system allows fewer.
    """
    try:
        import resource
    except ImportError:  # this system has no such limit
        return
    needed = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"expected {needed} open files for max_connections {connections}, got a limit of "
            f"{hard}: raise it (`ulimit -Hn`), or lower max_connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
