"""Commands that are killed, disks that refuse: run again, they must end as if undisturbed.

    python benchmarks/fault_processes.py --work DIR --count 100 --seed 1

A verb runs in a process of its own, on a tiny model. Its faults:

- "killed at a write": SIGKILL before the n-th time that it opens a file for writing, makes,
  renames or removes one; n goes over all of them.
- "killed at random": SIGKILL at a random moment, three times in a row, each time the next life.
- "killed while replacing": as at a write, with an earlier, larger output that --overwrite replaces.
- "disk full at a write": from the n-th time on, making and opening files fails with ENOSPC.
- "file cut short": no file may grow beyond a random size (RLIMIT_FSIZE).
- "read-only": every write fails with EROFS.
- "two at once": the same command twice at the same time.
- "clock jumps": every few readings of the clock, it is off by up to ten years.

After a fault nothing half-written may stand under a final name, and a refusal must be one line
that says what to do. Then the command is run again: every file must be as an undisturbed run
leaves it, byte for byte (seconds, memory and the like that are noted in them aside), with nothing
else beside them.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / d) for d in ("cli", ".")]

FAULTS = (
    "killed at a write", "killed at random", "killed while replacing", "disk full at a write",
    "file cut short", "read-only", "two at once", "clock jumps",
)  # fmt: skip
MADE = {"study": "study", "emulate": "emulator", "tune": "adapter", "plug-in": "tuned"}
VERBS = tuple(MADE)
NOTE = "out.done.json"
WRITES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"})
MAKES = frozenset({"open", "os.mkdir"})
TEN_YEARS = 10 * 365 * 86_400.0
LONGER = 1.2
"""The horizon of kills at random grows by this with every life that was still going on."""
LIVES = 3
"""Lives in a row that are cut short at random."""
_OF_THIS_RUN = ("seconds", "wall_seconds", "tokens_per_second", "peak_memory_bytes", "resumed_from")
_NOTED = re.compile(
    '"({}|output)": ?({{[^}}]*}}|[^,}}\n]*)'.format("|".join(_OF_THIS_RUN)).encode()
)
"""What a result's JSON tells of the run that made it; "output" is a hash that such facts are in."""


# In the process of the verb.


@dataclass(frozen=True, kw_only=True)
class Injection:
    """What happens to a process.

    Args:
        folder: only writes below it count.
        kind: one of "nothing", "kill", "refuse", "short", "clock".
        at: the write that it begins with, from 1; of "short" a number of bytes.
        number: the error of the operating system, of "refuse".
    """

    folder: Path
    kind: str = "nothing"
    at: int = 0
    number: int = 0
    seed: int = 0


def life(arguments: list[str], home: Path, injection: Injection, report, output) -> None:
    """Run a command line; reports its exit code and how often it wrote."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    os.environ["BLINDTUNE_HOME"] = str(home)
    from blindtune.cli.main import run

    writes = watch(injection)
    if injection.kind == "short":
        resource.setrlimit(resource.RLIMIT_FSIZE, (injection.at, injection.at))
    if injection.kind == "clock":
        jump_about(injection.seed)
    code = run(arguments)
    sys.stdout.flush()
    report.send((code, writes[0]))


def watch(injection: Injection) -> list[int]:
    """Count the writes of this process; the fault comes with the one that it is due at."""
    count = [0]

    def hook(event: str, args: tuple) -> None:
        if not writes(event, args, injection.folder):
            return
        count[0] += 1
        if count[0] < injection.at:
            return
        if injection.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if injection.kind == "refuse" and (event in MAKES or injection.number == errno.EROFS):
            raise OSError(injection.number, os.strerror(injection.number), str(args[0]))

    sys.addaudithook(hook)
    return count


def writes(event: str, args: tuple, folder: Path) -> bool:
    """Whether an audit event changes something below a folder."""
    if event == "open":
        name, _, flags = args
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in WRITES:
        name = args[0]
        if args[-1] not in (-1, None) and not Path(os.fsdecode(name)).is_absolute():
            return True  # by a handle of its directory, as `shutil.rmtree` does
    else:
        return False
    return not isinstance(name, int) and os.fsdecode(name).startswith(str(folder))


def jump_about(seed: int) -> None:
    """A wall clock that somebody keeps setting."""
    draw, true, state = random.Random(seed), time.time, [0.0, 0]

    def read() -> float:
        state[1] -= 1
        if state[1] < 0:
            state[:] = draw.uniform(-TEN_YEARS, TEN_YEARS), draw.randint(0, 5)
        return true() + state[0]

    time.time = read
    time.time_ns = lambda: int(read() * 1e9)


# In the process of the harness.


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (None: killed), what it printed, how often it wrote."""

    code: int | None
    text: str
    writes: int
    seconds: float


