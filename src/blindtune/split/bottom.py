"""The bottom package: what the vendor gives to customers of split tuning, written and opened.

It is an ordinary transformers model with the customer's layers only: the bottom's, and in the
U-shape the top's behind them. What belongs to the vendor is an empty place in it, and its weights
are not in the package. Opening trusts nothing, as for emulators: the config is judged
(`models.configs`), and every name, shape and dtype is checked on the meta device before anything is
allocated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blindtune.errors import ConfigError, MismatchError, OutputError, PackageError
from blindtune.exchange.packages.manifest import BottomManifest, Dtype
from blindtune.exchange.packages.package import Package, open_package
from blindtune.exchange.packages.signing import Signature, Signer, Trust
from blindtune.exchange.packages.writing import write_package
from blindtune.exchange.tensors import Expected, check_expected
from blindtune.models.configs import (
    check_buffers,
    check_finite_buffers,
    config_from_values,
    config_values,
)
from blindtune.models.decoder import Decoder
from blindtune.models.encoders import empty_encoder, is_encoder, meta_encoder
from blindtune.models.fingerprint import fingerprint
from blindtune.models.margins import Margins, margins_of
from blindtune.models.surgery import empty_model, meta_model, tied_names
from blindtune.models.tokenizers import read_tokenizer, tokenizer_files, tokenizer_from_files
from blindtune.split.partition import Cut, Stack, stack_of

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@final
@dataclass(frozen=True, kw_only=True)
class Bottom:
    """An opened bottom package; its model is frozen and in eval mode."""

    stack: Stack
    """The customer's layers: `cut` of the bottom, then `last` of the top."""
    tokenizer: PreTrainedTokenizerBase
    margins: Margins
    """The tokens that it puts around every text; all others are the text."""
    cut: Cut
    id: str
    """The package id's 64 hex digits, which the vendor names in its welcome."""
    max_length: int | None
    """Longest sequence in tokens."""
    signature: Signature | None = None
    """Who signed the package."""

    @property
    def hidden_size(self) -> int:
        """D, the width of what crosses."""
        return self.stack.hidden_size


def write_bottom(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    cut: Cut,
    *,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    overwrite: bool = False,
    signer: Signer | None = None,
) -> str:
    """Write the customer's part of a whole model as a package.

    Args:
        model: the whole model; it is not changed.
        cut: who holds what; `layers` is the model's.
        dtype: of the weights in the package.
        max_length: longest sequence in tokens; None: the model's limit alone.
        overwrite: replace an earlier package.
        signer: signs the package; None: it stays unsigned.

    Returns:
        The 64 hex digits of the package id.

    Raises:
        ConfigError: the cut is for another number of layers, or the family cannot move layers.
        OutputError: it cannot be written, or no reader would accept the tokenizer.
    """
    stack = stack_of(model)
    if stack.layer_count != cut.layers:
        raise ConfigError(
            f"expected a cut of a model of {stack.layer_count} layers, got one of {cut.layers}"
        )
    if cut.last and getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ConfigError(
            "expected layers that do not depend on their index, got a config with "
            "scale_attn_by_inverse_layer_idx=True: use last=0"
        )
    config = _customer_config(stack, cut)
    sketch = _vacate(_build(config, torch.float32, meta=True), cut)
    tensors = {
        name: tensor.to(DTYPES[dtype]) for name, tensor in _tensors_of(stack, sketch, cut).items()
    }
    manifest = BottomManifest(
        model=fingerprint(model),
        model_type=config.model_type,
        config=config_values(config) | {"dtype": dtype},
        dtype=dtype,
        partition=cut.partition,
        cut=cut.cut,
        last=cut.last,
        layers=cut.layers,
        max_length=max_length,
    )
    files = _readable_files(tokenizer, model)
    identity = write_package(out, manifest, tensors, files, overwrite=overwrite, signer=signer)
    return identity.removeprefix("sha256:")


def open_bottom(
    package: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust: Trust | None = None,
    id: str | None = None,
) -> Bottom:
    """Open a bottom package, trusting none of it.

    Args:
        package: its directory.
        dtype: of the model.
        trust: whose packages are opened; None: anybody's.
        id: the 64 hex digits of the one package that is opened; None: any.

    Raises:
        PolicyError: `trust` refuses the package.
        PackageError: the package is damaged or malformed (docs/package-format.md), or its
            tokenizer repeats a text or changes what stands around it.
        MismatchError: another `id`, or its tensors are not those that its manifest describes.
        UnsupportedModelError: its model family is not known here.
    """
    opened = open_package(package, "bottom", trust=trust)
    found = opened.id.removeprefix("sha256:")
    if id not in (None, found):
        raise MismatchError(
            f"{package}: expected the bottom package that the job was made with "
            f"({str(id)[:12]}...), got {found[:12]}...: name that one"
        )
    manifest = opened.manifest
    cut = _cut_of(manifest)
    model = _load(opened, cut, dtype).requires_grad_(False)
    tokenizer = tokenizer_of(opened, model)
    return Bottom(
        stack=stack_of(model),
        tokenizer=tokenizer,
        margins=margins_of(tokenizer),
        cut=cut,
        id=found,
        max_length=manifest.max_length,
        signature=opened.signature,
    )


