"""Looks for what tests know to be secret in everything that a log or standard error gets.

One `LogWatch` looks over a whole session (conftest.py): at every record of `logging`, at what
tests and pytest capture of standard error, and at the logs that served processes leave in files.
Secrets are the texts, labels and tokens of the end-to-end tests, passphrases, and every token that
is drawn meanwhile. Standard output is the user's own: `admit` shows the token there.
"""

import logging
import os
import re
import secrets
from collections import Counter
from pathlib import Path

import pytest

LEAST = 10
"""Characters of a secret: shorter ones stand in words that are none."""
KEYS = re.compile(r"PRIVATE KEY-----|AGE-SECRET-KEY-")
SHOWN = re.compile(r"One example, «trained tokens» marked:\n.*?\n\n", re.DOTALL)
"""What `tune` shows a data owner of its own data, once, on purpose (docs/security.md)."""
LOG_FILES = ("*.err", "log*.jsonl")
VARIABLES = ("BLINDTUNE_TOKEN", "BLINDTUNE_PASSPHRASE")
SECRETS: set[str] = set()
EXPECTED = {
    "test_nothing_of_a_job_is_in_metrics_or_log": "file",
    "test_serving_from_the_command_line": "file",
    "test_a_customer_is_killed_at_random_moments": "file",
    "test_tune_predict_cancel_on_the_command_line": "stderr",
    "test_what_a_customer_does_wrong": "stderr",
    "test_customers_come_and_go_while_it_serves": "record",
}
"""What a test must have given to look at, if it was run."""


def keep_secret(*texts: str) -> None:
    """From now on these may stand in no log."""
    SECRETS.update(text for text in texts if len(text) >= LEAST)


class LogWatch:
    """Counts the lines that it was shown, and remembers those that give a secret away.

    Attributes:
        lines: by source: "record", "stderr" or "file".
        leaks: where, and the line.
    """

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self.leaks: list[tuple[str, str]] = []
        self.passed: set[str] = set()

    def look(self, source: str, text: str, where: str | None = None) -> None:
        """Look at some lines."""
        known = {*SECRETS, *filter(None, map(os.environ.get, VARIABLES))}
        where = where or os.environ.get("PYTEST_CURRENT_TEST", "between tests")
        self.lines[source] += len(text.splitlines())
        text = SHOWN.sub("", text) if source == "stderr" else text
        if KEYS.search(text) or any(secret in text for secret in known):
            self.leaks += [
                (where, line[:500])
                for line in text.splitlines()
                if KEYS.search(line) or any(secret in line for secret in known)
            ] or [(where, "a secret over several lines")]

    def look_at_files(self, folder: Path) -> None:
        """Look at the logs in files below a folder; tokens that lie there are secrets too."""
        for path in folder.rglob("token"):
            if path.is_file():
                keep_secret(path.read_text().strip())
        for pattern in LOG_FILES:
            for path in filter(Path.is_file, folder.rglob(pattern)):
                self.look("file", path.read_text(errors="replace"), str(path))

    def verdict(self) -> list[str]:
        """What is wrong: secrets in logs, or logs that nobody looked at."""
        missing = [
            f"{test} gave no {source} to look at"
            for test, source in EXPECTED.items()
            if test in self.passed and not self.lines[source]
        ]
        return [f"{where}: {line}" for where, line in self.leaks] + missing

    def install(self, patched: pytest.MonkeyPatch) -> None:
        """Look at records and at captured standard error, and learn the tokens that are drawn."""
        make_record, read = logging.getLogRecordFactory(), pytest.CaptureFixture.readouterr

        def looked_at(*arguments, **options):
            record = make_record(*arguments, **options)
            error = record.exc_info[1] if record.exc_info else ""
            self.look("record", f"{record.getMessage()}\n{error}".strip())
            return record

        def read_and_look(fixture):
            found = read(fixture)
            self.look("stderr", found.err if isinstance(found.err, str) else repr(found.err))
            return found

        def remembered(draw):
            def drawn(*arguments):
                token = draw(*arguments)
                keep_secret(token if len(token) >= 32 else "")
                return token

            return drawn

        patched.setattr(pytest.CaptureFixture, "readouterr", read_and_look)
        for name in ("token_urlsafe", "token_hex"):
            patched.setattr(secrets, name, remembered(getattr(secrets, name)))
        logging.setLogRecordFactory(looked_at)
        self._undo = lambda: logging.setLogRecordFactory(make_record)

    def uninstall(self) -> None:
        """Give the record factory back."""
        self._undo()


SESSION = LogWatch()
"""The one that looks over all tests of this process."""
