"""Results appear under their final name whole, or not at all.

Whatever a verb writes is filled in beside its place, flushed to the disk, and renamed. A process
that is killed may leave a hidden `.NAME.*.partial` and a `.NAME.lock` behind; the next write of the
same result removes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError

from blindtune.errors import OutputError
from blindtune.places import located

_REMEDIES = {
    errno.ENOSPC: "free some space there or choose another disk",
    errno.EDQUOT: "your quota is used up: free some space or choose another disk",
    errno.EFBIG: "the file size limit is reached: raise it or choose another disk",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.EROFS: "the disk is read-only: choose another directory",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
}


def remedy_of(error: OSError) -> str | None:
    """What to do about an error of the operating system, if it is one that is known here."""
    return _REMEDIES.get(error.errno or 0)


def output_error(path: Path, error: OSError | SafetensorError) -> OutputError:
    """Translate an error of the operating system met while writing `path`."""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror
    else:  # the library passes on what the system said as text: "... (os error 28)"
        found = re.search(r"os error (\d+)", str(error))
        number, reason = int(found[1]) if found else None, None
    remedy = _REMEDIES.get(number or 0, "nothing was left there: check the path and retry")
    return OutputError(f"{path}: cannot be written ({reason or error}): {remedy}")


Place = str | Path | None
"""Of what is read: a path, a name that is no path, or nothing."""


def check_apart(target: Path, inputs: Iterable[Place]) -> None:
    """Check that a result would not take the place of what it is made of.

    Args:
        target: where the result shall be.
        inputs: what is read; names of the hub, and what is not there, are passed over.

    Raises:
        OutputError: one of them is there, or lies in it.
    """
    final = target.resolve()
    for one in inputs:
        if not isinstance(one, str | Path) or not os.path.exists(located(one)):  # noqa: PTH110  # text
            continue
        read = located(one).resolve()
        if final == read or final in read.parents:
            raise OutputError(
                f"{target}: expected a place apart from what is read, {one} would be replaced by "
                "what is made of it: choose another place"
            )


def check_free(target: Path, *, overwrite: bool, mark: str, inputs: Iterable[Place] = ()) -> None:
    """Check, before any work is done, that a result directory can be written.

    Args:
        target: where it shall be.
        overwrite: an earlier result may be replaced.
        mark: name of a file that every result of this kind holds; only a directory that has it is
            ever replaced.
        inputs: what the result is made of, which it never replaces.

    Raises:
        OutputError: something is in the way, or the place cannot be written to.
    """
    check_apart(target, inputs)
    if target.is_symlink():
        raise OutputError(f"{target}: expected a directory, a symbolic link is there: name its aim")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        if not overwrite:
            raise OutputError(
                f"{target}: expected a new or empty directory, something is there: choose another "
                "place, or say that it may be overwritten (--overwrite)"
            )
        if not (target / mark).is_file():
            raise OutputError(
                f"{target}: expected an earlier result to replace (with {mark}), something else is "
                "there: choose another place"
            )
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(
            f"{target}: expected a place to write, {parent} is no directory or not writable: "
            "choose another place"
        )


COMPANIONS = ("work", "done.json", "options.yaml")
"""Endings of what stands beside a result NAME and belongs to it: `NAME.work`, ..."""
OPENINGS = 100
"""Times that a lock is tried to be made where it is told that there is no such directory."""
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""What this thread of work holds, so that a verb may hold what its parts hold again."""


@contextmanager
def sole_writer(target: str | Path) -> Iterator[None]:
    """Keep every other process, and every other thread, from writing `target` meanwhile.

    First of all, what killed writers of it left is put in order: a half-written result goes, one
    that was about to be replaced comes back if nothing has taken its place. The lock is one of the
    operating system: it ends with the process that holds it, however that ends. On a network file
    system it is as good as that system's `flock`. Of several launched processes (torchrun) the
    first one holds it for all.

    Args:
        target: a result; it, and its directory, need not exist.

    Raises:
        OutputError: another one is writing it, or its directory cannot be written.
    """
    final = located(target).absolute()
    if final in _held.get() or os.environ.get("RANK", "0") != "0":
        yield
        return
    path = final.parent / f".{final.name}.lock"
    above = [parent for parent in final.parents if not parent.exists()]
    try:
        handle = _lock(path, final)
    except OSError as error:
        raise output_error(final, error) from error
    token = _held.set(_held.get() | {final})
    try:
        try:
            put_in_order(final)
        except OSError as error:
            raise output_error(final, error) from error
        yield
    finally:
        _held.reset(token)
        with suppress(OSError):  # a disk that is read-only by now
            path.unlink()  # while it is held: who gets hold of it now looks again
        os.close(handle)
        with suppress(OSError):  # what was made for the lock alone
            for parent in above:
                parent.rmdir()


