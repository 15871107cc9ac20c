"""What a backbone passes to its layers, found out by running it with recorders in their place.

Masks, positions and what else a family hands down are so the model's own, whatever the family.

Shapes: B batch, L length, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from blindtune.errors import UnsupportedModelError


class LayerCall(NamedTuple):
    """What the backbone passes to one layer after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LayerInputs:
    """Everything that the layers of a model need for one batch."""

    hidden_BLD: Tensor
    """What enters layer 0: embedded tokens, with positions where the family adds them."""
    calls: tuple[LayerCall, ...]
    """One call a layer: masks, position embeddings; they differ by layer type (Gemma)."""


def layer_inputs(
    backbone: Callable[..., Any],
    layers: nn.ModuleList,
    input_ids_BL: Tensor,
    attention_mask_BL: Tensor | None,
    *,
    returns_tuple: bool,
    family: str,
) -> LayerInputs:
    """Embed a batch and find out what the backbone would pass to every layer.

    Not safe while another thread runs the same model.

    Args:
        backbone: runs the layers, called with `input_ids` and `attention_mask`.
        layers: its layers; they are swapped for recorders meanwhile.
        input_ids_BL: token ids [B, L].
        attention_mask_BL: 1 for tokens, 0 for padding [B, L]; None for no padding.
        returns_tuple: whether the backbone takes [0] of what a layer returns.
        family: what messages call it.

    Raises:
        UnsupportedModelError: the backbone does not treat its layers as the table of families says.
    """
    with _recording(layers, returns_tuple) as recorders:
        backbone(input_ids=input_ids_BL, attention_mask=attention_mask_BL)
    first = recorders[0].hidden
    calls = tuple(recorder.call for recorder in recorders if recorder.call is not None)
    if first is None or len(calls) != len(recorders):
        raise UnsupportedModelError(
            f"expected the {family} backbone to run all {len(recorders)} layers, got {len(calls)}; "
            "the config and the list of layers disagree"
        )
    return LayerInputs(first, calls)


def run_layer(layer: nn.Module, hidden_BLD: Tensor, call: LayerCall) -> Tensor:
    """Hidden states [B, L, D] after a layer."""
    out = layer(hidden_BLD, *call.args, **call.kwargs)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


@contextmanager
def _recording(layers: nn.ModuleList, returns_tuple: bool) -> Iterator[list[_Recorder]]:
    originals = list(layers)
    recorders = [_Recorder(layer, returns_tuple) for layer in originals]
    try:
        for i, recorder in enumerate(recorders):
            layers[i] = recorder
        yield recorders
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


class _Recorder(nn.Module):
    """Stands in for a layer: notes its arguments and returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self._wrapped = (layer,)  # in a tuple, so that it is not registered as a submodule
        self._returns_tuple = returns_tuple
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_wrapped"][0], name)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(hidden_states, Tensor) or hidden_states.ndim != 3:
            raise UnsupportedModelError(
                "expected the backbone to pass hidden states [B, L, D] from layer to layer, got "
                f"{type(hidden_states).__name__}; check the family's `returns_tuple` against the "
                "installed version of transformers (docs/families.md)"
            )
        self.hidden = hidden_states
        self.call = LayerCall(args, kwargs)
        return (hidden_states, None) if self._returns_tuple else hidden_states
