"""A package: the one directory that a party hands to the other; `writing` writes it.

It holds `manifest.json`, `manifest.sha256`, the weights, and a few small files from a fixed list
(docs/package-format.md). Nothing in it is executed or unpickled. Opening checks, in this order:
names, sizes, hashes, and only then what the files say.

What is not covered: the hashes show that a package is whole, not who made it. That is what a
signature is for (signing.py), and the reader's `Trust`; a reader without one opens packages of
anybody.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar, final, overload

from torch import Tensor

from blindtune.errors import ConfigError, MismatchError, PackageError
from blindtune.exchange.files import (
    open_regular,
    printable,
    read_exactly,
    read_verified,
    verify,
)
from blindtune.exchange.packages.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    AdapterManifest,
    BottomManifest,
    EmulatorManifest,
    Manifest,
    decode_manifest,
    package_id,
)
from blindtune.exchange.packages.signing import (
    SIGNATURE_NAME,
    Signature,
    Trust,
    read_signature,
)
from blindtune.exchange.tensors import (
    MAX_TENSORS,
    Expected,
    TensorFacts,
    check_expected,
    numbers,
    read_header,
    read_tensors,
)
from blindtune.places import located

DIGEST_NAME = "manifest.sha256"
MAX_PACKAGE_BYTES = 256 << 30
MAX_SHARDS = 999
# Every file that may accompany the weights, and the most bytes that it may have.
SMALL_FILES = {
    "tokenizer.json": 64 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
    "LICENSE": 1 << 20,
    "README.md": 1 << 20,
}
_SHARD = re.compile(r"weights-([0-9]{5})-of-([0-9]{5})\.safetensors")

ManifestT = TypeVar("ManifestT", bound=Manifest, covariant=True)
Kind = Literal["emulator", "adapter", "bottom", "any"]


@final
@dataclass(frozen=True, kw_only=True)
class Package(Generic[ManifestT]):
    """A package whose every byte was checked against its manifest when it was opened.

    Attributes:
        path: its directory.
        id: the package id; it pins every byte of every file.
        manifest: what it says about itself.
        header: facts of every tensor, of all shards.
        shards: tensor names by weights file.
        signature: who signed it; None if nobody did.
    """

    path: Path
    id: str
    manifest: ManifestT
    header: Mapping[str, TensorFacts]
    shards: Mapping[str, tuple[str, ...]]
    signature: Signature | None = None

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return numbers(self.header)

    @property
    def file_bytes(self) -> int:
        """Of all files that the manifest lists."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def read_tensors(self, expected: Expected) -> dict[str, Tensor]:
        """Read exactly the expected tensors (shape and dtype by name), all of them finite.

        What is read is hashed once more, so files exchanged since opening are refused.

        Raises:
            MismatchError: other names, shapes or dtypes than expected; nothing was allocated.
            PackageError: a value is NaN or infinite, or a file changed since opening.
        """
        check_expected(self.header, expected, self.path)
        tensors: dict[str, Tensor] = {}
        for file, names in self.shards.items():
            wanted = {name: expected[name] for name in names}
            stated = self.manifest.files[file].sha256
            tensors |= read_tensors(self.path / file, wanted, sha256=stated)
        return tensors

    def read_file(self, name: str) -> bytes:
        """Read one of the small files (a name in `manifest.files`), checked once more.

        Raises:
            PackageError: the package has no such file, or it changed since opening.
        """
        if name not in SMALL_FILES or name not in self.manifest.files:
            raise PackageError(
                f"{self.path}: expected a file {printable(name)} in the package, there "
                "is none: ask for a package that has it"
            )
        entry = self.manifest.files[name]
        return read_verified(self.path / name, size=entry.bytes, sha256=entry.sha256)


