"""README and docs say what is true: figures, commands, files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_come_from_committed_results():
    program = ROOT / "benchmarks" / "readme.py"
    done = subprocess.run(
        [sys.executable, str(program), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_fences_open_and_close_in_turn(document):
    fences = re.findall(r"^ *```(\w*)$", document.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert not any(fences[1::2]), "a fence with a language closes nothing"


def test_every_verb_in_the_readme_parses():
    """Each `blindtune ...` line is accepted up to running it: unknown options would be refused."""
    from blindtune.cli.main import run

    commands = re.findall(r"^blindtune (.+)$", README, re.MULTILINE)
    assert {line.split()[0] for line in commands} == {
        "study", "emulate", "inspect", "tune", "plug-in", "evaluate",
        "serve", "admit", "split-tune", "predict", "cancel", "keys", "audit",
    }  # fmt: skip
    for line in commands:
        words = line.split()
        assert run([words[0], "--help"]) == 0
        help_text = subprocess.run(
            [sys.executable, "-m", "blindtune.cli.main", words[0], "--help"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for option in (w for w in words if w.startswith("--")):
            assert option in help_text, line


def test_python_in_the_readme_names_what_exists():
    import blindtune

    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    compile(block, "README.md", "exec")
    for name in re.findall(r"blindtune\.(\w+)", block):
        assert name in blindtune.__all__, name


def test_the_test_command_is_what_ci_runs():
    assert "./run check" in README
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec ./run check"


def test_versions_agree():
    import tomllib

    import blindtune

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == blindtune.__version__
    assert f"## {blindtune.__version__}" in (ROOT / "CHANGELOG.md").read_text()