@dataclass
class Started:
    """A process that runs, and what it has printed so far."""

    process: multiprocessing.Process
    answer: Connection
    printed: Connection
    start: float
    text: bytes = b""

    def read(self) -> bool:
        """Wait for more; False when there is no more."""
        part = os.read(self.printed.fileno(), 65_536)
        self.text += part
        return bool(part)

    def line_with(self, words: bytes, seconds: float) -> bytes | None:
        """Its first line with these words, or None if it ends without one."""
        limit = time.monotonic() + seconds
        while True:
            for line in self.text.splitlines(keepends=True):
                if words in line and line.endswith(b"\n"):
                    return line
            if not self.printed.poll(max(0.0, limit - time.monotonic())) or not self.read():
                return None


class Launcher:
    """Runs command lines in processes of their own, which begin in a moment.

    Args:
        home: of their keys.
        modules: imported once, for all of them.
    """

    def __init__(self, home: Path, modules: list[str]) -> None:
        self._home = home
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(modules)

    def begin(self, arguments: list, injection: Injection) -> Started:
        """Start a process; `end` waits for it."""
        answer, report = self._context.Pipe(duplex=False)
        printed, output = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=life, args=([*map(str, arguments)], self._home, injection, report, output)
        )
        process.start()
        report.close()
        output.close()
        return Started(process, answer, printed, time.perf_counter())

    def end(self, started: Started) -> Ended:
        """Wait until a process is over."""
        while started.read():
            pass
        started.process.join()
        seconds = time.perf_counter() - started.start
        try:
            code, count = started.answer.recv()
        except EOFError:
            code, count = None, 0
        return Ended(code, started.text.decode(errors="replace"), count, seconds)

    def run(self, arguments: list, injection: Injection) -> Ended:
        """A process from beginning to end."""
        return self.end(self.begin(arguments, injection))

    def kill(self, started: Started) -> Ended:
        """SIGKILL, unless it is over already."""
        started.process.kill()
        return self.end(started)

    def stop(self, started: Started) -> Ended:
        """End it in good order."""
        started.process.terminate()
        return self.end(started)


@dataclass
class Verb:
    """A command line, and what it leaves undisturbed.

    Attributes:
        final: the names beside the output that stand there in the end.
    """

    name: str
    arguments: list[str]
    files: dict[str, str] = field(default_factory=dict)
    writes: int = 0
    seconds: float = 0.0


