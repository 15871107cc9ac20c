"""No test touches the keyring of whoever runs it."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BLINDTUNE_HOME", str(tmp_path_factory.mktemp("home")))
        yield
