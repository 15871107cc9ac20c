"""A vendor and a customer that are killed, or whose disk is full: the job ends as if undisturbed.

    python benchmarks/fault_service.py --work DIR --count 100 --seed 1

`serve` and `split-tune` run as processes of their own, on a tiny model. Whoever is killed is
started again with the same command. Compared with an undisturbed job, as in `fault_proxy`: every
file in the customer's directory but its secrets, and the vendor's last checkpoint, tensor by
tensor. No half-written file may stay on either side.

Vendor and customer are killed at random moments (SIGKILL, three in a row), or refused by their
disk: making and opening files fails from a random write on (ENOSPC), or no file may grow beyond a
random size (RLIMIT_FSIZE); the one with the full disk is then started again with room.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import shutil
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / d) for d in (".", "split")]
from fault_processes import Injection, Launcher, Started, Tally  # noqa: E402

VENDOR, CUSTOMER = "vendor", "customer"
FAULTS = ("vendor killed", "customer killed", "both killed", "vendor's disk full",
          "customer's disk full", "vendor's file cut short", "customer's file cut short",
          "customer twice at once")  # fmt: skip
LIVES = 3
"""Kills in a row."""
SERVING = b'"state": "serving"'
WAIT_SECONDS = 60.0
QUICK = """
    --lora-rank 2 --learning-rate 1e-2 --seed 3 --epochs 30 --batch-size 4 --accumulate 2
    --checkpoint-steps 2 --privatizer none --unprotected --give-up-after-seconds 60
"""


class Sides:
    """Files of both parties, and the processes that work on them.

    Args:
        folder: an empty directory.
    """

    def __init__(self, folder: Path) -> None:
        from customer_world import write_table
        from vendor_world import write_model

        self.folder = folder.absolute()
        self.place = self.folder / "place"
        self.launcher = Launcher(self.folder / "home", ["blindtune.split.vendor.service"])
        self.model = write_model(self.folder / "model")
        self.data = write_table(self.folder / "train.csv")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.place.mkdir()
        with self._serving():
            admitted = self.launcher.run(
                ["admit", "anna", "--out", self.place / "vendor", "--token-file",
                 self.folder / "token"], Injection(folder=self.place),
            )  # fmt: skip
            assert admitted.code == 0, admitted.text
        shutil.copytree(self.place / "vendor", self.folder / "fresh")
        with self.fresh_place(), self._serving():
            begin = time.perf_counter()
            ended = self.launcher.end(self.tune())
            assert ended.code == 0, ended.text
            self.seconds, self.writes = time.perf_counter() - begin, ended.writes
        self.calm = self.result()

    @contextmanager
    def fresh_place(self):
        """The directory of both parties, as before any job; always the same one."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.folder / "fresh", self.place / "vendor")
        yield

    def serve(self, **injection) -> Started:
        """Start the vendor."""
        options = f"--cut 1 --self-signed --port {self.port} --retry-after-seconds 0.01 --json"
        arguments = ["serve", self.model, "--out", self.place / "vendor", *options.split()]
        return self.launcher.begin(arguments, Injection(folder=self.place, **injection))

    def tune(self, **injection) -> Started:
        """Start the customer."""
        arguments = [
            "split-tune", self.facts["addresses"][0], "--fingerprint", self.facts["fingerprint"],
            "--token-file", self.folder / "token", "--bottom", self.folder / "fresh" / "bottom",
            "--data", self.data, "--out", self.place / "job", *QUICK.split(),
        ]  # fmt: skip
        return self.launcher.begin(arguments, Injection(folder=self.place, **injection))

    @contextmanager
    def _serving(self):
        vendor = self.serve()
        try:
            self.facts = json.loads(vendor.line_with(SERVING, WAIT_SECONDS))
            yield
        finally:
            self.vendor_writes = self.launcher.stop(vendor).writes

    def result(self) -> dict:
        """What a job has left at both parties, without names and secrets drawn anew each time."""
        from blindtune.split.vendor.store import JobStore
        from fault_proxy import nameless, own_files

        (job,) = (self.place / "vendor" / "jobs").glob("job_*")
        mark = (self.place / "vendor" / "bottom.sha256").read_text()
        store = JobStore(self.place / "vendor", mark)
        states = store.states(job.name)
        number = states.numbers()[-1]
        vendor = nameless(states.load(number), job.name)
        return {"vendor": vendor, "customer": own_files(self.place / "job"), "last": number}

    def left(self) -> list[str]:
        """Half-written files."""
        return [str(p.relative_to(self.place)) for p in self.place.rglob("*.partial")]


