"""Packages of every format version open for ever, and compute what they did when they were made."""

import json
from pathlib import Path

import pytest

from blindtune.exchange.packages.keys import decode_private_key, decode_public_key
from blindtune.exchange.packages.manifest import READABLE_VERSIONS
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.sealing import unseal
from blindtune.exchange.packages.signing import Trust
from packages.make import PASSPHRASE, figures

PLACE = Path(__file__).parent
VERSIONS = sorted(path.name for path in PLACE.glob("v*"))
IDENTITIES = {
    "v1/emulator": "sha256:a83ef51bdae508c872f16a86299904651a7f788d40298575dc9840eae89afafb",
    "v1/adapter": "sha256:7469b8364aaa58e3f0ff22f2c613bc2f987e0815e4bcb16ba7b7a54a6129feba",
    "v1/lora": "sha256:e112bc7899ae7432137624d4c67ddb83f2b4a975305bc1b08b8a0eadd8e484b4",
    "v1/bottom": "sha256:4578dbfb7b2a9d814e6711d984b1d1a9aa4d67457dd76206b9c2c1f1b52c3387",
}
"""Package ids: an old package is never made again."""


def test_every_version_that_is_read_is_here():
    assert [f"v{version}" for version in READABLE_VERSIONS] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_old_packages_open_and_compute_what_they_did(version):
    stated = json.loads((PLACE / version / "figures.json").read_text())
    assert figures(PLACE / version) == pytest.approx(stated, abs=1e-4)
    assert len(set(stated.values())) == 4


@pytest.mark.parametrize("name", IDENTITIES)
def test_old_packages_are_signed_and_unchanged(name):
    place = PLACE / name
    key = decode_public_key((place.parent / "signer.key").read_bytes())
    package = open_package(place, trust=Trust(signers={"maker": key}))
    assert package.id == IDENTITIES[name]
    assert package.signature.name == "maker"


@pytest.mark.parametrize("version", VERSIONS)
def test_old_sealed_packages_and_locked_keys_open(version, tmp_path):
    place = PLACE / version
    reader = decode_private_key((place / "reader.key").read_bytes(), PASSPHRASE)
    maker = decode_public_key((place / "signer.key").read_bytes())
    identity, signature = unseal(
        place / "adapter.sealed", tmp_path / "a", reader, trust=Trust(signers={"maker": maker})
    )
    assert (identity, signature.name) == (IDENTITIES[f"{version}/adapter"], "maker")
    for file in (place / "adapter").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
