"""Where an output goes, and whether it is there already: `--out`, `--overwrite`, `--resume`.

Beside every finished output stands `NAME.done.json`: which options and inputs made it, what its
bytes are, and what was told about it. With `--resume auto` the same command finds all of them
unchanged and has nothing to do. Nothing of it goes into the output itself. While a command runs,
the note says that it has begun: killed in its last moment, it may replace what it made itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from blindtune import __version__
from blindtune.cli.configfile import options_path
from blindtune.cli.printing import json_line, plain
from blindtune.errors import OutputError
from blindtune.places import located

Facts = dict[str, Any]
"""What an act returned, as plain JSON values."""
_NO_IDENTITY = frozenset({"out", "resume", "threads"})
"""Options that do not decide what is made."""
SAID = 4
"""Differences that a refusal names."""


def _part(identity: Mapping[str, Any], name: str) -> Facts:
    part = identity.get(name)
    return part if isinstance(part, dict) else {}


def _shown(value: object) -> str:
    return "none" if value is None else str(value)[:40]


def record_path(out: Path) -> Path:
    """Where it is noted that an output is done: beside it, never inside."""
    out = out.absolute()
    return out.parent / f"{out.name}.done.json"


@final
@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line asks for, told by values and by the bytes of its files."""

    verb: str
    out: Path
    identity: Mapping[str, Any] | None
    """None where the inputs cannot be told apart: such an output is never taken as done."""

    def done(self) -> Facts | None:
        """What was told about the output, if this very request made what stands there."""
        found = self._note()
        facts = found.get("facts")
        if not isinstance(facts, dict) or not self.out.exists():
            return None
        if found.get("output") != digest(self.out):
            return None
        return facts | {"path": str(self.out), "options": str(options_path(self.out))}

    def begun(self) -> bool:
        """Whether this very request was killed when its output stood, before it could note that.

        What stood there before it began is not its own.
        """
        found = self._note()
        if found.get("begun") is not True or not self.out.exists():
            return False
        made = digest(self.out)
        return made is not None and made != found.get("before")

    def difference(self, typed: Callable[[str], str]) -> str:
        """What output is there instead, in words; "" where that is not known.

        Args:
            typed: how an option of this name is typed.
        """
        found, standing = _read(record_path(self.out)), digest(self.out)
        if found.get("begun") is True and found.get("before") == standing:
            found = _noted(record_path(self.out)) or {}  # a command that was killed changed nothing
        earlier = found.get("identity")
        if self.identity is None or not isinstance(earlier, dict):
            return ""
        if earlier == self.identity:
            if found.get("output") == standing:
                return "the output of this very command is there (--resume auto takes it as it is)"
            return "the output of this very command is there, and was changed since"
        there, asked = (
            {
                "made by version": identity.get("version"),
                **{typed(name): value for name, value in _part(identity, "options").items()},
                **{
                    f"other bytes of {typed(name)}": value
                    for name, value in _part(identity, "inputs").items()
                },
            }
            for identity in (earlier, self.identity)
        )
        names = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
        if not names:
            return ""
        said = [
            name if name.startswith("other bytes") else
            f"{name} {_shown(there.get(name))} (now {_shown(asked.get(name))})"
            for name in names[:SAID]
        ]  # fmt: skip
        more = [f"{len(names) - SAID} more"] if len(names) > SAID else []
        return f"an output of other options or inputs is there ({', '.join([*said, *more])})"

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Note that the request has begun; failed, the note goes, unless the output stands.

        Raises:
            OutputError: the note cannot be written.
        """
        # Killed twice in a row: what stands there is still this request's own.
        before = self._note().get("before") if self.begun() else digest(self.out)
        earlier = record_path(self.out)
        kept = earlier.read_bytes() if earlier.is_file() else None
        if self.identity is not None:
            begun = {"identity": self.identity, "begun": True, "before": before}
            self._write(begun | {"earlier": _noted(earlier)})
        try:
            yield
        except BaseException:
            if digest(self.out) == before:
                with suppress(OSError, OutputError):
                    if kept is not None:
                        self._write_bytes(kept)
                    elif self.identity is not None:
                        earlier.unlink()
            raise

    def note_done(self, facts: Facts) -> None:
        """Note that the output is whole.

        Raises:
            OutputError: the note cannot be written.
        """
        self._write({"identity": self.identity, "output": digest(self.out), "facts": facts})

    def _note(self) -> Facts:
        """The note beside the output, if it is of this very request; a damaged one says nothing."""
        if self.identity is None:
            return {}
        found = _read(record_path(self.out))
        for note in (found, found.get("earlier")):
            if isinstance(note, dict) and note.get("identity") == self.identity:
                return note
        return {}

    def _write(self, note: Facts) -> None:
        self._write_bytes((json_line({"verb": self.verb, **note}) + "\n").encode())

    def _write_bytes(self, content: bytes) -> None:
        from blindtune.atomic import atomic_file

        with atomic_file(record_path(self.out)) as partial:
            partial.write_bytes(content)


def _read(path: Path) -> Facts:
    """A note; a damaged one says nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _noted(path: Path) -> Facts | None:
    """The note of the output that is there, also behind the one of a command that was killed."""
    found = _read(path)
    return found.get("earlier") if found.get("begun") else found or None


