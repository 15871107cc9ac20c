"""A vendor's service: a model, its bottom package, its customers and its jobs, behind TLS.

    VENDOR/bottom/         the package that customers get; made when it is not there
    VENDOR/customers.json  names and hashes of tokens (`admit`); read again when it changes
    VENDOR/tls/            the self-signed certificate, if there is one
    VENDOR/jobs/           jobs and their checkpoints (split.vendor.store)

One process at a time serves from a directory. Killed at any moment and started again, it goes on
with every job from its last checkpoint, and customers bring it to where it was.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

import msgspec
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ConfigError, MismatchError, OutputError
from blindtune.exchange.packages.manifest import BottomManifest, Dtype
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import Signer
from blindtune.exchange.packages.writing import check_place
from blindtune.exchange.wire.codec import MessageLimits
from blindtune.exchange.wire.credentials import CustomerFile, fingerprint
from blindtune.exchange.wire.events import Event
from blindtune.exchange.wire.guard import GuardConfig
from blindtune.exchange.wire.messages import Partition
from blindtune.exchange.wire.serving import Server, ServerConfig
from blindtune.kinds import check_kinds
from blindtune.models import fingerprint as models
from blindtune.models.encoders import load_any
from blindtune.models.loading import preferred_device
from blindtune.places import located
from blindtune.split.bottom import write_bottom
from blindtune.split.partition import Cut, stack_of
from blindtune.split.terms import VendorLimits
from blindtune.split.vendor.door import CertificateConfig, credentials_of, prepare, told_hosts
from blindtune.split.vendor.endpoint import Endpoint
from blindtune.split.vendor.event_log import EventLog
from blindtune.split.vendor.handler import Vendor
from blindtune.split.vendor.housekeeping import Housekeeping
from blindtune.split.vendor.metrics import CONTENT_TYPE, Metrics


@dataclass(frozen=True, kw_only=True)
class BottomConfig:
    """What customers get of a model, beside the number of blocks in the bottom."""

    partition: Partition = "two-part"
    """two-part: the vendor has the rest and sees labels; u-shape: the customer has the last part,
    the head and the labels too."""
    last: int = 0
    """u-shape: blocks of the customer's last part; 0: final norm and head alone."""
    dtype: Dtype = "float32"
    """Of the weights in the package."""
    max_length: int | None = None
    """Longest sequence in tokens; None: as long as the model takes."""

    def __post_init__(self) -> None:
        """Refuse fractions of blocks and tokens."""
        check_kinds(self)

    def cut(self, layers: int, cut: int) -> Cut:
        """The cut of a model of so many layers."""
        return Cut(partition=self.partition, layers=layers, cut=cut, last=self.last)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """How a vendor watches its service."""

    metrics_port: int | None = None
    """Serve /metrics (Prometheus) and /health over plain HTTP at this port; 0: any free one."""
    metrics_host: str = "127.0.0.1"
    """Address for them; they are not encrypted and ask for no password."""
    log_file: str | None = None
    """Append JSON lines here; None: they go to standard error."""

    def __post_init__(self) -> None:
        """Refuse what is no port."""
        check_kinds(self)


@final
@dataclass(frozen=True, kw_only=True)
class WrittenBottom:
    """A bottom package that was written."""

    path: Path
    id: str
    """64 hex digits; customers can compare them."""
    cut: Cut
    bytes: int


