"""Counting FLOPs, with what torch's counter does not know on a CPU."""

from contextlib import nullcontext

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
    return _Total(display=False, custom_mapping=cpu)


class _Total(FlopCounterMode):
    """Counts the sum alone: what tells modules apart keeps tensors, and fails where gradients are
    asked for by `torch.autograd.grad`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mod_tracker = _Everywhere()


class _Everywhere(nullcontext):
    """In the place of torch's tracker of modules."""

    parents = frozenset({"Global"})
