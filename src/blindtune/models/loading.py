"""Open models and tokenizers: a local directory, a hub name, or an embedded model.

No code from a model's directory is ever run, no pickle is ever read, and a checkpoint that lacks a
weight is refused (transformers alone would fill it with random numbers and print a warning).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blindtune.errors import ModelError
from blindtune.models import embedded
from blindtune.models.families import family_of

# What transformers, huggingface_hub and safetensors raise for a model that cannot be opened;
# hub and network errors are OSErrors.
_FOREIGN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spm.model")


def load_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a causal language model of a known family, in eval mode.

    Args:
        name: a local directory, a hub name, or `smollm2-135m` (the embedded default decoder).
        dtype: of the weights; bfloat16 is slow on CPUs.
        device: where the weights go.

    Raises:
        UnsupportedModelError: the model's family is not in the table of families.
        ModelError: no such model, no safetensors weights, or weights missing or misshapen.
    """
    source = model_source(name)
    config = load_config(source)
    family_of(config)
    # Old checkpoints carry buffers that are computed now; a weight too many is another model.
    return load_checked(
        AutoModelForCausalLM,
        source,
        config,
        surplus=lambda key: key.endswith(".weight"),
        dtype=dtype,
        device=device,
    )


def load_checked(
    kind: Any,
    source: str,
    config: Any,
    *,
    surplus: Callable[[str], bool],
    dtype: torch.dtype,
    device: str | torch.device,
    **options: Any,
) -> PreTrainedModel:
    """Load a model of which every weight is there, in eval mode.

    Args:
        kind: the auto class that builds it.
        source: from `model_source`.
        config: from `load_config`.
        surplus: which weight that the checkpoint has too many means that it is another model's.
        dtype, device: of the weights.
        options: more for the model class.

    Raises:
        ModelError: no safetensors weights, or weights missing, misshapen or too many.
    """
    try:
        with _without_report():
            model, info = kind.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except _FOREIGN as error:
        raise ModelError(
            f"expected safetensors weights that fit the config in {source}, got: "
            f"{first_line(error)}; check that the download or copy is complete, and convert "
            "pickled weights with save_pretrained"
        ) from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise ModelError(
            f"expected every weight of the model in {source}, got a checkpoint without "
            f"{len(absent)} of them ({_some(absent)}); get the complete checkpoint"
        )
    more = sorted(key for key in info["unexpected_keys"] if surplus(key))
    if more:
        raise ModelError(
            f"expected only weights that the config in {source} describes, got {len(more)} more "
            f"({_some(more)}); config.json and the weights are not of one model"
        )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


@contextmanager
def _without_report() -> Iterator[None]:
    """Without the table of keys that transformers logs: they are judged here, or meant so."""

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def preferred_device() -> torch.device:
    """Where heavy work runs: the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; it always has an end and a padding token.

    Args:
        name: as for `load_model`. A tokenizer without a padding token pads with its end token.

    Raises:
        ModelError: there is no tokenizer, or it has no end-of-text token.
    """
    source = model_source(name)
    tokenizer = open_tokenizer(source)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"expected a tokenizer with an end-of-text token in {source}, got none; set eos_token "
            "in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def open_tokenizer(source: str) -> Any:
    """The tokenizer at a resolved place, as it is.

    Raises:
        ModelError: there is none. (Without its files transformers makes up an empty one.)
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).is_file() for file in _VOCABULARIES):
        raise ModelError(
            f"expected a tokenizer in {source}, got none of {', '.join(_VOCABULARIES)}; put "
            "tokenizer.json and tokenizer_config.json beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except _FOREIGN as error:
        raise ModelError(
            f"expected a tokenizer in {source}, got: {first_line(error)}; put tokenizer.json and "
            "tokenizer_config.json beside the weights"
        ) from error


def model_source(name: str | Path) -> str:
    """What to hand to transformers for a model name: a directory, or a hub name.

    Raises:
        ModelError: it names a place that is no whole model.
    """
    if embedded.is_embedded(name):
        return str(embedded.model_directory(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            raise ModelError(
                f"expected a whole model in {path}, got a PEFT adapter; merge it into its model "
                "first (merge_and_unload, save_pretrained)"
            )
        if not (path / "config.json").is_file():
            raise ModelError(
                f"expected a Hugging Face model directory, got {path} without config.json; give "
                "the directory that holds config.json and the weights"
            )
        return str(path)
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if looks_local or path.exists():
        raise ModelError(
            f"expected a model directory, got {name}, which is not a directory; give a directory, "
            f"a hub name, or {' or '.join(embedded.NAMES)}"
        )
    return str(name)


def load_config(source: str) -> Any:
    """The config at a resolved place; no code of it is run.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _FOREIGN as error:
        if Path(source).is_dir():
            what, advice = f"a readable config.json in {source}", "check the file"
        else:
            what = f"a model named {source!r} on the hub or in its local cache"
            advice = (
                f"without a network give a local directory or {embedded.NAME}; a private model "
                "needs `hf auth login`"
            )
        raise ModelError(f"expected {what}, got: {first_line(error)}; {advice}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
