"""`accelerate launch blindtune tune` with two processes tunes as one does."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import TUNE_OPTIONS

from blindtune.exchange.packages.package import open_package


def tensors(directory):
    package = open_package(directory, "adapter")
    return package.read_tensors({n: (f.shape, f.dtype) for n, f in package.header.items()})


def free_port():
    """A free port below those that systems give to connections: no other test gets it meanwhile."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_two_processes_tune_as_one(made, blindtune, tmp_path, lora_rank):
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launcher += f" --mixed_precision no --dynamo_backend no --main_process_port {free_port()}"
    script = Path(sys.executable).parent / "blindtune"
    common = ["tune", made / "emulator", "--data", made / "private.jsonl", *TUNE_OPTIONS]
    common += ["--lora-rank", lora_rank, "--lora-dropout", 0, "--json"]
    size = "--per-device-train-batch-size"
    command = [*launcher.split(), script, *common, "--out", tmp_path / "two", size, 2]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # the first process alone prints
    assert done.stderr.count("trained tokens:") == 1
    one = blindtune(*common, "--out", tmp_path / "one", size, 4).facts
    assert two["tokens"] == one["tokens"]
    assert two["id"] == open_package(tmp_path / "two").id
    for (_, ours), (_, theirs) in zip(two["train_loss"], one["train_loss"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    expected, found = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
