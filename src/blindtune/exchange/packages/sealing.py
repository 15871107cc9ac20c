"""A package for one reader's eyes: sealed into one file that only the recipient can open.

A sealed file is an age file (https://age-encryption.org/v1) around an uncompressed tar archive
(ustar) of the package's files, so `age --decrypt | tar x` opens it too. Both ways are streams: a
few MiB of memory, whatever the size; no plain text is written but the package itself. age checks
every 64 KiB before it is passed on, and the end; the package that comes out is verified as any
other.

What is not covered: sealing hides, it does not sign. Who made the package is said by its signature,
which is inside; that it was meant for this recipient is said by nobody. A sealed file shows its
size.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from blindtune.atomic import atomic_directory, atomic_file, check_apart
from blindtune.errors import BlindtuneError, ConfigError, OutputError, PackageError, PolicyError
from blindtune.exchange.files import CHUNK_BYTES, open_regular, printable, read_exactly
from blindtune.exchange.packages.keys import PrivateKey, PublicKey
from blindtune.exchange.packages.manifest import MANIFEST_NAME
from blindtune.exchange.packages.package import (
    MAX_PACKAGE_BYTES,
    MAX_SHARDS,
    can_hold,
    open_package,
    package_files,
)
from blindtune.exchange.packages.signing import Signature, Trust
from blindtune.exchange.packages.writing import check_place
from blindtune.places import located

MAX_RECIPIENTS = 256
_MAX_HEADER_BYTES = 64 << 10
_FIRST_LINE = b"age-encryption.org/v1\n"
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_MAX_FILES = MAX_SHARDS + 20
_MAX_FILE_BYTES = 8**11 - 1  # eleven octal digits in ustar


def seal(
    package: Path | str,
    out: Path | str,
    recipients: Sequence[PublicKey],
    *,
    overwrite: bool = False,
) -> str:
    """Seal a package into one file that any of the recipients can open; returns its id.

    Args:
        package: its directory; it is verified first.
        out: the file to write.
        recipients: whoever has one of these keys can open it. The sender cannot, unless it is one.
        overwrite: replace a file that is in the way.

    Raises:
        PackageError, OutputError: see errors.py.
    """
    import pyrage

    target = located(out)
    check_apart(target, [package, *located(package).glob("*")])
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(
            f"{target}: expected a new file, something is there: choose another, or say that it "
            "may be overwritten (--overwrite)"
        )
    if not 0 < len(recipients) <= MAX_RECIPIENTS:
        raise ConfigError(f"expected 1 to {MAX_RECIPIENTS} recipients, got {len(recipients)}")
    opened = open_package(package)
    large = [name for name, entry in opened.manifest.files.items() if entry.bytes > _MAX_FILE_BYTES]
    if large:
        raise OutputError(f"{large[0]}: more than 8 GiB in one file cannot be sealed: make shards")
    keys = [pyrage.x25519.Recipient.from_str(key.receiving_key) for key in recipients]
    with atomic_file(target) as partial, partial.open("wb") as sealed:
        plain = _Kept(_Source(_archive(opened.path, package_files(opened))))
        cipher = _Kept(sealed)
        try:
            pyrage.encrypt_io(plain, cipher, keys)
        except Exception as error:
            raise plain.failure or cipher.failure or error from error
    return opened.id


def unseal(
    sealed: Path | str,
    out: Path | str,
    key: PrivateKey,
    *,
    trust: Trust | None = None,
    overwrite: bool = False,
    max_bytes: int = MAX_PACKAGE_BYTES,
) -> tuple[str, Signature | None]:
    """Open a sealed file with one's own key and write the package in it, once it is verified.

    Args:
        sealed: the file.
        out: directory of the package.
        key: the recipient's.
        trust: whose packages are accepted; None: anybody's.
        overwrite: replace an earlier package (and nothing else) that is in the way.
        max_bytes: refuse a package that is larger.

    Returns:
        Package id and signature.

    Raises:
        ConfigError: there is no such file.
        PolicyError: it is sealed for others, or `trust` refuses the package.
        PackageError: it is altered, truncated, or holds anything but a package.
        OutputError: the package cannot be written, or something is in the way.
    """
    import pyrage

    identity = pyrage.x25519.Identity.from_str(key.receiving_secret)
    path = located(sealed)
    check_place(located(out), overwrite=overwrite, inputs=(path,))
    if not path.exists():
        raise ConfigError(f"{path}: expected a sealed file, there is none: check the path")
    handle, _size = open_regular(path)
    with handle, atomic_directory(out, overwrite=overwrite, mark=MANIFEST_NAME) as partial:
        _check_header(handle, path)
        unpacking = Unpacking(path, partial, max_bytes)
        cipher, plain = _Kept(handle), _Kept(unpacking)
        try:
            pyrage.decrypt_io(cipher, plain, [identity])
            unpacking.finish()
        except Exception as error:
            raise cipher.failure or plain.failure or _translated(path, error) from error
        finally:
            unpacking.close()
        opened = open_package(partial, trust=trust)
    return opened.id, opened.signature


def _check_header(handle: BinaryIO, path: Path) -> None:
    """Refuse an endless header: age reads it from its start again for every part that comes."""
    begin = handle.read(_MAX_HEADER_BYTES)
    handle.seek(0)
    header, found, _ = begin.partition(b"\n--- ")
    if not begin.startswith(_FIRST_LINE):
        raise PackageError(f"{path}: no sealed file: ask for it again")
    if not found or header.count(b"\n-> ") > MAX_RECIPIENTS:
        raise PackageError(
            f"{path}: expected a header of at most {_MAX_HEADER_BYTES} bytes for {MAX_RECIPIENTS} "
            "recipients, got a longer one: ask for the file again"
        )


def _translated(path: Path, error: Exception) -> BlindtuneError:
    if isinstance(error, BlindtuneError):
        return error
    reason = printable(" ".join(str(error).split()))
    if "no matching keys" in reason.lower():
        return PolicyError(f"{path}: sealed for somebody else: ask for it to be sealed to your key")
    return PackageError(
        f"{path}: cannot be opened ({reason}): it is no sealed file, or was altered: ask for it "
        "again"
    )


def _archive(directory: Path, names: Sequence[str]) -> Iterator[bytes]:
    """The archive's bytes: header, content and padding of every file, and the end."""
    for name in names:
        handle, size = open_regular(directory / name)
        with handle:
            yield _tar_header(name, size)
            for begin in range(0, size, CHUNK_BYTES):
                yield read_exactly(handle, min(CHUNK_BYTES, size - begin), directory / name)
        yield bytes(-size % _BLOCK)
    yield _END


