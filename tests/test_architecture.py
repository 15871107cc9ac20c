"""Floors and walls: imports go down only, rooms of one floor do not know each other.

A room may have folders, one for each party where there are two. What a wall says of a folder, it
says of every module in it: a new module is behind it by where it lies. Folders import each other
one way only, and what they share lies in the room itself, below them.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "blindtune"
FLOORS = {
    "errors": 0,
    "version": 0,
    "places": 0.5,  # raises errors
    "kinds": 0.5,
    "atomic": 0.7,  # knows places
    "models": 1,
    "privacy": 1,
    "exchange": 1,
    "training": 1,
    "offsite": 2,
    "split": 2,
    "attacks": 2,
    "evaluation": 3,
    "cli": 4,
}
# Who may not reach whom, even through other modules.
WALLS = {
    "blindtune.split.vendor": ("blindtune.privacy", "blindtune.split.customer"),
    "blindtune.split.customer": ("blindtune.split.vendor",),
    "blindtune.offsite.data_owner": (
        "blindtune.offsite.model_owner",
        "blindtune.offsite.competitors",
    ),
    "blindtune.exchange.packages": ("blindtune.exchange.wire",),
    "blindtune.exchange.wire": ("blindtune.exchange.packages",),
    "blindtune.attacks": ("blindtune.offsite", "blindtune.split"),
}
DRAWERS = {"utils", "util", "common", "helpers", "misc", "base"}


def module_name(path: Path) -> str:
    parts = ("blindtune", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the project that a module names in any import, lazy ones included."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return frozenset(name for name in found if name in FILES and name != module)


def reachable(module: str) -> set[str]:
    seen, stack = set(), [module]
    while stack:
        for name in imports(stack.pop()) - seen:
            seen.add(name)
            stack.append(name)
    return seen


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_every_room_has_a_floor():
    assert {room(m) for m in FILES} - {None} <= set(FLOORS)


@pytest.mark.parametrize("module", [m for m in FILES if room(m)])
def test_imports_go_down(module):
    own = room(module)
    for name in imports(module):
        other = room(name)
        if other not in (None, own):
            assert FLOORS[other] < FLOORS[own], f"{module} (floor {FLOORS[own]}) imports {name}"


def is_in(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


@pytest.mark.parametrize(("inside", "forbidden"), WALLS.items())
def test_walls(inside, forbidden):
    for place in (inside, *forbidden):
        assert place in FILES, f"{place} has moved: so must its wall"
    for module in (m for m in FILES if is_in(m, inside)):
        crossed = {
            name for name in reachable(module) if any(is_in(name, wall) for wall in forbidden)
        }
        assert not crossed, f"{module} reaches {sorted(crossed)}"


def test_no_folder_cycles():
    """A folder is its own modules: what two folders share lies below both, beside neither."""
    below: dict[str, set[str]] = {}
    for module, path in FILES.items():
        if path.name != "__init__.py":
            own = module.rpartition(".")[0]
            folders = {name.rpartition(".")[0] for name in imports(module) if not is_folder(name)}
            below.setdefault(own, set()).update(folders - {own, "blindtune"})
    for folder in below:
        seen, stack = set(), [folder]
        while stack:
            for name in below.get(stack.pop(), set()) - seen:
                seen.add(name)
                stack.append(name)
        assert folder not in seen, f"{folder} imports itself through other folders"


def is_folder(module: str) -> bool:
    return FILES[module].name == "__init__.py"


def test_no_module_cycles():
    for module in FILES:
        if module == "blindtune":
            continue  # the package exports lazily what imports it
        assert module not in reachable(module), f"{module} imports itself through others"


def test_no_drawers_and_no_long_modules():
    for module, path in FILES.items():
        assert not DRAWERS & {part.strip("_") for part in module.split(".")}, module
        assert len(path.read_text().splitlines()) <= 500, module


def test_functions_fit_a_screen():
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{module}.{node.name}: {length} lines"


def test_nothing_unpickles_or_runs_code():
    forbidden = ("import pickle", "trust_remote_code=True", "eval(", "exec(", "weights_only=False")
    for module, path in FILES.items():
        text = path.read_text()
        for word in forbidden:
            position = text.find(word)
            while position >= 0:
                assert text[position - 1] in "._abcdefghijklmnopqrstuvwxyz", f"{module}: {word}"
                position = text.find(word, position + 1)
