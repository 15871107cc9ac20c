"""`--resume auto` for every verb: what is done is done, and what is not is made."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import STUDY_OPTIONS, TUNE_OPTIONS

from blindtune.cli import plug_in
from blindtune.cli.audit import VERB
from blindtune.cli.output import Request, check_place, record_path, request
from blindtune.errors import OutputError

OUTPUTS = {
    "study": ["study", "llama", "--data", "public.txt", *STUDY_OPTIONS],
    "emulator": ["emulate", "study"],
    "adapter": ["tune", "emulator", "--data", "private.jsonl", *TUNE_OPTIONS],
    "tuned": ["plug-in", "llama", "adapter"],
    "scores.json": ["evaluate", "tuned", "--choices", "choices.jsonl", "--max-items", "3"],
}


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of everything, as the working directory."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def run(place, blindtune):
    """Make one of the outputs, and tell whether it was made or found."""

    def call(name, *more):
        done = blindtune(*OUTPUTS[name], "--out", f"new-{name}", *more, "--json")
        found = None if done.facts is None else done.facts.pop("already_done", False)
        return SimpleNamespace(code=done.code, err=done.err, facts=done.facts, found=found)

    return call


def state(place):
    """Every file of the outputs, by what changes when it is written anew."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in place.rglob("new-*")}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_done_is_not_done_again(place, run, name):
    first = run(name)
    assert (first.code, first.found) == (0, False), first.err
    before = state(place)
    again = run(name)
    assert (again.code, again.found) == (0, True)
    assert state(place) == before
    for facts in (first.facts, again.facts):
        facts.pop("wall_seconds")
    assert again.facts == first.facts
    assert run(name, "--resume", "never").code == 2
    assert state(place) == before
    anew = run(name, "--resume", "never", "--overwrite")
    assert (anew.code, anew.found) == (0, False)
    assert state(place) != before


def test_people_are_told_that_nothing_was_run(place, blindtune):
    asked = ["emulate", "study", "--out", "e"]
    assert "Nothing was run" not in blindtune(*asked).err
    done = blindtune(*asked)
    assert "Emulator written" in done.out
    assert "Nothing was run" in done.err


def test_other_options_are_another_output(run):
    assert run("emulator").code == 0
    refused = run("emulator", "--alpha", "0.5")
    assert refused.code == 2
    assert "an output of other options or inputs is there" in refused.err
    assert "there (--alpha 0.25 (now 0.5)):" in refused.err
    many = run("emulator", "--alpha", "0.5", "--beta", "0.5", "--unsigned")
    assert "--alpha 0.25 (now 0.5), --beta" in many.err
    never = run("emulator", "--resume", "never")
    assert "the output of this very command is there (--resume auto" in never.err
    assert run("emulator", "--alpha", "0.5", "--overwrite").found is False
    assert run("emulator", "--alpha", "0.5", "--overwrite").found is True
    assert run("emulator", "--alpha", "0.5", "--threads", "1").found is True  # speed only


def test_another_input_is_another_output(place, run):
    assert run("scores.json").code == 0
    with (place / "choices.jsonl").open("a") as file:
        file.write("\n")
    refused = run("scores.json")
    assert (refused.code, "is there (other bytes of --choices)" in refused.err) == (2, True)
    assert run("scores.json", "--overwrite").found is False


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json", "more.txt"])
def test_a_changed_output_is_not_taken_as_done(place, run, name):
    assert run("emulator").code == 0
    with (place / "new-emulator" / name).open("ab") as file:
        file.write(b" ")
    refused = run("emulator")
    assert (refused.code, "is there, and was changed since" in refused.err) == (2, True)
    again = run("emulator", "--overwrite")
    if name == "more.txt":  # somebody's own file, which is not thrown away
        assert (again.code, (place / "new-emulator" / name).read_text()) == (2, " ")
    else:
        assert again.found is False


def test_a_damaged_note_says_nothing(place, run):
    assert run("emulator").code == 0
    note = place / "new-emulator.done.json"
    for text in ("", "[]", "{}", '{"identity": null, "output": null, "facts": null}'):
        note.write_text(text)
        assert run("emulator").code == 2
    note.unlink()
    assert run("emulator").code == 2


