"""Safetensors files written by a stranger: a strict header, then exactly the expected tensors.

A file is accepted only in the one spelling that the safetensors library itself writes without
metadata: compact JSON, tensors listed in the order of their data, no gap, no overlap, no spare
byte. So two readers cannot disagree about a file, and nothing can hide in it. Sizes are checked
with Python integers before any tensor is allocated.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from blindtune.errors import MismatchError, OutputError, PackageError
from blindtune.exchange.files import (
    CHUNK_BYTES,
    check_digest,
    fill_exactly,
    open_regular,
    printable,
    read_exactly,
)

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 4
MAX_NAME = 256

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")
_SHOWN = 3
_FEW = 256
"""Tensors of fewer values cannot slow anything down."""

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class TensorFacts(NamedTuple):
    """What a header says of one tensor; begin and end are byte offsets into the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def numbers(header: Mapping[str, TensorFacts]) -> int:
    """How many numbers the tensors of a header, or of a part of one, hold."""
    return sum(math.prod(facts.shape) for facts in header.values())


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: Literal["F32", "F16", "BF16"]
    shape: Annotated[
        list[Annotated[int, Meta(ge=1, le=2**63 - 1)]], Meta(max_length=MAX_DIMENSIONS)
    ]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


def read_header(path: Path) -> dict[str, TensorFacts]:
    """Read and check a safetensors header; no tensor is read.

    Returns:
        Facts by tensor name, in the order of the data.

    Raises:
        PackageError: anything but the one accepted spelling, or beyond the limits.
    """
    handle, size = open_regular(path)
    with handle:
        return _parse(_raw_header(handle, size, path), size, path)


def check_expected(found: Mapping[str, TensorFacts], expected: Expected, source: Path) -> None:
    """Raise MismatchError unless names, shapes and dtypes are exactly the expected ones."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {_CODES[facts.dtype]}{list(facts.shape)}, expected "
        f"{_CODES.get(expected[name][1], expected[name][1])}{list(expected[name][0])}"
        for name, facts in found.items()
        if name in expected and (facts.shape, facts.dtype) != expected[name]
    ]
    problems = [
        f"{len(names)} {word} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for word, names in (("missing", missing), ("unexpected", unexpected), ("different", wrong))
        if names
    ]
    if problems:
        raise MismatchError(
            f"{source}: the tensors do not fit: {'; '.join(problems)}: "
            "use the package that was made for this model"
        )


def read_tensors(path: Path, expected: Expected, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Read exactly the expected tensors, all finite, with no more memory than they need.

    Args:
        path: a safetensors file.
        expected: shape and dtype by tensor name: every one must be there, and no other.
        sha256: when given, the hash in hex of what is read here must be this one: a file that
            was exchanged after an earlier check is refused.

    Raises:
        PackageError: the file is malformed or altered, or a value is NaN or infinite.
        MismatchError: the file is sound, but holds other tensors; nothing was allocated.
    """
    handle, size = open_regular(path)
    with handle:
        raw = _raw_header(handle, size, path)
        header = _parse(raw, size, path)
        check_expected(header, expected, path)
        digest = hashlib.sha256(raw)
        tensors = {}
        for name, facts in header.items():
            tensors[name] = torch.empty(facts.shape, dtype=facts.dtype)
            view = _bytes_of(tensors[name])
            fill_exactly(handle, view, path)
            if sha256 is not None:
                digest.update(view)
    if sha256 is not None:
        check_digest(path, digest.hexdigest(), sha256)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise PackageError(
                f"{path}: {name} holds NaN or infinite values: ask for the package again"
            )
        if is_flooded(tensor):
            raise PackageError(
                f"{path}: {name} is full of subnormal values, with which processors compute many "
                "times slower: ask for the package again"
            )
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; needs no memory beyond the tensor."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def is_flooded(tensor: Tensor) -> bool:
    """Whether more than a sixteenth of a tensor is subnormal where it is computed, in float32.

    Real weights have hardly any. float16 is computed in float32, where its smallest values are
    normal.
    """
    if tensor.dtype == torch.float16 or tensor.numel() < _FEW:
        return False
    tiny, count = torch.finfo(torch.float32).tiny, 0
    for part in tensor.detach().reshape(-1).split(CHUNK_BYTES):
        size = part.abs()
        count += int(((size > 0) & (size < tiny)).sum())
    return 16 * count > tensor.numel()


