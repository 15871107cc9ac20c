"""What each word of a vocabulary means to a model: its state after all layers, alone in a text.

Made by whoever holds the whole model (the vendor, or a customer with any public model of the same
tokenizer), from public things only; `privacy.word_groups` joins words whose vectors are near.

Shapes: V vocabulary, D hidden, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blindtune.split.partition import Stack


@torch.no_grad()
def word_vectors(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 1024
) -> Tensor:
    """Unit vectors [V, D]: the mean of the last layer's states of a text of one word.

    The tokenizer's start and separator are around the word, as in every text. Cost: a forward pass
    over V texts of one word.

    Args:
        stack: the whole model.
        tokenizer: its tokenizer.
        batch_size: words at once; changes speed only.
    """
    weight = stack.embedding.weight
    assert isinstance(weight, Tensor)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = whole[: whole.index(bare[0])]
    after = whole[len(before) + len(bare) :]
    found = []
    for word_B in torch.arange(len(weight)).split(batch_size):
        ids_BL = torch.tensor([*before, 0, *after]).repeat(len(word_B), 1)
        ids_BL[:, len(before)] = word_B
        inputs = stack.begin(ids_BL, torch.ones_like(ids_BL))
        hidden_BLD = stack.run_layers(inputs.hidden_BLD, inputs.calls, 0, stack.layer_count)
        found.append(torch.nn.functional.normalize(hidden_BLD.mean(1), dim=1))
    return torch.cat(found)