@overload
def open_package(
    directory: Path | str,
    kind: Literal["emulator"],
    *,
    max_bytes: int = ...,
    trust: Trust | None = ...,
) -> Package[EmulatorManifest]: ...
@overload
def open_package(
    directory: Path | str,
    kind: Literal["adapter"],
    *,
    max_bytes: int = ...,
    trust: Trust | None = ...,
) -> Package[AdapterManifest]: ...
@overload
def open_package(
    directory: Path | str,
    kind: Literal["bottom"],
    *,
    max_bytes: int = ...,
    trust: Trust | None = ...,
) -> Package[BottomManifest]: ...
@overload
def open_package(
    directory: Path | str,
    kind: Literal["any"] = ...,
    *,
    max_bytes: int = ...,
    trust: Trust | None = ...,
) -> Package[Manifest]: ...
def open_package(
    directory: Path | str,
    kind: Kind = "any",
    *,
    max_bytes: int = MAX_PACKAGE_BYTES,
    trust: Trust | None = None,
) -> Package[Manifest]:
    """Open a package that the other party made, trusting none of it.

    Args:
        directory: where it is.
        kind: which kind of package is wanted.
        max_bytes: refuse a package whose files are larger together.
        trust: whose packages are opened; None: anybody's.

    Raises:
        ConfigError: there is no such directory.
        PackageError: anything in it is not as docs/package-format.md demands.
        MismatchError: it is a sound manifest of another kind.
        PolicyError: nobody whom `trust` names signed it, or it is older than one seen before.
    """
    path = located(directory)
    names, manifest_bytes, manifest, signature = _admitted(path, trust)
    if kind != "any" and manifest.format != f"blindtune-{kind}":
        raise MismatchError(
            f"{path}: expected {'a' if kind == 'bottom' else 'an'} {kind} package, this is a "
            f"{manifest.format} package: give the other directory"
        )
    weights = _check_entries(path, manifest, names, max_bytes)
    for name, entry in manifest.files.items():
        verify(path / name, size=entry.bytes, sha256=entry.sha256)
    (header, shards), identity = _read_headers(path, weights), package_id(manifest_bytes)
    if trust is not None:
        trust.check_order(path, signature, manifest, identity)
    return Package(
        path=path,
        id=identity,
        manifest=manifest,
        header=header,
        shards=shards,
        signature=signature,
    )


def package_kind(directory: Path | str, *, trust: Trust | None = None) -> str:
    """What a package says it is: emulator, adapter or bottom; none of its other files is read.

    Raises:
        ConfigError, PackageError, PolicyError: as for `open_package`, which is to check the rest.
    """
    _, _, manifest, _ = _admitted(located(directory), trust)
    return str(manifest.format).removeprefix("blindtune-")


def _admitted(
    path: Path, trust: Trust | None
) -> tuple[set[str], bytes, Manifest, Signature | None]:
    """Names of all files, the manifest's bytes, what it says, and who signed it."""
    try:
        names = _list_names(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}): check its permissions"
        ) from error
    _check_names(path, names)
    manifest_bytes = read_manifest(path)
    signature = read_signature(path, manifest_bytes) if SIGNATURE_NAME in names else None
    if trust is not None:  # before a byte of what it says is parsed
        signature = trust.admit(path, signature)
    manifest = decode_manifest(manifest_bytes)
    if signature is not None and signature.package != manifest.format:
        raise PackageError(
            f"{path}: signed as a {signature.package} package, this is a {manifest.format} "
            "package: ask for the package again"
        )
    return names, manifest_bytes, manifest, signature


def _read_headers(
    path: Path, weights: Iterable[str]
) -> tuple[dict[str, TensorFacts], dict[str, tuple[str, ...]]]:
    """Facts of every tensor, and tensor names by weights file."""
    header: dict[str, TensorFacts] = {}
    shards: dict[str, tuple[str, ...]] = {}
    for name in weights:
        found = read_header(path / name)
        if len(header) + len(found) > MAX_TENSORS:
            raise PackageError(
                f"{path / name}: expected at most {MAX_TENSORS} tensors in all shards, got more: "
                "ask for the package again"
            )
        twice = next((tensor for tensor in found if tensor in header), None)
        if twice is not None:
            raise PackageError(
                f"{path / name}: {twice} is in another shard too: ask for the package again"
            )
        header |= found
        shards[name] = tuple(found)
    return header, shards


def package_files(package: Package[Manifest]) -> list[str]:
    """Names of all files of a package, what vouches for the others first."""
    signature = [SIGNATURE_NAME] if package.signature is not None else []
    return [MANIFEST_NAME, DIGEST_NAME, *signature, *sorted(package.manifest.files)]


