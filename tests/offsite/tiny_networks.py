"""Tiny batches and untrained stand-ins for the middle of a tiny model."""

import torch
from torch import nn

from blindtune.models.blocks import Harmonizer


def ids(count, length=12, seed=0):
    return torch.randint(3, 100, (count, length), generator=torch.Generator().manual_seed(seed))


def stand_ins_for(decoder, count, seed=0):
    torch.manual_seed(seed)
    modules = [
        Harmonizer(decoder.hidden_size, 4, returns_tuple=decoder.family.returns_tuple)
        for _ in range(count)
    ]
    for module in modules:
        nn.init.normal_(module.up.weight, std=0.3)
    return nn.ModuleList(modules)
