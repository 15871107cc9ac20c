"""Command-line options from the source of the config dataclasses.

The dataclasses are the only place where an option has its name, type, default and meaning. Their
modules import torch, and help must answer at once, so their source is parsed instead of imported:
`rank: int = 4` with a docstring under it becomes `--rank INTEGER`, its help, its default.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import click

SOURCE = Path(__file__).parent.parent
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a config dataclass, as its source says it."""

    name: str
    kind: type
    """int, float, str or bool; of every item if `repeated`."""
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    """The only values there are, or () for any."""
    repeated: bool = False
    """A tuple: given several times, or with commas."""
    optional: bool = False
    """None is a value."""

    def expected(self) -> str:
        """What a value must be, in words."""
        word = f"one of {', '.join(self.choices)}" if self.choices else WORDS[self.kind]
        return f"a list ({word} each)" if self.repeated else word


@dataclass(frozen=True, kw_only=True)
class Group:
    """The options that one config dataclass gives to a verb."""

    heading: str
    module: str
    """Where the dataclass is, such as blindtune.training.config."""
    name: str
    """Of the dataclass."""
    prefix: str = ""
    """Before every option name, where two dataclasses of a verb share names."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Option name by field name, for single fields."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Where the verb's default differs from the dataclass's."""
    left_out: frozenset[str] = frozenset()
    """Fields that are no option of their own here."""

    def options(self) -> dict[str, Field]:
        """Every field by the name of its option."""
        return {
            self.renamed.get(f.name, self.prefix + f.name): f
            for f in read_fields(self.module, self.name)
            if f.name not in self.left_out
        }

    def values(self, resolved: Mapping[str, Any]) -> dict[str, Any]:
        """The dataclass's keyword arguments out of the resolved options."""
        return {f.name: resolved[option] for option, f in self.options().items()}

    def click_options(self) -> list[click.Option]:
        """The options for click, in the order of the source."""
        options = self.options()
        given = {option: self.defaults.get(f.name, f.default) for option, f in options.items()}
        return [
            _click_option(option, f, given[option], _help_of(f, options, given[option]))
            for option, f in options.items()
        ]


def option_name(name: str) -> str:
    """`adapter_layers` as it is typed: `--adapter-layers`."""
    return "--" + name.replace("_", "-")


def as_typed(text: str, options: Mapping[str, Field]) -> str:
    """A text of the library as the command line's user knows it: fields by their option's name.

    Names of one word are taken for options only in backquotes: "rank" may be the English word. A
    field's name that several options have stays, unless one of them is called so.
    """
    fields = [f.name for f in options.values()]
    typed = {f.name: option_name(o) for o, f in options.items() if fields.count(f.name) == 1}
    typed |= {option: option_name(option) for option in options}
    text = re.sub(r"`(\w+)`", lambda found: typed.get(found[1], found[0]), text)
    typed = {name: option for name, option in typed.items() if "_" in name}
    if not typed:
        return text
    names = "|".join(sorted(map(re.escape, typed), key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({names})(?![\w/-])", lambda found: typed[found[1]], text)


def _help_of(f: Field, options: Mapping[str, Field], default: Any) -> str:
    """A field's docstring for people who cannot type None: it is the default or out of reach."""
    said = f.help
    if default is not None:
        said = re.sub(r"[.;] None: .*?\.(?= |$)", ".", said)
    said = said.replace("None: ", "default: ").replace(" is None", " is not given")
    return as_typed(said, options)


def _click_option(name: str, f: Field, default: Any, said: str) -> click.Option:
    flag = option_name(name)
    if f.kind is bool:
        declaration, kind = f"{flag}/--no-{flag[2:]}", None
    else:
        declaration = flag
        kind = click.Choice(f.choices) if f.choices else click.types.convert_type(f.kind)
    if f.repeated and not f.choices:
        kind = click.STRING  # commas first, numbers then
    return click.Option(
        [declaration, name],
        type=kind,
        default=list(default) if f.repeated else default,
        multiple=f.repeated,
        help=said,
        show_default=default not in (None, ()),
        callback=partial(split_commas, kind=f.kind) if f.repeated else None,
    )


def split_commas(
    ctx: click.Context, option: click.Parameter, values: Sequence[str], *, kind: type = str
) -> list[Any]:
    """`--x a,b --x c` means a, b, c; each of the given type."""
    convert = click.types.convert_type(kind).convert
    parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
    return [convert(part, option, ctx) for part in parts]


@cache
def read_fields(module: str, name: str) -> tuple[Field, ...]:
    """The fields of a config dataclass, from its source."""
    body = next(
        node.body
        for node in _tree(module).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    found = []
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        assert isinstance(node.target, ast.Name), f"{module}.{name}"
        assert node.value is not None, f"{module}.{name}.{node.target.id} has no default"
        found.append(
            Field(
                name=node.target.id,
                default=ast.literal_eval(node.value),
                help=_docstring(below),
                **_read_type(node.annotation, module),
            )
        )
    return tuple(found)


def _docstring(node: ast.stmt | None) -> str:
    assert isinstance(node, ast.Expr), "every field has a docstring under it"
    assert isinstance(node.value, ast.Constant), "every field has a docstring under it"
    return " ".join(str(node.value.value).split())


@cache
def _tree(module: str) -> ast.Module:
    path = SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _read_type(node: ast.expr, module: str) -> dict[str, Any]:
    """What `Field` says of an annotation; aliases are followed through imports."""
    match node:
        case ast.Name(id=word) if word in _TYPES:
            return {"kind": _TYPES[word]}
        case ast.Name(id=alias):
            return _read_alias(alias, module)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            items = values.elts if isinstance(values, ast.Tuple) else [values]
            return {"kind": str, "choices": tuple(ast.literal_eval(item) for item in items)}
        case ast.Subscript(
            value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, ast.Constant(value=end)])
        ) if end is ...:
            return _read_type(item, module) | {"repeated": True}
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _read_type(left, module) | {"optional": True}
    raise AssertionError(f"{module}: no option is made of the annotation {ast.unparse(node)}")


def _read_alias(alias: str, module: str) -> dict[str, Any]:
    for node in _tree(module).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name == alias:
                return _read_type(value, module)
            case ast.ImportFrom(module=str(other), names=names) if other.startswith("blindtune."):
                for imported in names:
                    if (imported.asname or imported.name) == alias:
                        return _read_alias(imported.name, other)
    raise AssertionError(f"{module}: the annotation {alias} is not an alias of this project")
