"""Rows that are kept, and settings that nothing beats."""

import pytest

from blindtune.errors import OutputError
from blindtune.evaluation.frontiers.sweeps import KeptRows, unbeaten


def test_a_row_is_made_once_for_what_decides_it(tmp_path):
    rows, made = KeptRows(tmp_path / "out"), []

    def make():
        assert not rows.work.exists()
        rows.work.mkdir()
        made.append(len(made))
        return {"value": len(made)}

    with rows.alone():
        asked = [rows.row("a", [n], make)["value"] for n in (1, 1, 2)]
        with pytest.raises(ZeroDivisionError):
            rows.row("a", [3], lambda: {"value": 1 // 0})
    assert asked == [1, 1, 2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows"]
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 2


def test_what_a_killed_sweep_left_goes(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / ".a.json.00c0ffee.partial").touch()
    (tmp_path / ".study.00c0ffee.partial").mkdir()
    with KeptRows(tmp_path).alone():
        assert [path.name for path in tmp_path.iterdir() if path.name != "rows"] == []
    assert not list((tmp_path / "rows").iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "rows").touch()
    with pytest.raises(OutputError), KeptRows(tmp_path).alone():
        raise AssertionError


def test_unbeaten_settings():
    settings = [(3, 1), (2, 2), (2, 1), (1, 1), (0, 5), (3, 0)]
    assert unbeaten(settings, lambda s: s) == ((3, 1), (2, 2), (0, 5))
    assert unbeaten([], lambda s: s) == ()
