"""Options in a YAML file: read with suspicion, and written so that they repeat the run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindtune.cli.options import Field
from blindtune.errors import ConfigError

MAX_BYTES = 1 << 20


def read_config(path: Path, known: Mapping[str, Field]) -> dict[str, Any]:
    """Option values by name from a YAML file.

    Args:
        path: the file; keys are option names, with underscores or dashes.
        known: every option there is, by name.

    Raises:
        ConfigError: unreadable, too large, not a mapping, an unknown key, a value of another type.
    """
    import yaml

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a YAML file of options, cannot read it "
            f"({error.strerror or error}): check the path"
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_BYTES} bytes of options, got more")
    try:
        plain = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: expected YAML, got an error: {reason}") from error
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise ConfigError(
            f"{path}: expected lines such as `seed: 7`, got a {type(plain).__name__}: write one "
            "option a line"
        )
    values: dict[str, Any] = {}
    for key, value in plain.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: unknown option {str(key)!r}{_nearest(name, known)}")
        if name in values:
            raise ConfigError(f"{path}: option {name} is given twice: remove one of the two")
        values[name] = _checked(value, known[name], f"{path}: {key}")
    return values


def _nearest(name: str, known: Mapping[str, Field]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]}?"
    return f": known are {', '.join(sorted(known))}"


def _checked(value: Any, field: Field, where: str) -> Any:
    """A value of the field's type, or ConfigError."""
    if value is None and field.optional:
        return None
    items = value if field.repeated and isinstance(value, list) else [value]
    found = [_converted(item, field) for item in items]
    if None in found:
        raise ConfigError(f"{where}: expected {field.expected()}, got {value!r:.80}")
    return found if field.repeated else found[0]


def _converted(value: Any, field: Field) -> Any:
    """One value as the field's kind; None where it is of another."""
    if field.choices:
        return value if value in field.choices else None
    if field.kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except (ValueError, OverflowError):
            return None
    fits = isinstance(value, field.kind) and isinstance(value, bool) == (field.kind is bool)
    return value if fits else None


def options_path(out: Path) -> Path:
    """Where the options of a run are saved: beside its output, never inside."""
    out = out.absolute()
    return out.parent / f"{out.name}.options.yaml"


def read_saved(path: Path) -> dict[str, Any]:
    """Options that a run of any verb saved, unchecked; none where there is no such file."""
    import yaml

    try:
        with path.open("rb") as file:
            plain = yaml.safe_load(file.read(MAX_BYTES))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def write_config(verb: str, out: Path, values: Mapping[str, Any]) -> Path:
    """Save the resolved options of a run.

    Raises:
        OutputError: they cannot be written.
    """
    import yaml

    from blindtune.atomic import atomic_file

    plain = {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in values.items()
    }
    target = options_path(out)
    text = (
        f"# Repeat this run: blindtune {verb} --config {target.name} --overwrite --resume never\n"
    )
    text += yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target
