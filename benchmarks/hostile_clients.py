"""Hostile clients beside one healthy job at a vendor's server: the job must end as if alone.

    python benchmarks/hostile_clients.py --work DIR [--smoke] [crowds]

`blindtune serve` is a process, on a tiny model; so are the hostile clients (`hostile_network.py`:
what each kind does), and the customer is this one. A row is a crowd: nobody, 20 clients of one
kind, 100 of all kinds, 1,000 idle connections at once. Every client comes again when its connection
is closed. The customer comes when the crowd is there, opens a job and tunes for 200 steps. Compared
with the job beside nobody: its losses, to the last bit, its predictions, its time a step, the
server's memory. Rows are kept and resumed as in `offsite.py`; results go to
benchmarks/results/hostile_clients-crowds.json and from there to docs/reliability.md (`readme.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / d) for d in (".", "split")]
from split_world import CONFIG, LABELS, TEXTS  # noqa: E402
from vendor_world import write_model  # noqa: E402

from blindtune.errors import NetworkError  # noqa: E402
from blindtune.exchange.wire.credentials import VendorTrust  # noqa: E402
from blindtune.exchange.wire.network import Connection  # noqa: E402
from blindtune.exchange.wire.resuming import RetryConfig  # noqa: E402
from blindtune.split.bottom import open_bottom  # noqa: E402
from blindtune.split.customer.private_states import privatize  # noqa: E402
from blindtune.split.customer.requests import PassConfig, new_token, open_job, predict, train  # noqa: E402
from blindtune.split.vendor.door import admit  # noqa: E402
from fault_processes import Injection, Launcher  # noqa: E402
from hostile_network import CUSTOMERS, KINDS  # noqa: E402
from rows import parse_options, run_rows  # noqa: E402

PROGRAM = Path(__file__).with_name("hostile_network.py")
HANDSHAKE_SECONDS, IDLE_SECONDS = 5, 10
OPTIONS = f"""
    --cut 1 --self-signed --port 0 --metrics-port 0 --json --grace-seconds 1
    --handshake-timeout-seconds {HANDSHAKE_SECONDS} --connection-idle-seconds {IDLE_SECONDS}
