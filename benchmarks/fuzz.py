"""Fuzzing of everything that reads bytes of others: packages, signatures, headers, frames, files.

    python benchmarks/fuzz.py --minutes 10                 # goes on where the last run stopped
    python benchmarks/fuzz.py --reproduce frame:123456     # one execution again, with its traceback
    python benchmarks/fuzz.py --engine atheris --target manifest --minutes 5   # guided by coverage

Execution number i of a target always is the same input: its random numbers come from (target, i).
The results go into benchmarks/results/fuzz.json: how many executions, how many were refused, what
crashed, the longest execution, and the most memory that one took. The program ends with code 1 if
anything crashed, took longer than SECONDS, needed more than MEMORY_BYTES, or was accepted that must
not be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

from blindtune.errors import BlindtuneError
from fuzz_targets import FORBIDDEN, WORDS, Target, make_targets

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SECONDS = 5
"""Longer than that is called a hang."""
MEMORY_BYTES = 64 << 20
"""More than that for one small input is called a flood."""
BATCH = 100
"""Executions between two looks at the memory."""
_MAX_INPUT = 64 << 10


def mutate(seeds, draw: random.Random) -> bytes:
    """A seed with one to eight changes."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice([1, 1, 1, 2, 2, 4, 8])):
        draw.choice(_CHANGES)(data, seeds, draw)
    return bytes(data[:_MAX_INPUT])


def _spot(data: bytearray, draw: random.Random) -> int:
    return draw.randrange(len(data)) if data else 0


def _flip(data, seeds, draw) -> None:
    if data:
        data[_spot(data, draw)] ^= 1 << draw.randrange(8)


def _set_byte(data, seeds, draw) -> None:
    if data:
        data[_spot(data, draw)] = draw.randrange(256)


def _digit(data, seeds, draw) -> None:
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if places:
        data[draw.choice(places)] = 48 + draw.randrange(10)


def _word(data, seeds, draw) -> None:
    begin = _spot(data, draw)
    data[begin : begin + draw.choice([0, 0, 1, 4])] = draw.choice(WORDS)


def _number(data, seeds, draw) -> None:
    """A telling integer over 1, 2, 4 or 8 bytes."""
    form = draw.choice(["<B", "<H", "<I", "<Q"])
    size = struct.calcsize(form)
    value = draw.choice([0, 1, 7, 8, 255, 1 << 15, 1 << 31, 1 << 40, (1 << 64) - 1])
    begin = _spot(data, draw)
    data[begin : begin + size] = struct.pack(form, value % (1 << 8 * size))


def _cut(data, seeds, draw) -> None:
    del data[_spot(data, draw) :]


def _remove(data, seeds, draw) -> None:
    begin = _spot(data, draw)
    del data[begin : begin + draw.choice([1, 2, 8, 64])]


def _repeat(data, seeds, draw) -> None:
    begin = _spot(data, draw)
    part = data[begin : begin + draw.choice([1, 8, 64, 512])]
    data[begin:begin] = part * draw.choice([1, 1, 2, 30])


def _splice(data, seeds, draw) -> None:
    other = draw.choice(seeds)
    data[_spot(data, draw) :] = other[draw.randrange(len(other)) :]


_CHANGES: tuple[Callable[..., None], ...] = (
    _flip, _flip, _set_byte, _digit, _word, _word, _number, _cut, _remove, _repeat, _splice,
)  # fmt: skip


class Hang(BaseException):
    """One execution took longer than SECONDS."""


def execute(target: Target, data: bytes) -> tuple[bool, str | None]:
    """Run one input: whether it was refused, and what went wrong, if anything."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.run(data)
    except BlindtuneError:
        return True, None
    except (Exception, Hang) as error:
        return False, f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False, "accepted" if target.policy == FORBIDDEN else None


def make_input(target: Target, number: int) -> bytes:
    """The input of this number."""
    draw = random.Random(f"{target.name} {number}")
    return target.repair(mutate(target.seeds, draw), draw)


def run_batch(target: Target, record: dict) -> None:
    """The next BATCH executions of a target, and what they needed."""
    before = _resident(reset=True)
    for number in range(record["executions"], record["executions"] + BATCH):
        begin = time.perf_counter()
        refused, problem = execute(target, make_input(target, number))
        seconds = time.perf_counter() - begin
        record["refused"] += refused
        record["longest_seconds"] = max(record["longest_seconds"], round(seconds, 4))
        if problem is None and seconds > SECONDS:  # in a library that no signal interrupts
            problem = f"Hang: {seconds:.1f} s"
        if problem is not None:
            record["problems"].append({"number": number, "what": problem})
    record["executions"] += BATCH
    more = max(0, _resident() - before)
    record["most_memory_bytes"] = max(record["most_memory_bytes"], more)
    if more > MEMORY_BYTES:
        last = record["executions"]
        what = f"{more} bytes of memory within {BATCH} executions"
        record["problems"].append({"number": last - BATCH, "what": what})


def _resident(*, reset: bool = False) -> int:
    """Bytes of resident memory at its peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _limit_memory() -> None:
    """Beyond a GiB more than now, every allocation fails, so that a flood is a crash."""
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(status.split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), resource.RLIM_INFINITY))


