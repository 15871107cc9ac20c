"""Results appear whole, or not at all."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors import SafetensorError

from blindtune.atomic import (
    atomic_directory,
    atomic_file,
    check_free,
    put_in_order,
    remove_directory,
    remove_left_overs,
    secret_file,
    sole_writer,
)
from blindtune.errors import OutputError


def _write_half(place, error):
    with place as partial:
        (partial / "a" if partial.is_dir() else partial).write_text("half")
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_appears_when_it_is_complete(tmp_path):
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path, error):
    for place in (atomic_directory, atomic_file):
        with pytest.raises(OutputError, match="free some space"):
            _write_half(place(tmp_path / "out"), error)
    assert names(tmp_path) == []


def test_other_exceptions_pass_and_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_failed_flush_is_an_output_error(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="cannot be written"), atomic_file(tmp_path / "f") as part:
        part.write_text("1")
    assert names(tmp_path) == []


def test_overwriting_replaces_only_results_of_its_kind(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("1")
    for overwrite in (False, True):
        with pytest.raises(OutputError), atomic_directory(target, overwrite=overwrite, mark="m"):
            pass
    assert names(target) == ["precious"]
    (target / "m").write_text("old")
    with atomic_directory(target, overwrite=True, mark="m") as directory:
        (directory / "m").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (target / "m").read_text() == "new"
    assert names(target) == ["m"]


def test_a_result_never_replaces_what_it_is_made_of(tmp_path, monkeypatch):
    (tmp_path / "out" / "data").mkdir(parents=True)
    for name in ("m", "data/text"):
        (tmp_path / "out" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    out, told = tmp_path / "out", {"overwrite": True, "mark": "m"}
    for read in ("out", out / "data" / "text", tmp_path / "link", "out/../out"):
        with pytest.raises(OutputError, match="apart from what is read"):
            check_free(out, inputs=(None, "a/name", read), **told)
    check_free(out, inputs=(tmp_path, "x" * 5000, tmp_path / "none", ["a"]), **told)


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".out.0a0a0a0a.partial").mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_a_parent_that_is_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="no directory"):
        check_free(tmp_path / "file" / "out", overwrite=False, mark="m")
    with pytest.raises(OutputError), atomic_file(tmp_path / "file" / "f"):
        pass


def test_one_at_a_time_writes_a_result(tmp_path):
    def write_too():
        with sole_writer(tmp_path / "out"):
            pass

    with ThreadPoolExecutor() as others, sole_writer(tmp_path / "out"):
        with pytest.raises(OutputError, match="another process is writing it"):
            others.submit(write_too).result()
        with sole_writer(tmp_path / "other"), sole_writer(tmp_path / "out"):
            assert names(tmp_path) == [".other.lock", ".out.lock"]
        with pytest.raises(OutputError):  # the inner one has not let go of it
            others.submit(write_too).result()
    assert names(tmp_path) == []
    write_too()


def test_a_lock_that_nobody_holds_any_more_is_no_obstacle(tmp_path):
    (tmp_path / ".out.lock").touch()
    with sole_writer(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_a_lock_leaves_no_directory_behind(tmp_path):
    with sole_writer(tmp_path / "a" / "b" / "out"):
        assert names(tmp_path / "a" / "b") == [".out.lock"]
    assert names(tmp_path) == []


def test_a_place_where_nothing_can_be_made_is_refused_at_once():
    with (
        pytest.raises(OutputError, match="No such file or directory"),
        sole_writer("/proc/blindtune"),
    ):
        raise AssertionError


def test_what_killed_writers_left_is_put_in_order(tmp_path):
    for name in (".out.00c0ffee.partial", ".out.work.00c0ffee.partial", ".out.00c0ffee.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.00c0ffee.replaced" / "a").write_text("earlier")
    others = [".out.00c0ffee.part", ".out.b.00c0ffee.partial", ".outer.00c0ffee.partial"]
    for name in (*others, ".out.done.json.00c0ffee.partial"):
        (tmp_path / name).touch()
    with sole_writer(tmp_path / "out"):
        assert (tmp_path / "out" / "a").read_text() == "earlier"
    assert names(tmp_path) == [*others, "out"]
    (tmp_path / ".out.00c0ffee.replaced").mkdir()
    with sole_writer(tmp_path / "out"):
        pass
    assert names(tmp_path) == [*others, "out"]


def test_of_launched_processes_the_first_holds_it_for_all(tmp_path, monkeypatch):
    with ThreadPoolExecutor() as others, sole_writer(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        assert others.submit(sole_writer(tmp_path / "out").__enter__).result() is None


def test_a_directory_is_removed_whole(tmp_path, monkeypatch):
    remove_directory(tmp_path / "absent")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_directory(tmp_path / "out")
    (left,) = names(tmp_path)
    assert left.startswith(".out.")
    with sole_writer(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_half_written_files_go_when_their_file_is_put_in_order(tmp_path):
    (tmp_path / ".a.json.00c0ffee.partial").touch()
    (tmp_path / ".b.json.00c0ffee.partial").touch()
    put_in_order(tmp_path / "a.json")
    put_in_order(tmp_path / "absent" / "a.json")
    assert names(tmp_path) == [".b.json.00c0ffee.partial"]


def test_left_overs_of_a_folder_go_whatever_they_are(tmp_path):
    (tmp_path / ".a.json.00c0ffee.partial").touch()
    (tmp_path / ".study.00c0ffee.partial").mkdir()
    (tmp_path / ".study.00c0ffee.partial" / "a").touch()
    (tmp_path / "rows").mkdir()
    remove_left_overs(tmp_path)
    remove_left_overs(tmp_path / "absent")
    assert names(tmp_path) == ["rows"]


def test_links_are_not_followed(tmp_path):
    (tmp_path / "aim").mkdir()
    (tmp_path / "aim" / "a").touch()
    (tmp_path / "out").symlink_to(tmp_path / "aim")
    with pytest.raises(OutputError, match="symbolic link"):
        check_free(tmp_path / "out", overwrite=True, mark="a")
    (tmp_path / "out.work").symlink_to(tmp_path / "aim")
    remove_directory(tmp_path / "out.work")
    assert names(tmp_path) == ["aim", "out"]
    assert names(tmp_path / "aim") == ["a"]


def test_what_is_put_there_meanwhile_stays(tmp_path):
    def write():
        with atomic_directory(tmp_path / "o"):
            (tmp_path / "o").mkdir()
            (tmp_path / "o" / "mine").touch()

    with pytest.raises(OutputError, match="something is there"):
        write()
    assert names(tmp_path) == ["o"]
    assert names(tmp_path / "o") == ["mine"]


def test_only_a_result_comes_back_and_only_a_whole_one(tmp_path, monkeypatch):
    (tmp_path / ".out.work.00c0ffee.replaced").mkdir()
    put_in_order(tmp_path / "out")
    assert names(tmp_path) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m").touch()

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with (
            pytest.raises(KeyboardInterrupt),
            atomic_directory(tmp_path / "out", overwrite=True, mark="m") as directory,
        ):
            (directory / "m").write_text("new")
    assert (tmp_path / "out" / "m").read_text() == "new"
    assert not list(tmp_path.glob("*.replaced"))


def test_a_secret_file_is_its_owners_alone_whatever_writes_it(tmp_path):
    for name, replaced in (("kept", False), ("replaced", True)):
        with secret_file(tmp_path / name) as partial:
            assert partial.stat().st_mode & 0o777 == 0o600
            if replaced:  # as libraries do
                partial.unlink()
            partial.write_text(name)
            if replaced:
                partial.chmod(0o644)
        assert (tmp_path / name).read_text() == name
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
