"""What a training run needs around it, and what is put back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from blindtune.errors import ConfigError
from blindtune.training.config import RunConfig


@contextmanager
def surroundings(model: nn.Module, run: RunConfig) -> Iterator[None]:
    """Set threads, precision, and activation checkpointing; afterwards all of it is put back.

    The model ends in evaluation mode, whatever happens; verbosity and `use_cache` are put back too.
    Under bfloat16 what is not trained was rounded, and stays so; the model ends on the CPU, for a
    GPU that held it may not hold it in float32.

    Raises:
        ConfigError: activation checkpointing of a model that has none.
    """
    from transformers.utils import logging

    with ExitStack() as after:
        after.callback(logging.set_verbosity, logging.get_verbosity())
        after.callback(model.eval)
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            after.callback(setattr, config, "use_cache", config.use_cache)
        if run.threads is not None:
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(run.threads)
        if run.gradient_checkpointing:
            after.callback(_set_checkpointing(model))
        if run.precision == "bfloat16":
            after.callback(_cast, _cast(_frozen(model), torch.bfloat16), torch.float32)
            after.callback(model.cpu)
        yield


def products_in(precision: str, device: torch.device) -> torch.autocast:
    """Around forward passes: in which type matrices are multiplied."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    """What is not trained, in float32."""
    parameters = model.parameters()
    return [p for p in parameters if not p.requires_grad and p.dtype == torch.float32]


def _cast(parameters: list[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return parameters


def _set_checkpointing(model: Any) -> Any:
    """Turn activation checkpointing on; returns what turns it off."""
    word = next(
        (w for w in ("activation", "gradient") if hasattr(model, f"{w}_checkpointing_enable")), None
    )
    if word is None:
        raise ConfigError(
            "gradient_checkpointing needs a transformers model, got "
            f"{type(model).__name__}: leave it off"
        )
    options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{word}_checkpointing_enable")(**options)
    return getattr(model, f"{word}_checkpointing_disable")
