import math

import pytest
from rich.console import Console

from blindtune.errors import DataError, OutputError
from blindtune.evaluation import scoreboard, tables
from blindtune.evaluation.scoreboard import Cost, Scoreboard, merge

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


def test_merged_runs_have_mean_and_spread():
    board = merge([language(0.0), language(0.1), language(0.2)])
    assert board.runs == 3
    assert board.spread("FT").mean == pytest.approx(math.log(24) + 0.1)
    assert board.spread("FT").deviation == pytest.approx(0.1)
    assert board.delta().deviation == pytest.approx(0, abs=1e-12)
    assert f"{board.spread('FT'):.2f}" == "3.28 ± 0.10"


def test_recovery_is_averaged_run_by_run():
    rows = {"ZS": (0.5,), "Plug-in": (0.6, 0.6), "FT": (0.6, 0.7)}
    board = Scoreboard(measure="accuracy", data="d", rows=rows)
    assert board.recovery().mean == pytest.approx((1 + 0.5) / 2)
    assert merge([board, board]).rows["ZS"] == (0.5,) * 4


def test_costs_are_averaged():
    boards = [
        language(costs=(Cost(name="tune", seconds=seconds, tokens=100),)) for seconds in (1.0, 3.0)
    ]
    assert merge(boards).costs == (Cost(name="tune", seconds=2.0, tokens=100),)


def test_boards_that_differ_do_not_merge():
    with pytest.raises(DataError, match="one measure"):
        merge([language(), questions()])
    with pytest.raises(DataError, match="at least one"):
        merge([])


@pytest.mark.parametrize("scores", [(math.nan,), (1.5,), (-0.1,), (0.5, 0.5, 0.5)])
def test_bad_scores_are_refused(scores):
    with pytest.raises(DataError, match="'FT'"):
        Scoreboard(
            measure="accuracy",
            data="d",
            rows={"Plug-in": (0.1,) * 4, "FT": scores},
        )


def test_json_round_trip(tmp_path):
    board = merge([language(costs=(Cost(name="study", bytes=3),)), language(0.3)])
    scoreboard.save(board, tmp_path / "board.json")
    assert scoreboard.load(tmp_path / "board.json") == board
    text = (tmp_path / "board.json").read_text()
    assert '"recovery"' in text
    assert list(scoreboard.load(tmp_path / "board.json").rows) == list(PERPLEXITIES)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="missing"):
        scoreboard.load(tmp_path / "missing")
    with pytest.raises(OutputError, match="cannot be"):
        scoreboard.save(language(), tmp_path)
    for text in (b"{", b"{}", b'{"scoreboard": {"measure": "x", "data": "", "rows": {}}}'):
        with pytest.raises(DataError, match="expected a scoreboard"):
            scoreboard.from_json(text)


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
