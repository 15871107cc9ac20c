"""Single files that cross between parties: opened with suspicion, written durably.

Reading never follows a symbolic link, never waits on a pipe, and never reads past the stated
size. Writing fsyncs before it reports success.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from blindtune.errors import PackageError

CHUNK_BYTES = 1 << 20


def printable(text: str, *, limit: int = 200) -> str:
    """A stranger's text, shortened and stripped of control characters, for a one-line message."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(text) <= limit else shown[:limit] + "..."


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading; return it with its size in bytes.

    Raises:
        PackageError: it is missing, unreadable, a symbolic link, a directory, a pipe or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "it is a symbolic link, and a package holds only regular files"
        else:
            reason = error.strerror or str(error)
        raise PackageError(
            f"{printable(str(path))}: cannot be opened ({reason}): ask for the package again"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PackageError(
            f"{printable(str(path))}: not a regular file, and a package holds nothing else: "
            "ask for the package again"
        )
    return os.fdopen(descriptor, "rb", buffering=0), status.st_size


def read_exactly(handle: BinaryIO, count: int, path: Path) -> bytes:
    """Read `count` bytes, or raise PackageError: the file ended early."""
    view = memoryview(bytearray(count))
    fill_exactly(handle, view, path)
    return bytes(view)


def fill_exactly(handle: BinaryIO, view: memoryview, path: Path) -> None:
    """Fill `view` from the file, or raise PackageError: it ended early or cannot be read."""
    filled = 0
    while filled < len(view):
        try:
            count = handle.readinto(view[filled : filled + 64 * CHUNK_BYTES])  # type: ignore[attr-defined]
        except OSError as error:
            raise PackageError(
                f"{path}: cannot be read ({error.strerror or error}): check the disk"
            ) from error
        if not count:
            raise PackageError(
                f"{path}: ended after {filled} of {len(view)} bytes: ask for the package again"
            )
        filled += count


def read_verified(path: Path, *, size: int, sha256: str) -> bytes:
    """Read a small file whose size and hash the manifest states; PackageError if they differ."""
    with _open_sized(path, size) as handle:
        content = read_exactly(handle, size, path)
    check_digest(path, hashlib.sha256(content).hexdigest(), sha256)
    return content


def verify(path: Path, *, size: int, sha256: str) -> None:
    """Check a file's size, then its hash, in constant memory; PackageError if they differ."""
    digest = hashlib.sha256()
    with _open_sized(path, size) as handle:
        for begin in range(0, size, CHUNK_BYTES):
            digest.update(read_exactly(handle, min(CHUNK_BYTES, size - begin), path))
    check_digest(path, digest.hexdigest(), sha256)


def check_digest(path: Path, found: str, stated: str) -> None:
    """Raise PackageError unless the hash found is the hash that the manifest states."""
    if found != stated:
        raise PackageError(
            f"{path}: altered: its sha256 is {found[:12]}..., the manifest says "
            f"{stated[:12]}...: ask for the package again"
        )


def _open_sized(path: Path, size: int) -> BinaryIO:
    handle, found = open_regular(path)
    if found != size:
        handle.close()
        raise PackageError(
            f"{path}: {found} bytes, but the manifest says {size}: truncated or altered, "
            "ask for the package again"
        )
    return handle


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file and fsync it; return its size in bytes and its sha256 in hex."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as handle:
        for chunk in chunks:
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    return size, digest.hexdigest()
