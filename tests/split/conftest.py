"""What the tests of split tuning share."""

import multiprocessing

import pytest

PRELOADED = ["blindtune.split.vendor.service", "blindtune.split.customer.tuning_job"]
PRELOADED += ["peft", "peft.functional", "grpc", "prometheus_client"]


@pytest.fixture(scope="module")
def fork():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = []

    def start(work, *arguments):
        process = context.Process(target=work, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
