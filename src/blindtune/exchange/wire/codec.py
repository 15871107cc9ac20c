"""Messages to frames and back (docs/wire-format.md); what is read is read with suspicion.

A message is a msgpack header and a payload of raw tensors, cut into frames of at most 1 MiB. The
first frame states both sizes; they are checked against the limits of the message's kind before
anything is allocated, and every frame carries a checksum.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from blindtune.errors import ConfigError, VerificationError
from blindtune.exchange.files import printable
from blindtune.exchange.tensors import is_finite
from blindtune.exchange.wire.messages import (
    HIDDEN_FIELDS,
    KINDS,
    PROTOCOL_VERSION,
    WITH_TENSORS,
    Message,
    Precision,
)

FRAME_BYTES = 1 << 20
MAGIC = b"BTXF"
MAX_PLAIN_HEADER_BYTES = 8 << 10
MAX_TENSOR_HEADER_BYTES = 64 << 10

# magic, version, kind, flags (0), exchange, header bytes, payload bytes, position, crc32
_HEAD = struct.Struct("<4sBBHIIQQ")
_CRC = struct.Struct("<I")
HEAD_BYTES = _HEAD.size + _CRC.size
BODY_BYTES = FRAME_BYTES - HEAD_BYTES
_ALIGN = 8
_MAX_EXPONENT = 120

_Dtype = Literal["float32", "float16", "int8", "int64", "int32"]
_EXACT: dict[torch.dtype, _Dtype] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
}
_STORED = {name: getattr(torch, name) for name in get_args(_Dtype)}
_NUMBERS = {type_: number for number, type_ in KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class MessageLimits:
    """What a reader accepts."""

    max_payload_bytes: int = 64 << 20
    """Bytes of the tensors of one message; in memory int8 takes four times as much."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 1 << 10 <= self.max_payload_bytes <= 2**31 - 1:
            raise ConfigError(
                f"max_payload_bytes must be between 1024 and 2147483647, not "
                f"{self.max_payload_bytes}"
            )


class _Facts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a tensor is stored: value = stored x 2^-exponent, or stored x its row's scale (int8)."""

    dtype: _Dtype
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=2**31 - 1)], ...], Meta(min_length=1, max_length=4)
    ]
    exponent: Annotated[int, Meta(ge=-_MAX_EXPONENT, le=_MAX_EXPONENT)] = 0

    def stored_bytes(self) -> int:
        """Bytes in the payload, padding included; a Python integer, so it cannot overflow."""
        size: int = math.prod(self.shape) * _STORED[self.dtype].itemsize
        if self.dtype == "int8":
            size += 4 * math.prod(self.shape[:-1])
        return size + -size % _ALIGN


def encode(message: Message, exchange: int) -> Iterator[bytes]:
    """The frames of a message; they are made one at a time, as they are asked for.

    Args:
        message: its tensors may be on any device; they must not change until all is sent.
        exchange: the number that ties a reply to its request on one stream, below 2**32.

    Raises:
        VerificationError: a tensor holds NaN or infinite values, is empty, or has a type that no
            reader would accept.
    """
    facts, parts = [], []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, Tensor):
            precision = getattr(message, "precision", None) if name in HIDDEN_FIELDS else None
            fact, stored = _store(name, value.detach().cpu(), precision)
            facts.append(fact)
            parts.append(stored)
    header = msgspec.msgpack.encode(message, enc_hook=_each(facts))
    payload = _join(facts, parts)
    return _cut(_NUMBERS[type(message)], exchange, header, payload)


def stored_bytes(message: Message) -> int:
    """Bytes of a message's tensors as `encode` writes them, without encoding them."""
    total = 0
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, Tensor):
            lossy = getattr(message, "precision", None) if name in HIDDEN_FIELDS else None
            kind = lossy or _EXACT[value.dtype]
            total += _Facts(dtype=kind, shape=tuple(value.shape)).stored_bytes()
    return total


def held_bytes(message: Message) -> int:
    """Bytes of a message's tensors in memory."""
    values = (getattr(message, name) for name in message.__struct_fields__)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def row_bytes(precision: Precision, width: int) -> int:
    """Of one token's states [width] on the wire."""
    return {"float32": 4 * width, "float16": 2 * width, "int8": width + 4}[precision]


