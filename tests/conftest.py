"""No test touches the keyring of whoever runs it; the longest ones come first."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BLINDTUNE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def pytest_collection_modifyitems(items):
    """Begin with what takes minutes, so that no process is left alone with it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)
