"""What Python does not check of a config: that whole numbers are whole, and several are several."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from typing import Any

from blindtune.errors import ConfigError


def check_kinds(config: Any) -> None:
    """Check the whole numbers and the tuples of a config, by its annotations.

    Args:
        config: a dataclass whose module has annotations as text (`from __future__`).

    Raises:
        ConfigError: a fraction in the place of a whole number, one value in that of several.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), str(f.type).removesuffix(" | None")
        if value is None:
            continue
        if kind == "int" and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise ConfigError(f"expected {f.name} to be a whole number, got {value!r}: round it")
        if kind.startswith("tuple[") and not isinstance(value, tuple | list):
            raise ConfigError(
                f"expected {f.name} to be a tuple, got {value!r}: write ({value!r},) for one value"
            )
