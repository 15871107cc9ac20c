"""What benchmarks/fuzz.py attacks: every reader of bytes that another party, or a file, brings.

A target has seeds (valid inputs), a dictionary, and `run(data)`, which returns normally when the
input was accepted and raises a BlindtuneError when it was refused. Anything else is a crash. Where
something may be accepted, `run` asserts what must hold then: the same bytes come out again.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blindtune.errors import BlindtuneError
from blindtune.evaluation.utility.choices import read_items
from blindtune.exchange.packages.keys import new_private_key
from blindtune.exchange.packages.manifest import (
    AdapterLayer,
    AdapterManifest,
    CompressedLayer,
    EmulatorManifest,
    FullModelFacts,
    HarmonizerLayer,
    LoraFacts,
    decode_manifest,
    encode_manifest,
)
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import SIGNATURE_NAME, Signer, Trust, read_signature
from blindtune.exchange.packages.writing import write_package
from blindtune.exchange.tensors import read_header, read_tensors
from blindtune.exchange.wire import codec, messages
from blindtune.models.tokenizers import SETTINGS_NAME, TOKENIZER_NAME, tokenizer_from_files
from blindtune.split.customer.labelled_text import read_labelled
from blindtune.training.records import token_ids
from blindtune.training.text import DataConfig, load_dataset_file

FORBIDDEN, ALLOWED = "refused always", "refused, or round trip"
Mutate = Callable[[bytes, random.Random], bytes]
WORDS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"Infinity",
    b"-0", b"1e999", b"1e-999", b"9" * 400, b"18446744073709551616", b"-1", b"null", b"true",
    b"[" * 2000, b'{"a":' * 2000, b'"version":1,', b'"version":1', b"auto_map", b"../", b"\0",
    b"\xff", b"\xef\xbb\xbf", b" ", b"\n", b"\r", b"F64", b"BF16", b"__metadata__", b"data_offsets",
    b'"shape":[', b"4294967296,4294967296", b"\xed\xa0\x80",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader under attack."""

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes], None]
    policy: str
    """FORBIDDEN: nothing but a seed may be accepted; ALLOWED: `run` checks what is."""
    repair: Mutate = lambda data, draw: data
    """Makes a mutated input pass the outermost check, so that the inner ones are reached."""


def emulator_manifest() -> EmulatorManifest:
    """A manifest with every kind of layer in it."""
    return EmulatorManifest(
        model="5f" * 32,
        model_type="llama",
        config={
            "hidden_size": 8,
            "rms_norm_eps": 1e-05,
            "rope": {"theta": 1e20, "list": [1, None]},
        },
        dtype="float32",
        adapter_layers=1,
        layers=[
            AdapterLayer(),
            CompressedLayer(ranks={"self_attn.q_proj": (2,), "self_attn.qkv": (2, 1, 1)}),
            HarmonizerLayer(rank=3),
            AdapterLayer(),
        ],
        full_model=FullModelFacts(parameters=1000, bytes=4000, layers=6),
        max_length=None,
    )


def adapter_manifest() -> AdapterManifest:
    """A LoRA adapter's manifest."""
    return AdapterManifest(
        emulator="sha256:" + "0a" * 32,
        kind="lora",
        model="5f" * 32,
        model_type="llama",
        dtype="bfloat16",
        adapter_layers=1,
        layers=5,
        lora=LoraFacts(rank=2, alpha=16.0, targets=["self_attn.q_proj"]),
    )


def make_targets(place: Path) -> list[Target]:
    """All targets; files are written under `place`, which should be in memory."""
    torch.manual_seed(0)
    tensors = {
        "model.layers.0.weight": torch.randn(2, 3),
        "model.layers.1.bias": torch.randn(3).bfloat16(),
        "scale": torch.tensor(0.5, dtype=torch.float16),
    }
    return [
        *_packages(place, tensors),
        _manifests(),
        _signatures(place),
        _safetensors(place, tensors),
        _frames(),
        _tokenizers(),
        *_data_files(place),
        *_training_files(place),
    ]


def _packages(place: Path, tensors) -> list[Target]:
    """A signed package with one file replaced; and one whose hashes were made to agree again."""
    key = new_private_key()
    signed, forged = place / "signed", place / "forged"
    files = {"LICENSE": b"free"}
    write_package(signed, emulator_manifest(), tensors, files, signer=Signer(key=key))
    write_package(forged, emulator_manifest(), tensors, files)
    trust = Trust(signers={"owner": key.public})
    expected = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return [
        _package("package", signed, FORBIDDEN, lambda path: open_package(path, trust=trust)),
        _package("forged package", forged, ALLOWED, lambda path: _read_forged(path, expected)),
    ]


