"""A digest that tells whether two parties, or two days, mean the same model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from blindtune.errors import ModelError

# The numbers that change what the weights compute. Everything else in a config (names of its
# author, cache switches, library versions) may differ between two copies of one model.
_ESSENTIAL = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "do_layer_norm_before",
    "use_parallel_residual",
    "apply_residual_connection_post_layernorm",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)
_WHERE_THERE = ("hidden_activation",)
"""Essential too, and counted only where a config has them (Gemma 2 and 3)."""


def fingerprint(model: PreTrainedModel) -> str:
    """The sha256, in hex, of the config's essentials and of every weight.

    Names, shapes, dtypes and bytes count; a tied weight counts once; device, training mode and the
    order of registration do not. One weight at a time is on the CPU (1 to 2 GB/s).

    Raises:
        ModelError: the model is on the meta device and has no weights to read.
    """
    digest = hashlib.sha256(b"blindtune model fingerprint 1\n")
    config = model.config
    essential = {key: getattr(config, key, None) for key in _ESSENTIAL}
    essential |= {key: getattr(config, key) for key in _WHERE_THERE if hasattr(config, key)}
    digest.update(_line(essential))
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ModelError(
                f"expected a model with weights, got {name!r} on the meta device; load it first"
            )
        tensor = parameter.detach().to("cpu").contiguous()
        digest.update(_line([name, list(tensor.shape), str(tensor.dtype)]))
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _line(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, default=str) + "\n").encode()
