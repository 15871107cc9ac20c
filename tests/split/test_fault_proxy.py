"""Jobs over a network that fails end as undisturbed ones do; and the proxy would be noticed."""

import contextlib
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fault_network
import fault_proxy

COUNT = 3


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    with fault_proxy.open_sites(tmp_path_factory.mktemp("sites")) as found:
        yield found


@pytest.mark.parametrize("fault", fault_proxy.ALL_FAULTS)
def test_every_job_ends_as_an_undisturbed_one(sites, fault):
    first = fault_proxy.ALL_FAULTS.index(fault) % 2  # the partitions take turns
    row = fault_proxy.disturb(sites[first:] + sites[:first], fault, COUNT, seed=1)
    assert row["equal"], row["different"]
    assert row["injected"] == COUNT
    assert row["connections"] >= 3 * row["jobs"]  # tune, predict, cancel


def test_what_an_undisturbed_job_leaves(sites):
    for site in sites:
        assert site.calm["left"] == []
        assert {"job.json", "losses.jsonl", "privacy.json"} < set(site.calm["files"])
        assert site.calm["vendor"]["steps"] == site.calm["steps"]


def test_a_difference_is_seen():
    one = {"a": [torch.ones(3)], "b": 2}
    assert fault_proxy.same(one, {"a": [torch.ones(3)], "b": 2})
    assert not fault_proxy.same(one, {"a": [torch.ones(3)], "b": 3})
    assert not fault_proxy.same(one, {"a": [torch.ones(3) + 1e-7], "b": 2})
    assert not fault_proxy.same(one, {"a": [], "b": 2})
    assert not fault_proxy.same(one, {"a": [torch.ones(3)]})


SENT = bytes(range(256)) * 8


def send_back(side):
    with contextlib.suppress(OSError), side:
        while got := side.recv(1 << 16):
            side.sendall(got)


@pytest.fixture
def echo():
    """A port that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    side, _ = listener.accept()
                    threading.Thread(target=send_back, args=(side,), daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def received(port, seconds=1.0):
    """What comes back of SENT until the end, an error, or silence."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as side:
        side.sendall(SENT)
        try:
            while len(found) < 2 * len(SENT) and (got := side.recv(1 << 16)):
                found += got
                if len(found) == len(SENT):
                    side.settimeout(0.1)
        except OSError as error:
            return found, type(error).__name__
    return found, "end"


@pytest.mark.parametrize("fault", fault_network.FAULTS)
def test_each_fault_does_what_it_says(echo, fault):
    with fault_network.FaultProxy(echo, fault, seed=0, gap=1, limit=1) as proxy:
        found, ending = received(proxy.port)
        assert proxy.injected == 1
        if fault == "delay":
            assert found == SENT
        elif fault == "duplication":
            assert found == SENT + SENT
        elif fault in ("reordering", "alteration"):
            assert found != SENT
            assert len(found) == len(SENT)
        elif fault == "truncation":
            assert SENT.startswith(found)
            assert len(found) < len(SENT)
            assert ending == "end"
        else:
            assert found == b""
            assert (
                ending
                in {
                    "loss": ["TimeoutError"],
                    "reset": ["ConnectionResetError"],
                    "half-open": ["TimeoutError", "ConnectionResetError"],
                }[fault]
            )
        assert received(proxy.port) == (SENT, "TimeoutError")  # the limit is reached