def _read_forged(path: Path, expected) -> None:
    plain = json.loads((path / "manifest.json").read_bytes())
    if isinstance(plain, dict) and isinstance(plain.get("files"), dict):
        for name in plain["files"]:
            if (path / name).is_file():
                content = (path / name).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                plain["files"][name] = {"bytes": len(content), "sha256": digest}
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        (path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    package = open_package(path)
    assert encode_manifest(package.manifest) == (path / "manifest.json").read_bytes()
    for tensor in package.read_tensors(expected).values():
        assert bool(torch.isfinite(tensor).all())


def _package(name: str, directory: Path, policy: str, read: Callable[[Path], object]) -> Target:
    """An input is a file's number (one byte) and its content; the other files stay as they are."""
    whole = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    names = list(whole)

    def run(data: bytes) -> None:
        chosen = names[data[0] % len(names)] if data else names[0]
        touched = (chosen, "manifest.json", "manifest.sha256")
        (directory / chosen).write_bytes(data[1:])
        try:
            if policy == FORBIDDEN and data[1:] == whole[chosen]:
                raise BlindtuneError("not altered")
            try:
                read(directory)
            except (ValueError, RecursionError, AttributeError, OSError) as error:
                if error.__traceback__ is not None and _in_forger(error):
                    raise BlindtuneError("the forger could not read it") from error
                raise
        finally:
            for other in touched:
                (directory / other).write_bytes(whole[other])

    seeds = [bytes([i]) + content for i, content in enumerate(whole.values())]

    def keep_number(data: bytes, draw: random.Random) -> bytes:
        return bytes([draw.randrange(len(names))]) + data[1:] if draw.random() < 0.1 else data

    return Target(name=name, seeds=seeds, run=run, policy=policy, repair=keep_number)


def _in_forger(error: Exception) -> bool:
    """Whether it was our own forger above that failed, not the reader under attack."""
    traceback = error.__traceback__
    functions = []
    while traceback is not None:
        functions.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return "_read_forged" in functions and "open_package" not in functions


def _manifests() -> Target:
    def run(data: bytes) -> None:
        assert encode_manifest(decode_manifest(data)) == data

    seeds = [encode_manifest(emulator_manifest()), encode_manifest(adapter_manifest())]
    return Target(name="manifest", seeds=seeds, run=run, policy=ALLOWED, repair=respell)


def respell(data: bytes, draw: random.Random) -> bytes:
    """Half of the time, valid JSON with one value changed, in canonical form again."""
    if draw.random() < 0.5:
        return data
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = [(plain, key) for key in _keys(plain)]
    for holder, key in places:
        places += [(holder[key], inner) for inner in _keys(holder[key])]
    if places:
        holder, key = draw.choice(places)
        values = [None, 0, -1, 1.0, 2**63, "", "x" * 300, [], {}, True, [[]], 1e308, draw.random()]
        values.append(draw.choice(places)[0])
        holder[key] = draw.choice(values)
    try:
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return data


def _keys(value) -> list:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _signatures(place: Path) -> Target:
    directory = place / "signature"
    directory.mkdir()
    signer = Signer(key=new_private_key())
    manifest_bytes = encode_manifest(adapter_manifest())
    seed = signer.sign(adapter_manifest(), manifest_bytes)

    def run(data: bytes) -> None:
        if data == seed:
            raise BlindtuneError("not altered")
        (directory / SIGNATURE_NAME).write_bytes(data)
        read_signature(directory, manifest_bytes)

    return Target(name="signature", seeds=[seed], run=run, policy=FORBIDDEN, repair=respell)


def _safetensors(place: Path, tensors) -> Target:
    path = place / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    expected = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = read_header(path)
        theirs = safetensors.torch.load(data)
        assert theirs.keys() == found.keys()
        for name, tensor in read_tensors(path, expected).items():
            assert bool(torch.isfinite(tensor).all())
            assert torch.equal(theirs[name], tensor)

    def length(data: bytes, draw: random.Random) -> bytes:
        """Half of the time, the length field is right for the header as it now is."""
        end = data.rfind(b"}") + 1
        if draw.random() < 0.5 or end < 8:
            return data
        header = data[8:end] + b" " * (-(end - 8) % 8)
        return struct.pack("<Q", len(header)) + header + data[end:].lstrip(b" ")

    return Target(
        name="safetensors", seeds=[path.read_bytes()], run=run, policy=ALLOWED, repair=length
    )


def _frames() -> Target:
    hidden = torch.randn(5, 4)
    sent = [
        messages.Hello(program="fuzz"),
        messages.OpenJob(
            token="0a" * 32, partition="two-part", cut=1, bottom="0b" * 32,
            task="classification", outputs=3, options={"learning_rate": 1e-3, "rank": 4},
        ),
        messages.Batch(
            sequence=1, hidden_TD=hidden, lengths=(2, 3), labels=torch.tensor([0, 2]), weight=0.5
        ),
        messages.Forward(sequence=2, precision="int8", hidden_TD=hidden, lengths=(5,)),
        messages.Outputs(sequence=2, precision="float32", hidden_TD=hidden),
    ]  # fmt: skip
    seeds = [next(codec.encode(message, 1)) for message in sent]
    accepts = frozenset(messages.KINDS)

    def run(data: bytes) -> None:
        reader = codec.FrameReader(
            accepts=accepts, limits=codec.MessageLimits(max_payload_bytes=1 << 20)
        )
        done = reader.feed(data)
        if done is None:
            raise BlindtuneError("not complete")
        exchange, message = done
        if "precision" in message.__struct_fields__:  # the one in which nothing is rounded
            message = msgspec.structs.replace(message, precision="float32")
        sent = b"".join(codec.encode(message, exchange))
        again = reader.feed(sent)
        assert again is not None
        assert b"".join(codec.encode(again[1], again[0])) == sent

    def checksum(data: bytes, draw: random.Random) -> bytes:
        """Mostly, sizes and checksum are right for what the frame now holds."""
        if draw.random() < 0.2 or len(data) < codec.HEAD_BYTES:
            return data
        fixed = bytearray(data)
        if draw.random() < 0.7:
            (payload,) = struct.unpack_from("<Q", data, 16)
            body = len(data) - codec.HEAD_BYTES
            struct.pack_into("<I", fixed, 12, max(0, body - payload) % 2**32)
        crc = zlib.crc32(fixed[codec.HEAD_BYTES :], zlib.crc32(fixed[:32]))
        struct.pack_into("<I", fixed, 32, crc)
        return bytes(fixed)

    return Target(name="frame", seeds=seeds, run=run, policy=ALLOWED, repair=checksum)


def _tokenizers() -> Target:
    """A tokenizer.json of every kind of model, read and put to work."""
    words = ["<u>", "<e>", *"abcdehist .", "##a", "##t", "at", "cat"]
    vocabulary = {word: i for i, word in enumerate(words)}
    kinds = [
        models.WordLevel(vocabulary, unk_token="<u>"),
        models.WordPiece(vocabulary, unk_token="<u>"),
        models.BPE(vocabulary, [("a", "t"), ("c", "at")], unk_token="<u>"),
        models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0),
    ]
    splits = [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.ByteLevel(),
        pre_tokenizers.Split(Regex(r"\s+|[a-z]+"), "isolated"),
    ]
    seeds = []
    for model, split in zip(kinds, splits, strict=True):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = split
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <e>", special_tokens=[("<e>", 1)]
        )
        tokenizer.add_special_tokens(["<e>"])
        seeds.append(tokenizer.to_str().encode())
    settings = json.dumps({"eos_token": "<e>", "unk_token": "<u>"}).encode()

    def run(data: bytes) -> None:
        files = {TOKENIZER_NAME: data, SETTINGS_NAME: settings}
        tokenizer = tokenizer_from_files(files, rows=32)
        ids = token_ids("a cat at the b\u00e9d \u2603 twice,\n" + "ab " * 300, tokenizer)
        assert all(0 <= i < 32 for i in ids)

    return Target(name="tokenizer", seeds=seeds, run=run, policy=ALLOWED, repair=respell)