def shard(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Check tensors and deal them into shards of at most `max_bytes` of data each.

    A single larger tensor gets a shard of its own. Within a shard, larger dtypes come first,
    then names in order, so that every tensor is aligned.

    Raises:
        OutputError: a name, dtype, shape or value that no reader would accept.
    """
    if not tensors:
        raise OutputError("no tensor to write: a package needs at least one")
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        _check_writable(name, tensor)
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def serialize(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file in chunks, one tensor on the CPU at a time."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = _Entry(_CODES[tensor.dtype], list(tensor.shape), (begin, end))  # type: ignore[arg-type]
    header = _spell(entries)
    if len(tensors) > MAX_TENSORS or len(header) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{len(tensors)} tensors are too many for one file: choose a smaller shard size"
        )
    yield struct.pack("<Q", len(header)) + header
    for tensor in tensors.values():
        view = _bytes_of(tensor.detach().cpu().contiguous())
        for begin in range(0, len(view), 16 * CHUNK_BYTES):
            yield view[begin : begin + 16 * CHUNK_BYTES]


def _check_writable(name: str, tensor: Tensor) -> None:
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise OutputError(f"`{name}` is not a tensor name that a package can hold: rename it")
    if tensor.dtype not in _CODES:
        raise OutputError(
            f"{name} is {tensor.dtype}, a package holds float32, float16 or bfloat16: convert it"
        )
    if tensor.ndim > MAX_DIMENSIONS or tensor.numel() == 0:
        raise OutputError(
            f"{name} has shape {list(tensor.shape)}; a package holds tensors of at most "
            f"{MAX_DIMENSIONS} dimensions and none that is empty: leave it out"
        )
    if not is_finite(tensor.detach()):
        raise OutputError(
            f"{name} holds NaN or infinite values: nothing was written; "
            "if it was trained, lower the learning rate and train again"
        )
    if is_flooded(tensor):
        raise OutputError(
            f"{name} is full of subnormal values, no reader would accept that: set them to 0"
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _spell(entries: Mapping[str, _Entry]) -> bytes:
    """The one accepted spelling of a header: compact, padded with spaces to 8 bytes."""
    header = msgspec.json.encode(entries)
    return header + b" " * (-len(header) % 8)


def _malformed(path: Path, reason: str) -> PackageError:
    return PackageError(f"{path}: {printable(reason)}: ask for the package again")


def _raw_header(handle: BinaryIO, size: int, path: Path) -> bytes:
    """The length field and the header, as they stand in the file."""
    if size < 8:
        raise _malformed(path, f"{size} bytes are too few for a safetensors file")
    field = read_exactly(handle, 8, path)
    length = struct.unpack("<Q", field)[0]
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise _malformed(
            path,
            f"the header claims {length} bytes of a file of {size}; "
            f"at most {MAX_HEADER_BYTES} are allowed",
        )
    return field + read_exactly(handle, length, path)


def _parse(raw: bytes, size: int, path: Path) -> dict[str, TensorFacts]:
    text = raw[8:]
    if text.count(b"{") > MAX_TENSORS + 1:
        raise _malformed(path, f"more than {MAX_TENSORS} tensors")
    try:
        entries = msgspec.json.decode(text, type=dict[str, _Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(path, f"the header is malformed ({error})") from error
    if not entries:
        raise _malformed(path, "no tensor in it")
    facts, position = {}, 0
    for name, entry in entries.items():
        if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
            raise _malformed(path, f"`{name[:80]}` is not a tensor name")
        begin, end = entry.data_offsets
        dtype = DTYPES[entry.dtype]
        need = math.prod(entry.shape) * dtype.itemsize
        if begin != position or end - begin != need:
            raise _malformed(
                path,
                f"{name} is said to lie at {begin}..{end}, but {entry.dtype}{entry.shape} "
                f"after the tensor before it lies at {position}..{position + need}",
            )
        facts[name] = TensorFacts(dtype, tuple(entry.shape), begin, end)
        position = end
    if len(raw) + position != size:
        raise _malformed(path, f"{size} bytes, but header and tensors make {len(raw) + position}")
    if _spell(entries) != text:
        raise _malformed(
            path, "the header is not as the safetensors library writes it (a name given twice?)"
        )
    return facts
