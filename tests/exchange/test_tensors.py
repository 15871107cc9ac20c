"""The reader of strangers' safetensors files, against the library and a slow oracle."""

import hashlib
import json
import struct
import time

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blindtune.errors import MismatchError, OutputError, PackageError
from blindtune.exchange import tensors as t

SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, tensors):
    path.write_bytes(b"".join(t.serialize(t.shard(tensors, 2**40)[0])))
    return path


def test_bytes_are_those_of_the_safetensors_library(tmp_path, tensors):
    path = write(tmp_path / "ours.safetensors", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_reads_what_the_safetensors_library_reads(tmp_path, tensors, expected):
    path = write(tmp_path / "x.safetensors", tensors)
    slow = safetensors.torch.load_file(path)
    fast = t.read_tensors(path, expected, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert fast.keys() == slow.keys() == t.read_header(path).keys()
    for name, tensor in slow.items():
        assert fast[name].dtype == tensor.dtype
        assert torch.equal(fast[name], tensor)
        assert fast[name].shape == t.read_header(path)[name].shape


def test_strided_and_trained_tensors_are_written_by_value(tmp_path):
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    path = write(tmp_path / "x.safetensors", {"a": weight.T, "b": weight[:, 1]})
    read = t.read_tensors(path, {"a": ((4, 3), torch.float32), "b": ((3,), torch.float32)})
    assert torch.equal(read["a"], weight.detach().T)
    assert torch.equal(read["b"], weight.detach()[:, 1])


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({}, 0, "no tensor"),
        ({"a": entry()}, 7, "make"),
        ({"a": entry()}, 9, "make"),
        ({"a": entry("F64", (1,))}, 8, "malformed"),
        ({"a": entry("I8", (8,))}, 8, "malformed"),
        ({"a": entry(shape=(1, 1, 1, 1, 2))}, 8, "malformed"),
        ({"a": entry(shape=(0,), offsets=(0, 0))}, 0, "malformed"),
        ({"a": entry(shape=(-2,))}, 8, "malformed"),
        ({"a": entry(shape=(2**62, 2**62, 2**62, 2**62))}, 8, "lies at"),
        ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, 8, "make"),
        ({"a": entry(shape=(2**63,))}, 8, "malformed"),
        ({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}, 0, "lies at"),
        ({"a": entry(offsets=(8, 0))}, 8, "lies at"),
        ({"a": entry(offsets=(0, 10**30))}, 8, "lies at"),
        ({"a": entry(offsets=(-8, 0))}, 8, "malformed"),
        ({"a": entry(offsets=(8, 16))}, 16, "lies at"),
        ({"a": entry(), "b": entry()}, 8, "lies at"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "lies at"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "lies at"),
        ({"a": entry(offsets=(8, 16)), "b": entry()}, 16, "lies at"),
        ({"a": entry() | {"extra": 1}}, 8, "extra"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
        ({"a": {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}}, 8, "writes it"),
        ({"__metadata__": {"format": "pt"}, "a": entry()}, 8, "malformed"),
        ({"__metadata__": entry()}, 8, "not a tensor name"),
        ({"../a": entry()}, 8, "not a tensor name"),
        ({"a b": entry()}, 8, "not a tensor name"),
        ({"a\n": entry()}, 8, "not a tensor name"),
        ({"ä": entry()}, 8, "not a tensor name"),
        ({"a..b": entry()}, 8, "not a tensor name"),
        ({"": entry()}, 8, "not a tensor name"),
        ({"a" * 257: entry()}, 8, "not a tensor name"),
        ({"a": [entry()]}, 8, "malformed"),
        ([entry()], 8, "malformed"),
    ],
)
def test_a_header_is_refused(safetensors_file, header, size, message):
    with pytest.raises(PackageError, match=message) as caught:
        t.read_header(safetensors_file(header, bytes(size)))
    assert str(caught.value).isprintable()


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '


