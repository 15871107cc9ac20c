"""What every verb shares: its options, its help, and the way it runs.

A verb module gives the parameters, the configs whose fields become options, and three functions:
`act` (calls the act, returns plain facts), `show` (prints them for people) and, where there is
something to estimate, `estimate`. Import nothing heavy at its top: help must answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blindtune.cli.configfile import options_path, read_config, write_config
from blindtune.cli.libraries import calm, full_memory
from blindtune.cli.options import Field, Group, as_typed, option_name
from blindtune.cli.output import Facts, Request, check_parent, check_place, request, write_facts
from blindtune.cli.printing import print_estimate, print_json, stdout_console
from blindtune.errors import BlindtuneError, OutputError
from blindtune.places import located

if TYPE_CHECKING:
    from rich.console import Console

    from blindtune.models.costs import Estimate

ConfigT = TypeVar("ConfigT")
_FLAGS = ("config", "dry_run", "json", "debug", "overwrite")
_KINDS = {"boolean": bool, "integer": int, "float": float}
"""By click's name of a type, with " range" behind it or not."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The resolved options of one run."""

    values: Mapping[str, Any]
    """By option name."""
    groups: Sequence[Group]
    overwrite: bool = False
    announce: Callable[[Facts], None] = field(default=lambda facts: None)
    """Prints facts now, as those of the end are printed: what is to be known while it runs."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def of(self, config: type[ConfigT]) -> ConfigT:
        """The config of this class, from its options."""
        group = next(group for group in self.groups if group.name == config.__name__)
        return config(**group.values(self.values))


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command of the command line."""

    name: str
    help: str
    parameters: Sequence[click.Parameter]
    """Arguments and options that are no config's; `out` is where the output goes."""
    groups: Sequence[Group] = ()
    act: Callable[[Settings], Facts]
    show: Callable[[Facts, Console], None]
    estimate: Callable[[Settings], Estimate] | None = None
    mark: str = ""
    """A file that every output of the verb has and few other directories; --overwrite replaces
    nothing else. Without one it replaces what the note beside it says that the verb made. A verb
    that goes on looks after its directory itself then."""
    out_is_file: bool = False
    """Whether `out` is an optional file for what --json prints, instead of a directory."""
    keeps_progress: bool = False
    """Whether an interrupted run leaves something that the same command goes on from."""
    inputs: Sequence[str] = ()
    """Options of configs that name a file or directory that is read."""
    untold: Sequence[str] = ()
    """Options that bring in files which only the act knows: no such output is taken as done."""
    goes_on: bool = False
    """Whether the verb works on in the directory `out` that is there, and replaces nothing."""
    less_memory: str = "use a machine with more memory"
    """What to do when memory runs out."""
    interrupted: str = "nothing was left behind: run the same command again"
    """What to do after Ctrl-C."""

    @property
    def writes(self) -> bool:
        """Whether there is an output."""
        return any(parameter.name == "out" for parameter in self.parameters)

    def command(self) -> click.Command:
        """The verb as a click command."""
        sections: list[tuple[str, list[click.Parameter]]] = [("Input and output", [])]
        sections[0][1].extend(self.parameters)
        sections += [(group.heading, list(group.click_options())) for group in self.groups]
        sections.append(("Every verb", self._general_options()))
        return _VerbCommand(
            name=self.name,
            help=self.help,
            params=[parameter for _, some in sections for parameter in some],
            callback=lambda **values: _run(self, values),
            sections=sections,
        )

    def _general_options(self) -> list[click.Parameter]:
        options: list[click.Parameter] = [
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                is_eager=True,
                expose_value=False,
                callback=lambda ctx, _, path: _use_config(ctx, path, self.known()),
                help="YAML file of options, by the names here; the command line beats it.",
            ),
            click.Option(
                ["--threads"],
                type=click.IntRange(min=1),
                help="CPU threads of torch; default: as many as the machine has cores.",
            ),
            click.Option(["--json"], is_flag=True, help="One JSON object on stdout instead."),
            click.Option(["--debug"], is_flag=True, help="Tracebacks and warnings."),
        ]
        if self.writes and not self.goes_on:
            again = "Replace an earlier output."
            options.insert(1, click.Option(["--overwrite"], is_flag=True, help=again))
            options.insert(1, self._resume_option())
        if self.estimate is not None:
            dry = "Estimate memory, bytes and time; write nothing."
            options.insert(1, click.Option(["--dry-run"], is_flag=True, help=dry))
        return options

    def _resume_option(self) -> click.Option:
        going_on = "an interrupted run goes on, and " if self.keeps_progress else ""
        return click.Option(
            ["--resume"],
            type=click.Choice(["auto", "never"]),
            default="auto",
            show_default=True,
            help=f"auto: {going_on}an output that the same options and inputs made is taken as "
            "done; never: start anew.",
        )

    def known(self) -> dict[str, Field]:
        """Every option that a file may set."""
        known: dict[str, Field] = {}
        for parameter in self.parameters:
            assert parameter.name is not None
            kind = _KINDS.get(parameter.type.name.removesuffix(" range"), str)
            known[parameter.name] = Field(
                name=parameter.name,
                kind=kind,
                default=None,
                help="",
                choices=tuple(getattr(parameter.type, "choices", ())),
                repeated=getattr(parameter, "multiple", False),
                optional=not parameter.required and kind is not bool,
            )
        for group in self.groups:
            known |= group.options()
        if self.writes and not self.goes_on:
            ways = ("auto", "never")
            known["resume"] = Field(name="resume", kind=str, default="auto", help="", choices=ways)
        threads = Field(name="threads", kind=int, default=None, help="", optional=True)
        return known | {"threads": threads}

    def typed(self, name: str) -> str:
        """How an option or argument is typed: --adapter-layers, STUDY."""
        arguments = {str(p.name) for p in self.parameters if isinstance(p, click.Argument)}
        return name.upper() if name in arguments else option_name(name)


