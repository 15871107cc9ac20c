"""Embedding inversion by the nearest neighbour: which word's embedding lies nearest to a state?

Source: the EIA of Split-and-Privatize (arXiv 2312.15603, section 4), argmin_w ||E[w] - z_t||.
E[w] is the embedding *as the model makes it*: with scale, positions, token types and norms that
the bottom adds, since whoever has the model knows them. Needs no text, no training, no guess about
the language.

At cut 0 without noise it finds every token. At cut 0 with noise in vector mode, where the embedding
is nothing but the table, it is the likeliest word by the noise alone; in token mode it finds the
tokens that were sent. Behind blocks it compares block outputs with embeddings, which works only as
far as the residual stream still carries the word: weak, and no measure of what a trained attack
finds (`trained_inversion`).

Shapes: T tokens of all texts, L length, D hidden, V vocabulary, C words of a portion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.attacks.adversary import Guess, Stack, StatesView, as_guess
from blindtune.attacks.imitation import Imitation
from blindtune.privacy.nearest import NearestRows

PORTION_NUMBERS = 2**24  # float32 numbers of embedded words held at once


@torch.no_grad()
def nearest_tokens(view: StatesView) -> Guess:
    """For every state the token whose embedding at that position lies nearest, by exact L2.

    Cost: a matmul of T x V x D, and for models with positions V x L embeddings once. Ties go to
    the lowest id.
    """
    imitation = Imitation(view.model, 0)
    query_TD = torch.cat(view.states).to(view.table_VD.device, torch.float64)
    place_T = torch.cat([torch.arange(length) for length in view.lengths])
    longest = max(view.lengths)
    if not depends_on_place(view.model, longest):
        place_T, longest = torch.zeros_like(place_T), 1
    at_place = [(place_T == place).nonzero().squeeze(1) for place in range(longest)]
    found_T = torch.zeros(len(query_TD), dtype=torch.int64, device=query_TD.device)
    best_T = query_TD.new_full((len(query_TD),), torch.inf)
    size = max(1, PORTION_NUMBERS // (longest * view.model.hidden_size))
    for word_C in torch.arange(len(view.table_VD), device=query_TD.device).split(size):
        made_CLD = made_at(imitation, word_C, longest)
        for place, mine in enumerate(at_place):
            table_CD = made_CLD[:, place]
            row = NearestRows(table_CD).find(query_TD[mine])
            distance = (table_CD[row].double() - query_TD[mine]).square().sum(1)
            nearer = distance < best_T[mine]
            found_T[mine[nearer]] = word_C[row[nearer]]
            best_T[mine[nearer]] = distance[nearer]
    return as_guess(found_T, view.lengths)


def made_at(imitation: Imitation, word_C: Tensor, length: int) -> Tensor:
    """What enters layer 0 for each word at each of `length` positions, [C, L, D]."""
    embedding_CLW = imitation.model.embedding(word_C)[:, None].expand(-1, length, -1)
    mask_CL = torch.ones(len(word_C), length, dtype=torch.int64, device=word_C.device)
    return imitation.through(embedding_CLW, mask_CL, cut=0)


@torch.no_grad()
def depends_on_place(model: Stack, length: int) -> bool:
    """Whether a word's embedding is another at another position: found by trying two words."""
    if length < 2:
        return False
    device = next(model.model.parameters()).device
    made_CLD = made_at(Imitation(model, 0), torch.tensor([1, 2], device=device), length)
    return not bool((made_CLD == made_CLD[:, :1]).all())
