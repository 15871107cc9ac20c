"""The frontier: what is on it, what is cheapest, and that rows are run once."""

import json
from dataclasses import replace

import pytest

from blindtune.errors import ConfigError
from blindtune.evaluation import frontier as module
from blindtune.evaluation.frontier import Frontier, FrontierConfig, Setting, frontier
from blindtune.evaluation.frontier_page import answer_sentence, write_frontier
from offsite_world import STUDY, save_text, save_tiny


def setting(plug_in, emulator_ft, flops=1.0, alpha=0.25):
    return Setting(
        adapter_layers=2, alpha=alpha, beta=0.8, emulator_zs=9.0, emulator_ft=emulator_ft,
        plug_in=plug_in, parameters=1, bytes=1, flops_per_token=flops,
    )  # fmt: skip


MILD = setting(3.0, 3.1, 8.0, 0.1)
MIDDLE = setting(3.1, 3.5, 5.0, 0.2)
BEATEN = setting(3.2, 3.5, 6.0, 0.3)
STRONG = setting(3.5, 4.5, 3.0, 0.4)
MEASURED = Frontier(
    zs=4.0, ft=2.0, direct={2: 2.5}, settings=(STRONG, BEATEN, MILD, MIDDLE), test_tokens=100,
    study_text="public.txt",
)  # fmt: skip


def test_what_no_other_beats_is_efficient():
    assert MEASURED.efficient() == (MILD, MIDDLE, STRONG)


@pytest.mark.parametrize(
    ("recovery", "gap", "answer"),
    [
        (None, None, STRONG),
        (0.44, None, MIDDLE),
        (0.5, None, MILD),
        (None, 0.4, STRONG),
        (0.44, 0.35, MIDDLE),
        (0.5, 0.35, None),
        (0.0, 1.1, None),
    ],
)
def test_the_cheapest_that_reaches_both(recovery, gap, answer):
    assert MEASURED.cheapest(recovery, gap) == answer


def test_a_plug_in_that_gains_nothing_recovers_nothing():
    useless = setting(4.0, 4.5)
    found = Frontier(
        zs=4.0, ft=2.0, direct={2: 2.5}, settings=(useless,), test_tokens=1, study_text=""
    )
    assert found.cheapest(0.0, None) == useless
    assert found.cheapest(0.01, None) is None


def test_answers_are_said_in_words():
    said = answer_sentence(MEASURED, MIDDLE, 0.45, 0.35)
    assert "(2, 0.2, 0.8): recovery 0.450, gap 0.400" in said
    said = answer_sentence(MEASURED, None, 0.5, 0.35)
    assert "No setting tried" in said
    assert "best recovery is 0.500" in said
    assert "widest gap 1.000" in said


def test_recovery_is_undefined_where_tuning_gains_nothing(tmp_path):
    none = replace(MEASURED, ft=4.0)
    assert none.recovery(3.0) is None
    assert none.cheapest(0.1, None) is None
    facts = write_frontier(none, tmp_path, FrontierConfig(), gap=0.3)
    assert facts["answer"]["alpha"] == 0.4
    assert "Recovery is undefined" in (tmp_path / "frontier.html").read_text()


def test_bad_sweeps_are_refused():
    with pytest.raises(ConfigError, match="at least one value"):
        FrontierConfig(alpha=())
    with pytest.raises(ConfigError, match="test_share"):
        FrontierConfig(test_share=1.0)


def test_rows_are_shared_and_run_once(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    config = FrontierConfig(
        adapter_layers=(1,), alpha=(0.34,), beta=(0.8,), max_length=32, steps=3, batch_size=2,
        learning_rate=1e-3,
    )  # fmt: skip
    fits, original = [], module.fit
    monkeypatch.setattr(module, "fit", lambda *a, **k: fits.append(1) or original(*a, **k))
    place = (tmp_path / "model", tmp_path / "private.txt", tmp_path / "out")
    options = {"public": tmp_path / "public.txt", "how": STUDY}
    options["dynamic"] = module.DynamicConfig(steps=0)
    first = frontier(*place, config, **options)
    assert len(fits) == 3  # all weights, the adapter on the full model, one setting
    assert {first.settings[0].plug_in, first.direct[1], first.ft}.isdisjoint({first.zs})
    again = frontier(*place, replace(config, beta=(0.8, 0.2)), **options)
    assert len(fits) == 4  # one more setting
    assert again.settings[0] == first.settings[0]
    assert again.settings[1].parameters < first.settings[0].parameters
    frontier(*place, replace(config, steps=4), **options)
    assert len(fits) == 7  # another tuning is another row
    facts = write_frontier(again, tmp_path / "out", config, recovery=-100.0, gap=None)
    written = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert written == json.loads(json.dumps(facts))
    page = (tmp_path / "out" / "frontier.html").read_text()
    assert "1, 0.34, 0.8" in page
    assert "<svg" in page
    assert {p.name.partition("-")[0] for p in (tmp_path / "out").iterdir()} == {
        "rows", "study", "frontier.json", "frontier.html",
    }  # fmt: skip


def test_a_setting_that_changes_much_is_a_row_like_others(tmp_path):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    config = FrontierConfig(
        adapter_layers=(1,), alpha=(0.34,), beta=(0.8,), max_length=32, steps=3, batch_size=2,
        learning_rate=0.3,
    )  # fmt: skip
    place = (tmp_path / "model", tmp_path / "private.txt", tmp_path / "out")
    options = {"how": STUDY, "dynamic": module.DynamicConfig(steps=0)}
    found = frontier(*place, config, public=tmp_path / "public.txt", **options)
    assert len(found.settings) == 1


def test_a_study_of_other_text_is_another_study(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    config = FrontierConfig(
        adapter_layers=(1,), alpha=(0.34,), beta=(0.8,), max_length=32, steps=1, batch_size=2
    )
    seen, original = [], module.emulate
    monkeypatch.setattr(
        module, "emulate", lambda s, *a, **k: seen.append(s) or original(s, *a, **k)
    )

    def run(public):
        return frontier(
            tmp_path / "model", tmp_path / "private.txt", tmp_path / "out", config,
            public=tmp_path / public, how=STUDY, dynamic=module.DynamicConfig(steps=0),
        )  # fmt: skip

    first = run("public.txt")
    run("private.txt")
    assert len(seen) == 2
    assert seen[0].explained != seen[1].explained
    assert run("public.txt") == first
    assert len(seen) == 2


def test_settings_that_cannot_be_made_are_refused_before_any_tuning(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    monkeypatch.setattr(module, "fit", None)
    config = FrontierConfig(adapter_layers=(1, 4), alpha=(0.5,), beta=(1.0,), max_length=32)
    with pytest.raises(ConfigError, match="kept middle layer"):
        frontier(
            tmp_path / "model", tmp_path / "private.txt", tmp_path / "out", config,
            public=tmp_path / "public.txt", how=STUDY, dynamic=module.DynamicConfig(steps=0),
        )  # fmt: skip
