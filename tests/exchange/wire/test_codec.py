import math
import struct
import zlib

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_vendor import batch, opening

from blindtune.errors import VerificationError
from blindtune.exchange.wire import codec
from blindtune.exchange.wire.codec import (
    FRAME_BYTES,
    HEAD_BYTES,
    FrameReader,
    MessageLimits,
    encode,
)
from blindtune.exchange.wire.messages import (
    KINDS,
    REPLIES,
    REQUESTS,
    Backward,
    Batch,
    Busy,
    Cancel,
    Checkpoint,
    Forward,
    Hello,
    Predictions,
    Step,
    equal,
)

BOTH = REQUESTS | REPLIES


def decode(frames, **options):
    reader = FrameReader(accepts=options.pop("accepts", BOTH), **options)
    for frame in frames:
        found = reader.feed(frame)
    assert found is not None
    assert not reader.amid
    return found


def seal(head, body):
    """A frame with a right checksum, as a stranger could make it."""
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def forge(kind=12, header=b"", payload=0, position=0, body=None, version=1, magic=b"BTXF", flags=0):
    head = struct.pack("<4sBBHIIQQ", magic, version, kind, flags, 7, len(header), payload, position)
    return seal(head, header if body is None else body)


def backward(values):
    return Backward(sequence=2, forward=1, gradient_TD=values)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 5))


@st.composite
def rows(draw):
    count, width = draw(shapes)
    values = draw(st.lists(finite, min_size=count * width, max_size=count * width))
    return torch.tensor(values).view(count, width)


plain = st.one_of(
    st.builds(Step, sequence=st.integers(1, 2**53)),
    st.builds(Busy, retry_after_seconds=st.floats(0, 86400)),
    st.builds(Hello, program=st.just("blindtune 0.1.0")),
    st.builds(Checkpoint, sequence=st.integers(0, 2**53)),
    st.just(Cancel()),
    st.builds(opening),
)
exact = st.one_of(
    plain,
    st.builds(Predictions, logits_BC=rows()),
    rows().map(
        lambda r: Forward(sequence=1, precision="float32", hidden_TD=r, lengths=(1,) * len(r))
    ),
    rows().map(
        lambda r: Batch(
            sequence=5, precision="float32", hidden_TD=r, lengths=(len(r),), labels=r[:1, 0]
        )
    ),
)


@given(message=exact, exchange=st.integers(0, 2**32 - 1))
def test_what_is_exact_comes_back_bit_by_bit(message, exchange):
    number, again = decode(encode(message, exchange))
    assert number == exchange
    assert equal(message, again)


@given(values=rows(), precision=st.sampled_from(["float16", "int8"]))
@example(values=torch.tensor([[3.402e38]]), precision="float16")
@example(values=torch.tensor([[-(2.0**127)]]), precision="int8")
@example(values=torch.tensor([[1.7e38, -1.7e38, 0.0]]), precision="float16")
@example(values=torch.tensor([[1.7e38, -1.7e38, 1e-45]]), precision="int8")
@example(values=torch.tensor([[1e-45]]), precision="float16")
def test_lossy_precisions_have_a_known_error(values, precision):
    message = Backward(sequence=2, forward=1, precision=precision, gradient_TD=values)
    if values.abs().max() >= 2.0**127:
        with pytest.raises(VerificationError, match=r"1\.7e38"):
            encode(message, 1)
        return
    _, again = decode(encode(message, 1))
    found = again.gradient_TD.double()
    error = (found - values.double()).abs()
    if precision == "float16":  # a relative 2^-11 down to 2^-29 of the largest value
        largest = float(values.abs().max())
        bound = values.double().abs() * 2**-11 + max(largest * 2**-38, 2.0**-143)
    else:  # half a step of the row's scale
        bound = values.double().abs().amax(-1, keepdim=True) / 127 * 0.5001 + 1e-37
    assert found.isfinite().all()
    assert (error <= bound).all()
    assert again.gradient_TD.dtype == torch.float32


