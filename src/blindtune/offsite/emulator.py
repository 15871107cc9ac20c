"""The emulator: what the data owner gets, an ordinary transformers model with odd layers.

A package holds the Hugging Face config, one entry a layer, and the weights. `open_emulator` builds
the model class of that config, swaps the replaced layers for harmonizers and the compressed
projections for factors, checks every name, shape and dtype against the package's header before it
allocates anything, and loads. The result works with `transformers.Trainer`, PEFT and `generate`.
This module also runs at the data owner and knows nothing of how an emulator is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ModelError, OutputError, PackageError
from blindtune.exchange.packages.manifest import (
    CompressedLayer,
    Dtype,
    EmulatorManifest,
    FullModelFacts,
    HarmonizerLayer,
    LayerEntry,
)
from blindtune.exchange.packages.package import Package, open_package
from blindtune.exchange.packages.signing import Signature, Signer, Trust
from blindtune.exchange.packages.writing import write_package
from blindtune.exchange.tensors import Expected, check_expected
from blindtune.models.blocks import Harmonizer
from blindtune.models.configs import (
    check_buffers,
    check_finite_buffers,
    config_from_values,
    config_values,
)
from blindtune.models.decoder import Decoder
from blindtune.models.surgery import empty_model, meta_model, replace_layer, tied_names
from blindtune.models.tokenizers import read_tokenizer, tokenizer_files, tokenizer_from_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    signature: Signature | None = None
    """Who signed the package."""

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
    signer: Signer | None = None,
) -> str:
    """Write an assembled emulator as a package and return its id.

    Args:
        model: after surgery; its layers are as `layers` says.
        layers: one entry a layer.
        model_fingerprint: of the full model; an adapter for it must name it.
        full_model: facts that `inspect` compares with.
        dtype: of the weights in the package.
        max_length: longest sequence the emulator is meant for; None: the config's limit.
        signer: signs the package; None: it stays unsigned.

    Raises:
        OutputError: it cannot be written, or no reader would accept the config or the
            tokenizer.
    """
    manifest = EmulatorManifest(
        model=model_fingerprint,
        model_type=model.config.model_type,
        config=config_values(model.config, model.generation_config) | {"dtype": dtype},
        dtype=dtype,
        adapter_layers=adapter_layers,
        layers=list(layers),
        full_model=full_model,
        max_length=max_length,
    )
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in package_tensors(model).items()}
    files = tokenizer_files(tokenizer)
    try:
        read_config(manifest)
        tokenizer_from_files(files, rows=model.config.vocab_size)
    except PackageError as error:
        raise OutputError(f"no reader would accept this emulator: {error}") from error
    return write_package(out, manifest, tensors, files, overwrite=overwrite, signer=signer)


def package_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight of a model once, by the name that its package uses."""
    aliases = tied_names(model)
    return {name: t for name, t in model.state_dict().items() if name not in aliases}


def open_emulator(
    package: str | Path, *, dtype: torch.dtype | None = None, trust: Trust | None = None
) -> Emulator:
    """Open an emulator package, trusting none of it.

    Args:
        package: its directory.
        dtype: of the model; None: as in the package.
        trust: whose emulators are opened; None: anybody's.

    Raises:
        PolicyError: `trust` refuses the package.
        PackageError: the package is damaged or malformed (docs/package-format.md).
        MismatchError: its tensors are not those that its manifest describes.
        UnsupportedModelError: its model family is not known here.
    """
    opened = open_package(package, "emulator", trust=trust)
    model = _load(opened, dtype)
    model.requires_grad_(False)
    indices = adapter_indices(opened.manifest.adapter_layers, len(opened.manifest.layers))
    for _, parameter in adapter_parameters(model, indices):
        parameter.requires_grad_(True)
    return Emulator(
        model=model,
        tokenizer=tokenizer_of(opened, model),
        id=opened.id,
        manifest=opened.manifest,
        signature=opened.signature,
    )


def tokenizer_of(
    package: Package[EmulatorManifest], model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer that a package carries, for its model or the sketch of it.

    Raises:
        PackageError: it is malformed, or returns ids that the model has no word for.
    """
    rows = model.config.vocab_size
    return read_tokenizer(package.manifest.files, package.read_file, rows=rows)


def package_sketch(package: Package[EmulatorManifest]) -> PreTrainedModel:
    """The emulator on the meta device: its names and shapes, proven to be the package's.

    Raises:
        UnsupportedModelError: its model family is not known here.
        PackageError: no model can be built as the manifest says.
        MismatchError: the tensors are not those that the manifest describes.
    """
    if len(package.header) < len(package.manifest.layers):
        raise PackageError(
            f"{package.path}: expected weights in each of {len(package.manifest.layers)} layers, "
            f"got {len(package.header)} tensors: ask for the package again"
        )
    model = _build(package, partial(meta_model, dtype=DTYPES[package.manifest.dtype]))
    check_buffers(model)
    check_expected(package.header, _expected(model), package.path)
    return model


def _expected(model: PreTrainedModel) -> Expected:
    return {name: (tuple(t.shape), t.dtype) for name, t in package_tensors(model).items()}


def _load(package: Package[EmulatorManifest], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model, built in its dtype: what it computes of the config would be rounded by a cast."""
    shape, dtype = package_sketch(package), dtype or DTYPES[package.manifest.dtype]
    tensors = package.read_tensors(_expected(shape))
    model = _build(package, partial(empty_model, dtype=dtype))
    check_finite_buffers(model)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= set(tied_names(shape)), missing
    model.tie_weights()
    return model


def _build(
    package: Package[EmulatorManifest], build: Callable[[Any], PreTrainedModel]
) -> PreTrainedModel:
    """The assembled model, without weights; `build` makes one of a config."""
    manifest, config = package.manifest, read_config(package.manifest)
    try:
        return assemble(build(config), manifest.layers)
    except Exception as error:  # a stranger's numbers reach code that never expected them
        raise PackageError(
            f"{package.path}: no model can be built of its config: "
            f"{' '.join(str(error).split())[:300]}: ask for the package again"
        ) from error


def read_config(manifest: EmulatorManifest) -> Any:
    """The Hugging Face config of a package, judged; errors as of `config_from_values`."""
    return config_from_values(
        manifest.config,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        layer_count=len(manifest.layers),
    )


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
