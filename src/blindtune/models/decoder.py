"""A view of a Hugging Face causal language model as embedding, layers, final norm and head.

Shapes: B batch, L length, D hidden, V vocabulary, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blindtune.errors import ConfigError, ModelError, UnsupportedModelError
from blindtune.models.blocks import LowRankLinear, split_parts
from blindtune.models.families import Family, Linear, family_of
from blindtune.models.layer_inputs import LayerCall, LayerInputs, layer_inputs, run_layer


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear module of a layer, read in one orientation whatever the family stores.

    A fused module has several parts (query, key, value); a plain one has one.
    """

    path: str
    """Dotted path inside the layer."""
    module: nn.Module
    """An `nn.Linear`, a GPT-2 `Conv1D`, or a `LowRankLinear` put there by compression."""
    parts: tuple[str, ...]
    """What the parts are, in row order."""
    sizes: tuple[int, ...]
    """Output features of every part."""
    in_features: int
    heads: int | None
    """None for stacked rows; the number of heads when the parts alternate head by head."""

    def weights(self) -> tuple[Tensor, ...]:
        """The weight [O_part, I] of every part, as a view or copy of the module's weight."""
        if isinstance(self.module, LowRankLinear):
            weight_IO = self.module.dense_weight().T
        elif isinstance(self.module, Conv1D):
            weight_IO = self.module.weight
        else:
            assert isinstance(self.module, nn.Linear), type(self.module)
            weight_IO = self.module.weight.T
        return tuple(part.T for part in split_parts(weight_IO.detach(), self.sizes, self.heads))

    @property
    def bias_O(self) -> Tensor | None:
        """The bias [O] in the module's own row layout, or None."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return None if bias is None else bias.detach()

    def low_rank(self, ranks: Sequence[int]) -> LowRankLinear:
        """A low-rank module that can take this one's place: same shape, layout and bias.

        Its factors still have to be set (`LowRankLinear.set_factors`); dtype and device follow the
        module.

        Args:
            ranks: one rank a part.
        """
        like = next(self.module.parameters())
        module = LowRankLinear(
            self.in_features,
            list(zip(self.sizes, ranks, strict=True)),
            bias=self.bias_O is not None,
            heads=self.heads,
        ).to(device=like.device, dtype=like.dtype)
        if module.bias is not None and self.bias_O is not None:
            with torch.no_grad():
                module.bias.copy_(self.bias_O)
        return module


@final
class Decoder:
    """A causal language model seen as embedding, layers, final norm and head.

    Nothing is copied: the view reads and runs the modules of the model that it was given, and
    follows surgery on it.

    Raises:
        UnsupportedModelError: the family is unknown, or the model lacks a part the table names.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family: Family = family_of(model.config)
        missing = [
            f"{role} {path!r}"
            for role, path in (
                ("layers", self.family.layers),
                ("embedding", self.family.embedding),
                ("final_norm", self.family.final_norm),
                ("head", self.family.head),
            )
            if not _has_path(model, path)
        ]
        if missing:
            raise UnsupportedModelError(
                f"expected a causal language model of the {self.family.name} family, got "
                f"{type(model).__name__} without {', '.join(missing)}; load it with "
                "AutoModelForCausalLM, or correct the family's names (docs/families.md)"
            )

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
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

    @property
    def head(self) -> nn.Module:
        """The output projection onto the vocabulary."""
        module: nn.Module = self.model.get_submodule(self.family.head)
        return module

    def is_raw(self, i: int) -> bool:
        """Whether slot `i` holds a layer with attention, not a harmonizer or the like."""
        return _has_path(self.layers[i], self.family.attention[0].path)

    def begin(self, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None) -> LayerInputs:
        """Embed a batch and find out what the backbone would pass to every layer.

        The backbone itself is run with every layer swapped for a recorder, so masks and positions
        are the model's own. Not safe while another thread runs the same model.

        Args:
            input_ids_BL: token ids [B, L].
            attention_mask_BL: 1 for tokens, 0 for padding [B, L]; None for no padding.

        Raises:
            UnsupportedModelError: the backbone does not treat its layers as the table says.
        """
        backbone = self.model.get_submodule(self.family.layers.rpartition(".")[0])
        return layer_inputs(
            partial(backbone, use_cache=False),
            self.layers,
            input_ids_BL,
            attention_mask_BL,
            returns_tuple=self.family.returns_tuple,
            family=self.family.name,
        )

    def run_layer(
        self, i: int, hidden_BLD: Tensor, call: LayerCall, layer: nn.Module | None = None
    ) -> Tensor:
        """Hidden states [B, L, D] after layer `i`, or after `layer` in its place."""
        return run_layer(self.layers[i] if layer is None else layer, hidden_BLD, call)

    def run_layers(
        self, hidden_BLD: Tensor, calls: Sequence[LayerCall], start: int, stop: int
    ) -> Tensor:
        """Hidden states [B, L, D] after the layers start .. stop-1."""
        assert 0 <= start <= stop <= self.layer_count, (start, stop, self.layer_count)
        for i in range(start, stop):
            hidden_BLD = self.run_layer(i, hidden_BLD, calls[i])
        return hidden_BLD

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Logits [B, L, V] from what leaves the last layer [B, L, D]."""
        return self.scores(self.features(hidden_BLD))

    def features(self, hidden_BLD: Tensor) -> Tensor:
        """What enters the head [B, L, F], from what leaves the last layer [B, L, D]."""
        for path in (self.family.final_norm, self.family.after_norm):
            module = None if path is None else _at_path(self.model, path)
            if module is not None:
                hidden_BLD = module(hidden_BLD)
        return hidden_BLD

    def scores(self, features_BLF: Tensor) -> Tensor:
        """Logits [B, L, V] from what enters the head [B, L, F]."""
        logits_BLV: Tensor = self.head(features_BLF)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits_BLV if cap is None else torch.tanh(logits_BLV / cap) * cap

    def projections(self, i: int) -> tuple[Projection, ...]:
        """The attention's linear maps of layer `i`: query, key, value (or fused) and output."""
        return tuple(self._projection(i, linear) for linear in self.family.attention)

    def feed_forward(self, i: int) -> tuple[Projection, ...]:
        """The feed-forward network's linear maps of layer `i`."""
        return tuple(self._projection(i, linear) for linear in self.family.feed_forward)

    def _projection(self, i: int, linear: Linear) -> Projection:
        layer = self.layers[i]
        if not _has_path(layer, linear.path):
            raise ModelError(
                f"expected layer {i} to be a {self.family.name} layer with {linear.path!r}, got "
                f"{type(layer).__name__}; only raw layers have projections"
            )
        module = layer.get_submodule(linear.path)
        if isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
        else:
            assert isinstance(module, nn.Linear | LowRankLinear), type(module)
            in_features, out_features = module.in_features, module.out_features
        return Projection(
            path=linear.path,
            module=module,
            parts=linear.parts,
            sizes=self._part_sizes(linear, out_features),
            in_features=in_features,
            heads=self.config.num_attention_heads if linear.interleaved else None,
        )

    def _part_sizes(self, linear: Linear, out_features: int) -> tuple[int, ...]:
        """Output features of every part; with grouped queries, key and value are smaller."""
        count = len(linear.parts)
        if linear.parts == ("query", "key", "value"):
            config = self.config
            heads = config.num_attention_heads
            groups = getattr(config, "num_key_value_heads", None) or heads
            key = out_features * groups // (heads + 2 * groups)
            return (out_features - 2 * key, key, key)
        assert out_features % count == 0, (linear, out_features)
        return (out_features // count,) * count


POSITIONS_AFTER_PADDING = ("roberta", "mpnet")
"""These number positions from the padding's id + 1 on."""
UNLIMITED_CONTEXT = 2048
"""Tokens that are read at once by a model that sets no limit: attention takes their square."""


def context_limit(config: Any) -> int | None:
    """The most tokens that a model was made to read at once; None where it has no limit (BLOOM)."""
    text = config.get_text_config()
    shift = text.pad_token_id + 1 if text.model_type in POSITIONS_AFTER_PADDING else 0
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(text, name, None)
        if isinstance(limit, int):
            return limit - shift
    return None


def check_context(max_length: int, *limits: int | None) -> None:
    """Refuse examples that are longer than a model can read.

    Args:
        max_length: tokens of the longest example.
        limits: what the model (`context_limit`) and its package allow; None for no limit.

    Raises:
        ConfigError: it exceeds one of them.
    """
    lowest = min((limit for limit in limits if limit is not None), default=max_length)
    if max_length > lowest:
        raise ConfigError(
            f"expected max_length up to {lowest}, the most tokens that this model reads at once, "
            f"got {max_length}: lower it (--max-length {lowest})"
        )


def _at_path(root: nn.Module, path: str) -> Any:
    """What lies at a dotted path, where a part may also be None or missing (None)."""
    found: Any = root
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _has_path(root: nn.Module, path: str) -> bool:
    """Whether a dotted path exists, even if it leads to None (a norm that a variant lacks)."""
    parent, _, name = path.rpartition(".")
    holder = _at_path(root, parent) if parent else root
    return holder is not None and hasattr(holder, name)
