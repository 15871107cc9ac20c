"""Every mistake is one line on stderr, with what to do and the right exit code."""

import errno
import json
import shutil

import pytest
import torch
from command_line import STUDY_OPTIONS, TUNE_OPTIONS, write_lines

VERIFICATION, USAGE, INTERNAL = 3, 2, 70


def refused(done, code, *words):
    assert done.code == code, done.err
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def tune(made, blindtune, tmp_path):
    def call(data, *more, emulator=None):
        return blindtune(
            "tune", emulator or made / "emulator", "--data", data, "--out", tmp_path / "out",
            *TUNE_OPTIONS, *more,
        )  # fmt: skip

    return call


@pytest.fixture
def study(made, blindtune, tmp_path):
    def call(*more, data=None, model="llama"):
        return blindtune(
            "study", made / model, "--data", data or made / "public.txt",
            "--out", tmp_path / "out", *STUDY_OPTIONS, *more,
        )  # fmt: skip

    return call


def test_missing_data(tune, tmp_path):
    refused(tune(tmp_path / "none.jsonl"), USAGE, "none.jsonl: expected a data file, there is none")


def test_empty_data(tune, study, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(tune(empty), USAGE, "empty.jsonl", "the file is empty")
    refused(study(data=empty), USAGE, "empty.jsonl", "the file is empty")


def test_a_bad_line_is_named_by_file_and_number(tune, tmp_path):
    data = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    data.write_text(f"{good}\n{good}\n{{oops\n{good}\n")
    refused(tune(data), USAGE, f"{data}:3: expected JSON")


def test_a_strange_record_is_named(tune, tmp_path):
    data = tmp_path / "strange.jsonl"
    write_lines(data, [{"prompt": "a", "completion": "b"}, {"text": "c"}])
    refused(tune(data), USAGE, f"{data}:2")


def test_text_in_the_place_of_a_file(tune):
    done = tune("Jane Doe lives in Utrecht. " * 20)
    refused(done, USAGE, "got text of 540 characters")
    assert "Jane" not in done.err


def test_a_file_of_options_knows_the_home_directory(made, blindtune, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("out: ~/e\n")
    assert blindtune("emulate", made / "study", "--config", "run.yaml").code == 0
    assert (tmp_path / "e" / "manifest.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_delta_without_an_epsilon(tune, made):
    done = tune(made / "private.jsonl", "--dp-delta", "1e-5")
    refused(done, USAGE, "expected --dp-epsilon with --dp-delta")


def test_too_few_tokens(study, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refused(study(data=short), USAGE, "short.txt", "give more text")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", "7"], "expected alpha from 0 to 1, got 7.0"),
        (["--alpha", "nan"], "expected alpha from 0 to 1"),
        (["--beta", "-1"], "expected beta from 0 to 1"),
        (["--adapter-layers", "0"], "expected --adapter-layers >= 1"),
        (["--adapter-layers", "4"], "expected a kept middle layer, got none"),
        (["--alpha", "1"], "expected a kept middle layer, got none"),
        (["--alpha", "many"], "'many' is not a valid float"),
        (["--reading", "both"], "'both' is not one of 'removed', 'kept'"),
        (["--alpah", "1"], "No such option"),
    ],
)
def test_triplets_out_of_range(made, blindtune, tmp_path, options, words):
    done = blindtune("emulate", made / "study", "--out", tmp_path / "e", *options)
    refused(done, USAGE, words)
    assert list(tmp_path.iterdir()) == []


def test_no_middle_layer_to_study(study):
    refused(study("--min-adapter-layers", 4), USAGE, "leave a middle")


def test_no_study_there(made, blindtune, tmp_path):
    done = blindtune("emulate", made / "llama", "--out", tmp_path / "e")
    refused(done, USAGE, "expected a study", "blindtune study")


def test_no_model_there(blindtune, made, tmp_path):
    done = blindtune(
        "study", tmp_path / "none", "--data", made / "public.txt", "--out", tmp_path / "s"
    )
    refused(done, USAGE, "expected a model directory")


def test_an_unknown_family(made, study):
    broken = made / "unknown"
    if not broken.exists():
        shutil.copytree(made / "llama", broken)
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "t5"}
    (broken / "config.json").write_text(json.dumps(config))
    refused(study(model="unknown"), USAGE, "expected a model of type", "docs/families.md")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_emulator(made, blindtune, tune, tmp_path, name, damage):
    package = tmp_path / "damaged"
    shutil.copytree(made / "emulator", package)
    content = bytearray((package / name).read_bytes())
    if damage == "truncated":
        (package / name).write_bytes(content[:-1])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        (package / name).write_bytes(content)
    else:
        (package / name).unlink()
    refused(blindtune("inspect", package), VERIFICATION, "ask for the package again")
    refused(tune(made / "private.jsonl", emulator=package), VERIFICATION)


def test_an_adapter_is_no_emulator(made, tune):
    done = tune(made / "private.jsonl", emulator=made / "adapter")
    refused(done, VERIFICATION, "expected an emulator package")


def test_the_wrong_model_at_plug_in(made, blindtune, tmp_path):
    done = blindtune("plug-in", made / "smollm2", made / "adapter", "--out", tmp_path / "t")
    refused(done, VERIFICATION, "expected an adapter for this model")
    assert list(tmp_path.iterdir()) == []


OUTPUTS = {"study": "study", "emulator": "emulate", "adapter": "tune", "tuned": "plug-in"}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_in_the_way(made, blindtune, tmp_path, name):
    again = [OUTPUTS[name], "--config", made / f"{name}.options.yaml"]
    done = blindtune(*again, "--resume", "never")
    assert (done.code, done.out) == (USAGE, "")
    assert str(made / name) in done.err.splitlines()[-1]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    done = blindtune(*again, "--out", mine, "--overwrite")
    refused(done, USAGE, "expected a new directory, or an earlier output")
    refused(blindtune(*again, "--out", mine / "thesis.txt", "--overwrite"), USAGE)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    shutil.rmtree(mine)
    shutil.copytree(made / name, mine)
    assert blindtune(*again, "--out", mine).code == USAGE
    if name == "tuned":  # as every model has its files, the note beside it tells
        done = blindtune(*again, "--out", mine, "--overwrite")
        refused(done, USAGE, "(with its mine.done.json beside it)")
        shutil.copy(made / f"{name}.done.json", tmp_path / "mine.done.json")
    assert blindtune(*again, "--out", mine, "--overwrite", "--resume", "never").code == 0


def test_an_output_that_cannot_be_made(made, blindtune, tmp_path):
    (tmp_path / "file").touch()
    done = blindtune("emulate", made / "study", "--out", tmp_path / "file" / "e")
    refused(done, USAGE, "is a file: choose another --out")


def test_the_working_directory_is_no_output(made, blindtune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = blindtune("emulate", made / "study", "--out", ".", "--overwrite")
    refused(done, USAGE, "expected a new directory")


def test_scores_bury_nothing(made, blindtune, tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    asked = ["evaluate", made / "tuned", "--choices", made / "choices.jsonl", "--out"]
    refused(blindtune(*asked, thesis), USAGE, "expected a new file")
    refused(blindtune(*asked, thesis, "--overwrite"), USAGE, "expected a new file")
    refused(blindtune(*asked, tmp_path, "--overwrite"), USAGE, "expected a new file")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert thesis.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0"), "GPU"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "CPU"),
        (MemoryError(), "CPU"),
    ],
)
def test_too_little_memory(made, blindtune, tune, monkeypatch, error, place):
    import blindtune.evaluation.utility.evaluating as evaluating
    import blindtune.offsite.data_owner.tuning as tuning

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(tuning, "tune", full)
    monkeypatch.setattr(evaluating, "evaluate", full)
    words = f"out of memory on the {place}: lower"
    done = tune(made / "private.jsonl")
    refused(done, USAGE, f"{words} --per-device-train-batch-size", "--gradient-checkpointing")
    done = blindtune("evaluate", made / "llama", "--data", made / "public.txt")
    refused(done, USAGE, f"{words} --batch-size or --max-length")


def test_a_file_that_cannot_be_read(made, blindtune, monkeypatch):
    import blindtune.evaluation.inspection as inspection

    def forbidden(package, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(package))

    monkeypatch.setattr(inspection, "inspect", forbidden)
    refused(blindtune("inspect", made / "emulator"), USAGE, "emulator: Permission denied")


def test_nothing_to_score(made, blindtune):
    refused(blindtune("evaluate", made / "llama"), USAGE, "--data, --choices or --tasks")


def test_what_is_needed_is_asked_for(blindtune):
    refused(blindtune("tune", "emulator"), USAGE, "Missing option '--data'", "tune --help")
    refused(blindtune("plug-in", "model", "--out", "x"), USAGE, "Missing argument 'ADAPTER'")
    refused(blindtune("tunne"), USAGE, "No such command 'tunne'")


def fail(*arguments, **options):
    raise RuntimeError("first line\nsecond line")


def test_a_fault_of_ours_is_one_line(made, blindtune, monkeypatch):
    import blindtune.evaluation.inspection as inspection

    monkeypatch.setattr(inspection, "inspect", fail)
    done = blindtune("inspect", made / "emulator")
    assert done.code == INTERNAL
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("internal error: RuntimeError: first line second line")
    assert "--debug" in done.err
    done = blindtune("inspect", made / "emulator", "--debug")
    assert done.code == INTERNAL
    assert "Traceback" in done.err


def test_debug_shows_where_an_error_came_from(blindtune, tmp_path):
    done = blindtune("inspect", tmp_path / "none", "--debug")
    assert done.code == USAGE
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