def empty_record() -> dict:
    """Nothing was run yet."""
    return {
        "executions": 0, "refused": 0, "longest_seconds": 0.0, "most_memory_bytes": 0,
        "problems": [],
    }  # fmt: skip


def fuzz(targets: list[Target], seconds: float, results: Path, most: int | None = None) -> dict:
    """Run all targets in turn for some time; results are kept every few seconds."""
    saved = json.loads(results.read_text()) if results.exists() else {}
    records = {t.name: saved.get("targets", {}).get(t.name) or empty_record() for t in targets}
    report = {**saved, "targets": {**saved.get("targets", {}), **records}}
    begin = last = time.monotonic()
    before, count = saved.get("seconds", 0.0), 0
    while time.monotonic() - begin < seconds and (most is None or count < most):
        for target in targets:
            run_batch(target, records[target.name])
            count += BATCH
        report["seconds"] = round(before + time.monotonic() - begin, 1)
        if time.monotonic() - last > 10:
            save(report, results)
            last = time.monotonic()
    save(report, results)
    return report


def save(report: dict, results: Path) -> None:
    """Sums and everything, in place of the old file."""
    records = report["targets"].values()
    report["executions"] = sum(r["executions"] for r in records)
    report["problems"] = sum(len(r["problems"]) for r in records)
    report["bounds"] = {"seconds": SECONDS, "memory_bytes": MEMORY_BYTES}
    partial = results.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    partial.replace(results)


def guided(target: Target, seconds: float, results: Path) -> None:
    """The same target under atheris, guided by the coverage of this project's own code."""
    import atheris

    saved = json.loads(results.read_text()) if results.exists() else {"targets": {}}
    name = f"{target.name} (atheris)"
    record = saved["targets"].setdefault(name, empty_record())

    def one(data: bytes) -> None:
        refused, problem = execute(target, data)
        record["executions"] += 1
        record["refused"] += refused
        if problem is not None:
            record["problems"].append({"input": data.hex(), "what": problem})
        if record["executions"] % 2000 == 0 or problem is not None:
            save(saved, results)

    for module in [m for name, m in sys.modules.items() if name.startswith("blindtune.")]:
        for function in [f for f in vars(module).values() if isinstance(f, FunctionType)]:
            if function.__module__ == module.__name__:
                atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as corpus, tempfile.NamedTemporaryFile("w") as words:
        for i, seed in enumerate(target.seeds):
            (Path(corpus) / str(i)).write_bytes(seed)
        for word in WORDS:
            if 0 < len(word) < 100:
                words.write('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n')
        words.flush()
        options = [f"-max_total_time={seconds:.0f}", "-verbosity=0", f"-dict={words.name}"]
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


@contextlib.contextmanager
def work_place() -> Iterator[Path]:
    """A directory in memory, if there is such a place."""
    shared = Path("/dev/shm")
    memory = str(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        yield Path(place)


def _alarm(*_: object) -> None:
    raise Hang(f"more than {SECONDS} s")


def main() -> int:
    """Parse options, fuzz, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--reproduce", metavar="TARGET:NUMBER")
    parser.add_argument("--engine", choices=["mutation", "atheris"], default="mutation")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    with work_place() as place:
        targets = make_targets(place)
        if options.reproduce:
            name, _, number = options.reproduce.rpartition(":")
            target = next(t for t in targets if t.name == name)
            data = make_input(target, int(number))
            print(data[:2000])
            try:
                target.run(data)
            except BaseException:
                traceback.print_exc()
            return 0
        targets = [t for t in targets if not options.target or t.name in options.target]
        if options.engine == "atheris":
            guided(targets[0], options.minutes * 60, options.results)
            return 0
        _limit_memory()
        report = fuzz(targets, options.minutes * 60, options.results)
    print(f"{report['executions']:,} executions in all, {report['problems']} problems")
    for name, record in report["targets"].items():
        print(
            f"  {name}: {record['executions']:,}, {record['refused']:,} refused, longest "
            f"{record['longest_seconds']} s, most memory {record['most_memory_bytes']:,} B"
        )
        for problem in record["problems"][:5]:
            print(f"    {problem}")
    return int(report["problems"] > 0)


if __name__ == "__main__":
    sys.exit(main())
