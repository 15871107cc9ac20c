"""Encoders (BERT and kin) as embedding and layers: the same view that `Decoder` gives of decoders.

Split tuning cuts encoders as it cuts decoders. `ENCODERS` says where a Hugging Face encoder keeps
its parts; a type that is not in it is refused.

Shapes: B batch, L length, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from blindtune.errors import ModelError, UnsupportedModelError
from blindtune.models.layer_inputs import LayerCall, LayerInputs, layer_inputs, run_layer
from blindtune.models.loading import (
    first_line,
    load_checked,
    load_config,
    load_model,
    load_tokenizer,
    model_source,
    open_tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """The names of one encoder family; paths start at the model without any head."""

    name: str
    """What messages call it."""
    model_types: tuple[str, ...]
    """The values of `config.model_type` that mean this family."""
    layers: str = "encoder.layer"
    """The `ModuleList` of layers."""
    embedding: str = "embeddings.word_embeddings"
    """The token embedding."""
    attention: tuple[str, ...]
    """The attention's linear maps, by path inside a layer."""
    feed_forward: tuple[str, ...] = ("intermediate.dense", "output.dense")
    """The feed-forward network's linear maps, by path inside a layer."""
    returns_tuple: bool = False
    """True when the encoder takes [0] of what a layer returns."""
    pooler: bool = True
    """Whether the model class builds a pooler unless it is told not to."""
    config_keys: tuple[str, ...] = ()
    """What the model reads from its config although the config class does not know it."""


_BERT_ATTENTION = tuple(f"attention.{name}" for name in ("self.query", "self.key", "self.value"))

