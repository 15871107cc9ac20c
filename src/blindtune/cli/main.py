"""`blindtune`: the group of verbs, and what becomes of an error.

Exit codes: 0 done, 2 usage or input, 3 verification failed, 4 refused by policy, 5 network (can be
resumed), 70 an error of ours, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from blindtune import __version__
from blindtune.cli.verb import process_rank
from blindtune.errors import BlindtuneError

INTERNAL_ERROR = 70
INTERRUPTED = 130

VERBS = {
    "study": "model owner: study a model on public text, once",
    "emulate": "model owner: make an emulator from a study, without training",
    "inspect": "either: tell what a package holds and reveals",
    "tune": "data owner: tune an emulator's adapter on private data",
    "plug-in": "model owner: put the returned adapter into the full model",
    "evaluate": "either: score a model, an emulator, or one with an adapter",
    "frontier": "model owner: try settings, and draw what each gives and keeps",
    "split-frontier": "either: try cuts and noise of split tuning, and draw what each hides",
    "plant": "data owner: plant made-up secrets in a copy of the data, for an audit",
    "audit": "either: attack what is about to leave, and report what leaks",
    "bottom": "vendor: cut a model, and write what customers of split tuning get",
    "serve": "vendor: tune a model for customers who send privatized states",
    "admit": "vendor: give a customer a token",
    "split-tune": "customer: tune a vendor's model on texts that it never sees",
    "predict": "customer: ask a tuned job about new texts",
    "cancel": "customer: end a job at the vendor",
    "keys": "either: your key, and the keys that you trust",
    "seal": "either: seal a package so that only its recipient can open it",
    "unseal": "either: open what was sealed for you",
}
"""Every verb with its line in `blindtune --help`; its module is imported when it is used."""

_HELP = """Tune a model that you may not see, on data that you may not share.

The model owner studies a model once and sends out a lossy emulator of it. The data owner tunes
the emulator's end layers, the adapter, on private data and sends them back. Plugged into the full
model they make it better, although neither party saw what the other one holds.

\b
  model owner   blindtune study smollm2-135m --data public.txt --out study/
                blindtune emulate study/ --out emulator/
  data owner    blindtune inspect emulator/
                blindtune tune emulator/ --data private.jsonl --out adapter/
  model owner   blindtune plug-in smollm2-135m adapter/ --out tuned/
  either        blindtune evaluate tuned/ --data test.txt

Or the customer sends privatized states of the text to the vendor, who tunes the model with them.

\b
  vendor        blindtune serve smollm2-135m --cut 6 --out vendor/ --self-signed
                blindtune admit alice --out vendor/ --token-file alice.token
  customer      export BLINDTUNE_TOKEN=$(cat alice.token)
                blindtune split-tune URL --fingerprint HEX --bottom bottom/ \\
                  --data train.csv --changed-share 0.5 --out job/
                blindtune predict URL --fingerprint HEX --job job/ --data new.csv

Each verb explains itself: blindtune VERB --help.
"""


class _Verbs(click.Group):  # type: ignore[misc]  # click is untyped here
    """The verbs, in the order of the work, imported one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of one name."""
        if cmd_name not in VERBS:
            return None
        module = import_module(f"blindtune.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.VERB.command()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and lines, without importing a verb."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _group() -> click.Group:
    group = _Verbs(name="blindtune", help=_HELP, context_settings={"max_content_width": 100})
    return click.version_option(__version__, prog_name="blindtune", message="%(prog)s %(version)s")(
        group
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    debug = "--debug" in arguments
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines would stand between ours
    try:
        code = _group().main(list(arguments), prog_name="blindtune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        hint = f" (see {where} --help)" if where else ""
        return _fail(f"error: {error.format_message()}{hint}", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BlindtuneError as error:
        if debug:
            traceback.print_exc()
        return _fail(f"error: {error}", error.exit_code)
    except BrokenPipeError:
        sys.stdout = None  # nobody reads any more
        return 1
    except OSError as error:
        if error.filename is None:
            return _internal(error, debug)
        if debug:
            traceback.print_exc()
        from blindtune.atomic import remedy_of

        remedy = remedy_of(error) or "check the path"
        return _fail(f"error: {error.filename}: {error.strerror}: {remedy}", 2)
    except Exception as error:
        return _internal(error, debug)


def _internal(error: Exception, debug: bool) -> int:
    """An exception that nobody foresaw."""
    if debug:
        traceback.print_exc()
    return _fail(
        f"internal error: {type(error).__name__}: {str(error)[:300]}; this is a fault of "
        "blindtune, please report it; run again with --debug for the traceback",
        INTERNAL_ERROR,
    )


def _fail(message: str, code: int) -> int:
    """One line on stderr; launched processes other than the first say which one they are."""
    rank = process_rank()
    prefix = f"process {rank}: " if rank else ""
    click.echo(prefix + " ".join(message.split()), err=True)
    return code


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
