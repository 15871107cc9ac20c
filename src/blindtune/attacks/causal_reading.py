"""What a causal language model says after beginnings that grow by a word a step.

It keeps what the model made of the beginnings that it read last (keys and values), so beginnings
that go on from these cost a pass over their new tokens alone. They may go on by several tokens and
each by another number: shorter ones are filled up on the left, and nothing looks at the filling.

Shapes: B beginnings, R distinct ones, N new tokens of each, L of these whose successors are told,
C columns of keys and values, K tokens asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import final

import torch
from torch import Tensor
from transformers import DynamicCache

from blindtune.models.decoder import Decoder, context_limit

Beginning = tuple[int, ...]


@final
class CausalReading:
    """A causal language model, and keys and values of what it read last.

    Of a beginning longer than the model reads at once it sees the end, which moves, so each step
    costs a pass over all of it.

    Args:
        model: the language model.
    """

    def __init__(self, model: Decoder) -> None:
        config = model.config.get_text_config()
        self._model, self._limit = model.model, context_limit(config)
        self._window = getattr(config, "sliding_window", None)
        self._places = "position_ids" in signature(type(model.model).forward).parameters
        self.forget()

    def forget(self) -> None:
        """Free the keys and values."""
        self._cache: DynamicCache | None = None
        self._rows: dict[Beginning, int] = {}
        self._real_RC = torch.empty(0, 0, dtype=torch.int64)

    @torch.no_grad()
    def log_probabilities(
        self, before: Sequence[Beginning], rest: Sequence[int], token_BK: Tensor
    ) -> Tensor:
        """log P(token | beginning) + log P(rest of the beginning | what stands before it) [B, K].

        Args:
            before: tokens of each beginning; 0 is said of what comes after none.
            rest: how many tokens at the end of each count among what is said.
            token_BK: tokens asked for.
        """
        before = [tokens[-self._limit :] if self._limit else tokens for tokens in before]
        rest = [max(0, min(r, len(tokens) - 1)) for r, tokens in zip(rest, before, strict=True)]
        said_BK = torch.zeros(token_BK.shape)
        some_N = torch.tensor([place for place, tokens in enumerate(before) if tokens])
        if not len(some_N):
            return said_BK
        needs: dict[Beginning, int] = {}
        for tokens, count in zip(before, rest, strict=True):
            if tokens:
                needs[tokens] = max(needs.get(tokens, 0), 1 + count)
        log_RLV = self._read(needs)
        row_N = torch.tensor([self._rows[tokens] for tokens in before if tokens])
        said_BK[some_N] = log_RLV[row_N[:, None], -1, token_BK[some_N]]
        for place, row in zip(some_N.tolist(), row_N.tolist(), strict=True):
            for back in range(1, rest[place] + 1):  # a token, by what the one before it says
                said_BK[place] += log_RLV[row, -1 - back, before[place][-back]]
        return said_BK

    def _read(self, needs: dict[Beginning, int]) -> Tensor:
        """log P of every token after each of the last L tokens of distinct beginnings [R, L, V].

        Args:
            needs: of how many of its last tokens that is needed; places before these hold anything.
        """
        device, told = next(self._model.parameters()).device, max(needs.values())
        parents, lengths = self._parents(needs)
        width = max(len(t) - length for t, length in zip(needs, lengths, strict=True))
        # What is out of a layer's sight is told by columns, filling and all.
        hidden = self._window is not None and self._real_RC.shape[1] + width > self._window
        if hidden or not any(lengths):
            self.forget()
            lengths, width = [0] * len(needs), max(map(len, needs))
        fresh = [tokens[length:] for tokens, length in zip(needs, lengths, strict=True)]
        ids_RN = torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in fresh])
        real_RC = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in fresh])
        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
        else:
            self._cache.reorder_cache(torch.tensor(parents, device=device))
            known_R1 = torch.tensor(lengths)[:, None] > 0
            real_RC = torch.cat([self._real_RC[parents] * known_R1, real_RC], 1)
        place_RC = (real_RC.cumsum(1) - 1).clamp(min=0)
        places = {"position_ids": place_RC[:, -width:].to(device)} if self._places else {}
        logits_RLV = self._model(
            input_ids=ids_RN.to(device),
            attention_mask=real_RC.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=told,
            **places,
        ).logits[:, -told:]
        self._rows, self._real_RC = {tokens: row for row, tokens in enumerate(needs)}, real_RC
        log_RLV: Tensor = logits_RLV.float().log_softmax(2).cpu()
        return log_RLV

    def _parents(self, needs: dict[Beginning, int]) -> tuple[list[int], list[int]]:
        """Of each beginning the longest kept one that it goes on from, and its length, or 0, 0."""
        known = sorted({len(tokens) for tokens in self._rows}, reverse=True)
        parents, lengths = [], []
        for tokens, need in needs.items():
            fit = (n for n in known if n + need <= len(tokens) and tokens[:n] in self._rows)
            length = next(fit, 0)
            parents.append(self._rows[tokens[:length]] if length else 0)
            lengths.append(length)
        return parents, lengths
