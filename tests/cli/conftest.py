"""The command line, run in this process, in a directory where both parties have been."""

import json
from types import SimpleNamespace

import pytest
from command_line import STUDY_OPTIONS, TUNE_OPTIONS, write_files

from blindtune.cli.main import run


@pytest.fixture
def blindtune(capsys):
    """Run a command line; gives code, out and err, and what `--json` printed."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        facts = json.loads(out) if "--json" in arguments and code == 0 else None
        return SimpleNamespace(code=code, out=out, err=err, facts=facts)

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Model, data, and the results of study, emulate, tune and plug-in. Read-only."""
    place = tmp_path_factory.mktemp("made")
    write_files(place)
    path = {name: str(place / name) for name in ("llama", "study", "emulator", "adapter", "tuned")}
    public, private = str(place / "public.txt"), str(place / "private.jsonl")
    for arguments in (
        ["study", path["llama"], "--data", public, "--out", path["study"], *STUDY_OPTIONS],
        ["emulate", path["study"], "--out", path["emulator"]],
        ["tune", path["emulator"], "--data", private, "--out", path["adapter"], *TUNE_OPTIONS],
        ["plug-in", path["llama"], path["adapter"], "--out", path["tuned"]],
    ):
        assert run(arguments) == 0, arguments
    return place
