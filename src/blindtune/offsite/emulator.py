"""The emulator: what the data owner gets, an ordinary transformers model with odd layers.

A package holds the Hugging Face config, one entry a layer, and the weights. `open_emulator` builds
the model class of that config, swaps the replaced layers for harmonizers and the compressed
projections for factors, checks every name, shape and dtype against the package's header before it
allocates anything, and loads. The result works with `transformers.Trainer`, PEFT and `generate`.
This module also runs at the data owner and knows nothing of how an emulator is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ModelError, PackageError
from blindtune.exchange.manifest import (
    CompressedLayer,
    Dtype,
    EmulatorManifest,
    FullModelFacts,
    HarmonizerLayer,
    LayerEntry,
)
from blindtune.exchange.package import Package, open_package, write_package
from blindtune.models.blocks import Harmonizer
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import empty_model, meta_model, replace_layer, tied_names
from blindtune.models.tokenizers import FILE_NAMES, tokenizer_files, tokenizer_from_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What a config may hold besides the keys that its own class knows.
_EXTRA_KEYS = frozenset({"model_type", "architectures", "dtype", "num_hidden_layers"})
# What never goes into a package: where the owner keeps the model, library versions, code.
_PRIVATE_KEYS = frozenset(
    {"_name_or_path", "auto_map", "transformers_version", "quantization_config", "custom_pipelines"}
)


@final
@dataclass(frozen=True, kw_only=True)
class Emulator:
    """An opened emulator."""

    model: PreTrainedModel
    """The causal language model; only its adapter layers require gradients."""
    tokenizer: PreTrainedTokenizerBase
    id: str
    """Package id, which the adapter names."""
    manifest: EmulatorManifest

    @property
    def adapter_indices(self) -> tuple[int, ...]:
        """Indices of the adapter layers in the emulator."""
        return adapter_indices(self.manifest.adapter_layers, len(self.manifest.layers))


def adapter_indices(adapter_layers: int, layer_count: int) -> tuple[int, ...]:
    """The first and last N_a of `layer_count` layers."""
    return (*range(adapter_layers), *range(layer_count - adapter_layers, layer_count))


def adapter_parameters(
    model: PreTrainedModel, indices: Sequence[int]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the adapter layers, named `layers.<index>.<name>` as in an adapter package."""
    layers = Decoder(model).layers
    for i in indices:
        for name, parameter in layers[i].named_parameters():
            yield f"layers.{i}.{name}", parameter


def write_emulator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[LayerEntry],
    out: str | Path,
    *,
    model_fingerprint: str,
    adapter_layers: int,
    full_model: FullModelFacts,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    overwrite: bool = False,
) -> str:
    """Write an assembled emulator as a package and return its id.

    Args:
        model: after surgery; its layers are as `layers` says.
        layers: one entry a layer.
        model_fingerprint: of the full model; an adapter for it must name it.
        full_model: facts that `inspect` compares with.
        dtype: of the weights in the package.
        max_length: longest sequence the emulator is meant for; None: the config's limit.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {k: v for k, v in config.items() if k in _known_keys(type(model.config))}
    manifest = EmulatorManifest(
        model=model_fingerprint,
        model_type=model.config.model_type,
        config=config | {"dtype": dtype},
        dtype=dtype,
        adapter_layers=adapter_layers,
        layers=list(layers),
        full_model=full_model,
        max_length=max_length,
    )
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in package_tensors(model).items()}
    return write_package(out, manifest, tensors, tokenizer_files(tokenizer), overwrite=overwrite)


def package_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight of a model once, by the name that its package uses."""
    aliases = tied_names(model)
    return {name: t for name, t in model.state_dict().items() if name not in aliases}


def open_emulator(package: str | Path, *, dtype: torch.dtype | None = None) -> Emulator:
    """Open an emulator package, trusting none of it.

    Args:
        package: its directory.
        dtype: of the model; None: as in the package.

    Raises:
        PackageError: the package is damaged or malformed (docs/package-format.md).
        MismatchError: its tensors are not those that its manifest describes.
        UnsupportedModelError: its model family is not known here.
    """
    opened = open_package(package, "emulator")
    model = _load(opened)
    if dtype is not None:
        model = model.to(dtype)
    model.requires_grad_(False)
    indices = adapter_indices(opened.manifest.adapter_layers, len(opened.manifest.layers))
    for _, parameter in adapter_parameters(model, indices):
        parameter.requires_grad_(True)
    names = [name for name in FILE_NAMES if name in opened.manifest.files]
    tokenizer = tokenizer_from_files({name: opened.read_file(name) for name in names})
    return Emulator(model=model, tokenizer=tokenizer, id=opened.id, manifest=opened.manifest)


def _load(package: Package[EmulatorManifest]) -> PreTrainedModel:
    manifest = package.manifest
    config = read_config(manifest)
    dtype = DTYPES[manifest.dtype]
    try:
        sketch = assemble(meta_model(config, dtype=dtype), manifest.layers)
    except ModelError as error:
        raise PackageError(f"{package.path}: {error}") from error
    expected = {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in package_tensors(sketch).items()
    }
    tensors = package.read_tensors(expected)
    model = assemble(empty_model(config, dtype=dtype), manifest.layers)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= set(tied_names(sketch)), missing
    model.tie_weights()
    return model


def read_config(manifest: EmulatorManifest) -> Any:
    """The Hugging Face config of a package; unknown keys and other layer counts are refused."""
    try:
        kind = type(AutoConfig.for_model(manifest.model_type))
        unknown = sorted(set(manifest.config) - _known_keys(kind))
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        config = kind.from_dict(manifest.config)
    except Exception as error:  # a config class may raise anything on a stranger's values
        raise PackageError(
            f"expected a config of a known model type, got {manifest.model_type!r}: "
            f"{str(error)[:200]}: ask for the package again"
        ) from error
    if config.num_hidden_layers != len(manifest.layers):
        raise PackageError(
            f"expected {len(manifest.layers)} layers as listed, got a config with "
            f"{config.num_hidden_layers}: ask for the package again"
        )
    return config


def _known_keys(kind: type) -> set[str]:
    """What a config in a package may hold: the keys that its class knows, no private ones."""
    return (set(kind().to_dict()) | _EXTRA_KEYS) - _PRIVATE_KEYS


def assemble(model: PreTrainedModel, layers: Sequence[LayerEntry]) -> PreTrainedModel:
    """Give every layer of a freshly built model the form that its entry names, in place."""
    decoder = Decoder(model)
    like = next(model.parameters())
    for i, entry in enumerate(layers):
        if isinstance(entry, HarmonizerLayer):
            with torch.device(like.device):
                harmonizer = Harmonizer(
                    decoder.hidden_size,
                    entry.rank,
                    returns_tuple=decoder.family.returns_tuple,
                )
            replace_layer(model, i, harmonizer.to(like.dtype))
        elif isinstance(entry, CompressedLayer):
            _factor(decoder, i, entry)
    return model


def _factor(decoder: Decoder, i: int, entry: CompressedLayer) -> None:
    known = {p.path: p for p in (*decoder.projections(i), *decoder.feed_forward(i))}
    for path, ranks in entry.ranks.items():
        projection = known.get(path)
        if projection is None or len(ranks) != len(projection.parts):
            raise ModelError(f"layer {i} has no projection {path!r} with {len(ranks)} parts")
        if any(
            rank > min(size, projection.in_features)
            for rank, size in zip(ranks, projection.sizes, strict=True)
        ):
            raise ModelError(f"layer {i}: ranks {ranks} of {path!r} exceed its shape")
        decoder.layers[i].set_submodule(path, projection.low_rank(ranks))
