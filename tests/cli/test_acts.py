"""From study to plug-in on the command line: what is printed, written, and repeated."""

import json
import logging
import re
import shutil
import sys
import warnings
from functools import partial

import pytest
import yaml
from command_line import STUDY_OPTIONS, TUNE_OPTIONS

from blindtune.cli import printing


def remarks(done):
    """What was said on stderr, but for how far it is: a slow machine is told that."""
    progress = re.compile(r"[\w ,-]+: [\d,]+ of [\d,]+(, [\d,]+ s left)?")
    return [line for line in done.err.splitlines() if not progress.fullmatch(line)]


def files_of(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_study_tells_everything(made, blindtune, tmp_path):
    out = tmp_path / "study"
    done = blindtune(
        "study", made / "llama", "--data", made / "public.txt", "--out", out, *STUDY_OPTIONS,
        "--dynamic-steps", 2, "--json",
    )  # fmt: skip
    assert (done.code, remarks(done)) == (0, [])
    facts = done.facts
    assert facts["verb"] == "study"
    assert facts["path"] == str(out)
    assert len(facts["middle"]) == len(facts["scores"]) == len(facts["damage"]) == 6
    assert [step["step"] for step in facts["history"]] == [1, 2]
    assert {"calibrate", "measure", "learn"} <= set(facts["seconds"])
    assert facts["wall_seconds"] > 0
    beside = ["study", "study.done.json", "study.options.yaml"]
    assert sorted(p.name for p in tmp_path.iterdir()) == beside


def test_emulate_inspect_and_evaluate_agree(made, blindtune, tmp_path):
    out = tmp_path / "e"
    made_facts = blindtune("emulate", made / "study", "--out", out, "--alpha", 0.5, "--json").facts
    seen = blindtune("inspect", out, "--json").facts
    for name in ("id", "parameters", "full_parameters", "bytes", "full_bytes", "full_layers"):
        assert made_facts[name] == seen[name]
    assert made_facts["layers"] == {"adapter": 4, "harmonizer": 2, "compressed": 2}
    scored = blindtune("evaluate", out, "--data", made / "public.txt", "--json").facts
    assert scored["perplexity"]["perplexity"] > 1
    assert scored["choices"] is None


def test_tune_plug_in_and_evaluate(made, blindtune, tmp_path):
    adapter, tuned = tmp_path / "a", tmp_path / "t"
    done = blindtune(
        "tune", made / "emulator", "--data", made / "private.jsonl", "--out", adapter,
        "--lora-rank", 2, "--lora-targets", "self_attn.q_proj,mlp.up_proj",
        "--lora-targets", "self_attn.o_proj", *TUNE_OPTIONS, "--json",
    )  # fmt: skip
    assert done.code == 0
    assert "«" in done.err
    assert "trained tokens:" in done.err
    facts = done.facts
    assert (facts["steps"], len(facts["train_loss"])) == (3, 3)
    assert facts["validation_loss"]
    seen = blindtune("inspect", adapter, "--json").facts
    assert (seen["id"], seen["emulator"]) == (facts["id"], facts["emulator"])
    assert seen["lora_targets"] == ["mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"]
    plugged = blindtune("plug-in", made / "llama", adapter, "--out", tuned, "--json").facts
    assert plugged["adapter"] == facts["id"]
    assert list(plugged["relative_change"]) == ["0", "1", "6", "7"]
    scored = blindtune(
        "evaluate", tuned, "--choices", made / "choices.jsonl", "--max-items", 4, "--json"
    ).facts
    assert scored["choices"]["items"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "emulator"], ["Layers AA", "compressed", "package id", "It reveals"]),
        (["inspect", "adapter"], ["tuned on", "It reveals", "private data"]),
        (["evaluate", "tuned", "--data", "public.txt"], ["perplexity", "nats a token"]),
        (["evaluate", "tuned", "--choices", "choices.jsonl"], ["accuracy", "6 items"]),
    ],
)
def test_people_get_tables(made, blindtune, monkeypatch, arguments, words):
    monkeypatch.chdir(made)
    done = blindtune(*arguments)
    assert (done.code, remarks(done)) == (0, [])
    for word in words:
        assert word in done.out
    assert max(map(len, done.out.splitlines())) <= printing.PLAIN_WIDTH


def test_people_get_tables_of_what_was_written(made, blindtune, tmp_path):
    done = blindtune("emulate", made / "study", "--out", tmp_path / "e")
    assert "Emulator written" in done.out
    again = ["tune", tmp_path / "e", "--data", made / "private.jsonl", "--out", tmp_path / "a"]
    done = blindtune(*again, *TUNE_OPTIONS)
    assert "Adapter written" in done.out
    assert "validation loss" in done.out
    done = blindtune("plug-in", made / "llama", tmp_path / "a", "--out", tmp_path / "t")
    assert "relative change" in done.out