def test_float16_keeps_tiny_gradients_and_large_activations():
    for scale in (1e-12, 1.0, 1e9):
        values = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * scale
        _, again = decode(encode(backward(values), 1))
        assert torch.allclose(again.gradient_TD, values, rtol=2**-10, atol=scale * 1e-7)


def test_numbers_that_half_has_cross_unchanged():
    values = torch.randn(40, 9).half()
    _, again = decode(encode(backward(values), 1))
    assert torch.equal(again.gradient_TD, values.float())


def test_labels_and_logits_are_exact_whatever_the_precision():
    message = Batch(
        sequence=1, precision="int8", hidden_TD=torch.randn(2, 3), lengths=(1, 1),
        labels=torch.tensor([math.pi, 1e-30]),
    )  # fmt: skip
    assert torch.equal(decode(encode(message, 1))[1].labels, message.labels)


def test_a_large_message_spans_frames_and_interleaves_with_nothing():
    message = batch(1, rows=1200, width=1024)
    frames = list(encode(message, 3))
    assert [len(frame) for frame in frames[:-1]] == [FRAME_BYTES] * (len(frames) - 1)
    assert len(frames) == 3
    _, again = decode(frames)
    assert torch.allclose(again.hidden_TD, message.hidden_TD, rtol=2**-10, atol=1e-6)
    bad = [frames[:1] + frames[2:], [frames[0], frames[0]], frames[1:]]
    bad.append([frames[0], *encode(Step(sequence=1), 4)])
    for sequence in bad:
        with pytest.raises(VerificationError):
            decode(sequence)


@pytest.mark.parametrize("message", [Step(sequence=5), backward(torch.randn(2, 3))])
def test_every_flipped_bit_is_noticed(message):
    (frame,) = encode(message, 9)
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerificationError):
            FrameReader(accepts=BOTH).feed(bytes(flipped))


@settings(max_examples=300)
@given(message=exact, data=st.data())
def test_a_mutated_frame_is_refused_or_says_the_same(message, data):
    (frame,) = encode(message, 9)
    mutated = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                mutated[where] ^= data.draw(st.integers(1, 255))
            case "cut":
                del mutated[where : where + data.draw(st.integers(1, 9))]
            case "insert":
                mutated[where:where] = data.draw(st.binary(min_size=1, max_size=9))
        if not mutated:
            break
    try:
        found = FrameReader(accepts=BOTH).feed(bytes(mutated))
    except VerificationError:
        return
    assert found is not None
    assert equal(found[1], message)


@settings(max_examples=300)
@given(message=exact, data=st.data())
def test_a_mutated_body_with_a_right_checksum_never_does_more_than_be_refused(message, data):
    (frame,) = encode(message, 9)
    body = bytearray(frame[HEAD_BYTES:])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = FrameReader(accepts=BOTH).feed(seal(frame[: HEAD_BYTES - 4], bytes(body)))
    except VerificationError:
        return
    assert found is not None
    list(encode(found[1], 1))  # whatever is accepted is finite and can be sent on


@given(junk=st.binary(max_size=200))
def test_junk_is_refused(junk):
    with pytest.raises(VerificationError):
        FrameReader(accepts=BOTH).feed(junk)


def tensor_header(facts, **changes):
    fields = {"kind": "predictions", "logits_BC": facts, **changes}
    return msgspec.msgpack.encode(fields)


