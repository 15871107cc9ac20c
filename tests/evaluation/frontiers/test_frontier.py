"""The frontier: what is on it, what is cheapest, and that rows are run once."""

import json
from dataclasses import replace

import pytest
import torch

from blindtune.errors import ConfigError
from blindtune.evaluation.frontiers import offsite as module
from blindtune.evaluation.frontiers.estimate import estimate_frontier
from blindtune.evaluation.frontiers.offsite import FrontierConfig, frontier
from blindtune.evaluation.frontiers.scores import Frontier, Setting, gathered
from blindtune.evaluation.frontiers.sweeps import digest_of
from blindtune.evaluation.pages.offsite_frontier import answer_sentence, write_frontier
from blindtune.offsite.model_owner.emulation import EmulatorConfig
from offsite_world import STUDY, save_text, save_tiny, study_tiny


def setting(plug_in, emulator_ft, flops=1.0, alpha=0.25):
    """As if FT gained 2 nats for sure, with 0.1 nats between each score and its lower end."""
    return Setting(
        adapter_layers=2, alpha=alpha, beta=0.8, emulator_zs=9.0, emulator_ft=emulator_ft,
        plug_in=plug_in, gap_low=emulator_ft - plug_in - 0.1, recovery_low=(3.9 - plug_in) / 2,
        parameters=1, bytes=1, flops_per_token=flops,
    )  # fmt: skip


MILD = setting(3.0, 3.1, 8.0, 0.1)
MIDDLE = setting(3.1, 3.5, 5.0, 0.2)
BEATEN = setting(3.2, 3.5, 6.0, 0.3)
STRONG = setting(3.5, 4.5, 3.0, 0.4)
MEASURED = Frontier(
    zs=4.0, ft=2.0, gain_low=1.9, direct={2: 2.5}, settings=(STRONG, BEATEN, MILD, MIDDLE),
    test_texts=10, test_tokens=100, seeds=1, study_text="public.txt",
)  # fmt: skip


def test_what_no_other_beats_is_efficient():
    assert MEASURED.efficient() == (MILD, MIDDLE, STRONG)


@pytest.mark.parametrize(
    ("recovery", "gap", "surely", "likely"),
    [
        (None, None, STRONG, STRONG),
        (0.39, None, MIDDLE, MIDDLE),
        (0.44, None, MILD, MIDDLE),
        (0.5, None, None, MILD),
        (None, 0.89, STRONG, STRONG),
        (None, 0.95, None, STRONG),
        (0.39, 0.29, MIDDLE, MIDDLE),
        (0.39, 0.35, None, MIDDLE),
        (0.44, 0.29, None, MIDDLE),
        (0.5, 0.35, None, None),
        (0.0, 1.1, None, None),
    ],
)
def test_the_cheapest_that_reaches_both(recovery, gap, surely, likely):
    assert MEASURED.cheapest(recovery, gap) == surely
    assert MEASURED.cheapest(recovery, gap, surely=False) == likely


def test_a_plug_in_that_gains_nothing_recovers_nothing():
    useless = replace(setting(4.0, 4.5), recovery_low=0.0)
    found = replace(MEASURED, settings=(useless,))
    assert found.cheapest(0.0, None) == useless
    assert found.cheapest(0.01, None) is None
    assert found.cheapest(0.01, None, surely=False) is None


def test_answers_are_said_in_words():
    said = answer_sentence(MEASURED, MIDDLE, 0.39, 0.29)
    assert "(2, 0.2, 0.8): recovery 0.450 (at least 0.400), gap 0.400 nats (at least 0.300)" in said
    assert "95 % confidence, over 10 test texts alone, for this setting by itself, of 4" in said
    said = answer_sentence(replace(MEASURED, seeds=3), MIDDLE, 0.39, 0.29)
    assert "over 10 test texts and 3 seeds of tuning, for this setting by itself" in said
    said = answer_sentence(MEASURED, None, 0.5, 0.35)
    assert "No setting tried has recovery" in said
    assert "best recovery is 0.500" in said
    assert "widest gap 1.000" in said


