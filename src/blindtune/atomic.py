"""Results appear under their final name whole, or not at all.

Whatever a verb writes is filled in beside its place, flushed to the disk, and renamed. A process
that is killed may leave a hidden `.NAME.*.partial` behind; the next write of the same result
removes it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from blindtune.errors import OutputError

_REMEDIES = {
    errno.ENOSPC: "free some space there or choose another disk",
    errno.EDQUOT: "your quota is used up: free some space or choose another disk",
    errno.EFBIG: "the file size limit is reached: raise it or choose another disk",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.EROFS: "the disk is read-only: choose another directory",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
}


def output_error(path: Path, error: OSError | SafetensorError) -> OutputError:
    """Translate an error of the operating system met while writing `path`."""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror
    else:  # the library passes on what the system said as text: "... (os error 28)"
        found = re.search(r"os error (\d+)", str(error))
        number, reason = int(found[1]) if found else None, None
    remedy = _REMEDIES.get(number or 0, "nothing was left there: check the path and retry")
    return OutputError(f"{path}: cannot be written ({reason or error}): {remedy}")


def check_free(target: Path, *, overwrite: bool, mark: str) -> None:
    """Check, before any work is done, that a result directory can be written.

    Args:
        target: where it shall be.
        overwrite: an earlier result may be replaced.
        mark: name of a file that every result of this kind holds; only a directory that has it is
            ever replaced.

    Raises:
        OutputError: something is in the way, or the place cannot be written to.
    """
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
    final = Path(target).absolute()
    check_free(final, overwrite=overwrite, mark=mark)
    partial = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        _remove_left_overs(final)
        partial.mkdir(parents=True)
        yield partial
        _flush_tree(partial)
        _swap(partial, final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        raise output_error(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A file to write, which replaces `target` when the block ends without an exception.

    Raises:
        OutputError: the disk refuses; the old file, if any, stays.
    """
    final = Path(target).absolute()
    partial = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
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


def _swap(partial: Path, final: Path) -> None:
    """Rename into place; what was there goes only when the new one stands."""
    if not final.exists():
        partial.rename(final)
        return
    retired = partial.with_suffix(".replaced")
    final.rename(retired)
    try:
        partial.rename(final)
    except OSError:
        retired.rename(final)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _remove_left_overs(final: Path) -> None:
    """Remove what killed writers of this very target left beside it."""
    pattern = re.compile(re.escape(f".{final.name}.") + r"[0-9a-f]{8}\.(partial|replaced)")
    for path in final.parent.iterdir() if final.parent.is_dir() else ():
        if pattern.fullmatch(path.name) and (final.exists() or path.suffix == ".partial"):
            shutil.rmtree(path, ignore_errors=True)


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
