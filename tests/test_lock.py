"""requirements.lock names every file by its hash, in the versions that the tests run with."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"([A-Za-z0-9._-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
BY_THE_MACHINE = {"torch"}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pinned_version_is_locked_by_its_hash():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    entries = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(entries)
    locked = {plain(entry[1]): entry[2] for entry in entries}
    assert len(locked) == len(entries) > 100
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#")]  # fmt: skip
    pinned = {plain(name): version for name, version in pins}
    assert {n: v for n, v in pinned.items() if locked.get(n) != v}.keys() <= BY_THE_MACHINE
    assert not BY_THE_MACHINE & locked.keys()