class World:
    """A tiny model, both parties' files, and the verbs of the offsite protocol.

    Args:
        folder: an empty directory.
    """

    def __init__(self, folder: Path) -> None:
        from command_line import STUDY_OPTIONS, TUNE_OPTIONS, write_files

        self.folder = folder.absolute()
        self.place = self.folder / "place"
        modules = ["blindtune.offsite", "blindtune.training.trainer"]
        self.launcher = Launcher(self.folder / "home", modules)
        write_files(folder)
        path = {
            name: str(self.folder / name)
            for name in ("llama", "study", "emulator", "adapter", "public.txt", "private.jsonl")
        }
        steps = ["--dynamic-steps", "4"]
        tuning = ["--save-steps", "1", "--max-steps", "6"]
        self.verbs = [
            Verb("study", ["study", path["llama"], "--data", path["public.txt"],
                           *STUDY_OPTIONS, *steps]),
            Verb("emulate", ["emulate", path["study"]]),
            Verb("tune", ["tune", path["emulator"], "--data", path["private.jsonl"],
                          *TUNE_OPTIONS, *tuning]),
            Verb("plug-in", ["plug-in", path["llama"], path["adapter"]]),
        ]  # fmt: skip
        for verb in self.verbs:
            self._calm(verb)

    def made(self, verb: Verb) -> Path:
        """What a verb made undisturbed."""
        return self.folder / MADE[verb.name]

    def _calm(self, verb: Verb) -> None:
        """Run a verb undisturbed, note what it leaves, and keep it for the next one."""
        with self.empty_place():
            ended = self.run(verb, Injection(folder=self.place))
            assert ended.code == 0, ended.text
            verb.files, verb.writes, verb.seconds = self.left(), ended.writes, ended.seconds
            shutil.copytree(self.place / "out", self.made(verb))
            shutil.copy(self.place / NOTE, self.folder / f"{verb.name}.{NOTE}")

    @contextmanager
    def empty_place(self) -> Iterator[Path]:
        """The directory in which a command puts its output, empty; always the same one."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        yield self.place

    def begin(self, verb: Verb, injection: Injection, *more: str) -> Started:
        """Start a verb, with more options; `end` waits for it."""
        arguments = [*verb.arguments, "--out", self.place / "out", *more]
        return self.launcher.begin(arguments, injection)

    def end(self, started: Started) -> Ended:
        """What became of it."""
        return self.launcher.end(started)

    def run(self, verb: Verb, injection: Injection, *more: str) -> Ended:
        """A verb from beginning to end."""
        return self.end(self.begin(verb, injection, *more))

    def left(self) -> dict[str, str]:
        """sha256 of every file in the place, without what is noted of the run, by its name."""
        return {
            str(path.relative_to(self.place)): hashlib.sha256(content(path)).hexdigest()
            for path in sorted(self.place.rglob("*"))
            if path.is_file()
        }


def content(path: Path) -> bytes:
    """The bytes of a file, without what is noted of the run."""
    found = path.read_bytes()
    return _NOTED.sub(rb"\1", found) if path.suffix == ".json" else found


class Tally:
    """What came of one fault so far.

    Attributes:
        injected: faults so far.
        stopped: of them, those that ended the command.
        different: what was not as it should be.
    """

    def __init__(self) -> None:
        self.injected, self.stopped, self.different = 0, 0, []

    def note(self, what: str) -> None:
        """Something is not as it should be."""
        self.different.append(f"{self.injected}: {what}")

    def row(self) -> dict:
        """What came of it."""
        return {
            "injected": self.injected,
            "stopped": self.stopped,
            "equal": not self.different,
            "different": self.different,
        }


class Trial(Tally):
    """One verb under one fault, again and again."""

    def __init__(self, world: World, verb: Verb, fault: str, draw: random.Random) -> None:
        self.world, self.verb, self.fault, self.draw = world, verb, fault, draw
        super().__init__()
        self.more: tuple[str, ...] = ()
        self.horizon = verb.seconds
        """How long the verb takes, at the machine's load of now."""
        self._turn = 0

    def once(self) -> None:
        """An empty place, the fault, the same command again, and a look at everything."""
        with self.world.empty_place():
            ACTS[self.fault](self)
            again = self.world.run(self.verb, self.injection(), *self.more)
            if again.code != 0:
                self.note(f"the command again ended with {again.code}: {again.text[-2000:]}")
            self.compare()

    def compare(self) -> None:
        """Every file is as an undisturbed run leaves it, and there is no other one."""
        left, wanted = self.world.left(), self.verb.files
        for name in sorted(left.keys() | wanted.keys()):
            if name not in left:
                self.note(f"{name}: missing")
            elif name not in wanted:
                self.note(f"{name}: left")
            elif left[name] != wanted[name]:
                self.note(f"{name}: other bytes")

    def injection(self, **settings) -> Injection:
        """Of the place."""
        return Injection(folder=self.world.place, **settings)

    def next_write(self) -> int:
        """The next write of the verb to have its turn, all of them in a random order."""
        if self._turn % self.verb.writes == 0:
            self._order = self.draw.sample(range(1, self.verb.writes + 1), self.verb.writes)
        self._turn += 1
        return self._order[(self._turn - 1) % self.verb.writes]

    def half_written(self, earlier: dict[str, str] | None = None) -> None:
        """Under a final name there is nothing, or all of it; or all of what was there before."""
        wanted = {n: f for n, f in self.verb.files.items() if n.startswith("out/")}
        found = {n: f for n, f in self.world.left().items() if n.startswith("out/")}
        if found and found not in (wanted, earlier):
            self.note(f"half-written: {sorted(found)}")

    def refused(self, ended: Ended, *words: str) -> None:
        """It ended with one line that says what to do."""
        self.injected += 1
        lines = [line for line in ended.text.splitlines() if line.startswith("error: ")]
        if ended.code == 0:  # the fault hit nothing that mattered
            return
        self.stopped += 1
        if ended.code != 2 or len(lines) != 1 or "Traceback" in ended.text:
            self.note(f"refused with {ended.code}: {ended.text[-2000:]}")
        elif words and not any(word in lines[0].lower() for word in words):
            self.note(f"says: {lines[0]}")
        self.half_written()
        hidden = [name for name in self.world.left() if re.search(r"(^|/)\.", name)]
        if hidden and self.fault != "read-only":
            self.note(f"left behind: {hidden}")


def killed_at_a_write(trial: Trial) -> None:
    ended = trial.world.run(trial.verb, trial.injection(kind="kill", at=trial.next_write()))
    trial.injected += 1
    trial.stopped += ended.code is None
    if ended.code is not None:
        trial.note("it was not killed")
    trial.half_written()


