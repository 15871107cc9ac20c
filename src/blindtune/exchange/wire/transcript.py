"""What crossed between the parties, frame by frame: evidence for a customer, input for an attack.

A recorder is a tap of any transport. Its transcript holds the bytes exactly as they went over the
wire, and decodes them to messages; `attacks` take nothing else.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blindtune.atomic import atomic_file
from blindtune.errors import ConfigError, PackageError, VerificationError
from blindtune.exchange.files import open_regular, read_exactly
from blindtune.exchange.wire.codec import FRAME_BYTES, FrameReader, MessageLimits
from blindtune.exchange.wire.messages import REPLIES, REQUESTS, Hello, Message
from blindtune.exchange.wire.transport import DIRECTIONS, Direction

MAGIC = b"BTXT\x01\x00\x00\x00"
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
                accepts = REQUESTS if direction == "request" else REPLIES
                readers[direction] = FrameReader(accepts=accepts, limits=limits)
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

    def __init__(self, *, max_bytes: int = 1 << 30) -> None:
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


def open_transcript(path: Path, *, max_bytes: int = 1 << 30) -> Transcript:
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
        for _ in transcript.crossings(MessageLimits(max_payload_bytes=min(max_bytes, 2**31 - 1))):
            pass
    except VerificationError as error:
        raise PackageError(f"{path}: {error}: record it again") from error
    return transcript


def _begins(frame: bytes) -> bool:
    """Whether this frame is the first one of a message: its position is 0."""
    return frame[24:32] == bytes(8)
