"""Paths as callers name them."""

import pytest

from blindtune.errors import DataError
from blindtune.places import check_hub_name, data_source, located
from blindtune.training.canaries import plant, read_canaries


def test_the_home_directory_is_looked_for_in_data_and_outputs(tmp_path, monkeypatch):
    """A folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "private.txt").write_text("a line")
    plant("~/private.txt", "~/planted")
    assert read_canaries("~/planted/canaries.json")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert located("~/a") == tmp_path / "home" / "a"
    assert located("~nobody-of-this-name/a").parts[0] == "~nobody-of-this-name"
    assert data_source("./a.txt") == "./a.txt"


@pytest.mark.parametrize("name", ["squad", "org/squad_v1.1", "a.b/c-d"])
def test_names_of_the_hub_are_let_through(name):
    check_hub_name(data_source(name))


@pytest.mark.parametrize("text", ["two words", "a/b/c", "", "what?"])
def test_text_is_no_name_of_the_hub(text):
    with pytest.raises(DataError, match=f"text of {len(text)} characters"):
        check_hub_name(text)