def bottom(
    model: str | Path,
    out: str | Path,
    cut: int,
    config: BottomConfig | None = None,
    *,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> WrittenBottom:
    """Write the package that customers of split tuning get: embedding and the first blocks.

    Args:
        model: a local directory, a hub name, or an embedded model.
        out: directory of the package.
        cut: blocks of the bottom; 0: the embedding alone.
        overwrite: replace an earlier package.
        signer: signs the package; None: it stays unsigned.

    Raises:
        ConfigError: the model cannot be cut there. ModelError: it cannot be had.
        OutputError: the package cannot be written.
    """
    check_place(located(out), overwrite=overwrite, kind="bottom", inputs=(model,))
    loaded, tokenizer = load_any(model)
    config = config or BottomConfig()
    return _write(loaded, tokenizer, located(out), cut, config, overwrite=overwrite, signer=signer)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    cut: int,
    config: BottomConfig,
    *,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> WrittenBottom:
    where = config.cut(stack_of(model).layer_count, cut)
    identity = write_bottom(
        model, tokenizer, out, where, dtype=config.dtype, max_length=config.max_length,
        overwrite=overwrite, signer=signer,
    )  # fmt: skip
    return WrittenBottom(path=out, id=identity, cut=where, bytes=_size(out))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _find(model: PreTrainedModel, path: Path, cut: int, config: BottomConfig) -> WrittenBottom:
    """The package at `path`, if it is this model's at this cut.

    Raises:
        MismatchError: it is another one. PackageError: it is damaged.
    """
    opened = open_package(path, "bottom")
    manifest: BottomManifest = opened.manifest
    where = config.cut(stack_of(model).layer_count, cut)
    wanted = {
        "cut": where.cut,
        "partition": where.partition,
        "last": where.last,
        "dtype": config.dtype,
        "max_length": config.max_length,
        "layers": where.layers,
        "model": models.fingerprint(model),
    }
    for name, value in wanted.items():
        found = getattr(manifest, name)
        if found != value:
            raise MismatchError(
                f"{path}: expected a bottom package with {name} {value}, it has {found}: serve "
                "the model as it was cut before, or choose another directory"
            )
    return WrittenBottom(
        path=path, id=opened.id.removeprefix("sha256:"), cut=where, bytes=_size(path)
    )


@final
class Service:
    """A vendor that serves, from when it is made until it is closed; `serve` makes it.

    Attributes:
        addresses: what customers call.
        fingerprint: of the certificate, for customers who shall trust it as it is; None when an
            authority vouches for it.
        bottom: the package for customers.
        metrics_port: where metrics and health are, or None.
    """

    def __init__(
        self,
        model: str | Path,
        out: Path,
        cut: int,
        bottom_config: BottomConfig,
        access: CertificateConfig,
        server_config: ServerConfig,
        guard: GuardConfig,
        limits: VendorLimits,
        watch: WatchConfig,
        signer: Signer | None = None,
    ) -> None:
        self._closing, self._grace = threading.Lock(), 10.0
        with ExitStack() as undo:
            access.check_whole()  # before anything is made
            customers = CustomerFile(prepare(out))
            self._lock(out, undo)
            credentials = credentials_of(access, out, server_config.host)
            self._log = EventLog(watch.log_file)
            undo.callback(self._log.close)
            loaded, tokenizer = load_any(model)
            place = out / "bottom"
            if place.exists():
                self.bottom = _find(loaded, place, cut, bottom_config)
            else:
                self.bottom = _write(loaded, tokenizer, place, cut, bottom_config, signer=signer)
            self._metrics: Metrics | None = None
            stack = stack_of(loaded.to(preferred_device()))
            self._vendor = Vendor(
                stack, self.bottom.cut, self.bottom.id, out, limits=limits,
                payload=MessageLimits(max_payload_bytes=server_config.max_payload_bytes),
                observer=self._tell,
            )  # fmt: skip
            if watch.metrics_port is not None:
                self._metrics = Metrics(self._vendor.open_jobs)
            self._server = Server(
                self._vendor.session, customers, credentials, config=server_config,
                guard=guard, observer=self._tell,
            )  # fmt: skip
            undo.callback(lambda: self._server.close(self._grace))
            undo.callback(Housekeeping(self._vendor.expire).close)
            self.metrics_port = self._open_endpoint(watch, undo)
            self._undo = undo.pop_all()
        names = access.certificate_names
        self.addresses = told_hosts(server_config.host, self._server.port, names)
        self.fingerprint = (
            fingerprint(credentials.certificate.read_bytes()) if access.self_signed else None
        )
        self._log.write("service-began", {"port": self._server.port, "bottom": self.bottom.id})

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self, grace_seconds: float = 10.0) -> None:
        """Answer the requests that are worked on, tell customers to come back, and end."""
        with self._closing:
            self._grace = grace_seconds
            self._log.write("service-ends", {"jobs": self._vendor.open_jobs()})
            self._undo.close()

    def open_jobs(self) -> int:
        """How many jobs are open, of all customers."""
        return self._vendor.open_jobs()

    @staticmethod
    def _lock(out: Path, undo: ExitStack) -> None:
        lock = FileLock(out / "serve.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{out}: another process serves from this directory: end it, or choose another"
            ) from error
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
        undo.callback(lock.release)

    def _open_endpoint(self, watch: WatchConfig, undo: ExitStack) -> int | None:
        metrics = self._metrics
        if watch.metrics_port is None or metrics is None:
            return None
        pages = {
            "/metrics": (CONTENT_TYPE, metrics.text),
            "/health": ("application/json", self._health),
        }
        endpoint = Endpoint(watch.metrics_host, watch.metrics_port, pages)
        undo.callback(endpoint.close)
        return endpoint.port

    def _health(self) -> bytes:
        return msgspec.json.encode(
            {**msgspec.to_builtins(self._server.health()), "jobs": self._vendor.open_jobs()}
        )

    def _tell(self, event: Event) -> None:
        self._log(event)
        if self._metrics is not None:
            self._metrics(event)


def serve(
    model: str | Path,
    out: str | Path,
    cut: int,
    config: BottomConfig | None = None,
    *,
    access: CertificateConfig,
    server: ServerConfig | None = None,
    guard: GuardConfig | None = None,
    limits: VendorLimits | None = None,
    watch: WatchConfig | None = None,
    signer: Signer | None = None,
) -> Service:
    """Serve a model to customers of split tuning; use the result as a context manager.

    Args:
        model: a local directory, a hub name, or an embedded model.
        out: the vendor's directory; what is there is gone on with.
        cut: blocks of the customers' bottom.
        config: what else customers get.
        access: the certificate.
        server: address, and limits of streams and messages.
        guard: limits of connections, and of calls a second.
        limits: of jobs.
        watch: metrics and log.
        signer: signs the package for customers when it is made; None: it stays unsigned.

    Raises:
        ConfigError: an option is not possible, the address is taken, or another process serves
            from this directory.
        MismatchError: the directory is another model's, or was cut elsewhere.
        ModelError, OutputError: the model cannot be had, the directory cannot be written.
    """
    return Service(
        model,
        located(out),
        cut,
        config or BottomConfig(),
        access,
        server or ServerConfig(),
        guard or GuardConfig(),
        limits or VendorLimits(),
        watch or WatchConfig(),
        signer,
    )
