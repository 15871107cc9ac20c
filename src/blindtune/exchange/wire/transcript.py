"""What crossed between the parties, frame by frame: evidence for a customer, input for an attack.

A recorder is a tap of any transport, and so is a `Recording`, which lasts from one process to the
next. Their transcript holds the bytes exactly as they went over the wire, and decodes them to
messages; `attacks` take nothing else.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from blindtune.atomic import atomic_file, secret_file
from blindtune.errors import ConfigError, PackageError, VerificationError
from blindtune.exchange.files import open_regular, read_exactly
from blindtune.exchange.wire.codec import FRAME_BYTES, FrameReader, MessageLimits
from blindtune.exchange.wire.messages import REPLIES, REQUESTS, Hello, Message
from blindtune.exchange.wire.transport import DIRECTIONS, Direction

logger = logging.getLogger(__name__)

MAGIC = b"BTXT\x01\x00\x00\x00"
MOST_BYTES = 1 << 30
"""What a transcript holds at most."""
_RECORD = struct.Struct("<BI")


class Crossing(NamedTuple):
    """A message that crossed; `connection` counts from 1, `exchange` ties reply to request."""

    direction: Direction
    connection: int
    exchange: int
    message: Message


class Transcript:
    """All frames that crossed, in order."""

    def __init__(self, frames: tuple[tuple[Direction, bytes], ...]) -> None:
        self.frames = frames

    def wire(self, direction: Direction | None = None) -> bytes:
        """The bytes of one direction, or of both, end to end."""
        return b"".join(f for d, f in self.frames if direction in (None, d))

    def crossings(self, limits: MessageLimits | None = None) -> Iterator[Crossing]:
        """The messages, each where its last frame was; those that were cut off are left out.

        Raises:
            VerificationError: a frame is not one of the protocol.
        """
        readers: dict[Direction, FrameReader] = {}
        connection = 0
        for direction, frame in self.frames:
            if direction not in readers or _begins(frame):
                readers[direction] = _reader(direction, limits)
            arrived = readers[direction].feed(frame)
            if arrived is not None:
                connection += isinstance(arrived[1], Hello)
                yield Crossing(direction, connection, *arrived)

    def save(self, path: Path) -> None:
        """Write it to a file; OutputError if that fails."""
        with atomic_file(path) as partial, partial.open("xb") as handle:
            handle.write(MAGIC)
            for direction, frame in self.frames:
                handle.write(_RECORD.pack(DIRECTIONS.index(direction), len(frame)) + frame)


class Recorder:
    """Give it to one customer's transport as its tap; it sees every connection of that transport.

    Args:
        max_bytes: how much to hold in memory.

    Raises:
        ConfigError: more crossed than `max_bytes`; a transcript is whole or it is none.
    """

    def __init__(self, *, max_bytes: int = MOST_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._frames: list[tuple[Direction, bytes]] = []
        self._lock = threading.Lock()

    def __call__(self, direction: Direction, frame: bytes) -> None:
        """Note a frame."""
        with self._lock:
            self._bytes += len(frame)
            if self._bytes <= self._max_bytes:
                self._frames.append((direction, frame))

    def transcript(self) -> Transcript:
        """What has crossed so far."""
        with self._lock:
            if self._bytes > self._max_bytes:
                raise ConfigError(
                    f"{self._bytes} bytes crossed, at most {self._max_bytes} were to be recorded: "
                    "raise max_bytes or record a shorter run"
                )
            return Transcript(tuple(self._frames))


class Recording:
    """A tap that writes to a file at once, and goes on where an earlier process ended.

    A transcript is whole or it is none: where the disk refuses a frame, or more crosses than
    `max_bytes`, the file is emptied, which is logged, and the work goes on. A frame that is not one
    of the protocol ends its connection, and is left out: it would spoil the file.

    Args:
        path: a file that `begin` made; only its owner may read it.
        max_bytes: how large it may become.

    Raises:
        PackageError: it is no transcript.
    """

    def __init__(self, path: Path, *, max_bytes: int = MOST_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._bytes = _whole_bytes(path)
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(self._file, self._bytes)
        self._readers: dict[Direction, FrameReader] = {}
        self._lock = threading.Lock()

    @staticmethod
    def begin(path: Path) -> None:
        """Make the file, with nothing in it; OutputError if that fails."""
        with secret_file(path) as partial:
            partial.write_bytes(MAGIC)

    def __call__(self, direction: Direction, frame: bytes) -> None:
        """Write a frame."""
        record = _RECORD.pack(DIRECTIONS.index(direction), len(frame)) + frame
        with self._lock:
            if self._file is None or not self._belongs(direction, frame):
                return
            self._bytes += len(record)
            if self._bytes > self._max_bytes:
                self._give_up(f"more than {self._max_bytes:,} bytes crossed")
                return
            try:
                if os.write(self._file, record) != len(record):
                    self._give_up("the disk took a part of a frame")
            except OSError as error:
                self._give_up(error.strerror or str(error))

    def close(self) -> None:
        """End it; what still crosses is not noted."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _belongs(self, direction: Direction, frame: bytes) -> bool:
        if direction not in self._readers or _begins(frame):
            self._readers[direction] = _reader(direction, _limits(2**31 - 1))
        try:
            self._readers[direction].feed(frame)
        except VerificationError:
            return False
        return True

    def _give_up(self, why: str) -> None:
        assert self._file is not None
        with suppress(OSError):
            os.ftruncate(self._file, 0)
        with suppress(OSError):
            os.close(self._file)
        self._file = None
        logger.error("%s: emptied, as it would not be whole (%s)", self._path, why)


