"""The watch over all logs would see a secret, wherever it came."""

import logging
import secrets
import sys

import pytest

from log_watch import EXPECTED, SECRETS, SESSION, LogWatch, keep_secret

SECRET = "the heron counts in teal ink"


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr("log_watch.SECRETS", {SECRET})
    made = LogWatch()
    made.install(monkeypatch)
    yield made
    made.uninstall()


@pytest.fixture(autouse=True)
def _outside_of_the_session():
    """What is told here on purpose is not the session's affair."""
    before = list(SESSION.leaks)
    yield
    SESSION.leaks[:] = before


def test_records(watch):
    logger = logging.getLogger("blindtune.somewhere")
    logger.error("all is well with %s", "anna")
    assert (watch.lines["record"], watch.leaks) == (1, [])
    logger.error("got %s", SECRET)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("failed")
    logging.getLogger("grpc").warning("x %r", [SECRET])
    assert len(watch.leaks) == 3
    assert "test_records" in watch.leaks[0][0]


def test_standard_error(watch, capsys):
    print("a line\nand another", file=sys.stderr)
    print(SECRET)  # of standard output
    capsys.readouterr()
    assert (watch.lines["stderr"], watch.leaks) == (2, [])
    print(f"error: {SECRET}!", file=sys.stderr)
    capsys.readouterr()
    assert [line for _, line in watch.leaks] == [f"error: {SECRET}!"]


def test_the_example_that_tune_shows_is_its_own_users_affair(watch):
    shown = f"One example, «trained tokens» marked:\nSay: «{SECRET}»\n\n"
    watch.look("stderr", f"begin\n{shown}end\n")
    assert watch.leaks == []
    watch.look("stderr", f"{shown}{SECRET}\n\n")
    watch.look("record", shown)
    assert len(watch.leaks) == 2


def test_files_and_tokens(watch, tmp_path):
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "log.jsonl").write_text('{"event": "good"}\n')
    (tmp_path / "serve.err").write_text("well\n")
    (tmp_path / "predictions.jsonl").write_text(SECRET)  # is no log
    watch.look_at_files(tmp_path)
    assert (watch.lines["file"], watch.leaks) == (2, [])
    drawn, stored = secrets.token_urlsafe(32), "t" * 40
    (tmp_path / "token").write_text(stored + "\n")
    for text in (drawn, stored, "-----BEGIN PRIVATE KEY-----", "AGE-SECRET-KEY-1A"):
        watch.leaks.clear()
        (tmp_path / "serve.err").write_text(f"well\nsent {text}\n")
        watch.look_at_files(tmp_path)
        assert len(watch.leaks) == 1, text
    (tmp_path / "serve.err").unlink()  # the session will look here too


def test_what_is_in_the_environment(watch, monkeypatch):
    watch.look("stderr", "open the door")
    monkeypatch.setenv("BLINDTUNE_PASSPHRASE", "the door")
    watch.look("stderr", "open the door")
    assert len(watch.leaks) == 1


def test_a_verdict_needs_lines():
    watch = LogWatch()
    assert watch.verdict() == []
    test, source = next(iter(EXPECTED.items()))
    watch.passed.add(test)
    assert watch.verdict() == [f"{test} gave no {source} to look at"]
    watch.look(source, "a line")
    assert watch.verdict() == []
    watch.leaks.append(("there", "a secret"))
    assert watch.verdict() == ["there: a secret"]


def test_short_words_are_no_secrets():
    before = set(SECRETS)
    keep_secret("bad", "")
    assert before == SECRETS