GOOD = tensor_header(["float32", [1, 2], 0])


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (forge(version=2, header=b"x"), "version 2"),
        (forge(magic=b"HTTP", header=b"x"), "begin"),
        (forge(flags=1, header=b"x"), "flags"),
        (forge(kind=99, header=b"x"), "kind 99"),
        (forge(header=b""), "bytes, expected"),
        (forge(header=b"\x80"), "malformed"),
        (forge(header=msgspec.msgpack.encode({"kind": "step", "sequence": 0})), "malformed"),
        (forge(header=msgspec.msgpack.encode({"kind": "step", "sequence": "1"})), "malformed"),
        (forge(header=msgspec.msgpack.encode({"kind": "batch", "sequence": 1})), "malformed"),
        (forge(header=msgspec.msgpack.encode({"kind": "step", "sequence": 1, "x": 1})), "unknown"),
        (forge(header=b"\x91" * 8000), "malformed"),
        (forge(header=b"x" * 9000), "header of 9000"),
        (forge(header=b"x", payload=8, body=b"x" * 9), "payload of 8"),
        (forge(kind=17, header=b"x", payload=2**63), "payload of"),
        (forge(header=b"xx", position=1), "continue"),
        (forge(header=b"xx", body=b"xxx"), "belong"),
        (forge(header=b"xx", body=b"x"), "belong"),
        (forge(17, GOOD, 8, body=GOOD + struct.pack("<2f", 1, math.nan)), "NaN"),
        (forge(17, GOOD, 8, body=GOOD + struct.pack("<2f", 1, math.inf)), "NaN"),
        (forge(17, GOOD, 16, body=GOOD + bytes(16)), "tensors of 8"),
    ],
)
def test_forged_frames_are_refused_with_a_reason(frame, reason):
    with pytest.raises(VerificationError, match=reason):
        FrameReader(accepts=BOTH).feed(frame)


@pytest.mark.parametrize(
    "facts",
    [
        ["float32", [1, 2**31 - 1], 0],
        ["float32", [2**31 - 1, 2**31 - 1], 0],
        ["float32", [0, 2], 0],
        ["float32", [], 0],
        ["float32", [1, 1, 1, 1, 2], 0],
        ["float32", [1, -2], 0],
        ["float32", [2], 0],
        ["float64", [1, 1], 0],
        ["int64", [1, 1], 0],
        ["float16", [1, 2], 121],
        ["float16", [1, 2], 0, 1],
        ["int8", [1, 2]],
        "float32",
        None,
    ],
)
def test_forged_tensor_facts_are_refused_without_memory(facts):
    header = tensor_header(facts)
    frame = forge(17, header, 8, body=header + b"\xff\xff\xff\x7f" * 2)
    with pytest.raises(VerificationError):
        FrameReader(accepts=BOTH).feed(frame)


def test_a_scale_that_overflows_is_refused():
    header = tensor_header(["float16", [1, 4], -120])
    frame = forge(17, header, 8, body=header + struct.pack("<4e", 60000, 0, 0, 0))
    with pytest.raises(VerificationError, match="infinite"):
        FrameReader(accepts=BOTH).feed(frame)


def test_sizes_are_checked_before_memory_is_taken(monkeypatch):
    asked = []
    limits = MessageLimits(max_payload_bytes=1 << 20)
    reader = FrameReader(accepts=REQUESTS, limits=limits, admit=asked.append)
    first = next(encode(batch(1, rows=2000, width=1024), 1))
    monkeypatch.setattr(codec.torch, "empty", None)
    with pytest.raises(VerificationError, match="smaller batches"):
        reader.feed(first)
    assert asked == []


def test_a_reply_is_not_a_request():
    (frame,) = encode(Busy(retry_after_seconds=1), 1)
    with pytest.raises(VerificationError, match="Busy"):
        FrameReader(accepts=REQUESTS).feed(frame)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_infinite_is_sent(value):
    with pytest.raises(VerificationError, match="nothing was sent"):
        encode(backward(torch.tensor([[1.0, value]])), 1)


def test_empty_and_strange_tensors_are_not_sent():
    for values in (torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(VerificationError, match="empty"):
            encode(backward(values), 1)


def test_all_kinds_are_in_the_document():
    from pathlib import Path

    text = (Path(__file__).parents[3] / "docs" / "wire-format.md").read_text()
    for number, kind in KINDS.items():
        assert f"| {number} | `{kind.__struct_config__.tag}` |" in text
        for field in kind.__struct_fields__:
            assert f"`{field}`" in text, f"{kind.__name__}.{field}"
