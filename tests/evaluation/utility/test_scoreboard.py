import json
import math

import pytest
from rich.console import Console

from blindtune.errors import DataError, OutputError
from blindtune.evaluation.pages import tables
from blindtune.evaluation.utility import scoreboard
from blindtune.evaluation.utility.scoreboard import Cost, Scoreboard

PERPLEXITIES = {"ZS": 48.0, "Emulator ZS": 70.0, "Emulator FT": 44.0, "Plug-in": 26.0, "FT": 24.0}
ACCURACIES = {"ZS": 0.5, "Emulator ZS": 0.3, "Emulator FT": 0.4, "Plug-in": 0.575, "FT": 0.6}


def language(shift=0.0, **more):
    rows = {name: (math.log(value) + shift,) for name, value in PERPLEXITIES.items()}
    return Scoreboard(measure="nats", data="a test set", rows=rows, **more)


def questions(**changes):
    rows = {name: (value,) for name, value in (ACCURACIES | changes).items()}
    return Scoreboard(measure="accuracy", data="questions", rows=rows)


def shown(table):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_recovery_and_delta_of_perplexity():
    recovery = language().recovery()
    assert recovery.mean == pytest.approx(math.log(48 / 26) / math.log(48 / 24))
    assert (recovery.deviation, recovery.runs) == (None, 1)
    assert language().delta().mean == pytest.approx(math.log(44 / 26))


def test_recovery_and_delta_of_accuracy():
    assert questions().recovery().mean == pytest.approx(0.75)
    assert questions().delta().mean == pytest.approx(17.5)


def test_recovery_against_another_row():
    board = language()
    board.rows["Adapter tuned directly"] = (math.log(25.0),)
    recovery = board.recovery(against="Adapter tuned directly")
    assert recovery.mean == pytest.approx(math.log(48 / 26) / math.log(48 / 25))
    assert board.recovery(of="FT").mean == pytest.approx(1)


@pytest.mark.parametrize("ft", [0.5, 0.4, 0.5001])
def test_no_recovery_when_there_is_nothing_to_recover(ft):
    board = questions(FT=ft)
    assert board.recovery() is None
    assert "undefined" in tables.verdict(board)[0]


def test_missing_rows():
    board = Scoreboard(measure="nats", data="d", rows={"ZS": (3.0,)})
    assert board.recovery() is None
    assert board.delta() is None
    assert tables.verdict(board) == []
    assert tables.score_cells(board)[1] == [["ZS", "20.09", "3.000", ""]]


def test_runs_have_mean_and_spread():
    rows = {name: (s, s + 0.1, s + 0.2) for name, (s,) in language().rows.items()}
    board = Scoreboard(measure="nats", data="a test set", rows=rows)
    assert board.runs == 3
    assert board.spread("FT").mean == pytest.approx(math.log(24) + 0.1)
    assert board.spread("FT").deviation == pytest.approx(0.1)
    assert board.delta().deviation == pytest.approx(0, abs=1e-12)
    assert f"{board.spread('FT'):.2f}" == "3.28 ± 0.10"


def test_recovery_is_averaged_run_by_run():
    rows = {"ZS": (0.5,), "Plug-in": (0.6, 0.6), "FT": (0.6, 0.7)}
    board = Scoreboard(measure="accuracy", data="d", rows=rows)
    assert board.recovery().mean == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("scores", [(math.nan,), (1.5,), (-0.1,), (0.5, 0.5, 0.5)])
def test_bad_scores_are_refused(scores):
    with pytest.raises(DataError, match="'FT'"):
        Scoreboard(
            measure="accuracy",
            data="d",
            rows={"Plug-in": (0.1,) * 4, "FT": scores},
        )


def test_the_file_holds_the_scores_and_what_follows(tmp_path):
    scoreboard.save(language(costs=(Cost(name="study", bytes=3),)), tmp_path / "board.json")
    found = json.loads((tmp_path / "board.json").read_text())
    assert found["scoreboard"]["rows"] == {n: list(s) for n, s in language().rows.items()}
    assert found["scoreboard"]["costs"][0]["bytes"] == 3
    assert found["summary"]["recovery"]["mean"] == pytest.approx(language().recovery().mean)
    assert found["summary"]["perplexity"] == pytest.approx(PERPLEXITIES)
    with pytest.raises(OutputError, match="cannot be"):
        scoreboard.save(language(), tmp_path)


def test_tables_for_the_terminal():
    costs = (
        Cost(name="Full model", parameters=134_500_000, bytes=2**29),
        Cost(name="Tune [bold]", seconds=61.25, tokens=51_200),
    )
    text = shown(tables.score_table(language(costs=costs)))
    assert "48.00" in text
    assert "-0.383" not in text.split("Emulator FT")[0]
    assert "The plug-in reaches 88.5 % of the gain of full fine-tuning." in text
    assert "0.53 nats per token better than the tuned emulator" in text
    text = shown(tables.cost_table(language(costs=costs)))
    assert "134.5 M" in text
    assert "512.0 MiB" in text
    assert "Tune [bold]" in text
    assert "Peak memory" not in text
    text = shown(tables.score_table(questions(**{"Emulator FT": 0.6})))
    assert "57.5" in text
    assert "2.5 accuracy points worse" in text
