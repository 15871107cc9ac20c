"""What a run says of itself where nobody watches a bar."""

import pytest

from blindtune.training import progress
from blindtune.training.progress import SpacedLines, StepReport, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_log_gets_a_line_from_time_to_time_with_the_time_left(clock, capsys):
    lines = SpacedLines(every_seconds=30)
    for clock[0], done in ((0.0, 0), (29.0, 4), (31.0, 5), (40.0, 6), (62.0, 10), (70.0, 12)):
        lines("study", done, 12)
    assert capsys.readouterr().err.splitlines() == [
        "study: 5 of 12, 43 s left",
        "study: 10 of 12, 12 s left",
    ]


def test_a_resumed_stage_is_timed_by_what_is_done_now(clock, capsys):
    lines = SpacedLines(every_seconds=30)
    lines("learn", 90, 100)
    clock[0] = 40.0
    lines("learn", 92, 100)
    assert capsys.readouterr().err == "learn: 92 of 100, 160 s left\n"


def test_a_short_run_and_a_silent_one_say_nothing(clock, capsys):
    report = StepReport(
        step=1, max_steps=2, tokens=1, tokens_per_second=1.0, train_loss=None, validation_loss=None
    )
    with progress_bar(2, silent=False) as show:
        show(report)
    with progress_bar(2, silent=True) as show:
        clock[0] = 100.0
        show(report)
    assert capsys.readouterr().err == ""


def test_a_long_run_without_a_terminal_says_how_far_it_is(clock, capsys):
    with progress_bar(4, silent=False) as show:
        for clock[0], step in ((10.0, 1), (50.0, 3)):
            show(
                StepReport(
                    step=step, max_steps=4, tokens=1, tokens_per_second=1.0,
                    train_loss=None, validation_loss=None,
                )
            )  # fmt: skip
    assert capsys.readouterr().err == "tuning: 3 of 4, 20 s left\n"