def _tar_header(name: str, size: int) -> bytes:
    """The one header that is written, and accepted, for a file of this name and size."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    header: bytes = entry.tobuf(tarfile.USTAR_FORMAT)
    return header


class _Kept:
    """A stream for the library, which wraps what is raised in it: the error itself is kept.

    Args:
        stream: reads or writes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def read(self, count: int = -1) -> bytes:
        """As the stream does."""
        with self._keeping():
            found: bytes = self._stream.read(count)
        return found

    def write(self, data: bytes) -> int:
        """As the stream does."""
        with self._keeping():
            written: int = self._stream.write(data)
        return written

    def flush(self) -> None:
        """As the stream does."""
        with self._keeping():
            self._stream.flush()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, BlindtuneError) as error:
            self.failure = self.failure or error  # the library may write on after the first
            raise


class _Source:
    """A file to read from, over chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, b"" at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        count = len(self._rest) if count < 0 else count
        taken, self._rest = self._rest[:count], self._rest[count:]
        return bytes(taken)


class Unpacking:
    """A file to write an archive to; what comes is written out at once, as files of a package.

    Only regular files with names that a package can hold are accepted, each once, in the one
    spelling that `seal` writes.

    Args:
        source: what errors name.
        directory: where the files go.
        max_bytes: of all files together.
    """

    def __init__(self, source: Path, directory: Path, max_bytes: int) -> None:
        self._source, self._directory, self._left = source, directory, max_bytes
        self._head = bytearray()
        self._names: set[str] = set()
        self._file: BinaryIO | None = None
        self._content = self._padding = 0
        self._ended = 0

    def write(self, data: bytes) -> int:
        """Take the next bytes of the archive."""
        view = memoryview(data)
        while view:
            view = view[self._take(view) :]
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> None:
        """Check that the archive is complete; PackageError if not."""
        if self._ended != len(_END):
            raise self._refuse("the archive in it has no end")

    def close(self) -> None:
        """Close the file that is being written, if one is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, view: memoryview) -> int:
        """Use some bytes; how many."""
        if self._content:
            assert self._file is not None
            part = view[: self._content]
            self._file.write(part)
            self._content -= len(part)
            if not self._content:
                self.close()
            return len(part)
        if self._padding or self._ended:
            step = min(self._padding or len(_END) - self._ended, len(view))
            if not step or any(view[:step]):
                raise self._refuse("bytes stand where an archive has none")
            self._padding, self._ended = (
                (self._padding - step, 0) if self._padding else (0, self._ended + step)
            )
            return step
        step = min(_BLOCK - len(self._head), len(view))
        self._head += view[:step]
        if len(self._head) == _BLOCK:
            self._begin(bytes(self._head))
            self._head.clear()
        return step

    def _begin(self, header: bytes) -> None:
        if not any(header):
            self._ended = _BLOCK
            return
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        digits = header[124:135]
        size = int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else -1
        if not can_hold(name) or name in self._names or len(self._names) >= _MAX_FILES:
            raise self._refuse(
                f"it holds `{name}`, which is no file of a package, or holds it twice"
            )
        if size < 0 or header != _tar_header(name, size):
            raise self._refuse("its archive is not as `blindtune seal` writes it")
        self._left -= size
        if self._left < 0:
            raise self._refuse("its package is larger than allowed")
        self._names.add(name)
        self._file = (self._directory / name).open("xb")
        self._content, self._padding = size, -size % _BLOCK
        if not size:
            self.close()

    def _refuse(self, reason: str) -> PackageError:
        return PackageError(f"{self._source}: {printable(reason)}: ask for it again")