@pytest.mark.parametrize(
    "raw",
    [
        ONE[:-2],
        ONE + b"        ",
        ONE[:-2] + b"\n\n",
        b"  " + ONE[:-2],
        ONE[:-1] + b"\0",
        ONE.replace(b"[2]", b"[2.0]")[:-2],
        ONE.replace(b"[2]", b"[2e0]")[:-2],
        ONE.replace(b'"a"', b'"\\u0061"'),
        ONE[:-3] + ONE[:-2].replace(b"{", b",", 1),
        ONE.replace(b"[0,8]", b"[0,8]," + b'"data_offsets":[0,8]'),
        ONE.replace(b"[0,8]", b"[NaN,8]"),
        ONE.replace(b"8", b"9" * 100_000),
        ONE.replace(b"8", b"1e999"),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"",
        b"\xff\xfe",
    ],
)
def test_another_spelling_is_refused(safetensors_file, raw):
    assert t.read_header(safetensors_file(ONE, bytes(8)))
    begin = time.monotonic()
    with pytest.raises(PackageError):
        t.read_header(safetensors_file(raw, bytes(8)))
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("length", [0, 1, 57, 2**24 + 1, 2**32, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + ONE + bytes(8))
    with pytest.raises(PackageError):
        t.read_header(path)


def test_a_large_header_is_not_even_read(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", t.MAX_HEADER_BYTES + 1))
        handle.truncate(2**30)
    monkeypatch.setattr(t.msgspec.json, "decode", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(PackageError, match="at most"):
        t.read_header(path)


def test_a_flood_of_tensors_is_refused_before_parsing(safetensors_file, monkeypatch):
    empty = '"shape":[0],"data_offsets":[0,0]}'
    flood = ",".join(f'"t{i}":{{"dtype":"F32",{empty}' for i in range(t.MAX_TENSORS + 1))
    monkeypatch.setattr(t.msgspec.json, "decode", lambda *_, **__: pytest.fail("parsed"))
    begin = time.monotonic()
    with pytest.raises(PackageError, match="more than 100000 tensors"):
        t.read_header(safetensors_file(f"{{{flood}}}".encode()))
    assert time.monotonic() - begin < 1


def test_truncation_at_every_length_is_refused(tmp_path, tensors):
    path = write(tmp_path / "x.safetensors", tensors)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PackageError):
            t.read_header(path)


def test_a_changed_header_never_yields_the_expected_tensors(tmp_path, tensors, expected):
    """Without any hash: three flips of each header byte are refused one way or the other."""
    path = write(tmp_path / "x.safetensors", tensors)
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(end):
        for flip in (0x01, 0x20, 0xFF):
            forged = bytearray(whole)
            forged[position] ^= flip
            path.write_bytes(forged)
            with pytest.raises((PackageError, MismatchError)):
                t.read_tensors(path, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_refused(tmp_path, dtype, value):
    for size in (1, 7, 1000, 70_001):
        for position in {0, size // 2, size - 1}:
            good = torch.randn(size).to(dtype)
            bad = good.clone()
            bad[position] = value
            assert t.is_finite(good)
            assert not t.is_finite(bad)
    with pytest.raises(OutputError, match=r"layer\.weight holds NaN"):
        t.shard({"layer.weight": bad}, 100)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"layer.weight": bad}, path)
    with pytest.raises(PackageError, match=r"layer\.weight holds NaN"):
        t.read_tensors(path, {"layer.weight": ((70_001,), dtype)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flood_of_subnormal_values_is_refused(tmp_path, dtype):
    flood = torch.full((30, 30), 1e-39).to(dtype)
    some = torch.randn(30, 30).to(dtype)
    some.view(-1)[:50] = 1e-39
    assert 0 < float(flood[0, 0]) < torch.finfo(torch.float32).tiny
    path = tmp_path / "x.safetensors"
    expected = {"a": ((30, 30), dtype)}
    safetensors.torch.save_file({"a": some}, path)
    assert torch.equal(t.read_tensors(path, expected)["a"], some)
    safetensors.torch.save_file({"a": flood}, path)
    with pytest.raises(PackageError, match="subnormal"):
        t.read_tensors(path, expected)
    with pytest.raises(OutputError, match="subnormal"):
        t.shard({"a": flood}, 100)
    assert not t.is_flooded(torch.full((30, 30), 1e-6).half())  # normal in float32
    assert not t.is_flooded(torch.zeros(30, 30))
    # found in a later part of a large tensor too
    large = torch.zeros(3 << 20)
    large[2 << 20 :] = 1e-39
    assert t.is_flooded(large)


def test_a_mismatch_is_refused_before_allocating(tmp_path, tensors, expected, monkeypatch):
    path = write(tmp_path / "x.safetensors", tensors)
    monkeypatch.setattr(t.torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    more = expected | {f"extra.{i}": ((1,), torch.float32) for i in range(9)}
    with pytest.raises(MismatchError, match=r"9 missing \(extra.0, extra.1, extra.2, ...\)"):
        t.read_tensors(path, more)
    less = {name: facts for name, facts in expected.items() if name != "scale"}
    with pytest.raises(MismatchError, match=r"1 unexpected \(scale\)"):
        t.read_tensors(path, less)
    for facts in (((1,), torch.float16), ((), torch.float32)):
        with pytest.raises(MismatchError, match=r"scale is F16\[\], expected F(16\[1\]|32\[\])"):
            t.read_tensors(path, expected | {"scale": facts})


def test_a_file_exchanged_after_the_check_is_refused(tmp_path, tensors, expected):
    path = write(tmp_path / "x.safetensors", tensors)
    stated = hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, {name: tensor + 1 for name, tensor in tensors.items()})
    assert t.read_tensors(path, expected)
    with pytest.raises(PackageError, match="altered"):
        t.read_tensors(path, expected, sha256=stated)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a/b", torch.ones(1), "not a tensor name"),
        ("a", torch.ones(1, dtype=torch.int64), "convert it"),
        ("a", torch.ones(1, dtype=torch.float64), "convert it"),
        ("a", torch.ones(0), "empty"),
        ("a", torch.ones(1, 1, 1, 1, 1), "dimensions"),
    ],
)
def test_the_writer_refuses_what_no_reader_would_accept(name, tensor, message):
    with pytest.raises(OutputError, match=message):
        t.shard({name: tensor}, 100)


def test_no_tensor_at_all_is_not_written():
    with pytest.raises(OutputError, match="at least one"):
        t.shard({}, 100)


def test_shards_are_filled_up_to_the_limit():
    tensors = {name: torch.ones(size) for name, size in zip("abcde", (2, 2, 9, 1, 1), strict=True)}
    assert [list(part) for part in t.shard(tensors, 16)] == [["a", "b"], ["c"], ["d", "e"]]
    assert [list(part) for part in t.shard(tensors, 1)] == [["a"], ["b"], ["c"], ["d"], ["e"]]


def oracle(header, data_bytes):
    """Slow and plain: is every byte of the data in exactly one tensor, listed in order?"""
    owner = [None] * data_bytes
    order = []
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        count = 1
        for dimension in fields["shape"]:
            count *= dimension
        if not 0 <= begin < end <= data_bytes or end - begin != count * SIZES[fields["dtype"]]:
            return False
        for position in range(begin, end):
            if owner[position] is not None:
                return False
            owner[position] = name
        order.append(begin)
    return bool(header) and None not in owner and order == sorted(order)


@st.composite
def headers(draw):
    """Mostly right headers, one in some with an offset, shape, or length a little off."""
    header, position = {}, 0
    for name in draw(st.lists(st.sampled_from(["a", "b.c", "layers.0.w", "z_1"]), unique=True)):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(1, 3), max_size=3))
        size = SIZES[dtype] * torch.Size(shape).numel()
        slip = st.sampled_from([0] * 12 + [-2, 2])
        begin, end = position + draw(slip), position + size + draw(slip)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        position += size
    return header, max(0, position + draw(st.sampled_from([0] * 8 + [-2, 2])))


@given(headers())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_accepts_exactly_what_the_oracle_accepts(safetensors_file, case):
    header, data_bytes = case
    path = safetensors_file(header, bytes(data_bytes))
    if not oracle(header, data_bytes):
        with pytest.raises(PackageError):
            t.read_header(path)
        return
    found = t.read_header(path)
    assert {n: (list(f.shape), [f.begin, f.end]) for n, f in found.items()} == {
        n: (f["shape"], f["data_offsets"]) for n, f in header.items()
    }
    assert safetensors.torch.load(path.read_bytes()).keys() == found.keys()


@given(st.binary(max_size=120) | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_noise_is_refused(safetensors_file, raw):
    raw = raw if isinstance(raw, bytes) else raw.encode()
    with pytest.raises(PackageError):
        t.read_header(safetensors_file(raw, bytes(8)))
    path = safetensors_file(b"")
    path.write_bytes(raw)
    with pytest.raises(PackageError):
        t.read_header(path)