def test_scores_are_written_with_their_options(made, blindtune, tmp_path):
    out = tmp_path / "scores.json"
    asked = ["evaluate", made / "tuned", "--choices", made / "choices.jsonl", "--out", out]
    done = blindtune(*asked, "--max-items", 4)
    assert done.code == 0
    for path in (out, tmp_path / "scores.json.options.yaml"):
        assert path.name in done.out
    written = json.loads(out.read_text())
    assert (written["verb"], written["choices"]["items"]) == ("evaluate", 4)
    again = ["evaluate", "--config", tmp_path / "scores.json.options.yaml", "--overwrite", "--json"]
    facts = blindtune(*again, "--resume", "never").facts
    assert facts["choices"] == written["choices"]
    assert facts.keys() - written.keys() == {"wall_seconds"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        out.name,
        f"{out.name}.done.json",
        f"{out.name}.options.yaml",
    ]


@pytest.mark.parametrize("name", ["study", "emulator", "adapter", "tuned"])
def test_saved_options_repeat_the_run(made, blindtune, tmp_path, name):
    verbs = {"study": "study", "emulator": "emulate", "adapter": "tune", "tuned": "plug-in"}
    saved = made / f"{name}.options.yaml"
    done = blindtune(verbs[name], "--config", saved, "--out", tmp_path / name, "--json")
    assert done.code == 0, done.err
    before, after = files_of(made / name), files_of(tmp_path / name)
    if name == "study":  # but for its times
        assert before["study.safetensors"] == after["study.safetensors"]
    else:
        assert before == after
    options = yaml.safe_load(saved.read_text())
    again = yaml.safe_load((tmp_path / f"{name}.options.yaml").read_text())
    assert again == options | {"out": str(tmp_path / name)}


def test_the_command_line_beats_the_file(made, blindtune, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"study: {made / 'study'}\nalpha: 0.0\nbeta: 0.5\nadapter-layers: 3\n")
    out = tmp_path / "e"
    assert blindtune("emulate", "--config", config, "--out", out, "--alpha", 0.5).code == 0
    options = yaml.safe_load((tmp_path / "e.options.yaml").read_text())
    assert (options["alpha"], options["beta"], options["adapter_layers"]) == (0.5, 0.5, 3)
    assert options["reading"] == "kept"


