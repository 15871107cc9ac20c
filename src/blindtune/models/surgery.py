"""Cutting and mending decoders: replace layers, keep some of them, cast them, build empty ones.

The KV cache is what surgery can silently break. transformers sizes masks and positions by the
*first* cache layer of each layer type (layer 0 overall), and a replaced layer writes no cache.
Two rules keep this right, and `replace_layer` and `keep_layers` enforce both: layer 0 is always a
raw layer, and in configs with one type a layer (`layer_types`) every slot without attention is
given the type of layer 0, so the first slot of every type is a raw layer. A raw layer's own type
never changes; its attention was built for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from blindtune.errors import ModelError
from blindtune.models.decoder import Decoder
from blindtune.models.families import family_of
from blindtune.models.loading import first_line


def replace_layer(model: PreTrainedModel, i: int, module: nn.Module) -> None:
    """Put `module` (a harmonizer, or another layer of the family) into slot `i`, in place.

    The number of slots, and with it every other layer's cache index, stays. transformers records
    `output_hidden_states` by layer class: a slot with a harmonizer has no entry there.

    Raises:
        ModelError: there is no slot `i`, or a module without attention would become layer 0.
    """
    decoder = Decoder(model)
    if not 0 <= i < decoder.layer_count:
        raise ModelError(f"expected a layer from 0 to {decoder.layer_count - 1}, got {i}")
    previous = decoder.layers[i]
    decoder.layers[i] = module
    if not decoder.is_raw(0):
        decoder.layers[i] = previous
        raise ModelError(
            f"expected layer 0 to stay a {decoder.family.name} layer, because it holds the length "
            f"of the KV cache; got {type(module).__name__}; replace a later layer"
        )
    _renumber(decoder)


def keep_layers(model: PreTrainedModel, kept_indices: Sequence[int]) -> None:
    """Shorten the model, in place, to the layers of the given indices, in the given order.

    An index may repeat: the second occurrence is a copy of the layer with its own weights.
    `config.num_hidden_layers`, per-layer config lists and the layers' cache indices follow.

    Raises:
        ModelError: an index is out of range, nothing is kept, the first kept layer has no
            attention, or the family scales attention by the layer's index (GPT-2 option) and the
            kept layers would change theirs.
    """
    decoder = Decoder(model)
    count, config = decoder.layer_count, decoder.config
    if not kept_indices or not all(0 <= i < count for i in kept_indices):
        raise ModelError(
            f"expected at least one layer from 0 to {count - 1}, got {list(kept_indices)}"
        )
    if not decoder.is_raw(kept_indices[0]):
        raise ModelError(
            f"expected the first kept layer to be a {decoder.family.name} layer, because it holds "
            f"the length of the KV cache; layer {kept_indices[0]} has been replaced"
        )
    moves = list(kept_indices) != list(range(len(kept_indices)))
    if moves and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            "expected layers that do not depend on their index, got a config with "
            "scale_attn_by_inverse_layer_idx=True; replace layers instead of dropping them"
        )
    originals, seen = list(decoder.layers), set[int]()
    kept = []
    for i in kept_indices:
        kept.append(copy.deepcopy(originals[i]) if i in seen else originals[i])
        seen.add(i)
    lists = {key: getattr(config, key) for key in decoder.family.per_layer}
    parent, _, name = decoder.family.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    config.num_hidden_layers = len(kept)
    for key, values in lists.items():
        setattr(config, key, [values[i] for i in kept_indices])
    _renumber(decoder)


def _renumber(decoder: Decoder) -> None:
    """Give every layer the cache index of its slot, and slots without attention a safe type."""
    for slot, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", slot)  # noqa: B010
    for key in decoder.family.per_layer:
        values = list(getattr(decoder.config, key))
        for slot in range(len(values)):
            if not decoder.is_raw(slot):
                values[slot] = values[0]
        setattr(decoder.config, key, values)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every weight, in place, to what the model has when transformers opens it in this dtype.

    Buffers stay: rounded rotary frequencies would turn late positions by the wrong angle.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def empty_model(config: Any, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model of this config on the CPU, its weights allocated but not filled.

    Untouched weights cost address space, not memory. Buffers (rotary frequencies, embedding scale)
    are right, tied weights are tied, and the model is in eval mode. Norm weights are ones; every
    other weight is whatever the memory holds: load all of them before use.

    Args:
        config: a Hugging Face config of a known family; it is copied.
        dtype: of the weights.

    Raises:
        UnsupportedModelError: the family is unknown.
        ModelError: transformers cannot build a model from these numbers.
    """
    with no_init_weights():
        model = _from_config(config, dtype)
    model.tie_weights()
    return model


def meta_model(config: Any, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model of this config on the meta device: names and shapes, no memory.

    Raises:
        UnsupportedModelError: the family is unknown.
        ModelError: transformers cannot build a model from these numbers.
    """
    with torch.device("meta"):
        return _from_config(config, dtype)


def _from_config(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    family = family_of(config)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=False
        )
    except Exception as error:  # from a stranger's config, transformers may raise anything
        raise ModelError(
            f"expected a config that builds a {family.name} model, got one that transformers "
            f"refuses: {first_line(error)}; check its sizes"
        ) from error
    return model.eval()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that are the same tensor as an earlier one: name -> the earlier name.

    For most small decoders {"lm_head.weight": "model.embed_tokens.weight"}, or the other way
    round if the head is registered first.
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            tied[name] = original
    return tied
