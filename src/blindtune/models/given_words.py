"""A model begun from word embeddings in the place of words: no id reaches anything but padding.

Some encoders (RoBERTa, MPNet) number positions by which ids are padding. Whoever gives them noised
embeddings together with the true ids shows where a text has that id, and which id it is stands in
the model's config. So the ids that the model gets here only place the tokens.

Shapes: B batch, L length, W width of the word embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blindtune.models.decoder import Decoder
from blindtune.models.encoders import Encoder
from blindtune.models.layer_inputs import LayerInputs


def begin_with(stack: Decoder | Encoder, embedding_BLW: Tensor, mask_BL: Tensor) -> LayerInputs:
    """What `stack.begin` gives, from what its embedding module would give. Differentiable.

    Args:
        stack: the model.
        embedding_BLW: word embeddings, before positions, norms and the like are added; they may
            belong to no word.
        mask_BL: 1 for tokens, 0 for padding at the right.
    """
    with _in_place_of_words(stack, embedding_BLW):
        return stack.begin(placing_ids(stack.config, mask_BL), mask_BL)


def placing_ids(config: Any, mask_BL: Tensor) -> Tensor:
    """One and the same token [B, L] that is no padding, where its place alone matters."""
    padding = getattr(config, "pad_token_id", None)
    return torch.full_like(mask_BL, 1 if padding == 0 else 0)


@contextmanager
def _in_place_of_words(stack: Decoder | Encoder, embedding_BLW: Tensor) -> Iterator[None]:
    """The embedding module gives these instead."""

    def give(_module: Any, _args: Any, _words: Tensor) -> Tensor:
        return embedding_BLW

    handle = stack.embedding.register_forward_hook(give)
    try:
        yield
    finally:
        handle.remove()