def test_files_that_only_a_task_knows_are_not_vouched_for():
    def identity(tasks):
        values = {"model": "hub/name", "tasks": tasks}
        return request("evaluate", Path("x"), values, ["model"], ["tasks"]).identity

    assert identity(["arc"]) is None
    assert identity([]) is not None


def test_a_moved_model_is_named(place, run):
    (place / "llama").rename(place / "elsewhere")
    facts = place / "study" / "study.json"
    facts.write_text(facts.read_text().replace("llama", "gone"))
    assert run("emulator").code == 2
    assert run("emulator", "--model", "elsewhere", "--dry-run").code == 0
    assert run("emulator", "--model", "elsewhere").found is False
    wrong = run("emulator", "--model", "smollm2", "--overwrite")
    assert wrong.code == 3
    assert "expected the model that was studied" in wrong.err


def test_what_stood_there_before_a_killed_command_is_not_its_own(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "m").write_text("of the first")
    first, second = (Request(verb="v", out=out, identity={"n": n}) for n in (1, 2))
    first.note_done({"made": "first"})
    killed = [second.under_way() for _ in range(3)]
    killed[0].__enter__()  # nothing of it is left but the note
    assert not second.begun()
    assert first.done()["made"] == "first"
    killed[1].__enter__()  # and again
    assert first.done()["made"] == "first"
    (out / "m").write_text("of the second")
    assert second.begun()
    assert first.done() is None
    killed[2].__enter__()  # killed again before it has made its output anew
    assert second.begun()
    with pytest.raises(ZeroDivisionError), second.under_way():
        raise ZeroDivisionError
    assert second.begun()


def test_a_failed_command_leaves_the_note_of_what_is_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "m").write_text("of the first")
    first, second = (Request(verb="v", out=out, identity={"n": n}) for n in (1, 2))
    first.note_done({"made": "first"})
    with pytest.raises(ZeroDivisionError), second.under_way():
        raise ZeroDivisionError
    assert first.done()["made"] == "first"
    record_path(out).write_text('{"identity": {"n": 1}, "facts": 3}')
    assert first.done() is None


def test_a_refusal_after_a_killed_command_tells_of_what_stands_there(place, run):
    assert run("emulator").code == 0
    note = place / "new-emulator.done.json"
    done = json.loads(note.read_text())
    other = done["identity"] | {"options": done["identity"]["options"] | {"alpha": 0.5}}
    before = done["output"]
    note.write_text(
        json.dumps({"identity": other, "begun": True, "before": before, "earlier": done})
    )
    refused = run("emulator", "--alpha", "0.5")
    assert "there (--alpha 0.25 (now 0.5)):" in refused.err
    for options in ({"new": None} | done["identity"]["options"], None):
        note.write_text(json.dumps(done | {"identity": done["identity"] | {"options": options}}))
        refused = run("emulator", "--resume", "never")
        assert refused.code == 2
        assert "()" not in refused.err


def test_inputs_of_configs_are_told_by_their_bytes(place):
    (place / "prior").mkdir()
    requests = []
    for text in ("one", "two"):
        (place / "prior" / "config.json").write_text(text)
        values = {"subject": "s", "prior": str(place / "prior"), "out": "o"}
        requests.append(request("audit", place / "o", values, VERB.inputs, ()))
    assert requests[0].identity["inputs"] != requests[1].identity["inputs"]


@pytest.mark.parametrize(("verb", "name"), [(VERB, "audit.json"), (plug_in.VERB, "config.json")])
def test_a_directory_of_others_is_not_replaced_though_it_looks_like_an_output(tmp_path, verb, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")

    def check():
        check_place(verb.name, out, mark=verb.mark, is_file=False, overwrite=True)

    with pytest.raises(OutputError, match=r"\(with its out.done.json beside it\)"):
        check()
    Request(verb="study", out=out, identity=None).note_done({})
    with pytest.raises(OutputError, match="something else is there"):
        check()
    Request(verb=verb.name, out=out, identity=None).note_done({})
    check()