class Trial(Tally):
    """One fault, again and again."""

    def __init__(self, sides: Sides, fault: str, draw: random.Random) -> None:
        super().__init__()
        self.sides, self.fault, self.draw = sides, fault, draw

    def once(self) -> None:
        """A fresh place, the fault, both parties again until the job is done, and a look."""
        from fault_proxy import same

        with self.sides.fresh_place():
            if "killed" in self.fault:
                ended = self._kills()
            elif "twice" in self.fault:
                ended = self._twice()
            else:
                ended = self._full_disk(*self.fault.split("'s "))
            if ended.code != 0:
                self.note(f"the customer ended with {ended.code}: {ended.text[-2000:]}")
                return
            left = self.sides.left()  # before the vendor's files are opened, which tidies them
            found = self.sides.result()
            for key, wanted in self.sides.calm.items():
                if not same(found[key], wanted):
                    self.note(f"{key}: other values")
            if left:
                self.note(f"left: {left}")

    def _kills(self):
        sides = self.sides
        running = {VENDOR: sides.serve(), CUSTOMER: sides.tune()}
        start = {VENDOR: sides.serve, CUSTOMER: sides.tune}
        victims = (VENDOR, CUSTOMER) if "both" in self.fault else (self.fault.split()[0],)
        for _ in range(LIVES):
            time.sleep(self.draw.uniform(0, sides.seconds / 2))
            for victim in victims:
                killed = sides.launcher.kill(running[victim]).code is None
                self.injected += killed
                self.stopped += killed
                running[victim] = start[victim]()
        ended = sides.launcher.end(running[CUSTOMER])
        if ended.code == 5:  # it had given up while nobody was there: the same command goes on
            running[VENDOR].line_with(SERVING, WAIT_SECONDS)
            ended = sides.launcher.end(sides.tune())
        sides.launcher.stop(running[VENDOR])
        return ended

    def _full_disk(self, whose: str, what: str):
        sides, draw = self.sides, self.draw
        if what == "disk full":
            most = sides.writes if whose == CUSTOMER else sides.vendor_writes
            refusal = {"kind": "refuse", "at": draw.randint(1, most), "number": errno.ENOSPC}
        else:
            refusal = {"kind": "short", "at": int(2 ** draw.uniform(8, 16))}
        vendor = sides.serve(**refusal if whose == VENDOR else {})
        if vendor.line_with(SERVING, WAIT_SECONDS) is None:  # it could not even begin
            self._refused(sides.launcher.end(vendor))
            vendor = None
        else:
            customer = sides.tune(**refusal if whose == CUSTOMER else {})
            self._refused(sides.launcher.end(customer))
        if whose == VENDOR and vendor is not None:
            sides.launcher.stop(vendor)
            vendor = None
        vendor = vendor or sides.serve()
        vendor.line_with(SERVING, WAIT_SECONDS)
        ended = sides.launcher.end(sides.tune())
        sides.launcher.stop(vendor)
        return ended

    def _refused(self, ended) -> None:
        """It ended with one line that says what to do, or the fault hit nothing that mattered."""
        self.injected += 1
        if ended.code == 0:
            return
        self.stopped += 1
        lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
        if ended.code not in (2, 4, 5) or len(lines) != 1 or "Traceback" in ended.text:
            self.note(f"refused with {ended.code}: {ended.text[-2000:]}")

    def _twice(self):
        sides = self.sides
        vendor = sides.serve()
        vendor.line_with(SERVING, WAIT_SECONDS)
        first = sides.tune()
        time.sleep(self.draw.uniform(0, sides.seconds))
        second = sides.tune()
        ended = [sides.launcher.end(started) for started in (first, second)]
        self.injected += 1
        self.stopped += max(e.code for e in ended) > 0
        if sorted(e.code for e in ended) not in ([0, 0], [0, 2]):
            self.note(f"two at once: {[(e.code, e.text[-500:]) for e in ended]}")
        sides.launcher.stop(vendor)
        return min(ended, key=lambda e: e.code)


def try_out(sides: Sides, fault: str, count: int, seed: int) -> dict:
    """A fault, until it was injected so often; as `fault_processes.try_out`."""
    trial = Trial(sides, fault, random.Random(f"{fault} {seed}"))
    while trial.injected < count:
        trial.once()
    return trial.row()


def main() -> None:
    """Every fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="default: all")
    parser.add_argument("--count", type=int, default=5, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    sides = Sides(options.work)
    print(f"a job: {sides.seconds:.1f} s, {sides.writes} writes of the customer", flush=True)
    for fault in options.fault or FAULTS:
        print(fault, json.dumps(try_out(sides, fault, options.count, options.seed)), flush=True)


if __name__ == "__main__":
    main()