def _lock(path: Path, final: Path) -> int:
    refused = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # The one before has removed the directory that it had made for itself; or nothing can
            # be made here, as in /proc.
            if (refused := refused + 1) < OPENINGS:
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                f"{final}: another process is writing it: wait until it is done, or choose another "
                "place"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:  # no locks on this file system
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        os.close(handle)  # the one before has removed it: this is a file without a name


@contextmanager
def atomic_directory(
    target: str | Path, *, overwrite: bool = False, mark: str = ""
) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends without an exception.

    Args:
        target, overwrite, mark: as for `check_free`.

    Raises:
        OutputError: something is in the way, or the disk refuses; nothing stays in either case.
    """
    final = located(target).absolute()
    partial = _beside(final, "partial")
    with sole_writer(final):
        check_free(final, overwrite=overwrite, mark=mark)
        try:
            partial.mkdir(parents=True)
            yield partial
            _flush_tree(partial)
            check_free(final, overwrite=overwrite, mark=mark)  # nobody put anything there meanwhile
            _swap(partial, final)
        except (OSError, SafetensorError) as error:
            raise output_error(final, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def save_torch(state: object, path: Path) -> None:
    """`torch.save`, whose RuntimeError about a disk that refuses becomes an OSError.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            number = error.__context__.errno if isinstance(error.__context__, OSError) else None
            raise OSError(number or errno.EIO, str(error).partition("\n")[0]) from error


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A file to write, which replaces `target` when the block ends without an exception.

    Raises:
        OutputError: the disk refuses; the old file, if any, stays.
    """
    final = located(target).absolute()
    partial = _beside(final, "partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _flush(partial)
        partial.replace(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        raise output_error(final, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def secret_file(target: str | Path) -> Iterator[Path]:
    """As `atomic_file`; at no time may anybody but its owner read the file.

    Raises:
        OutputError: the disk refuses; the old file, if any, stays.
    """
    with atomic_file(target) as partial:
        partial.touch(mode=0o600)
        yield partial
        partial.chmod(0o600)  # if a library made another file in its place


def remove_directory(path: Path) -> None:
    """Remove a directory so that it is there whole or not at all, if it is there.

    Raises:
        OutputError: it cannot be removed.
    """
    going = _beside(path.absolute(), "partial")
    try:
        path.rename(going)
        _remove(going)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed ({error.strerror}): remove it") from error


def _beside(final: Path, ending: str) -> Path:
    """A hidden name that `put_in_order` knows."""
    return final.parent / f".{final.name}.{secrets.token_hex(4)}.{ending}"


def _swap(partial: Path, final: Path) -> None:
    """Rename into place; what was there goes only when the new one stands, for good."""
    retired = _beside(final, "replaced")
    going = retired.with_suffix(".partial")  # it must not come back from there
    if final.exists():
        final.rename(retired)
    try:
        partial.rename(final)
        _flush(final.parent)
        if retired.exists():
            retired.rename(going)
    except BaseException:
        if not partial.exists():
            final.rename(partial)
        if retired.exists():
            retired.rename(final)
        raise
    shutil.rmtree(going, ignore_errors=True)


def put_in_order(final: Path) -> None:
    """Put right what killed writers of this result and its companions left.

    `sole_writer` does; for others who know that nobody else writes it now.
    """
    names = "|".join(re.escape(ending) for ending in COMPANIONS)
    pattern = re.compile(
        re.escape(f".{final.name}.") + rf"((?:{names})\.)?[0-9a-f]{{8}}\.(partial|replaced)"
    )
    for path in list(final.parent.iterdir()) if final.parent.is_dir() else []:
        if not (found := pattern.fullmatch(path.name)):
            continue
        if found[2] == "replaced" and found[1] is None and not final.exists():
            path.rename(final)
        else:
            _remove(path)


def remove_left_overs(folder: Path) -> None:
    """Remove what killed writers left half-written in a folder that nobody else writes now."""
    for path in list(folder.glob(".*.partial")):
        _remove(path)


def _remove(path: Path) -> None:
    """A directory with all that is in it, a file, or a link but not its aim."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _flush(path)
    _flush(root)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