def _whole_bytes(path: Path) -> int:
    """Where the last whole record of a file ends: a killed process leaves a part of one."""
    handle, size = open_regular(path)
    with handle:
        if read_exactly(handle, min(size, len(MAGIC)), path) != MAGIC:
            raise PackageError(f"{path}: not a transcript of version 1: remove it")
        position = len(MAGIC)
        while position + _RECORD.size <= size:
            _, length = _RECORD.unpack(read_exactly(handle, _RECORD.size, path))
            if position + _RECORD.size + length > size:
                break
            position += _RECORD.size + length
            handle.seek(position)
    return position


def open_transcript(path: Path, *, max_bytes: int = MOST_BYTES) -> Transcript:
    """Read a transcript and check every frame in it.

    Raises:
        PackageError: it is missing, truncated, larger than `max_bytes`, or malformed.
    """
    handle, size = open_regular(path)
    with handle:
        if size > max_bytes:
            raise PackageError(
                f"{path}: {size} bytes, at most {max_bytes} are read: raise the limit"
            )
        if size < len(MAGIC) or read_exactly(handle, len(MAGIC), path) != MAGIC:
            raise PackageError(f"{path}: not a transcript of version 1: record it again")
        frames: list[tuple[Direction, bytes]] = []
        position = len(MAGIC)
        while position < size:
            direction, length = _RECORD.unpack(read_exactly(handle, _RECORD.size, path))
            if direction >= len(DIRECTIONS) or not 0 < length <= FRAME_BYTES:
                raise PackageError(f"{path}: malformed at byte {position}: record it again")
            frames.append((DIRECTIONS[direction], read_exactly(handle, length, path)))
            position += _RECORD.size + length
    transcript = Transcript(tuple(frames))
    try:
        for _ in transcript.crossings(_limits(max_bytes)):
            pass
    except VerificationError as error:
        raise PackageError(f"{path}: {error}: record it again") from error
    return transcript


def _limits(max_bytes: int) -> MessageLimits:
    return MessageLimits(max_payload_bytes=min(max_bytes, 2**31 - 1))


def _reader(direction: Direction, limits: MessageLimits | None) -> FrameReader:
    accepts = REQUESTS if direction == "request" else REPLIES
    return FrameReader(accepts=accepts, limits=limits)


def _begins(frame: bytes) -> bool:
    """Whether this frame is the first one of a message: its position is 0."""
    return frame[24:32] == bytes(8)