def test_an_answer_by_scores_alone_is_said_to_be_unsure():
    said = answer_sentence(MEASURED, None, 0.44, 0.35)
    assert "No setting tried is sure to have recovery of at least 0.44" in said
    assert "by its scores alone (2, 0.2, 0.8) has: recovery 0.450 (at least 0.400)" in said
    assert "More test text would tell" in said
    said = answer_sentence(replace(MEASURED, seeds=2), None, 0.44, 0.35)
    assert "More test text or more seeds would tell" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ft": 4.0, "gain_low": -0.1}, "gains 0.000 nats over ZS here, and surely only -0.100"),
        ({"gain_low": 0.0}, "gains 2.000 nats over ZS here, and surely only 0.000"),
        ({"gain_low": None}, "nobody knows how surely"),
    ],
)
def test_recovery_is_undefined_where_tuning_may_gain_nothing(tmp_path, changes, words):
    settings = tuple(replace(s, recovery_low=None) for s in MEASURED.settings)
    none = replace(MEASURED, settings=settings, **changes)
    assert none.recovery(3.0) is None
    assert none.cheapest(0.1, None) is none.cheapest(0.1, None, surely=False) is None
    facts = write_frontier(none, tmp_path, FrontierConfig(), gap=0.3)
    assert facts["answer"]["alpha"] == 0.4
    assert words in (tmp_path / "frontier.html").read_text()
    facts = write_frontier(none, tmp_path, FrontierConfig(), recovery=0.3)
    assert words in facts["sentence"]
    assert (tmp_path / "frontier.html").read_text().count(words) == 1


TRIPLET = EmulatorConfig(adapter_layers=1, alpha=0.5, beta=1.0)
NATS = torch.tensor([30.0, 20.0, 44.0, 10.0])
TOKENS = torch.tensor([10, 10, 20, 5])


def row(nats_N):
    return {"nats": nats_N.tolist(), "tokens": TOKENS.tolist()}


def gathered_from(gain, share, seeds=1):
    """FT gains this a token, the plug-in this share of it, in every text and seed alike."""
    tried = {
        "emulator_zs": (NATS + TOKENS).tolist(),
        "emulator_ft": (NATS + 0.25 * TOKENS).tolist(),
        "plug_in": (NATS - share * gain * TOKENS).tolist(),
        "tokens": TOKENS.tolist(), "parameters": 7, "bytes": 8, "flops_per_token": 9.0,
    }  # fmt: skip
    tuned = [row(NATS - gain * TOKENS)] * seeds
    return gathered(row(NATS), tuned, {1: tuned}, {TRIPLET: [tried] * seeds}, study_text="")


@pytest.mark.parametrize("seeds", [1, 3])
def test_texts_are_paired(seeds):
    found = gathered_from(gain=0.5, share=0.8, seeds=seeds)
    assert (found.seeds, found.test_texts, found.test_tokens) == (seeds, 4, 45)
    assert found.zs == pytest.approx(104 / 45)
    assert found.gain_low == pytest.approx(0.5)  # however hard a text is
    (only,) = found.settings
    assert (only.gap, only.gap_low) == pytest.approx((0.65, 0.65))
    assert (found.recovery(only.plug_in), only.recovery_low) == pytest.approx((0.8, 0.8))
    assert found.direct[1] == found.ft


def test_scores_are_means_over_seeds_and_spread_over_them():
    def one(gain):
        tuned = row(NATS - gain * TOKENS)
        own = {"emulator_zs": NATS.tolist(), "emulator_ft": NATS.tolist(), **tuned}
        own |= {"plug_in": tuned["nats"], "parameters": 7, "bytes": 8, "flops_per_token": 9.0}
        return tuned, own

    rows = [one(gain) for gain in (0.4, 0.5, 0.6)]
    tuned, own = zip(*rows, strict=True)
    found = gathered(row(NATS), tuned, {1: tuned}, {TRIPLET: own}, study_text="")
    assert found.zs - found.ft == pytest.approx(0.5)
    assert found.gain_low == pytest.approx(0.5 - 2.92 * 0.1 / 3**0.5, abs=1e-4)
    assert found.settings[0].gap_low == pytest.approx(found.gain_low)
    assert found.settings[0].recovery_low == pytest.approx(1.0)  # in every seed


def test_little_or_unsure_gain_leaves_recovery_undefined():
    assert gathered_from(gain=9e-4, share=0.5).settings[0].recovery_low is None
    assert gathered_from(gain=2e-3, share=0.5).settings[0].recovery_low == pytest.approx(0.5)
    tuned = row(NATS - torch.tensor([9.0, -3.0, 2.0, -1.0]))
    found = gathered(row(NATS), [tuned], {}, {}, study_text="")
    assert found.zs - found.ft > 0.1 > 0 > found.gain_low
    assert found.recovery(found.ft) is None


def test_one_test_text_answers_nothing(tmp_path):
    one = {"nats": [3.0], "tokens": [2]}
    tried = {"emulator_zs": [4.0], "emulator_ft": [3.5], "plug_in": [2.0], "parameters": 7}
    tried |= {"bytes": 8, "flops_per_token": 9.0}
    found = gathered(
        one, [{"nats": [1.0]}], {1: [{"nats": [1.0]}]}, {TRIPLET: [tried]}, study_text=""
    )
    assert (found.gain_low, found.settings[0].gap_low) == (None, None)
    assert found.cheapest(None, 0.1) is None
    said = write_frontier(found, tmp_path, FrontierConfig(), gap=0.1)["sentence"]
    assert "is sure to have a gap of at least 0.1 nats" in said
    assert "gap 0.750 nats (at least ?)" in said
    assert "over 1 test text alone" in said


