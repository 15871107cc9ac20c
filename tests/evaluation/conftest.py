"""Tiny models and a tiny tokenizer as fixtures."""

import pytest
import torch

from blindtune.models.blocks import Harmonizer
from blindtune.models.surgery import replace_layer
from tiny_models import FAMILY_NAMES, tiny_model, tiny_tokenizer

EMULATOR = "llama with harmonizers"


@pytest.fixture(params=[*FAMILY_NAMES, EMULATOR])
def any_model(request):
    if request.param != EMULATOR:
        return tiny_model(request.param)
    model = tiny_model("llama")
    torch.manual_seed(0)
    for slot in (2, 5):
        harmonizer = Harmonizer(32, 4)
        torch.nn.init.normal_(harmonizer.up.weight)
        replace_layer(model, slot, harmonizer)
    return model


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
