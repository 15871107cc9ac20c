import pytest

from offsite_world import owners_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The acts of both parties up to two adapters, on a tiny Llama. Read-only."""
    return owners_world(tmp_path_factory.mktemp("world"), "llama")
