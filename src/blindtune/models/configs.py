"""A model's config as a package carries it: what is written, and what of a stranger's is believed.

Config classes take almost any value, and models compute sizes from some of them. So a config from
another party is judged before a class of transformers sees it: known keys, the stated model type
and number of layers, bounded numbers, token ids within the vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from blindtune.errors import PackageError
from blindtune.models.decoder import POSITIONS_AFTER_PADDING
from blindtune.models.encoders import encoder_family_of, is_encoder
from blindtune.models.families import family_of

MAX_NUMBER = 10**12
"""Of any number in a config; every real one is far below."""
MAX_BUFFER_BYTES = 1 << 20
"""Of all buffers together, unless the parameters are larger."""

_LAYER_KEYS = ("num_hidden_layers", "n_layer")
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Where -1 says that there is no limit (DeBERTa).
_UNLIMITED_KEYS = frozenset({"max_relative_positions", "position_buckets"})
# Which class, and in which dtype: said by the manifest, and so only compared.
_STATED_KEYS = frozenset({"model_type", "architectures", "dtype"})
# What never goes into a package: where the owner keeps the model, library versions, code.
_PRIVATE_KEYS = frozenset(
    {"_name_or_path", "auto_map", "transformers_version", "quantization_config", "custom_pipelines"}
)


def config_values(config: Any, generation: Any = None) -> dict[str, Any]:
    """What of a config goes into a package: what its class knows and the model depends on.

    Token ids outside of the vocabulary (some models say pad_token_id -1) become None.

    Args:
        config: the model's.
        generation: its generation config, which no package carries: where generation ends
            by it, the config ends. None: as the config says.
    """
    defaults = _defaults(type(config))
    known = (set(defaults) | _STATED_KEYS | _family_keys(config)) - _PRIVATE_KEYS - _runtime_keys()
    values = json.loads(config.to_json_string(use_diff=False))
    for key in _TOKEN_KEYS:
        if not _in_vocabulary(getattr(config, key, None), config.vocab_size):
            values[key] = None
    end = getattr(generation, "eos_token_id", None)
    if end is not None and _in_vocabulary(end, config.vocab_size):
        values["eos_token_id"] = end
    return {key: value for key, value in values.items() if key in known}


def config_from_values(
    values: Mapping[str, Any], *, model_type: str, dtype: str, layer_count: int
) -> Any:
    """The Hugging Face config that another party's package describes.

    Args:
        values: plain JSON.
        model_type, dtype, layer_count: as the manifest says.

    Raises:
        UnsupportedModelError: the model type is in neither table of families.
        PackageError: a key is unknown, or a value impossible.
    """
    more = _family_keys(SimpleNamespace(model_type=model_type))
    try:
        kind = type(AutoConfig.for_model(model_type))
        _check_keys(values, _defaults(kind), more)
        _check_stated(values, model_type, dtype, layer_count)
        for key, value in _leaves(values):
            _check_leaf(key, value)
        kept = set(values) - _runtime_keys() - {"architectures", "dtype"}
        config = kind.from_dict({key: copy.deepcopy(values[key]) for key in kept})
        if config.num_hidden_layers != layer_count:
            raise ValueError(f"{config.num_hidden_layers} layers, the manifest lists {layer_count}")
        for key in _TOKEN_KEYS:
            token = getattr(config, key, None)
            if not _in_vocabulary(token, config.vocab_size):
                raise ValueError(f"{key} is {token}, outside of {config.vocab_size} tokens")
        if model_type in POSITIONS_AFTER_PADDING and config.pad_token_id is None:
            raise ValueError("no pad_token_id, from which its positions are counted")
    except Exception as error:  # a config class may raise anything on a stranger's values
        raise PackageError(
            f"expected a plain config of a {model_type} model, got: "
            f"{' '.join(str(error).split())[:200]}: ask for the package again"
        ) from error
    return config


def check_buffers(sketch: nn.Module) -> None:
    """Refuse a model on the meta device whose buffers are larger than its parameters.

    Parameters are compared with the weights in the package; buffers come from the config alone.

    Raises:
        PackageError: more than `MAX_BUFFER_BYTES` and than the parameters.
    """
    parameters = sum(p.numel() * p.element_size() for p in sketch.parameters())
    buffers = sum(b.numel() * b.element_size() for b in sketch.buffers())
    if buffers > max(MAX_BUFFER_BYTES, parameters):
        raise PackageError(
            f"expected a config whose buffers are smaller than the model ({parameters:,} bytes), "
            f"got one that asks for {buffers:,} bytes: ask for the package again"
        )


def check_finite_buffers(model: nn.Module) -> None:
    """Raise PackageError if a config's numbers made a buffer NaN or infinite."""
    for name, buffer in model.named_buffers():
        if not bool(torch.isfinite(buffer).all()):
            raise PackageError(
                f"expected a config with finite buffers, got NaN or infinite values in {name}: "
                "ask for the package again"
            )


def _defaults(kind: type) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(kind().to_json_string(use_diff=False))
    return plain


def _runtime_keys() -> set[str]:
    """What every config has and no weight depends on: how the model's user runs it."""
    return {*PreTrainedConfig().to_dict(), "use_cache"} - _STATED_KEYS


def _family_keys(config: Any) -> frozenset[str]:
    """What models of the config's family read although its class does not know it."""
    if is_encoder(config):
        return frozenset(encoder_family_of(config).config_keys)
    family_of(config)
    return frozenset()


def _check_keys(
    values: Mapping[str, Any], defaults: Mapping[str, Any], more: frozenset[str]
) -> None:
    """Unknown keys are refused; a runtime key may stand with its default, and is not used."""
    known = (set(defaults) | _STATED_KEYS | {"num_hidden_layers"} | more) - _PRIVATE_KEYS
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    for key in sorted(_runtime_keys() & set(values)):
        if values[key] != defaults.get(key):
            raise ValueError(f"{key} is for the model's user to set, not for a package")


def _check_stated(values: Mapping[str, Any], model_type: str, dtype: str, layer_count: int) -> None:
    if values.get("model_type") != model_type:
        raise ValueError(f"model_type {values.get('model_type')!r}, not as in the manifest")
    if values.get("dtype") not in (None, dtype):
        raise ValueError(f"dtype {values['dtype']!r}, the manifest says {dtype}")
    for key in _LAYER_KEYS:
        count = values.get(key, layer_count)
        if type(count) is not int or count != layer_count:
            raise ValueError(f"{key} {count!r}, the manifest lists {layer_count} layers")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value inside nested JSON, with the nearest key above it."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _leaves(item, inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def _check_leaf(key: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _UNLIMITED_KEYS and value == -1:
        return
    if is_number and not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{key} is {value}, expected 0 to {MAX_NUMBER}")
    if key == "partial_rotary_factor" and not (is_number and 0 < value <= 1):
        raise ValueError(f"{key} is {value}, expected more than 0 and at most 1")
    is_rate = "dropout" in key or key.endswith("_pdrop")
    if is_rate and value is not None and not (is_number and value < 1):
        raise ValueError(f"{key} is {value}, expected 0 to less than 1")


def _in_vocabulary(token: Any, size: int) -> bool:
    """Whether a token id, or every one of a list of them, is a row of the embedding; or None."""
    tokens = token if isinstance(token, list | tuple) else [token]
    return token is None or all(type(t) is int and 0 <= t < size for t in tokens)