class _VerbCommand(click.Command):  # type: ignore[misc]  # click is untyped here
    """A command whose help groups the options under headings."""

    def __init__(
        self, *, sections: list[tuple[str, list[click.Parameter]]], **options: Any
    ) -> None:
        super().__init__(**options)
        self._sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a heading."""
        for heading, parameters in self._sections:
            options = [p for p in parameters if isinstance(p, click.Option)]
            rows = [row for option in options if (row := option.get_help_record(ctx))]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def _use_config(ctx: click.Context, path: Path | None, known: Mapping[str, Field]) -> None:
    if path is not None:
        ctx.default_map = read_config(path, known)


def process_rank() -> int:
    """Which of several launched processes this is; 0 alone prints and writes."""
    return int(os.environ.get("RANK", "0"))


def _at_home(value: Any) -> Any:
    """A path in the home directory, which no shell looks into in a file of options."""
    return str(located(value)) if isinstance(value, str) and value.startswith("~/") else value


def _run(verb: Verb, values: dict[str, Any]) -> None:
    flags = {name: values.pop(name, False) for name in _FLAGS}
    resolved: dict[str, Any] = {
        name: tuple(values[name]) if isinstance(values[name], list) else _at_home(values[name])
        for name in verb.known()
        if name not in flags
    }
    output = sys.stdout

    def announce(facts: Facts) -> None:
        with contextlib.redirect_stdout(output):
            _print_facts(verb, facts, as_json=flags["json"])

    settings = Settings(
        values=resolved, groups=verb.groups, overwrite=flags["overwrite"], announce=announce
    )
    out = None if resolved.get("out") is None else Path(resolved["out"])
    start = time.perf_counter()
    try:
        with calm(flags["debug"]):
            if resolved.get("threads") is not None:
                import torch

                torch.set_num_threads(resolved["threads"])
            if flags["dry_run"]:
                assert verb.estimate is not None
                found, facts = verb.estimate(settings), None
            else:
                facts = _act(verb, settings, out)
    except KeyboardInterrupt:
        click.echo(f"interrupted; {verb.interrupted}", err=True)
        raise click.exceptions.Exit(130) from None
    except BlindtuneError as error:
        error.args = (as_typed(str(error), verb.known()), *error.args[1:])
        raise
    except Exception as error:
        if (place := full_memory(error)) is None:
            raise
        raise BlindtuneError(f"out of memory on the {place}: {verb.less_memory}") from error
    if process_rank() != 0:
        return
    if facts is None:
        print_estimate(verb.name, found, as_json=flags["json"])
    else:
        facts["wall_seconds"] = round(time.perf_counter() - start, 3)
        _print_facts(verb, facts, as_json=flags["json"])


def _act(verb: Verb, settings: Settings, out: Path | None) -> Facts:
    """Act, and save beside the output what was asked and told; or find that all is done."""
    if out is None:
        return verb.act(settings)
    if verb.goes_on:
        if verb.mark:
            check_place(verb.name, out, mark=verb.mark, is_file=verb.out_is_file, overwrite=True)
        return verb.act(settings)
    files = [p for p in verb.parameters if not getattr(p, "is_flag", False)]
    inputs = [*(str(parameter.name) for parameter in files), *verb.inputs]
    asked = request(verb.name, out, settings.values, inputs, verb.untold)
    from blindtune.atomic import sole_writer

    if (facts := _found_done(settings, asked)) is not None:
        with contextlib.suppress(OutputError), sole_writer(out):  # puts it in order
            pass
        return facts
    check_parent(out)
    with sole_writer(out):
        if (facts := _found_done(settings, asked)) is not None:  # another process was quicker
            return facts
        return _anew(verb, settings, asked)


def _found_done(settings: Settings, asked: Request) -> Facts | None:
    facts = asked.done() if settings["resume"] == "auto" else None
    return None if facts is None else facts | {"already_done": True}


def _anew(verb: Verb, settings: Settings, asked: Request) -> Facts:
    """Make an output that is not there, and note what was asked and told."""
    own = settings.overwrite or asked.begun()
    check_place(
        verb.name, asked.out, mark=verb.mark, is_file=verb.out_is_file, overwrite=own,
        there=lambda: asked.difference(verb.typed),
    )  # fmt: skip
    settings = replace(settings, overwrite=own)
    if process_rank() != 0:
        return verb.act(settings)
    with asked.under_way():
        facts = verb.act(settings)
        facts["options"] = str(options_path(asked.out))
        if verb.out_is_file:
            write_facts(asked.out, {"verb": verb.name, **facts})
        write_config(verb.name, asked.out, settings.values)
        asked.note_done(facts)
    return facts


def _print_facts(verb: Verb, facts: Facts, *, as_json: bool) -> None:
    if as_json:
        print_json({"verb": verb.name, **facts})
    else:
        verb.show(facts, stdout_console())
        if facts.get("already_done"):
            click.echo("Nothing was run: these options and inputs made what is there.", err=True)
