"""Options are read from source: the reading agrees with the dataclasses themselves."""

import dataclasses
import re
import types
import typing
from importlib import import_module

import click
import pytest

from blindtune.cli.configfile import options_path, read_config, write_config
from blindtune.cli.main import VERBS
from blindtune.cli.options import Field, _help_of, as_typed, read_fields
from blindtune.errors import ConfigError

VERB_OBJECTS = {
    name: import_module(f"blindtune.cli.{name.replace('-', '_')}").VERB for name in VERBS
}
VERB_OBJECTS |= {verb.name: verb for verb in VERB_OBJECTS.pop("keys").verbs.values()}
GROUPS = [
    pytest.param(group, id=f"{name}-{group.name}")
    for name, verb in VERB_OBJECTS.items()
    for group in verb.groups
]


def real_type(annotation):
    """(kind, choices, repeated, optional) of an evaluated annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        rest = [a for a in arguments if a is not type(None)]
        kind, choices, repeated, _ = real_type(rest[0])
        return kind, choices, repeated, True
    if origin is typing.Literal:
        return str, arguments, False, False
    if origin is tuple:
        kind, choices, _, optional = real_type(arguments[0])
        return kind, choices, True, optional
    return annotation, (), False, False


@pytest.mark.parametrize("group", GROUPS)
def test_the_source_says_what_the_dataclass_is(group):
    cls = getattr(import_module(group.module), group.name)
    hints = typing.get_type_hints(cls)
    read = read_fields(group.module, group.name)
    real = dataclasses.fields(cls)
    assert [f.name for f in read] == [f.name for f in real]
    for ours, theirs in zip(read, real, strict=True):
        assert ours.default == theirs.default, ours.name
        assert type(ours.default) is type(theirs.default), ours.name
        found = (ours.kind, ours.choices, ours.repeated, ours.optional)
        assert found == real_type(hints[ours.name]), ours.name
        assert ours.help, ours.name


@pytest.mark.parametrize("verb", VERB_OBJECTS.values(), ids=VERB_OBJECTS)
def test_no_command_draws_noise_that_can_be_repeated(verb):
    assert not [name for name in verb.known() if "testing" in name]


@pytest.mark.parametrize("group", GROUPS)
def test_defaults_build_the_default_config(group):
    cls = getattr(import_module(group.module), group.name)
    command = click.Command("x", params=group.click_options())
    values = command.make_context("x", []).params
    resolved = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    assert cls(**group.values(resolved)) == cls(**group.defaults)


@pytest.mark.parametrize("group", GROUPS)
def test_help_says_what_can_be_typed(group):
    fields = {f.name for f in read_fields(group.module, group.name)}
    for option in group.click_options():
        assert "None" not in option.help, option.name
        assert not fields & set(re.findall(r"`(\w+)`", option.help)), option.help
        if option.default is not None:
            assert "default: " not in option.help, "the default is another here"


def test_names_that_several_options_have_are_left_or_are_the_option_of_that_name():
    def named(name):
        return Field(name=name, kind=int, default=1, help="")

    options = {"seed": named("seed"), "split_seed": named("seed"), "dp_unit": named("unit")}
    assert as_typed("`seed` and `unit`", options) == "--seed and --dp-unit"
    del options["seed"]
    options["order_seed"] = named("seed")
    assert as_typed("`seed` or split_seed", options) == "`seed` or --split-seed"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("Most tokens; None: 2048. Longer ones 0.5 cut.", "Most tokens. Longer ones 0.5 cut."),
        ("Share. None: 0.75 of all.", "Share."),
    ],
)
def test_help_of_an_option_with_a_default_leaves_none_out(told, said):
    shown = Field(name="most", kind=int, default=None, help=told, optional=True)
    assert _help_of(shown, {"most": shown}, 7) == said


@pytest.mark.parametrize("name", VERB_OBJECTS)
def test_no_two_parameters_of_a_verb_share_a_name(name):
    verb = VERB_OBJECTS[name]
    names = [p.name for p in verb.command().params]
    assert len(names) == len(set(names))
    assert set(verb.known()) <= set(names)


KNOWN = {
    "rank": Field(name="rank", kind=int, default=1, help=""),
    "rate": Field(name="rate", kind=float, default=1.0, help="", optional=True),
    "pack": Field(name="pack", kind=bool, default=True, help=""),
    "mode": Field(name="mode", kind=str, default="a", help="", choices=("a", "b")),
    "tasks": Field(name="tasks", kind=str, default=(), help="", repeated=True),
    "rates": Field(name="rates", kind=float, default=(), help="", repeated=True),
    "text_column": Field(name="text_column", kind=str, default="text", help=""),
}


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(path, KNOWN)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("rank: 3\npack: false\n", {"rank": 3, "pack": False}),
        ("text-column: body", {"text_column": "body"}),
        ("rate: 1e-4", {"rate": 1e-4}),
        ("rate: 2", {"rate": 2.0}),
        ("rate:", {"rate": None}),
        ("tasks: a", {"tasks": ["a"]}),
        ("tasks: [a, b]", {"tasks": ["a", "b"]}),
        ("rates: [5e-5, 2.0e-4, 1]", {"rates": [5e-5, 2e-4, 1.0]}),
        ("rates: 5e-5", {"rates": [5e-5]}),
    ],
)
def test_a_file_sets_options(tmp_path, text, values):
    assert read(tmp_path, text) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rnak: 3", "unknown option 'rnak': did you mean rank?"),
        ("zzzzzzzz: 3", "unknown option 'zzzzzzzz': known are mode"),
        ("rank: three", "expected a whole number, got 'three'"),
        ("rank: 1.5", "expected a whole number, got 1.5"),
        ("rank: true", "expected a whole number, got True"),
        ("rank:", "expected a whole number, got None"),
        ("rate: fast", "expected a number, got 'fast'"),
        ("pack: 1", "expected true or false, got 1"),
        ("mode: c", "expected one of a, b, got 'c'"),
        ("tasks: [1]", "expected a list (text each), got [1]"),
        ("rates: [1, fast]", "expected a list (a number each), got [1, 'fast']"),
        ("rate: [1]", "expected a number, got [1]"),
        ("rate: true", "expected a number, got True"),
        ("text_column: 7", "expected text, got 7"),
        ("text_column: a\ntext-column: b", "given twice"),
        ("- rank", "got a list"),
        ("rank: [", "expected YAML, got an error"),
        ("rank: !!python/object/apply:os.getcwd []", "expected YAML, got an error"),
        (b"\xff\xfe\xff", "expected YAML, got an error"),
        ("a" * (1 << 20) + "aa", "at most 1048576 bytes"),
        ("[" * 100_000, "expected YAML, got an error"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read it"):
        read_config(tmp_path / "none.yaml", KNOWN)


def test_what_is_written_is_read_back(tmp_path):
    values = {
        "rank": 3,
        "rate": 1e-5,
        "pack": False,
        "mode": "b",
        "tasks": ("a", "b"),
        "text_column": "yes",
    }
    path = write_config("study", tmp_path / "out", values)
    assert path == options_path(tmp_path / "out") == tmp_path / "out.options.yaml"
    assert read_config(path, KNOWN) == values | {"tasks": ["a", "b"]}


@pytest.mark.parametrize("every", [False, True], ids=["defaults", "every option"])
@pytest.mark.parametrize("name", VERB_OBJECTS)
def test_the_saved_options_of_every_verb_are_read_back(tmp_path, name, every):
    verb = VERB_OBJECTS[name]
    command, known, given = verb.command(), verb.known(), []
    for option in command.params:
        if (
            option.name in known
            and (every or option.required)
            and not getattr(option, "is_flag", 0)
        ):
            value = getattr(option.type, "choices", ["1"])[0]  # "1" is text, and in every range
            named = isinstance(option, click.Option)
            given.append(f"{option.opts[0]}={value}" if named else value)
    values = command.make_context(name, given).params
    saved = {n: values[n] for n in known if n in values}
    path = write_config(name, tmp_path / "out", saved)
    read = read_config(path, known)
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in saved.items()} == read
    assert command.make_context(name, ["--config", str(path)]).params == values