def can_hold(name: str) -> bool:
    """Whether some package has a file of this name."""
    own = (MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME, "weights.safetensors")
    return name in own or name in SMALL_FILES or _SHARD.fullmatch(name) is not None


def shard_names(count: int) -> list[str]:
    """Of the weights files, when there are so many."""
    if count == 1:
        return ["weights.safetensors"]
    return [f"weights-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def digest_line(manifest_bytes: bytes) -> bytes:
    """The content of manifest.sha256, in the form that `sha256sum --check` reads."""
    return f"{hashlib.sha256(manifest_bytes).hexdigest()}  {MANIFEST_NAME}\n".encode()


def _check_names(path: Path, names: Collection[str]) -> None:
    """Whether there is a package at all."""
    missing = [name for name in (MANIFEST_NAME, DIGEST_NAME) if name not in names]
    if len(missing) == 2:
        raise PackageError(
            f"{path}: expected a package, this directory is none (it has no {MANIFEST_NAME}): name "
            "the one that emulate, tune or serve has made"
        )
    if missing:
        raise PackageError(f"{path}: {missing[0]} is missing: ask for the package again")


def _list_names(path: Path) -> set[str]:
    """Names in the directory, which may hold regular files only."""
    if path.is_symlink():
        raise PackageError(f"{path}: is a symbolic link: give the directory itself")
    if not path.is_dir():
        raise ConfigError(f"{path}: expected a package, no such directory: check the path")
    names: set[str] = set()
    with os.scandir(path) as entries:
        for entry in entries:
            if len(names) > MAX_SHARDS + 20:
                raise PackageError(f"{path}: too many files for a package: ask for it again")
            if not entry.is_file(follow_symlinks=False):
                raise PackageError(
                    f"{path}: {printable(entry.name)} is a link, a directory or a device; "
                    "a package holds only regular files: ask for the package again"
                )
            names.add(entry.name)
    return names


def read_manifest(path: Path) -> bytes:
    """The bytes of a package's manifest; PackageError if its hash beside it is another."""
    handle, size = open_regular(path / MANIFEST_NAME)
    with handle:
        if size > MAX_MANIFEST_BYTES:
            raise PackageError(
                f"{path / MANIFEST_NAME}: {size} bytes, at most {MAX_MANIFEST_BYTES} are allowed: "
                "ask for the package again"
            )
        manifest_bytes = read_exactly(handle, size, path / MANIFEST_NAME)
    line = digest_line(manifest_bytes)
    handle, size = open_regular(path / DIGEST_NAME)
    with handle:
        if size != len(line) or read_exactly(handle, size, path / DIGEST_NAME) != line:
            raise PackageError(
                f"{path}: {DIGEST_NAME} is not the hash of {MANIFEST_NAME}: one of them is "
                "altered, ask for the package again"
            )
    return manifest_bytes


def _check_entries(path: Path, manifest: Manifest, names: set[str], max_bytes: int) -> list[str]:
    """Check names and sizes against the manifest; return the weights files in order."""
    listed = set(manifest.files)
    weights = sorted(listed - set(SMALL_FILES))
    if weights != shard_names(max(1, len(weights))) or len(weights) > MAX_SHARDS:
        raise _disagreement(path, "its weights files are not a complete set", weights)
    if missing := listed - names:
        raise _disagreement(path, "files are missing", missing)
    if extra := names - listed - {MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME}:
        raise _disagreement(path, "files are not in the manifest", extra)
    large = [
        n for n, limit in SMALL_FILES.items() if n in listed and manifest.files[n].bytes > limit
    ]
    if large:
        raise _disagreement(path, "files are too large", large)
    total = sum(entry.bytes for entry in manifest.files.values())
    if total > max_bytes:
        raise PackageError(
            f"{path}: {total} bytes, at most {max_bytes} were allowed: raise the limit only if "
            "you expect a package of that size"
        )
    return weights


def _disagreement(path: Path, what: str, names: Iterable[str]) -> PackageError:
    shown = printable(", ".join(sorted(names)[:5]) or "none")
    return PackageError(f"{path}: {what} ({shown}): ask for the package again")