def test_an_unknown_key_in_a_file_is_refused(made, blindtune, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rte: 1e-4\n")
    done = blindtune("tune", "--config", config, made / "emulator", "--data", "x", "--out", "y")
    assert done.code == 2
    assert "did you mean learning_rate?" in done.err


def test_no_path_of_a_party_leaks_into_a_package(made):
    for package in ("emulator", "adapter"):
        for name, content in files_of(made / package).items():
            assert str(made).encode() not in content, name
            assert b"private.jsonl" not in content, name


@pytest.mark.parametrize("verb", ["study", "emulate", "inspect", "tune", "plug-in", "evaluate"])
def test_a_dry_run_estimates_and_writes_nothing(made, blindtune, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(made)
    arguments = {
        "study": ["llama", "--data", "public.txt", "--out", tmp_path / "x", *STUDY_OPTIONS],
        "emulate": ["study", "--out", tmp_path / "x"],
        "inspect": ["emulator", "--out", tmp_path / "x"],
        "tune": ["emulator", "--data", "private.jsonl", "--out", tmp_path / "x", *TUNE_OPTIONS],
        "plug-in": ["llama", "adapter", "--out", tmp_path / "x"],
        "evaluate": ["llama", "--data", "public.txt", "--choices", "choices.jsonl"],
    }[verb]
    before = sorted(made.rglob("*"))
    done = blindtune(verb, *arguments, "--dry-run")
    assert (done.code, remarks(done)) == (0, [])
    assert "an estimate, nothing was done" in done.out
    assert "GFLOP/s, measured just now" in done.out
    estimate = blindtune(verb, *arguments, "--dry-run", "--json").facts["estimate"]
    assert estimate["seconds"] == pytest.approx(sum(estimate["parts"].values()))
    assert estimate["memory_bytes"] > 0
    assert estimate["rate"]["threads"] >= 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(made.rglob("*")) == before


def test_resume_goes_on_and_says_so(made, blindtune, tmp_path, monkeypatch):
    import blindtune.offsite.data_owner.tuning as tuning

    arguments = ["tune", made / "emulator", "--data", made / "private.jsonl"]
    arguments += ["--out", tmp_path / "a", *TUNE_OPTIONS, "--save-steps", 1, "--json"]
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "write_adapter", interrupt)
        done = blindtune(*arguments)
        assert done.code == 130
        assert "the same command goes on from the last checkpoint" in done.err
        assert not (tmp_path / "a").exists()
        assert not (tmp_path / "a.options.yaml").exists()
    done = blindtune(*arguments)
    assert done.facts["resumed_from"] == 3
    assert files_of(tmp_path / "a") == files_of(made / "adapter")
    shutil.rmtree(tmp_path / "a")
    assert blindtune(*arguments, "--resume", "never").facts["resumed_from"] is None


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_talk_of_libraries_does_not_reach_people(made, blindtune, monkeypatch):
    import blindtune.evaluation.inspection as inspection

    real = inspection.inspect

    def talkative(package, **options):
        warnings.warn("talk", UserWarning, stacklevel=1)
        logging.getLogger("transformers").warning("talk")
        logging.getLogger("lm_eval").warning("talk")
        print("talk")
        return real(package, **options)

    monkeypatch.setattr(inspection, "inspect", talkative)
    done = blindtune("inspect", made / "emulator", "--json")
    assert done.err == "talk\n"  # what is printed goes to stderr
    assert done.facts["kind"] == "emulator"
    assert logging.getLogger("lm_eval").isEnabledFor(logging.WARNING)


def test_processes_other_than_the_first_are_silent(made, blindtune, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = blindtune("inspect", made / "emulator")
    assert (done.code, done.out, done.err) == (0, "", "")
    done = blindtune("inspect", made / "none")
    assert done.err.startswith("process 1: error: ")


def test_threads(made, blindtune):
    import torch

    before = torch.get_num_threads()
    try:
        assert blindtune("inspect", made / "emulator", "--threads", before + 1).code == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_json_has_no_nan():
    assert printing.plain({"a": (float("nan"), float("inf"), 1.0), 2: None}) == {
        "a": [None, None, 1.0],
        "2": None,
    }


def test_bars_are_for_terminals(capsys, monkeypatch):
    with printing.stages() as show:
        show("work", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with printing.stages() as show:
        show("work", 1, 2)
        show("work", 2, 2)
        score = partial(show, "score")
        score(1, 2)
        score(30, 40)  # another measure under the same name
    captured = capsys.readouterr()
    assert "work" in captured.err
    assert "30/40" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e12, "2.5 TB")]
)
def test_sizes(count, words):
    assert printing.size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59, "59 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations(seconds, words):
    assert printing.duration(seconds) == words


def test_json_is_one_line(made, blindtune):
    out = blindtune("inspect", made / "adapter", "--json").out
    assert out.count("\n") == 1
    assert json.loads(out)["training"] == "full"


def test_an_interrupted_frontier_goes_on(made, blindtune, tmp_path, monkeypatch):
    asked = ["frontier", made / "llama", "--data", made / "private.jsonl", "--out", tmp_path / "f"]
    asked += ["--study", made / "study", "--alpha", "0.5", "--beta", 1, "--max-length", 64]
    asked += ["--steps", 2]

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("blindtune.evaluation.frontiers.offsite.emulate", interrupted)
        done = blindtune(*asked)
    assert (done.code, "run the same command again" in done.err) == (130, True)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f" / "rows").iterdir()}
    assert len(kept) == 3
    assert blindtune(*asked).code == 0
    rows = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f" / "rows").iterdir()}
    assert kept.items() < rows.items()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_frontier_answers_and_goes_on(made, blindtune, tmp_path):
    asked = [
        "frontier",
        made / "llama",
        "--data",
        made / "private.jsonl",
        "--study",
        made / "study",
    ]
    asked += ["--adapter-layers", 2, "--alpha", "0.25,0.5", "--beta", 1, "--max-length", 64]
    asked += ["--steps", 2, "--out", tmp_path / "f"]
    done = blindtune(*asked, "--json")
    assert (done.code, remarks(done)) == (0, [])
    assert [s["alpha"] for s in done.facts["settings"]] == [0.25, 0.5]
    assert done.facts["answer"] is None
    rows = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f" / "rows").iterdir()}
    assert len(rows) == 5  # ZS, FT, the adapter tuned directly, two settings
    told = blindtune(*asked, "--gap", -100)
    assert "The cheapest setting with a gap of at least -100 nats is (N_a" in told.out
    assert rows == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f" / "rows").iterdir()}


@pytest.mark.parametrize("folder", ["[v2]", "[/x]"])
def test_names_are_shown_as_they_are(made, blindtune, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "tuned", tmp_path / folder / "m")
    done = blindtune(
        "evaluate", f"{folder}/m", "--choices", made / "choices.jsonl", "--max-items", 2
    )
    assert done.code == 0, done.err
    assert f"{folder}/m, " in done.out