def tokenizer_of(
    package: Package[BottomManifest], model: PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The tokenizer that a package carries, for its model or the sketch of it.

    Raises:
        PackageError: it is malformed, or returns ids that the model has no word for.
    """
    tokenizer = read_tokenizer(package.manifest.files, package.read_file, rows=_rows(model))
    tokenizer.padding_side = "right"
    return tokenizer


def verified_sketch(package: Package[BottomManifest]) -> PreTrainedModel:
    """The model on the meta device, after checking that the package's tensors are its own.

    Raises:
        PackageError: no model can be built of its config.
        MismatchError: other tensors than the model's.
    """
    cut = _cut_of(package.manifest)
    if len(package.header) < cut.cut + cut.last:
        raise PackageError(
            f"{package.path}: expected weights in each of {cut.cut + cut.last} layers, got "
            f"{len(package.header)} tensors: ask for the package again"
        )
    own = DTYPES[package.manifest.dtype]
    sketch = _built(package, cut, own, meta=True)
    check_buffers(sketch)
    check_expected(package.header, _expected(sketch), package.path)
    return sketch


def _readable_files(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, bytes]:
    """The tokenizer's files, read once as a customer will; OutputError if that fails."""
    files = tokenizer_files(tokenizer)
    try:
        margins_of(tokenizer_from_files(files, rows=_rows(model)))
    except PackageError as error:
        raise OutputError(f"no reader would accept this bottom: {error}") from error
    return files


def _rows(model: PreTrainedModel) -> int:
    """Words of the embedding."""
    table_VD = stack_of(model).embedding.weight
    assert isinstance(table_VD, Tensor)
    return len(table_VD)


def _cut_of(manifest: BottomManifest) -> Cut:
    return Cut(
        partition=manifest.partition, layers=manifest.layers, cut=manifest.cut, last=manifest.last
    )


def _expected(sketch: PreTrainedModel) -> Expected:
    aliases = tied_names(sketch)
    return {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in sketch.state_dict().items()
        if name not in aliases
    }


def _built(
    package: Package[BottomManifest], cut: Cut, dtype: torch.dtype, *, meta: bool
) -> PreTrainedModel:
    manifest = package.manifest
    config = config_from_values(
        manifest.config,
        model_type=manifest.model_type,
        dtype=manifest.dtype,
        layer_count=max(1, manifest.cut + manifest.last),
    )
    try:
        return _vacate(_build(config, dtype, meta=meta), cut)
    except Exception as error:  # a stranger's numbers reach code that never expected them
        raise PackageError(
            f"{package.path}: no model can be built of its config: "
            f"{' '.join(str(error).split())[:300]}: ask for the package again"
        ) from error


def _load(package: Package[BottomManifest], cut: Cut, dtype: torch.dtype) -> PreTrainedModel:
    """The model, built in its dtype: what it computes of the config would be rounded by a cast."""
    sketch = verified_sketch(package)
    aliases = tied_names(sketch)
    tensors = package.read_tensors(_expected(sketch))
    model = _built(package, cut, dtype, meta=False)
    check_finite_buffers(model)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= set(aliases), missing
    if aliases:
        model.tie_weights()
    return model


def _customer_config(stack: Stack, cut: Cut) -> Any:
    """The whole model's config, cut to the customer's layers."""
    config = copy.deepcopy(stack.config)
    kept = cut.customer_layers or (0,)
    per_layer = stack.family.per_layer if isinstance(stack, Decoder) else ()
    values = {key: getattr(config, key) for key in per_layer}
    config.num_hidden_layers = len(kept)
    for key, value in values.items():
        setattr(config, key, [value[i] for i in kept])
    return config


def _build(config: Any, dtype: torch.dtype, *, meta: bool) -> PreTrainedModel:
    if is_encoder(config):
        return (meta_encoder if meta else empty_encoder)(config, dtype=dtype)
    return (meta_model if meta else empty_model)(config, dtype=dtype)


def _vacate(model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """Empty the places of a freshly built model that the customer does not hold, in place."""
    stack = stack_of(model)
    if not cut.customer_layers:
        stack.layers[0] = nn.Identity()
    if cut.partition == "two-part" and isinstance(stack, Decoder):
        family = stack.family
        for path in (family.final_norm, family.after_norm, family.head):
            parent, _, name = (path or "").rpartition(".")
            holder = model.get_submodule(parent)
            if path and getattr(holder, name, None) is not None:
                setattr(holder, name, nn.Identity())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return model


def _tensors_of(stack: Stack, sketch: PreTrainedModel, cut: Cut) -> dict[str, Tensor]:
    """The whole model's weights under the names of the customer's part."""
    whole, aliases, prefix = stack.model.state_dict(), tied_names(sketch), f"{stack.family.layers}."
    tensors = {}
    for name in sketch.state_dict():
        source = name
        if name.startswith(prefix):
            slot, _, rest = name.removeprefix(prefix).partition(".")
            source = f"{prefix}{cut.customer_layers[int(slot)]}.{rest}"
        if name not in aliases:
            tensors[name] = whole[source].detach()
    return tensors
