"""How a text, its token ids or its labels could hide in bytes."""

import struct

import msgspec


def numbers(values):
    """Whole numbers below 2**15 in every usual code."""
    for code in ("b", "h", "i", "q", "f", "e", "d"):
        fits = [v for v in values if v < 128 or code != "b"]
        for order in "<>":
            yield b"".join(struct.pack(order + code, v) for v in fits)
    yield b"".join(varint(v) for v in values)
    yield ",".join(map(str, values)).encode()
    yield " ".join(map(str, values)).encode()
    yield msgspec.msgpack.encode(list(values))


def varint(value):
    """LEB128, as protocol buffers write numbers."""
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def spellings(text, ids):
    """A text in clear or as the ids of its tokens."""
    for code in ("utf-8", "utf-16-le", "utf-16-be"):
        yield text.encode(code)
    yield from numbers(ids)