def test_bad_sweeps_are_refused():
    with pytest.raises(ConfigError, match="at least one value"):
        FrontierConfig(alpha=())
    with pytest.raises(ConfigError, match="seeds"):
        FrontierConfig(seeds=())
    with pytest.raises(ConfigError, match="test_share"):
        FrontierConfig(test_share=1.0)


SMALL = FrontierConfig(
    adapter_layers=(1,), alpha=(0.34,), beta=(0.8,), max_length=32, steps=3, batch_size=2,
    learning_rate=1e-3,
)  # fmt: skip


def test_rows_are_shared_and_run_once(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    config = SMALL
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
    both = frontier(*place, replace(config, seeds=(0, 1)), **options)
    assert len(fits) == 10  # the other seed alone
    assert (both.zs, both.seeds, both.test_texts) == (first.zs, 2, first.test_texts)
    assert {both.ft, both.settings[0].plug_in}.isdisjoint({first.ft, first.settings[0].plug_in})
    (zs,) = (tmp_path / "out" / "rows").glob("zs-*")
    sweep = module._Sweep(*place[:2], None, place[2], config)
    old = {"model": sweep.fingerprint, "test": sweep.test.fingerprint()}
    zs.with_name(f"zs-{digest_of(old)}.json").write_text('{"nats": 3.5}')  # of an earlier version
    zs.unlink()
    assert frontier(*place, config, **options) == first
    assert len(fits) == 10
    facts = write_frontier(again, tmp_path / "out", config, recovery=-100.0, gap=None)
    written = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert written == json.loads(json.dumps(facts))
    page = (tmp_path / "out" / "frontier.html").read_text()
    assert "1, 0.34, 0.8" in page
    assert "<svg" in page
    assert {p.name.partition("-")[0] for p in (tmp_path / "out").iterdir()} == {
        "rows", "study", "frontier.json", "frontier.html",
    }  # fmt: skip


def test_an_emulator_is_made_once_for_all_seeds(tmp_path, monkeypatch):
    """Rows are those of each seed alone, also where only some are missing."""
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    config = replace(SMALL, steps=2)
    made, original = [], module.emulate
    monkeypatch.setattr(module, "emulate", lambda *a, **k: made.append(1) or original(*a, **k))
    study_tiny(tmp_path, module.DynamicConfig(steps=0))
    files = (tmp_path / "model", tmp_path / "private.txt")
    for out, seeds, times in (("all", (0, 1), 1), ("one", (1,), 2), ("one", (0, 1), 3)):
        config = replace(config, seeds=seeds)
        frontier(*files, tmp_path / out, config, made_study=tmp_path / "study")
        assert len(made) == times
    both = [sorted((tmp_path / out / "rows").iterdir()) for out in ("all", "one")]
    assert [p.name for p in both[0]] == [p.name for p in both[1]]
    for row, again in zip(*both, strict=True):
        assert json.loads(row.read_text()) == json.loads(again.read_text())
    row = json.loads(next(p for p in both[0] if p.name.startswith("1-0.34")).read_text())
    assert row.keys() == {
        "emulator_zs", "emulator_ft", "plug_in", "tokens", "parameters", "bytes",
        "flops_per_token",
    }  # fmt: skip


def test_an_estimate_counts_seeds(tmp_path):
    save_tiny("llama", tmp_path / "model")
    save_text(tmp_path)
    config = FrontierConfig(adapter_layers=(1,), alpha=(0.34,), beta=(0.8,), max_length=32)
    one, three = (
        estimate_frontier(tmp_path / "model", tmp_path / "private.txt", replace(config, seeds=s))
        for s in ((0,), (0, 1, 2, 2))
    )
    assert three.tokens == 3 * one.tokens


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
    files = (tmp_path / "model", tmp_path / "private.txt", tmp_path / "out")
    options = {"public": tmp_path / "public.txt", "dynamic": module.DynamicConfig(steps=0)}
    with pytest.raises(ConfigError, match="kept middle layer"):
        frontier(*files, config, how=STUDY, **options)
    config = replace(config, adapter_layers=(1,), beta=(0.5,))
    bare = replace(STUDY, warm_start="none")
    with pytest.raises(ConfigError, match="expected a study with moments"):
        frontier(*files, config, how=bare, **options)
