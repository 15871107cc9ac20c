"""Writing a package: whole, or not at all, and only what a reader would accept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from torch import Tensor

from blindtune.atomic import Place, atomic_directory, check_free
from blindtune.errors import OutputError, PackageError
from blindtune.exchange.files import write_durably
from blindtune.exchange.packages.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
    package_id,
)
from blindtune.exchange.packages.package import (
    DIGEST_NAME,
    MAX_SHARDS,
    SMALL_FILES,
    can_hold,
    digest_line,
    read_manifest,
    shard_names,
)
from blindtune.exchange.packages.signing import SIGNATURE_NAME, Signer
from blindtune.exchange.tensors import serialize, shard
from blindtune.places import located

MAX_SHARD_BYTES = 4 << 30
FORMAT_PREFIX = "blindtune-"
"""Before the kind of a package, in the format that its manifest names."""


def write_package(
    directory: Path | str,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    signer: Signer | None = None,
) -> str:
    """Write a package under `directory`, whole or not at all, and return its id.

    See `atomic` for what that means when the process is killed.

    Args:
        directory: where it shall be; it must not exist, or be empty.
        manifest: what it says about itself; `files` is filled in here.
        tensors: by name; float32, float16 or bfloat16, finite, on any device.
        files: small files by name, each from SMALL_FILES.
        overwrite: replace an earlier package (and nothing else) that is in the way.
        max_shard_bytes: more tensor bytes than that go into several files.
        signer: signs the package; None: it stays unsigned.

    Raises:
        OutputError: it cannot be written, something is in the way, or the manifest, a tensor or
            a file is one that no reader would accept.
    """
    target = located(directory).absolute()
    _check_small_files(files)
    encode_manifest(manifest)
    shards = shard(tensors, max_shard_bytes)
    if len(shards) > MAX_SHARDS:
        raise OutputError(f"{len(shards)} weights files, at most {MAX_SHARDS}: make shards larger")
    check_place(target, overwrite=overwrite, kind=manifest.format.removeprefix(FORMAT_PREFIX))
    with atomic_directory(target, overwrite=overwrite, mark=MANIFEST_NAME) as partial:
        manifest_bytes = _fill(partial, manifest, shards, files, signer)
    return package_id(manifest_bytes)


def _fill(
    partial: Path,
    manifest: Manifest,
    shards: list[dict[str, Tensor]],
    files: Mapping[str, bytes],
    signer: Signer | None,
) -> bytes:
    entries: dict[str, FileEntry] = {}
    for name, part in zip(shard_names(len(shards)), shards, strict=True):
        size, sha256 = write_durably(partial / name, serialize(part))
        entries[name] = FileEntry(bytes=size, sha256=sha256)
    for name, content in files.items():
        size, sha256 = write_durably(partial / name, [content])
        entries[name] = FileEntry(bytes=size, sha256=sha256)
    manifest_bytes = encode_manifest(msgspec.structs.replace(manifest, files=entries))
    write_durably(partial / MANIFEST_NAME, [manifest_bytes])
    write_durably(partial / DIGEST_NAME, [digest_line(manifest_bytes)])
    if signer is not None:
        signature = signer.sign(manifest, manifest_bytes)
        write_durably(partial / SIGNATURE_NAME, [signature])
    return manifest_bytes


def check_place(
    target: Path, *, overwrite: bool, kind: str | None = None, inputs: Iterable[Place] = ()
) -> None:
    """Check that a package may be written at `target`: nothing but a package is ever replaced.

    Args:
        target: where it shall be.
        overwrite: an earlier package may be replaced.
        kind: emulator, adapter or bottom, and only such a one; None: any.
        inputs: what it is made of, which it never replaces.

    Raises:
        OutputError: something is in the way, in the directory too.
    """
    check_free(target, overwrite=overwrite, mark=MANIFEST_NAME, inputs=inputs)
    names = {entry.name for entry in target.iterdir()} if target.exists() else set()
    foreign = sorted(name for name in names if not can_hold(name))
    if foreign:
        raise OutputError(
            f"{target}: only an earlier package is overwritten, this directory is none "
            f"({', '.join(foreign[:3])}): choose another directory"
        )
    there = _kind_there(target) if names else None
    if kind is not None and there not in (None, kind):
        raise OutputError(
            f"{target}: expected a package of the kind {kind} to replace, got {there}: choose "
            "another directory, or remove that one if nobody needs it"
        )


def _kind_there(package: Path) -> str | None:
    """Of a package that shall be replaced; None: nothing in it can be read any more."""
    try:
        manifest = decode_manifest(read_manifest(package))
    except PackageError:
        return None
    return manifest.format.removeprefix(FORMAT_PREFIX)


def _check_small_files(files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        if name not in SMALL_FILES or len(content) > SMALL_FILES[name]:
            raise OutputError(
                f"{name} ({len(content)} bytes) cannot go into a package: allowed are "
                + ", ".join(f"{known} (<= {limit})" for known, limit in SMALL_FILES.items())
            )
