"""Counting FLOPs, with what torch's counter does not know on a CPU."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention(query, key, *_, **__):
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward(_gradient, query, key, *_, **__):
    return 2.5 * _attention(query, key)


def counter():
    """Counts FLOPs of matrix products and attention; singular and eigenvectors are not counted."""
    aten = torch.ops.aten
    cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=cpu)
