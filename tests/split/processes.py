"""Command lines as processes of their own, and waiting for them."""

import os
import socket
import sys
import time

from blindtune.cli.main import run


def command_line(arguments, out):
    """`blindtune ARGUMENTS`, with OUT.out and OUT.err."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.exit(run([str(argument) for argument in arguments]))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found