ENCODERS: tuple[EncoderFamily, ...] = (
    EncoderFamily(
        name="BERT",
        model_types=("bert", "roberta"),
        attention=(*_BERT_ATTENTION, "attention.output.dense"),
    ),
    EncoderFamily(
        name="DistilBERT",
        model_types=("distilbert",),
        layers="transformer.layer",
        attention=tuple(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")),
        feed_forward=("ffn.lin1", "ffn.lin2"),
        pooler=False,
    ),
    EncoderFamily(
        name="MPNet",
        model_types=("mpnet",),
        attention=tuple(f"attention.attn.{name}" for name in "qkvo"),
        returns_tuple=True,
    ),
    EncoderFamily(
        name="DeBERTa",
        model_types=("deberta-v2",),
        attention=(*(f"{path}_proj" for path in _BERT_ATTENTION), "attention.output.dense"),
        returns_tuple=True,
        pooler=False,
        config_keys=(
            "attention_head_size",
            "embedding_size",
            "norm_rel_ebd",
            "position_buckets",
            "share_att_key",
        ),
    ),
)
_BY_MODEL_TYPE = {kind: family for family in ENCODERS for kind in family.model_types}

_REFUSED = (
    ("is_decoder", "as a decoder it is another model"),
    ("add_cross_attention", "layers with cross-attention need another encoder"),
    ("conv_kernel_size", "a convolution between layers 0 and 1 belongs to neither party"),
    ("quantization_config", "quantized weights; load them dequantized"),
)


def is_encoder(config: Any) -> bool:
    """Whether the config is one of a known encoder."""
    return str(getattr(config, "model_type", None)) in _BY_MODEL_TYPE


def encoder_family_of(config: Any) -> EncoderFamily:
    """The family of a Hugging Face config.

    Raises:
        UnsupportedModelError: it is not in the table, or cannot be cut between any two layers.
    """
    family = _BY_MODEL_TYPE.get(str(getattr(config, "model_type", None)))
    if family is None:
        raise UnsupportedModelError(
            f"expected an encoder of type {', '.join(sorted(_BY_MODEL_TYPE))}, got "
            f"{getattr(config, 'model_type', None)!r}: add an entry to ENCODERS, or use another"
        )
    for key, reason in _REFUSED:
        if getattr(config, key, None):
            raise UnsupportedModelError(
                f"expected a plain {family.name} encoder, got a config with "
                f"{key}={getattr(config, key)!r}: {reason}"
            )
    return family


@final
class Encoder:
    """An encoder seen as embedding and layers. Nothing is copied.

    Args:
        model: an encoder without head and pooler, as `load_encoder` gives.

    Raises:
        UnsupportedModelError: the family is unknown, or the model lacks a part the table names.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family = encoder_family_of(model.config)
        for path in (self.family.layers, self.family.embedding):
            try:
                model.get_submodule(path)
            except AttributeError as error:
                raise UnsupportedModelError(
                    f"expected a bare {self.family.name} encoder with {path!r}, got "
                    f"{type(model).__name__}: load it with AutoModel"
                ) from error

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        layers = self.model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList), type(layers)
        return layers

    @property
    def layer_count(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        module: nn.Module = self.model.get_submodule(self.family.embedding)
        return module

    def begin(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> LayerInputs:
        """Embed a batch and find out what the model would pass to every layer.

        As `Decoder.begin`: the model is run with its layers swapped for recorders. Not safe while
        another thread runs the same model.

        Args:
            input_ids_BL: token ids [B, L].
            attention_mask_BL: 1 for tokens, 0 for padding [B, L]; None for no padding.

        Raises:
            UnsupportedModelError: the model does not treat its layers as the table says.
        """
        return layer_inputs(
            self.model,
            self.layers,
            input_ids_BL,
            attention_mask_BL,
            returns_tuple=self.family.returns_tuple,
            family=self.family.name,
        )

    def run_layers(
        self, hidden_BLD: Tensor, calls: Sequence[LayerCall], start: int, stop: int
    ) -> Tensor:
        """Hidden states [B, L, D] after the layers start .. stop-1."""
        assert 0 <= start <= stop <= self.layer_count, (start, stop, self.layer_count)
        for i in range(start, stop):
            hidden_BLD = run_layer(self.layers[i], hidden_BLD, calls[i])
        return hidden_BLD


def load_encoder(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load an encoder of a known family, without head and pooler, in eval mode.

    Args:
        name: a local directory, a hub name, or `minilm` (the embedded encoder).
        dtype: of the weights.
        device: where the weights go.

    Raises:
        UnsupportedModelError: the model's family is not in the table.
        ModelError: no such model, no safetensors weights, or weights missing or misshapen.
    """
    source = model_source(name)
    config = load_config(source)
    family = encoder_family_of(config)
    return load_checked(
        AutoModel,
        source,
        config,
        surplus=lambda key: family.layers in key,
        dtype=dtype,
        device=device,
        **_without_pooler(family),
    )


def load_any(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder or an encoder, whichever the config names, and its tokenizer.

    Args:
        name, dtype, device: as for `load_model` and `load_encoder`.

    Raises:
        ModelError: it cannot be had; UnsupportedModelError if its family is in neither table.
    """
    source = model_source(name)
    if not is_encoder(load_config(source)):
        return load_model(name, dtype=dtype, device=device), load_tokenizer(name)
    model = load_encoder(name, dtype=dtype, device=device)
    tokenizer = open_tokenizer(source)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"expected a tokenizer with a padding token in {source}, got none: set it")
    return model, tokenizer


def empty_encoder(config: Any, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An encoder of this config, its weights allocated but not filled; see `empty_model`."""
    with no_init_weights():
        return _from_config(config, dtype)


def meta_encoder(config: Any, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An encoder of this config on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return _from_config(config, dtype)


def _from_config(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    family = encoder_family_of(config)
    try:
        model: PreTrainedModel = AutoModel.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=False, **_without_pooler(family)
        )
    except (ValueError, TypeError, RuntimeError, KeyError, ZeroDivisionError) as error:
        raise ModelError(
            f"expected a config that builds a {family.name} encoder, got one that transformers "
            f"refuses: {first_line(error)}: check its sizes"
        ) from error
    return model.eval()


def _without_pooler(family: EncoderFamily) -> dict[str, bool]:
    return {"add_pooling_layer": False} if family.pooler else {}
