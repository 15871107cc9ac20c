"""No test touches the keyring of whoever runs it, no log has content; the longest come first."""

import pytest
from hypothesis import HealthCheck, settings

from log_watch import SESSION, keep_secret

# How fast examples come says more of the machine's load than of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BLINDTUNE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_content_in_logs(tmp_path_factory):
    """In the end: no log of any test held a text, label, token or passphrase of the tests."""
    keep_secret("open sesame", "open barley")
    with pytest.MonkeyPatch.context() as patched:
        SESSION.install(patched)
        yield
        SESSION.uninstall()
    SESSION.look_at_files(tmp_path_factory.getbasetemp())
    assert SESSION.verdict() == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    for name, content in report.sections:
        if "stderr" in name or "log" in name:
            SESSION.look("stderr", content)
    if report.when == "call" and report.passed:
        SESSION.passed.add(getattr(item, "originalname", item.name))
    return report


def pytest_collection_modifyitems(items):
    """Begin with what takes minutes, so that no process is left alone with it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)