"""
RETRIES = RetryConfig(first_delay_seconds=0.05, longest_delay_seconds=1.0)
CLIENTS, ALL, IDLE = 20, 100, 1000
EPOCHS, SMOKE_EPOCHS = 100, 10
ALONE = "nobody"


class Vendor:
    """A server as a process, with a healthy customer and one who means harm.

    Args:
        folder: an empty directory.
        launcher: of the process.
    """

    def __init__(self, folder: Path, launcher: Launcher) -> None:
        self.folder, self._launcher = folder, launcher
        self.out, self.log = folder / "vendor", folder / "log.jsonl"
        self.tokens = {name: admit(name, self.out) for name in ("anna", "eve")}
        model = write_model(folder / "model")
        arguments = ["serve", model, "--out", self.out, *OPTIONS.split(), "--log-file", self.log]
        self._started = launcher.begin(arguments, Injection(folder=folder))
        told = self._started.line_with(b'"state": "serving"', 60.0)
        assert told is not None, self._started.text
        self.facts = json.loads(told)
        self.port = int(self.facts["addresses"][0].rpartition(":")[2])
        self.bottom = open_bottom(self.out / "bottom")

    def __enter__(self) -> Vendor:
        return self

    def __exit__(self, *_exception: object) -> None:
        """End it; it must end well."""
        ended = self._launcher.stop(self._started)
        assert ended.code == 0, ended.text

    def memory(self) -> tuple[float, float]:
        """MiB of memory now, and at most so far."""
        text = Path(f"/proc/{self._started.process.pid}/status").read_text()
        facts = dict(line.split(":", 1) for line in text.splitlines())
        return tuple(int(facts[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))

    def metrics(self) -> dict[str, float]:
        """What the server counts, by series."""
        import urllib.request

        with urllib.request.urlopen(self.facts["metrics"], timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    @contextmanager
    def crowd(self, clients: dict[str, int], idle: int = 0) -> Iterator[dict]:
        """Clients at work, so many of each kind; their endings are there afterwards."""
        endings: dict = {}
        asked = {
            "port": self.port, "certificate": str(self.out / "tls" / "certificate.pem"),
            "token": self.tokens["eve"], "clients": clients, "idle": idle,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            if idle:
                assert process.stdout.readline() == "open\n"
            else:
                time.sleep(0.5)
            yield endings
            told, _ = process.communicate(timeout=60)  # closes its stdin
            endings |= json.loads(told.splitlines()[-1])
        finally:
            process.kill()
            process.wait()

    def job(self, epochs: int) -> dict:
        """A job from its opening to predictions; opening is tried until there is room."""
        trust = VendorTrust(token=self.tokens["anna"], fingerprint=self.facts["fingerprint"])
        private = privatize(self.bottom, TEXTS, LABELS, mechanism=None)
        begun, tries, job = time.monotonic(), 0, None
        while job is None:
            tries += 1
            try:
                job = open_job(
                    lambda: Connection(self.facts["addresses"][0], trust), self.bottom,
                    new_token(), CONFIG, task="classification", outputs=2, retries=RETRIES,
                )  # fmt: skip
            except NetworkError:
                if tries > 100:
                    raise
                time.sleep(0.2)
        opened, moments = time.monotonic(), []
        losses = train(
            job, private, PassConfig(epochs=epochs, batch_size=5, checkpoint_steps=50),
            on_loss=lambda _loss: moments.append(time.monotonic()),
        )  # fmt: skip
        logits = predict(job, private, precision="float32").tolist()
        job.close()
        steps = sorted(b - a for a, b in zip([opened, *moments], moments, strict=False))
        return {
            "losses": losses, "logits": logits, "tries": tries, "opening_seconds": opened - begun,
            "seconds": moments[-1] - opened, "p50_seconds": steps[len(steps) // 2],
            "p99_seconds": steps[len(steps) * 99 // 100],
        }  # fmt: skip


def crowds(number: int = ALL) -> dict[str, tuple[dict[str, int], int]]:
    """Every crowd: clients by kind, and idle connections at once."""
    each = {f"{CLIENTS} x {kind}": ({kind: CLIENTS}, 0) for kind in KINDS}
    return {
        ALONE: ({}, 0),
        f"{number} of all kinds": ({k: number // len(KINDS) for k in KINDS}, 0),
        f"{IDLE} idle at once": ({}, IDLE),
        **each,
    }


def beside(vendor: Vendor, crowd: tuple[dict[str, int], int], epochs: int) -> dict:
    """A healthy job beside a crowd.

    Returns:
        as `Vendor.job`; memory_MiB: of the server, at most; grown_MiB: above what it was before;
        endings: of the crowd's connections, by kind; refused: calls that the server turned away.
    """
    before, _ = vendor.memory()
    clients, idle = crowd
    with vendor.crowd(clients, idle) as endings:
        row = vendor.job(epochs)
        metrics = vendor.metrics()
    _, most = vendor.memory()
    away = {name: value for name, value in metrics.items() if "turned_away_total" in name}
    return row | {
        "memory_MiB": most, "grown_MiB": most - before, "refused": int(sum(away.values())),
        "endings": endings, "log_bytes": vendor.log.stat().st_size,
    }  # fmt: skip


def main() -> None:
    """All crowds."""
    options = parse_options(__doc__, ["crowds"], data=False)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    launcher = Launcher(options.work / "home", ["blindtune.split.vendor.service"])
    epochs = SMOKE_EPOCHS if options.smoke else EPOCHS
    kept = options.work / f"alone-{epochs}.json"

    def run(folder, crowd):
        with Vendor(folder, launcher) as vendor:
            row = beside(vendor, crowd, epochs)
        result = {key: row.pop(key) for key in ("losses", "logits")}
        if not kept.exists():
            assert crowd == ({}, 0), f"run the row {ALONE!r} first"
            kept.write_text(json.dumps(result))
        return {
            "equal": result == json.loads(kept.read_text()),
            "steps": len(result["losses"]),
        } | row

    rows = [(name, lambda f, crowd=crowd: run(f, crowd)) for name, crowd in crowds().items()]
    run_rows(
        "hostile_clients", "crowds", rows, work=options.work, data=False, only=options.only,
        facts={"handshake_seconds": HANDSHAKE_SECONDS, "idle_seconds": IDLE_SECONDS,
               "with_token": list(CUSTOMERS)},
        fresh=options.fresh or not kept.exists(), smoke=options.smoke,
    )  # fmt: skip


if __name__ == "__main__":
    main()
