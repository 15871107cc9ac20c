"""Words that a vocabulary has twice: what the vendor's table can do to a share of changed tokens.

The vendor makes the table. If it puts another row beside every word, noise that only swaps the two
changes as many tokens as one likes and hides nothing: whoever knows the table reads both as the
same word. So what is near is measured by what the vendor cannot shrink without ruining the model,
the distance between different words of the customer's own text.

In tables of public models no word of real text has another within a fifth of that distance (MiniLM
0.24 at least, SmolLM2-135M 0.40; the medians are 0.61 and 0.52).

Shapes: N sampled tokens, V vocabulary, D hidden, T rows of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.privacy.nearest import Tiling
from blindtune.privacy.noise_level import sampled_words

NEAR = 0.1
"""Of the median distance between two different words: nearer rows are one word's twins."""
MOST_TWINS = 0.05
"""Share of tokens with a twin above which no share of changed tokens can be believed."""


@torch.no_grad()
def twin_share(table_VD: Tensor, token_ids: Tensor, *, samples: int = 512) -> float:
    """Share of the tokens of a text whose row has another one in nearly the same place.

    Args:
        table_VD: the rows among which words are drawn or looked up.
        token_ids: rows of the text's tokens, as often as they occur.
        samples: tokens that are looked at, evenly spread (`sampled_words`).

    Raises:
        ConfigError, DataError: as for `sampled_words`.
    """
    word_N = sampled_words(table_VD, token_ids, samples)
    shuffled = torch.randperm(len(word_N), generator=torch.Generator().manual_seed(0))
    word_ND, other_N = table_VD[word_N].float(), word_N[shuffled.to(word_N.device)]
    differ_N = word_N != other_N
    if not bool(differ_N.any()):
        return 0.0
    apart = (word_ND - table_VD[other_N].float())[differ_N].norm(dim=1).median()
    nearest_N = word_ND.new_full((len(word_N),), torch.inf)
    for begin in range(0, len(table_VD), Tiling().rows):
        row_TD = table_VD[begin : begin + Tiling().rows].float()
        distance_NT = torch.cdist(word_ND, row_TD)
        own_N = word_N - begin
        here_N = ((own_N >= 0) & (own_N < len(row_TD))).nonzero().flatten()
        distance_NT[here_N, own_N[here_N]] = torch.inf
        nearest_N = torch.minimum(nearest_N, distance_NT.amin(1))
    return float((nearest_N < NEAR * apart).float().mean())
