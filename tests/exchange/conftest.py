"""Tiny packages of both kinds, and a way to forge them as a stranger could; servers of the wire."""

import hashlib
import json
import struct

import pytest
import torch
from wire_vendor import CUSTOMERS, TOKENS, CountingVendor

from blindtune.exchange.packages.manifest import (
    AdapterLayer,
    AdapterManifest,
    CompressedLayer,
    EmulatorManifest,
    FullModelFacts,
    HarmonizerLayer,
    LoraFacts,
    RawLayer,
)
from blindtune.exchange.packages.writing import write_package
from blindtune.exchange.wire.credentials import VendorTrust, make_development_certificate
from blindtune.exchange.wire.guard import GuardConfig
from blindtune.exchange.wire.serving import Server, ServerConfig


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_development_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def serve(certificate):
    """serve(vendor, credentials, guard, **config): a server of CountingVendor, at any port."""
    servers = []

    def start(vendor=None, credentials=certificate, guard=None, **config):
        config = ServerConfig(**{"port": 0, "retry_after_seconds": 0.01, **config})
        sessions = (vendor or CountingVendor()).session
        guard = GuardConfig(**(guard or {}))
        servers.append(Server(sessions, CUSTOMERS, credentials, config=config, guard=guard))
        return servers[-1]

    yield start
    for server in servers:
        server.close(0)


@pytest.fixture
def trust(certificate):
    return VendorTrust(token=TOKENS["alice"], roots=certificate.certificate)


@pytest.fixture
def emulator_manifest():
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
            RawLayer(),
            CompressedLayer(ranks={"self_attn.q_proj": (2,), "self_attn.qkv": (2, 1, 1)}),
            HarmonizerLayer(rank=3),
            AdapterLayer(),
        ],
        full_model=FullModelFacts(parameters=1000, bytes=4000, layers=6),
        max_length=None,
    )


@pytest.fixture
def adapter_manifest():
    return AdapterManifest(
        emulator="sha256:" + "0a" * 32,
        kind="lora",
        model="5f" * 32,
        model_type="llama",
        dtype="bfloat16",
        adapter_layers=1,
        layers=5,
        lora=LoraFacts(rank=2, alpha=16, targets=["self_attn.q_proj"]),
    )


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "model.layers.0.weight": torch.randn(2, 3),
        "model.layers.1.bias": torch.randn(3).bfloat16(),
        "scale": torch.tensor(0.5, dtype=torch.float16),
    }


@pytest.fixture
def expected(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.fixture
def package(tmp_path, emulator_manifest, tensors):
    """The directory of a tiny emulator package."""
    write_package(tmp_path / "emulator", emulator_manifest, tensors, {"LICENSE": b"free"})
    return tmp_path / "emulator"


def canonical(plain):
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sign_off(directory, manifest_bytes):
    """Put a manifest into a package with its hash, as a forger would."""
    (directory / "manifest.json").write_bytes(manifest_bytes)
    line = f"{hashlib.sha256(manifest_bytes).hexdigest()}  manifest.json\n"
    (directory / "manifest.sha256").write_text(line)


@pytest.fixture
def forge():
    """forge(directory, change): edit the manifest's plain JSON in place; sizes and hashes agree."""

    def _forge(directory, change=lambda plain: None):
        plain = json.loads((directory / "manifest.json").read_bytes())
        for name in plain["files"]:
            content = (directory / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            plain["files"][name] = {"bytes": len(content), "sha256": digest}
        change(plain)
        sign_off(directory, canonical(plain))

    return _forge


@pytest.fixture
def forge_bytes():
    """forge_bytes(directory, manifest_bytes): any bytes as the manifest, with their hash."""
    return sign_off


@pytest.fixture
def safetensors_file(tmp_path):
    """safetensors_file(header, data): write the file with that header (JSON or raw bytes)."""

    def _write(header, data=b""):
        if not isinstance(header, bytes):
            header = json.dumps(header, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
        path = tmp_path / "stranger.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)
        return path

    return _write
