"""The full model with some of its middle layers run by their stand-ins, and what that costs.

Shapes: B batch, L length, D hidden, V vocabulary, M middle layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blindtune.models.decoder import Decoder
from blindtune.models.layer_inputs import LayerInputs

Objective = Literal["lm", "distill"]


@final
class MixedNetwork:
    """A frozen decoder whose middle layers can each be run raw or by their stand-in.

    Args:
        decoder: the full model, frozen.
        stand_ins: one module per middle layer (a harmonizer, or `nn.Identity` for LayerDrop).
        first: index of the first middle layer in the decoder.
    """

    def __init__(self, decoder: Decoder, stand_ins: Sequence[nn.Module], first: int) -> None:
        self.decoder = decoder
        self.stand_ins = stand_ins
        self.first = first
        self.stop = first + len(stand_ins)

    @torch.no_grad()
    def prefix(self, input_ids_BL: Tensor) -> LayerInputs:
        """The hidden states that enter the first middle layer: the same for every mix."""
        start = self.decoder.begin(input_ids_BL.to(self.decoder.model.device))
        hidden_BLD = self.decoder.run_layers(start.hidden_BLD, start.calls, 0, self.first)
        return LayerInputs(hidden_BLD, start.calls)

    def _step(self, i: int, hidden_BLD: Tensor, inputs: LayerInputs, replaced: bool) -> Tensor:
        layer = self.stand_ins[i - self.first] if replaced else None
        if isinstance(layer, nn.Identity):
            return hidden_BLD
        return self.decoder.run_layer(i, hidden_BLD, inputs.calls[i], layer)

    def loss(
        self,
        inputs: LayerInputs,
        mix: frozenset[int],
        input_ids_BL: Tensor,
        objective: Objective = "lm",
    ) -> Tensor:
        """Loss of one mix in nats a token, with gradients to the stand-ins in it.

        Args:
            inputs: from `prefix`.
            mix: the middle layers to replace.
            input_ids_BL: the batch.
            objective: "lm": cross-entropy of the next token; "distill": KL(full model || mix) of
                the next token's distribution. What both have below the first replaced layer is
                computed once.
        """
        first = self.first + min(mix, default=0)
        with torch.no_grad():
            hidden_BLD = self.decoder.run_layers(inputs.hidden_BLD, inputs.calls, self.first, first)
        mixed_BLD = hidden_BLD
        for i in range(first, self.stop):
            mixed_BLD = self._step(i, mixed_BLD, inputs, i - self.first in mix)
        if objective == "lm":
            return self._tail(mixed_BLD, inputs, input_ids_BL)
        last = self.decoder.layer_count
        with torch.no_grad():
            full_BLD = self.decoder.run_layers(hidden_BLD, inputs.calls, first, last)
            # Less the first position: attention that has nowhere to go makes it unlike any other
            full_BLV = self.decoder.logits(full_BLD[:, 1:]).float().log_softmax(-1)
        mixed_BLD = self.decoder.run_layers(mixed_BLD, inputs.calls, self.stop, last)
        mixed_BLV = self.decoder.logits(mixed_BLD[:, 1:]).float().log_softmax(-1)
        return F.kl_div(
            mixed_BLV.flatten(0, 1), full_BLV.flatten(0, 1), reduction="batchmean", log_target=True
        )

    @torch.no_grad()
    def losses(
        self, inputs: LayerInputs, mixes: Sequence[frozenset[int]], input_ids_BL: Tensor
    ) -> list[float]:
        """Cross-entropies of several mixes on one batch.

        Mixes that agree on all layers so far share their hidden states: a layer runs once per
        distinct prefix. Depth first, so at most one state a mix is alive.
        """
        found: dict[frozenset[int], float] = {}

        def descend(i: int, hidden_BLD: Tensor, alive: list[frozenset[int]]) -> None:
            while i < self.stop:
                out = [mix for mix in alive if i - self.first in mix]
                if out and len(out) < len(alive):
                    descend(i + 1, self._step(i, hidden_BLD, inputs, True), out)
                    alive = [mix for mix in alive if i - self.first not in mix]
                    out = []
                hidden_BLD = self._step(i, hidden_BLD, inputs, bool(out))
                i += 1
            loss = float(self._tail(hidden_BLD, inputs, input_ids_BL))
            found.update(dict.fromkeys(alive, loss))

        descend(self.first, inputs.hidden_BLD, list(dict.fromkeys(mixes)))
        return [found[mix] for mix in mixes]

    def _tail(self, hidden_BLD: Tensor, inputs: LayerInputs, input_ids_BL: Tensor) -> Tensor:
        last = self.decoder.layer_count
        hidden_BLD = self.decoder.run_layers(hidden_BLD, inputs.calls, self.stop, last)
        logits_BLV = self.decoder.logits(hidden_BLD[:, :-1])
        targets_N = input_ids_BL[:, 1:].flatten().to(logits_BLV.device)
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_N)


@final
class GrowingMix:
    """One batch under a mix that layers are added to; what enters every middle layer is kept.

    A layer more is tried from that layer on, and adding it drops only what it changes. Up to M + 1
    states [B, L, D] are alive.

    Args:
        network: whose layers are replaced.
        input_ids_BL: the batch.
    """

    def __init__(self, network: MixedNetwork, input_ids_BL: Tensor) -> None:
        self.network, self.input_ids_BL = network, input_ids_BL
        self.mix = frozenset[int]()
        self._inputs = network.prefix(input_ids_BL)
        self._states = [self._inputs.hidden_BLD]

    @torch.no_grad()
    def loss(self, also: int | None = None) -> float:
        """Cross-entropy of the mix in nats a token, as it is or with one layer more replaced."""
        count = len(self.network.stand_ins)
        start = count if also is None else also
        while len(self._states) <= start:
            i = len(self._states) - 1
            self._states.append(self._step(i, self._states[i], i in self.mix))
        hidden_BLD = self._states[start]
        for i in range(start, count):
            hidden_BLD = self._step(i, hidden_BLD, i == also or i in self.mix)
        return float(self.network._tail(hidden_BLD, self._inputs, self.input_ids_BL))

    def add(self, i: int) -> None:
        """Replace a layer for good."""
        self.mix |= {i}
        del self._states[i + 1 :]

    def _step(self, i: int, hidden_BLD: Tensor, replaced: bool) -> Tensor:
        return self.network._step(self.network.first + i, hidden_BLD, self._inputs, replaced)
