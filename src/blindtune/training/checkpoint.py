"""Small checkpoints: the trained parameters and what the loop needs to go on, nothing frozen.

    checkpoints/
        run.json             what the run is; another run does not continue it
        checkpoint-120/      the newest complete one
            trained.safetensors  trainer.pt  trainer_state.json
        best-100.safetensors the trained parameters with the lowest validation loss

A checkpoint stands under its name only when it is complete (`atomic`).
These files never leave the party that trains. `trainer.pt` (optimizer, schedule, random states) is
read with `weights_only=True`, so it cannot run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blindtune.atomic import (
    atomic_directory,
    atomic_file,
    put_in_order,
    remove_directory,
    save_torch,
)
from blindtune.errors import ConfigError, OutputError

WEIGHTS_NAME = "trained.safetensors"
_RUN_NAME = "run.json"
_PROBE = 64
_ANEW = "start anew with resume=never (--resume never)"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_weights(path: Path, model: nn.Module) -> None:
    """Write `trained_state` to a safetensors file, atomically."""
    with _kept_whole(), atomic_file(path) as partial:
        save_file(trained_state(model), partial)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what `save_weights` wrote back into the same parameters.

    Raises:
        ConfigError: the file is damaged, or belongs to other parameters.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: expected trained weights, cannot read them ({error}): {_ANEW}"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
        raise ConfigError(
            f"{path}: expected {len(parameters)} trained parameters as the model has them, found "
            f"{len(state)} others: use another output directory, or {_ANEW}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, trainer: Mapping[str, Any], state_json: str
) -> None:
    """Write `checkpoint-<step>` atomically, then remove the older ones."""

    final = folder / f"checkpoint-{step}"
    again = atomic_directory(final, overwrite=True, mark=WEIGHTS_NAME)
    with _kept_whole(), again as partial:
        save_file(trained_state(model), partial / WEIGHTS_NAME)
        save_torch(dict(trainer), partial / "trainer.pt")
        (partial / "trainer_state.json").write_text(state_json)
    for old in _checkpoints(folder):
        if old != final:
            remove_directory(old)


def load_trainer(checkpoint: Path) -> dict[str, Any]:
    """Optimizer, schedule and random states of a checkpoint."""
    try:
        found: dict[str, Any] = torch.load(
            checkpoint / "trainer.pt", map_location="cpu", weights_only=True
        )
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError
        raise ConfigError(
            f"{checkpoint}: expected a checkpoint, cannot read it: {_ANEW}"
        ) from error
    return found


def keep_best(folder: Path, step: int | None) -> None:
    """Remove the best weights of every step but one."""
    for path in folder.glob("best-*.safetensors"):
        if path != best_path(folder, step):
            path.unlink()


def best_path(folder: Path, step: int | None) -> Path:
    """Where the best weights of a step are."""
    return folder / f"best-{step}.safetensors"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return max(_checkpoints(folder), key=_step, default=None)


def begin_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Empty the folder and note which run it belongs to."""
    put_in_order(folder)
    remove_directory(folder)
    with atomic_file(folder / _RUN_NAME) as partial:
        partial.write_text(json.dumps(run, indent=1, sort_keys=True))


def check_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Raise ConfigError when the folder's checkpoints belong to another run."""
    try:
        found = json.loads((folder / _RUN_NAME).read_text())
    except (OSError, ValueError):
        found = {}
    wanted = json.loads(json.dumps(run))
    different = sorted(k for k in {**wanted, **found} if found.get(k) != wanted.get(k))
    if different:
        changes = ", ".join(f"{k} {found.get(k)} -> {wanted.get(k)}" for k in different)
        raise ConfigError(
            f"{folder}: expected checkpoints of this run, found another's ({changes}): "
            f"use another output directory, or {_ANEW}"
        )


def clear(out_dir: Path) -> None:
    """Remove the checkpoints of a finished run: they hold weights fitted to the data.

    The run's directory goes too, unless there is more in it (TensorBoard logs).

    Raises:
        OutputError: they cannot be removed.
    """
    folder = out_dir / "checkpoints"
    put_in_order(folder)
    alone = out_dir.is_dir() and all(path == folder for path in out_dir.iterdir())
    try:
        remove_directory(out_dir if alone else folder)
    except OutputError as error:
        raise OutputError(
            f"{error}: the run is finished, and its checkpoints hold weights fitted to the data"
        ) from error


def model_key(model: nn.Module) -> str:
    """sha256 (hex) of all parameter names and shapes and a sample of the frozen values.

    The sample (64 values a tensor, evenly spaced) tells two models apart without reading either
    in full; trained parameters are left out, since LoRA starts at random.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.requires_grad}".encode())
        if not parameter.requires_grad:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // _PROBE)].to("cpu", torch.float32)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


@contextmanager
def _kept_whole() -> Iterator[None]:
    """Say of a checkpoint that cannot be written what that means for the run."""
    try:
        yield
    except OutputError as error:
        raise OutputError(
            f"{error}; then run the same command again: it goes on from the last complete "
            "checkpoint"
        ) from error
