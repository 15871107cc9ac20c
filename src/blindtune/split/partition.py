"""Who holds which layers, and how each part is run.

Two partitions of a model of N layers (arXiv 2312.15603, and METHODS 3.3's U-shape):

two-part: bottom (embedding, layers 0..cut-1) at the customer; top (layers cut..N-1, the head and
    the loss) at the vendor, who therefore sees the labels.
u-shape: bottom and top (the last `last` layers, final norm, head and loss) at the customer, trunk
    (what lies between) at the vendor, who is sent gradients and no label.

The vendor computes masks and positions from the lengths of the sequences alone: no part above the
cut needs token ids.

Shapes: B batch, L length, D hidden, F width of features (D, or what the head takes), C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from blindtune.errors import ConfigError
from blindtune.exchange.wire.messages import Partition
from blindtune.models.decoder import Decoder
from blindtune.models.encoders import Encoder, is_encoder
from blindtune.models.given_words import placing_ids
from blindtune.models.layer_inputs import LayerCall, LayerInputs

Stack = Decoder | Encoder
"""A model seen as embedding and layers."""
Pooling = Literal["first", "mean", "last"]
Task = Literal["classification", "regression"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a model is cut, and who holds what."""

    partition: Partition = "two-part"
    """two-part or u-shape."""
    layers: int
    """N, the layers of the whole model."""
    cut: int
    """Layers of the bottom; 0: the embedding alone."""
    last: int = 0
    """Layers of the customer's top in the u-shape; 0: final norm and head alone."""

    def __post_init__(self) -> None:
        """Refuse a cut that leaves the vendor without a layer."""
        if self.partition not in get_args(Partition):
            raise ConfigError(f"expected partition two-part or u-shape, got {self.partition!r}")
        if self.partition == "two-part" and self.last:
            raise ConfigError(f"expected last=0 in the two-part split, got {self.last}")
        if self.cut < 0 or self.last < 0 or self.cut + self.last >= self.layers:
            raise ConfigError(
                f"expected a cut that leaves the vendor at least one of {self.layers} layers, got "
                f"{self.cut} below and {self.last} above: choose fewer"
            )

    @property
    def vendor_layers(self) -> range:
        """Indices, in the whole model, of the layers that the vendor runs and tunes."""
        return range(self.cut, self.layers - self.last)

    @property
    def customer_layers(self) -> tuple[int, ...]:
        """Indices, in the whole model, of the layers that the customer has."""
        return (*range(self.cut), *range(self.layers - self.last, self.layers))


def stack_of(model: PreTrainedModel) -> Stack:
    """The model as embedding and layers; UnsupportedModelError if its family is unknown."""
    return Encoder(model) if is_encoder(model.config) else Decoder(model)


def vendor_calls(stack: Stack, mask_BL: Tensor) -> tuple[LayerCall, ...]:
    """Masks and positions of every layer, from the lengths alone.

    A batch of one and the same token is embedded for it and thrown away. Not safe while another
    thread runs the same model.

    Args:
        mask_BL: 1 for tokens, 0 for padding at the right.
    """
    return stack.begin(placing_ids(stack.config, mask_BL), mask_BL).calls


def run_vendor(stack: Stack, cut: Cut, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """What leaves the vendor's layers [B, L, D]; in the two-part split, the features [B, L, F]."""
    layers = cut.vendor_layers
    calls = vendor_calls(stack, mask_BL)
    hidden_BLD = stack.run_layers(hidden_BLD, calls, layers.start, layers.stop)
    return hidden_BLD if cut.partition == "u-shape" else finish(stack, hidden_BLD)


def run_bottom(stack: Stack, cut: Cut, inputs: LayerInputs) -> Tensor:
    """What the customer sends [B, L, D]: the states after the first `cut` layers.

    Args:
        stack: the whole model, or the customer's part of it (same indices below the cut).
        inputs: from `stack.begin`.
    """
    return stack.run_layers(inputs.hidden_BLD, inputs.calls, 0, cut.cut)


def run_top(stack: Stack, cut: Cut, hidden_BLD: Tensor, calls: Sequence[LayerCall]) -> Tensor:
    """The u-shape's features [B, L, F] from what the vendor's trunk gave.

    Args:
        stack: the whole model, or the customer's part of it; its last `last` layers are run.
        hidden_BLD: from the trunk.
        calls: of `stack.begin` for the same batch.
    """
    end = stack.layer_count
    return finish(stack, stack.run_layers(hidden_BLD, calls, end - cut.last, end))


def finish(stack: Stack, hidden_BLD: Tensor) -> Tensor:
    """From the last layer's states to features [B, L, F]: the decoder's final norm, if any."""
    return stack.features(hidden_BLD) if isinstance(stack, Decoder) else hidden_BLD


def feature_size(stack: Stack) -> int:
    """F: D, or less where the model projects before its head (OPT-350M)."""
    projected = getattr(stack.config, "word_embed_proj_dim", None)
    return int(projected or stack.hidden_size)


def lm_logits(stack: Stack, features_BLF: Tensor) -> Tensor:
    """Logits [B, L, V] of a decoder's own head."""
    assert isinstance(stack, Decoder), type(stack)
    return stack.scores(features_BLF)


class PooledHead(nn.Module):
    """One linear map of a sequence's pooled features: classes or regression targets.

    Args:
        features: F.
        outputs: C.
        pooling: "first" or "last" token, or the "mean" of all.
    """

    def __init__(self, features: int, outputs: int, pooling: Pooling) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigError(f"expected pooling first, mean or last, got {pooling!r}")
        self.pooling = pooling
        self.out = nn.Linear(features, outputs)

    def forward(self, features_BLF: Tensor, mask_BL: Tensor) -> Tensor:
        """Outputs [B, C]; the mask has its padding at the right."""
        if self.pooling == "first":
            pooled_BF = features_BLF[:, 0]
        elif self.pooling == "last":
            rows = torch.arange(len(features_BLF), device=features_BLF.device)
            pooled_BF = features_BLF[rows, mask_BL.sum(1) - 1]
        else:
            mask_BL1 = mask_BL[..., None].to(features_BLF.dtype)
            pooled_BF = (features_BLF * mask_BL1).sum(1) / mask_BL1.sum(1)
        outputs_BC: Tensor = self.out(pooled_BF)
        return outputs_BC


def default_pooling(stack: Stack) -> Pooling:
    """The mean for encoders, the last token for decoders (the only one that saw all)."""
    return "last" if isinstance(stack, Decoder) else "mean"


def task_loss(outputs_BC: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Mean loss: cross-entropy for classes [B]; mean square for targets [B] or [B, C]."""
    if task == "classification":
        return cross_entropy(outputs_BC, labels.long())
    return mse_loss(outputs_BC, labels.to(outputs_BC.dtype).view(outputs_BC.shape))


def mean_token_loss(logits_BLV: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean cross-entropy of every token that follows another, padding left out."""
    targets_BL = ids_BL.masked_fill(mask_BL == 0, -100)[:, 1:]
    return cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), targets_BL.flatten())
