import pytest
from tiny_networks import stand_ins_for

from blindtune.models.decoder import Decoder
from blindtune.offsite.model_owner.mixed_network import MixedNetwork
from offsite_world import owners_world
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The acts of both parties up to two adapters, on a tiny Llama. Read-only."""
    return owners_world(tmp_path_factory.mktemp("world"), "llama")


@pytest.fixture(params=["llama", "gemma3", "bloom"])
def network(request):
    model = tiny_model(request.param).requires_grad_(False)
    decoder = Decoder(model)
    return MixedNetwork(decoder, stand_ins_for(decoder, decoder.layer_count - 2), 1)
