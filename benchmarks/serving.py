"""Split tuning over loopback TLS: speed against one process, bytes, waiting, many customers.

    python benchmarks/serving.py --data DIR --work DIR [--smoke] [network customers ...]

`blindtune serve` runs as a process, every customer as another; MiniLM, two-part, one thread each,
film reviews of SST-2 (sst2_train.jsonl in --data), 16 texts a batch, one batch a step. Rows are
kept and collected as `rows.py` says, into benchmarks/results/serving-PART.json.

network: the same tuning by direct calls in this process and over the network, in turns; the ratio
    is taken pair by pair. Time depends on what else the machine does; CPU seconds hardly do, and
    are given beside it. "waiting" is the share of the run in which the model had nothing to do.
customers: 1, 4 and 16 at once: tokens/s of all, time between a customer's steps, and memory.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import torch

from blindtune.exchange.wire.credentials import VendorTrust
from blindtune.exchange.wire.messages import Cancel, Hello, OpenJob, Status
from blindtune.exchange.wire.network import Connection
from blindtune.models.encoders import load_any
from blindtune.split.bottom import open_bottom
from blindtune.split.customer.labelled_text import read_labelled
from blindtune.split.customer.private_states import PrivateStates, privatize
from blindtune.split.customer.requests import PassConfig, new_token, open_job, train
from blindtune.split.partition import Cut, stack_of
from blindtune.split.terms import TuningConfig
from blindtune.split.vendor.door import admit
from blindtune.split.vendor.handler import Vendor
from blindtune.split.vendor.service import bottom
from rows import parse_options, run_parts

MODEL, BATCH, CONFIG = "minilm", 16, TuningConfig()
PAIRS = [(2, "float16"), (2, "int8"), (5, "float16")]
CUSTOMERS = (1, 4, 16)
FORK = multiprocessing.get_context("forkserver")


class Bench:
    """Where things are, and how much is done of everything."""

    def __init__(self, data, work, smoke):
        self.data, self.work, self.smoke = data, work, smoke

    def files(self, cut, batches):
        """The bottom package and private states at a cut, made once."""
        place = self.work / f"cut-{cut}"
        if not (place / "bottom").exists():
            bottom(MODEL, place / "bottom", cut)
        states = place / f"private-{batches}.safetensors"
        if not states.exists():
            learn = read_labelled(self.data / "sst2_train.jsonl")
            count = batches * BATCH
            made = privatize(
                open_bottom(place / "bottom"), learn.texts[:count], learn.labels_N[:count],
                mechanism=None,
            )  # fmt: skip
            made.save(states)
        return place / "bottom", states

    def network(self, cut, precision):
        """Direct calls and network in turns, on the same states."""

        def row(folder):
            batches, repeats = (4, 1) if self.smoke else (12, 3)
            package, states = self.files(cut, batches)
            plan = PassConfig(batch_size=BATCH, precision=precision, checkpoint_steps=1000)
            direct, over = [], []
            with served(folder / "vendor", package, cut) as service:
                for _ in range(repeats):
                    direct.append(in_one_process(folder / "direct", package, states, cut, plan))
                    over.append(customers(service, states, plan, 1))
            pairs = list(zip(over, direct, strict=True))
            return {
                "tokens": over[0]["tokens"],
                "direct_tokens_per_second": median(run["tokens_per_second"] for run in direct),
                "network_tokens_per_second": median(run["tokens_per_second"] for run in over),
                "ratio": median(n["tokens_per_second"] / d["tokens_per_second"] for n, d in pairs),
                "ratios": [n["tokens_per_second"] / d["tokens_per_second"] for n, d in pairs],
                "direct_cpu_seconds": median(run["cpu_seconds"] for run in direct),
                "vendor_cpu_seconds": median(run["vendor_cpu_seconds"] for run in over),
                "customer_cpu_seconds": median(run["customer_cpu_seconds"] for run in over),
                "bytes_a_token_to_vendor": over[0]["bytes_in"] / over[0]["tokens"],
                "bytes_a_token_to_customer": over[0]["bytes_out"] / over[0]["tokens"],
                "waiting": median(run["waiting"] for run in over),
                "load": os.getloadavg(),
            }

        return row

    def customers(self, count):
        """So many customers at once, each with a job of its own."""

        def row(folder):
            batches = 4 if self.smoke else max(4, 24 // count)
            package, states = self.files(2, batches)
            plan = PassConfig(batch_size=BATCH, checkpoint_steps=1000)
            with served(folder / "vendor", package, 2) as service:
                before = memory(service["pid"])
                found = customers(service, states, plan, count)
                after = memory(service["pid"])
            return {
                **found,
                "memory_bytes_before": before,
                "memory_bytes_after": after,
                "load": os.getloadavg(),
            }

        return row


class Direct:
    """Requests go to the vendor as they are: no frames, no network."""

    def __init__(self, handler):
        self.call = handler

    def submit(self, message):
        future = Future()
        future.set_result(self.call(message))
        return future


def in_one_process(folder, package, states, cut, plan):
    """The same tuning in this process."""
    stack = stack_of(load_any(MODEL)[0])
    bottom_id = open_bottom(package).id
    vendor = Vendor(stack, Cut(layers=stack.layer_count, cut=cut), bottom_id, folder)
    private = PrivateStates.load(states)
    opening = OpenJob(
        token=new_token(), partition="two-part", cut=cut, bottom=bottom_id,
        options=CONFIG.options(), task="classification", outputs=2,
    )  # fmt: skip
    with vendor.session("direct") as handler:
        handler(Hello(program="benchmark"))
        handler(opening)
        begin, cpu = time.perf_counter(), time.process_time()
        train(Direct(handler), private, plan)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        handler(Cancel())
    tokens = sum(map(len, private.states)) * plan.epochs
    return {"tokens_per_second": tokens / seconds, "cpu_seconds": cpu}


@contextmanager
def served(folder, package, cut):
    """`blindtune serve` as a process; what it says of itself, and its process id."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "blindtune.cli.main", "serve", MODEL, "--cut", str(cut)]
    command += ["--out", str(folder), "--self-signed", "--port", "0", "--metrics-port", "0"]
    command += ["--log-file", str(folder.parent / "log.jsonl"), "--threads", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        facts = json.loads(process.stdout.readline())
        assert facts["bottom_id"] == open_bottom(package).id
        yield facts | {"pid": process.pid, "vendor": str(folder)}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def customers(service, states, plan, count):
    """Customers as processes that begin at one moment; what they and the vendor saw."""
    barrier, results = FORK.Barrier(count + 1), FORK.SimpleQueue()
    processes = []
    for number in range(count):
        token = admit(f"customer {number}", service["vendor"])
        arguments = (service, states, plan, token, barrier, results)
        processes.append(FORK.Process(target=customer, args=arguments))
        processes[-1].start()
    while barrier.n_waiting < count:
        time.sleep(0.01)
    before, cpu, begin = metrics(service), cpu_seconds(service["pid"]), time.perf_counter()
    barrier.wait(300)
    found = [results.get() for _ in range(count)]
    wall = time.perf_counter() - begin
    cpu = cpu_seconds(service["pid"]) - cpu
    after = metrics(service)
    for process in processes:
        process.join()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    worked = sum(value for name, value in grown.items() if name.startswith("work_seconds_sum"))
    gaps = [gap for result in found for gap in result["gaps"]]
    tokens = sum(result["tokens"] for result in found)
    return {
        "customers": count,
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "step_seconds_p50": median(gaps),
        "step_seconds_p99": quantiles(gaps, n=100)[98],
        "waiting": 1 - worked / wall,
        "bytes_in": grown['bytes_total{direction="in"}'],
        "bytes_out": grown['bytes_total{direction="out"}'],
        "vendor_cpu_seconds": cpu,
        "customer_cpu_seconds": sum(result["cpu_seconds"] for result in found),
    }


def customer(service, states, plan, token, barrier, results):
    """One customer, in a process of its own."""
    torch.set_num_threads(1)
    trust = VendorTrust(token=token, fingerprint=service["fingerprint"])
    private = PrivateStates.load(states)
    job = open_job(
        lambda: Connection(service["addresses"][0], trust), open_bottom(service["bottom"]),
        new_token(), CONFIG, task="classification", outputs=2,
    )  # fmt: skip
    job.call(Status())
    times = []
    barrier.wait(300)
    cpu = time.process_time()
    train(job, private, plan, on_loss=lambda _loss: times.append(time.perf_counter()))
    results.put(
        {
            "tokens": sum(map(len, private.states)) * plan.epochs,
            "gaps": [later - earlier for earlier, later in pairwise(times)],
            "cpu_seconds": time.process_time() - cpu,
        }
    )
    job.close()


def metrics(service):
    """Every series of the vendor's metrics, without the common beginning of the names."""
    with urllib.request.urlopen(service["metrics"], timeout=10) as page:
        lines = page.read().decode().splitlines()
    pairs = [line.rpartition(" ")[::2] for line in lines if not line.startswith("#")]
    return {name.removeprefix("blindtune_"): float(value) for name, value in pairs}


def memory(pid):
    """Bytes that a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def cpu_seconds(pid):
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    """Run the parts that were asked for."""
    options = parse_options(__doc__, ("network", "customers"))
    torch.set_num_threads(1)
    FORK.set_forkserver_preload(
        ["blindtune.split.customer.requests", "blindtune.exchange.wire.network", "grpc"]
    )
    bench = Bench(options.data, options.work, options.smoke)
    counts = (1, 2) if options.smoke else CUSTOMERS
    parts = {
        "network": [(f"cut {cut}, {precision}", bench.network(cut, precision))
                    for cut, precision in PAIRS],
        "customers": [(f"{count} at once", bench.customers(count)) for count in counts],
    }  # fmt: skip
    run_parts("serving", options, parts.get, facts={"model": MODEL, "batch": BATCH})


if __name__ == "__main__":
    main()