def killed_while_replacing(trial: Trial) -> None:
    shutil.copytree(trial.world.made(trial.verb), trial.world.place / "out")
    shutil.copy(trial.world.folder / f"{trial.verb.name}.{NOTE}", trial.world.place / NOTE)
    (trial.world.place / "out" / "LICENSE").write_bytes(b"of the earlier one alone")
    earlier = {n: f for n, f in trial.world.left().items() if n.startswith("out/")}
    trial.more = ("--overwrite",)
    at = trial.draw.randint(1, trial.verb.writes + len(trial.verb.files))
    ended = trial.world.run(trial.verb, trial.injection(kind="kill", at=at), *trial.more)
    trial.injected += ended.code is None
    trial.stopped += ended.code is None
    trial.half_written(earlier)


def killed_at_random(trial: Trial) -> None:
    for _ in range(LIVES):
        begun = trial.world.begin(trial.verb, trial.injection())
        begun.process.join(trial.draw.uniform(0, trial.horizon))
        ended = trial.world.launcher.kill(begun)
        killed = ended.code is None
        if killed:
            trial.horizon *= LONGER
        elif "Nothing was run" not in ended.text:
            trial.horizon = ended.seconds
        trial.injected += killed
        trial.stopped += killed
        trial.half_written()


def disk_full(trial: Trial) -> None:
    at = trial.next_write()
    fault = trial.injection(kind="refuse", at=at, number=errno.ENOSPC)
    trial.refused(trial.world.run(trial.verb, fault), "free some space")


def cut_short(trial: Trial) -> None:
    size = int(2 ** trial.draw.uniform(4, 18))
    ended = trial.world.run(trial.verb, trial.injection(kind="short", at=size))
    trial.refused(ended, "file size limit", "free some space")


def read_only(trial: Trial) -> None:
    at = 1 if trial.injected == 0 else trial.next_write()
    fault = trial.injection(kind="refuse", at=at, number=errno.EROFS)
    trial.refused(trial.world.run(trial.verb, fault), "read-only")


def two_at_once(trial: Trial) -> None:
    first = trial.world.begin(trial.verb, trial.injection())
    time.sleep(trial.draw.uniform(0, trial.verb.seconds))
    second = trial.world.begin(trial.verb, trial.injection())
    ended = [trial.world.end(begun) for begun in (first, second)]
    trial.injected += 1
    codes = sorted(e.code for e in ended)
    trial.stopped += codes == [0, 2]
    told = [e for e in ended if "another process is writing it" in e.text]
    done = [e for e in ended if "Nothing was run" in e.text]
    if codes not in ([0, 0], [0, 2]) or len(told) != (codes == [0, 2]):
        trial.note(f"two at once: {codes} {[e.text[-500:] for e in ended]}")
    if codes == [0, 0] and len(done) != 1:
        trial.note("both made the output")


def clock_jumps(trial: Trial) -> None:
    fault = trial.injection(kind="clock", seed=trial.draw.randrange(2**32))
    ended = trial.world.run(trial.verb, fault)
    trial.injected += 1
    if ended.code != 0:
        trial.note(f"ended with {ended.code}: {ended.text[-2000:]}")


ACTS: dict[str, Callable[[Trial], None]] = dict(
    zip(
        FAULTS,
        (killed_at_a_write, killed_at_random, killed_while_replacing, disk_full, cut_short,
         read_only, two_at_once, clock_jumps),
        strict=True,
    )
)  # fmt: skip


def try_out(world: World, verb: Verb, fault: str, count: int, seed: int) -> dict:
    """A verb under a fault, until it was injected so often.

    Returns:
        injected, stopped, equal (whether all was as it should be), different (what was not).
    """
    trial = Trial(world, verb, fault, random.Random(f"{verb.name} {fault} {seed}"))
    while trial.injected < count:
        trial.once()
    return trial.row()


def empty(folder: Path) -> None:
    """An empty directory, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def main() -> None:
    """Every verb under every fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="default: all")
    parser.add_argument("--verb", action="append", help="default: all")
    parser.add_argument("--count", type=int, default=5, help="faults of each kind, for each verb")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    world = World(options.work)
    for verb in world.verbs:
        if options.verb and verb.name not in options.verb:
            continue
        print(f"{verb.name}: {verb.writes} writes, {verb.seconds:.1f} s", flush=True)
        for fault in options.fault or FAULTS:
            row = try_out(world, verb, fault, options.count, options.seed)
            print(verb.name, fault, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
