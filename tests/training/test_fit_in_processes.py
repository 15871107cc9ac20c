"""`fit` where a process dies, and where there are two of them."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
import torch

SCRIPT = Path(tiny_training.__file__)


def launch(options, *before):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *before, str(SCRIPT), json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def options(out, **config):
    return {
        "model": "gpt2",
        "dropout": 0.2,
        "part": "",
        "out": str(out),
        "config": {"max_steps": 7, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
        | config,
        "run": {"eval_steps": 3, "save_steps": 2},
    }


def outcome(out):
    return torch.load(out / "final.pt"), json.loads((out / "result.json").read_text())


def test_killed_and_resumed_is_bit_identical(tmp_path):
    small = {"per_device_train_batch_size": 2}
    tiny_training.main(options(tmp_path / "whole", **small))
    killed = launch(options(tmp_path / "parts", **small) | {"die_at": 5})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "parts" / "checkpoints" / "checkpoint-4").exists()
    tiny_training.main(options(tmp_path / "parts", **small))
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert all(torch.equal(whole[0][name], parts[0][name]) for name in whole[0])
    assert whole[1] == parts[1]


def test_two_processes_equal_one_with_a_doubled_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launcher += f" --mixed_precision no --dynamo_backend no --main_process_port {port}"
    common = {"model": "llama", "part": "layers"}
    two = options(tmp_path / "two", per_device_train_batch_size=2) | common
    done = launch(two, *launcher.split())
    assert done.returncode == 0, done.stderr
    tiny_training.main(options(tmp_path / "one", per_device_train_batch_size=4) | common)
    (weights_two, result_two), (weights_one, result_one) = (
        outcome(tmp_path / "two"),
        outcome(tmp_path / "one"),
    )
    assert result_two["tokens"] == result_one["tokens"]
    for key in ("train_loss", "validation_loss"):
        for (step_two, loss_two), (step_one, loss_one) in zip(
            result_two[key], result_one[key], strict=True
        ):
            assert step_two == step_one
            assert loss_two == pytest.approx(loss_one, rel=1e-5)
    for name, weight in weights_one.items():
        torch.testing.assert_close(weights_two[name], weight, rtol=1e-3, atol=1e-5)