def _training_files(place: Path) -> list[Target]:
    """Readers of text to train on: one's own files, still no crash and no hang."""
    letters = {character: i for i, character in enumerate(map(chr, range(32, 127)))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters | {"<e>": 95}, [])), eos_token="<e>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    texts = b'{"text": "a cat sat on the mat"}\n{"text": "no cat sat there"}\n'
    pairs = b'{"prompt": "say a", "completion": " cat"}\n{"prompt": "b", "completion": "!"}\n'
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    talks = json.dumps({"messages": turns}).encode() + b"\n"
    config = DataConfig(max_length=8)

    def reader(name: str) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            (place / name).write_bytes(data)
            dataset = load_dataset_file(place / name, tokenizer, config)
            assert all(len(ids) <= 8 for ids in dataset.input_ids)

        return run

    array = b"[" + texts.strip().replace(b"\n", b",") + b"]"
    return [
        Target(name=f"data {name}", seeds=seeds, run=reader(name), policy=ALLOWED)
        for name, seeds in (
            ("training.jsonl", [texts, pairs, talks]),
            ("training.json", [array]),
            ("training.txt", [b"a cat sat on the mat\n" * 3]),
            ("training.csv", [b'text,id\n"a cat, sat",1\n\nno cat sat there,2\n']),
        )
    ]


def _data_files(place: Path) -> list[Target]:
    """Readers of labelled texts and of questions: one's own files, still no crash and no hang."""
    choices = b"".join(
        b'{"question": "What %d?", "choices": ["a cat", "rice"], "label": %d}\n' % (i, i % 2)
        for i in range(4)
    )
    lines = b'{"text": "a cat sat", "label": 1}\n{"text": "no", "label": 0}\n'
    table = b'text,label\n"a, cat",1\nno,0\n'

    def reader(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            (place / name).write_bytes(data)
            read(place / name)

        return run

    return [
        Target(name=f"data {name}", seeds=[seed], run=reader(name, read), policy=ALLOWED)
        for name, seed, read in (
            ("choices.jsonl", choices, read_items),
            ("labelled.jsonl", lines, read_labelled),
            ("labelled.csv", table, read_labelled),
        )
    ]