def _each(facts: list[_Facts]) -> Callable[[Any], Any]:
    """A hook that writes the next facts in the place of each tensor, in the order of fields."""
    order = iter(facts)
    return lambda _tensor: next(order)


def _store(name: str, tensor: Tensor, precision: Precision | None) -> tuple[_Facts, list[Tensor]]:
    """Facts and stored tensors, in the order in which they lie in the payload."""
    if tensor.numel() == 0 or not 1 <= tensor.ndim <= 4:
        raise VerificationError(
            f"{name} has shape {list(tensor.shape)}: a message holds tensors of 1 to 4 dimensions, "
            "none of them empty"
        )
    if tensor.is_floating_point():
        tensor = tensor.float()
    if tensor.dtype not in _EXACT:
        raise VerificationError(
            f"{name} is {tensor.dtype}: a message holds floating-point, int64 or int32 tensors"
        )
    if not is_finite(tensor):
        raise VerificationError(
            f"{name} holds NaN or infinite values: nothing was sent; lower the learning rate"
        )
    shape = tuple(tensor.shape)
    if precision not in ("float16", "int8"):
        return _Facts(_EXACT[tensor.dtype], shape), [tensor]
    low, high = torch.aminmax(tensor)
    largest = max(abs(float(low)), abs(float(high)))
    if largest >= 2.0**127:  # rounding could take it beyond float32
        raise VerificationError(
            f"{name} holds a value of {largest:.3g}, {precision} takes less than 1.7e38: nothing "
            "was sent; lower the learning rate"
        )
    if precision == "float16":
        # Scaled so that the largest value is just in range: tiny gradients keep their digits.
        exponent = min(15 - math.frexp(largest)[1], _MAX_EXPONENT) if largest else 0
        return _Facts("float16", shape, exponent), [(tensor * 2.0**exponent).half()]
    scale = (tensor.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    whole = (tensor / scale[..., None]).round().clamp_(-127, 127)
    return _Facts("int8", shape), [scale, whole.to(torch.int8)]


def _join(facts: list[_Facts], parts: list[list[Tensor]]) -> memoryview:
    payload = torch.zeros(sum(fact.stored_bytes() for fact in facts), dtype=torch.uint8)
    end = 0
    for fact, stored in zip(facts, parts, strict=True):
        begin, end = end, end + fact.stored_bytes()
        for tensor in stored:
            payload[begin : begin + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
            begin += tensor.nbytes
    return payload.numpy().data


def _cut(kind: int, exchange: int, header: bytes, payload: memoryview) -> Iterator[bytes]:
    total = len(header) + len(payload)
    for position in range(0, total, BODY_BYTES):
        end = min(position + BODY_BYTES, total)
        shift = len(header)
        body = (header[position:end], payload[max(position - shift, 0) : max(end - shift, 0)])
        head = _HEAD.pack(MAGIC, PROTOCOL_VERSION, kind, 0, exchange, shift, len(payload), position)
        crc = zlib.crc32(body[1], zlib.crc32(body[0], zlib.crc32(head)))
        yield b"".join((head, _CRC.pack(crc), *body))


class FrameReader:
    """Puts the messages of one stream together; after an error the stream must be closed.

    Args:
        accepts: the kinds that the other party may send.
        limits: sizes, checked before memory is taken.
        admit: called with the size of each message before its buffer is made; may raise.
    """

    def __init__(
        self,
        *,
        accepts: frozenset[int],
        limits: MessageLimits | None = None,
        admit: Callable[[int], None] | None = None,
    ) -> None:
        self._accepts = accepts
        self._limits = limits or MessageLimits()
        self._admit = admit
        self._stated: tuple[int, int, int, int] | None = None
        self._filled = 0
        self._header = bytearray()
        self._payload = torch.empty(0, dtype=torch.uint8)

    @property
    def amid(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._stated is not None

    def feed(self, frame: bytes) -> tuple[int, Message] | None:
        """Take the next frame; the exchange number and the message when it was the last one.

        Raises:
            VerificationError: the frame is malformed, altered, out of place, of another version,
                too large, or the message in it is not one of the protocol.
        """
        if not HEAD_BYTES < len(frame) <= FRAME_BYTES:
            raise _bad(f"{len(frame)} bytes, expected {HEAD_BYTES + 1} to {FRAME_BYTES}")
        magic, version, kind, flags, *sizes, position = _HEAD.unpack_from(frame)
        if magic != MAGIC:
            raise _bad("it does not begin as a frame does")
        if version != PROTOCOL_VERSION:
            raise _bad(
                f"version {version}, this program speaks version {PROTOCOL_VERSION}: "
                "install the release that the other party has"
            )
        view = memoryview(frame)
        crc = zlib.crc32(view[HEAD_BYTES:], zlib.crc32(view[: _HEAD.size]))
        if _CRC.unpack_from(frame, _HEAD.size) != (crc,) or flags:
            raise _bad("altered on its way (checksum)" if not flags else f"unknown flags {flags}")
        if self._stated is None:
            self._begin(kind, *sizes)
        if self._stated != (kind, *sizes) or position != self._filled:
            raise _bad("it does not continue the message that began")
        self._fill(view[HEAD_BYTES:])
        if self._filled < sizes[1] + sizes[2]:
            return None
        message = _parse(kind, bytes(self._header), self._payload)
        self._stated = None
        self._header, self._payload = bytearray(), torch.empty(0, dtype=torch.uint8)
        return sizes[0], message

    def _begin(self, kind: int, exchange: int, header_bytes: int, payload_bytes: int) -> None:
        if kind not in self._accepts:
            name = KINDS[kind].__name__ if kind in KINDS else "unknown"
            raise _bad(f"a message of kind {kind} ({name}) is not expected here")
        tensors = kind in WITH_TENSORS
        most = MAX_TENSOR_HEADER_BYTES if tensors else MAX_PLAIN_HEADER_BYTES
        if not 1 <= header_bytes <= most:
            raise _bad(f"a header of {header_bytes} bytes, expected 1 to {most}")
        most = self._limits.max_payload_bytes if tensors else 0
        if payload_bytes > most:
            raise _bad(
                f"a payload of {payload_bytes} bytes, at most {most} are allowed: "
                "send smaller batches"
            )
        if self._admit is not None:
            self._admit(header_bytes + payload_bytes)
        self._header = bytearray(header_bytes)
        self._payload = torch.empty(payload_bytes, dtype=torch.uint8)
        self._stated = (kind, exchange, header_bytes, payload_bytes)
        self._filled = 0

    def _fill(self, body: memoryview) -> None:
        split, total = len(self._header), len(self._header) + len(self._payload)
        if len(body) != min(BODY_BYTES, total - self._filled):
            raise _bad(f"{len(body)} bytes where {min(BODY_BYTES, total - self._filled)} belong")
        begin, end = self._filled, self._filled + len(body)
        if begin < split:
            self._header[begin:end] = body[: split - begin]
            body = body[split - begin :]
        if len(body):
            target = self._payload.numpy().data
            target[end - len(body) - split : end - split] = body
        self._filled = end


def _parse(kind: int, header: bytes, payload: Tensor) -> Message:
    end = 0

    def load(_type: type, stated: Any) -> Tensor:
        nonlocal end
        facts = msgspec.convert(stated, _Facts)
        begin, end = end, end + facts.stored_bytes()
        if end > len(payload):
            raise ValueError(f"tensors of {end} bytes in a payload of {len(payload)}")
        return _restore(facts, payload[begin:end])

    try:
        message = msgspec.msgpack.decode(header, type=KINDS[kind], dec_hook=load)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _bad(f"its header is malformed ({error})") from error
    if end != len(payload):
        raise _bad(f"tensors of {end} bytes in a payload of {len(payload)}")
    return message


def _restore(facts: _Facts, stored: Tensor) -> Tensor:
    count, rows = math.prod(facts.shape), math.prod(facts.shape[:-1])
    if facts.dtype == "int8":
        scale = stored[: 4 * rows].view(torch.float32)
        whole = stored[4 * rows : 4 * rows + count].view(torch.int8)
        tensor = whole.view(rows, -1) * scale[:, None]
    else:
        dtype = _STORED[facts.dtype]
        tensor = stored[: count * dtype.itemsize].view(dtype)
        if facts.dtype == "float16":
            tensor = tensor.float() * 2.0**-facts.exponent
    if not is_finite(tensor):
        raise ValueError("a tensor holds NaN or infinite values")
    return tensor.view(facts.shape)


def _bad(reason: str) -> VerificationError:
    return VerificationError(f"a frame was refused: {printable(reason, limit=300)}")
