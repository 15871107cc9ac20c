"""What each word of a vocabulary means to a model: its state after its layers, alone in a text.

Made from public things only, of a whole model or of the bottom that a customer has;
`privacy.word_groups` joins words whose vectors are near.

Shapes: V vocabulary, D hidden, L length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blindtune.models.margins import margins_of
from blindtune.split.partition import Stack


@torch.no_grad()
def word_vectors(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: int | None = None,
    batch_size: int = 1024,
    on_progress: Callable[[int, int], None] = lambda _done, _words: None,
) -> Tensor:
    """Unit vectors [V, D]: the mean of the last layer's states of a text of one word.

    The tokenizer's start and separator are around the word, as in every text. Cost: a forward pass
    over V texts of one word.

    Args:
        stack: the whole model, or a bottom.
        tokenizer: its tokenizer.
        layers: run so many; None: all; 0: rows of the embedding table instead of states.
        batch_size: words at once; changes speed only.
        on_progress: is told how many words of all are done.
    """
    weight = stack.embedding.weight
    assert isinstance(weight, Tensor)
    if layers == 0:
        return torch.nn.functional.normalize(weight.float(), dim=1)
    depth = stack.layer_count if layers is None else layers
    margins, found = margins_of(tokenizer), []
    before, after = margins.before, margins.after
    for word_B in torch.arange(len(weight)).split(batch_size):
        ids_BL = torch.tensor([*before, 0, *after]).repeat(len(word_B), 1)
        ids_BL[:, len(before)] = word_B
        inputs = stack.begin(ids_BL, torch.ones_like(ids_BL))
        hidden_BLD = stack.run_layers(inputs.hidden_BLD, inputs.calls, 0, depth)
        found.append(torch.nn.functional.normalize(hidden_BLD.mean(1), dim=1))
        on_progress(min(len(found) * batch_size, len(weight)), len(weight))
    return torch.cat(found)