def request(
    verb: str, out: Path, values: Mapping[str, Any], inputs: Iterable[str], untold: Iterable[str]
) -> Request:
    """The request of a command line; its input files are hashed (about 1 GB a second).

    Args:
        verb: its name.
        out: where the output goes.
        values: resolved options, by name.
        inputs: options that name a file, a directory, or something on the hub. What is no file
            counts as the same while its name is.
        untold: options that, once given, bring in files that are not known here.
    """
    told = not any(values.get(name) for name in untold)
    bytes_of: dict[str, str | None] = {}
    for name in inputs:
        value = values.get(name)
        place = located(value) if isinstance(value, str | Path) else None
        if place is not None and name != "out" and os.path.exists(place):  # noqa: PTH110  # any text
            bytes_of[name] = digest(place)
    options = {name: value for name, value in values.items() if name not in _NO_IDENTITY}
    identity = {"verb": verb, "version": __version__, "options": options, "inputs": bytes_of}
    told = told and None not in bytes_of.values()
    return Request(verb=verb, out=out, identity=plain(identity) if told else None)


def digest(path: Path) -> str | None:
    """sha256 (hex) of a file, or of the names and bytes of all files in a directory.

    None for what has no bytes of its own (a pipe), or cannot be read.
    """
    whole = hashlib.sha256()
    try:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                whole.update(json.dumps([str(file.relative_to(path)), digest(file)]).encode())
        elif path.is_file():
            with path.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            return None
    except OSError:
        return None
    return whole.hexdigest()


def check_parent(out: Path) -> None:
    """Refuse at once an output whose directory could not be made or written.

    Raises:
        OutputError: it cannot.
    """
    place = out.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{out}: cannot be made, {place} is a file: choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: cannot be made, {place} is not yours to write: choose another")


def check_place(
    verb: str,
    out: Path,
    *,
    mark: str,
    is_file: bool,
    overwrite: bool,
    there: Callable[[], str] = str,
) -> None:
    """Refuse at once an output that could not be made in the end, or would bury something else.

    Args:
        verb: its name.
        out: where the output shall be.
        mark: what every output directory of the verb holds; "": the note beside it names the verb.
        is_file: whether the output is one file of JSON instead.
        overwrite: an earlier output of the verb may be replaced.
        there: says for the refusal what output is there instead; "": not known.

    Raises:
        OutputError: it cannot be made there.
    """
    check_parent(out)
    if is_file:
        free, earlier, kind = not out.exists(), _is_earlier_file(verb, out), "file"
    else:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        earlier, kind = _is_earlier_directory(verb, out, mark), "directory"
    if (not free and not earlier) or out.resolve() == Path.cwd():
        told = "" if mark or is_file else f" (with its {record_path(out).name} beside it)"
        raise OutputError(
            f"{out}: expected a new {kind}, or an earlier output of {verb}{told} with --overwrite, "
            "something else is there: choose another --out"
        )
    if not free and not overwrite:
        raise OutputError(
            f"{out}: expected a new {kind}, {there() or f'an earlier output of {verb} is there'}: "
            "choose another --out, or replace it with --overwrite"
        )


def _is_earlier_directory(verb: str, out: Path, mark: str) -> bool:
    if mark:
        return (out / mark).exists()
    return out.is_dir() and _read(record_path(out)).get("verb") == verb


def _is_earlier_file(verb: str, out: Path) -> bool:
    if not out.is_file():
        return False
    beginning = f'{{"verb": "{verb}"'.encode()
    with out.open("rb") as file:
        return file.read(len(beginning)) == beginning


def write_facts(out: Path, facts: Facts) -> None:
    """Save what --json prints.

    Raises:
        OutputError: it cannot be written.
    """
    from blindtune.atomic import atomic_file

    with atomic_file(out) as partial:
        partial.write_text(json_line(facts) + "\n", encoding="utf-8")
