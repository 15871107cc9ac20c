"""Packages: whole or absent when written; every byte accounted for when opened."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from blindtune.errors import ConfigError, MismatchError, OutputError, PackageError
from blindtune.exchange import tensors as tensors_module
from blindtune.exchange.packages import manifest as manifest_module
from blindtune.exchange.packages import package as package_module
from blindtune.exchange.packages import signing as signing_module
from blindtune.exchange.packages import writing as writing_module
from blindtune.exchange.packages.manifest import decode_manifest
from blindtune.exchange.packages.package import SMALL_FILES, open_package
from blindtune.exchange.packages.writing import write_package

ROOT = Path(__file__).parents[3]
RELEASED = Path(__file__).parents[1] / "released"


def tree(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def names_in(path):
    return sorted(p.name for p in path.iterdir())


def test_round_trip(tmp_path, emulator_manifest, tensors, expected):
    files = {name: name.encode() for name in SMALL_FILES}
    identity = write_package(tmp_path / "deep/er/emulator", emulator_manifest, tensors, files)
    package = open_package(tmp_path / "deep/er/emulator", "emulator")
    assert package.id == identity
    assert package.manifest.layers == emulator_manifest.layers
    assert package.manifest.config == emulator_manifest.config
    assert set(package.manifest.files) == {"weights.safetensors", *files}
    assert {name: package.read_file(name) for name in files} == files
    read = package.read_tensors(expected)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert names_in(tmp_path / "deep/er") == ["emulator"]


def test_equal_input_gives_equal_bytes(tmp_path, emulator_manifest, tensors):
    backwards = dict(reversed(tensors.items()))
    first = write_package(tmp_path / "a", emulator_manifest, tensors, {"LICENSE": b"free"})
    second = write_package(tmp_path / "b", emulator_manifest, backwards, {"LICENSE": b"free"})
    assert first == second
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_id_is_what_sha256sum_prints(package):
    assert open_package(package).id == "sha256:" + (package / "manifest.sha256").read_text()[:64]
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "manifest.sha256"]
        subprocess.run(command, cwd=package, check=True, capture_output=True)


def test_shards(tmp_path, emulator_manifest, tensors, expected):
    write_package(tmp_path / "e", emulator_manifest, tensors, {}, max_shard_bytes=8)
    names = [f"weights-0000{i}-of-00002.safetensors" for i in (1, 2)]
    package = open_package(tmp_path / "e", "emulator")
    assert sorted(package.manifest.files) == names
    assert package.header.keys() == tensors.keys()
    read = package.read_tensors(expected)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(MismatchError, match="1 missing"):
        package.read_tensors(expected | {"more": ((1,), torch.float32)})


def test_kinds_are_told_apart(tmp_path, package, adapter_manifest, tensors):
    write_package(tmp_path / "adapter", adapter_manifest, tensors, {})
    assert open_package(tmp_path / "adapter", "adapter").manifest.lora.rank == 2
    assert open_package(tmp_path / "adapter").manifest.format == "blindtune-adapter"
    with pytest.raises(MismatchError, match="expected an emulator package"):
        open_package(tmp_path / "adapter", "emulator")
    with pytest.raises(MismatchError, match="expected an adapter package"):
        open_package(package, "adapter")


def test_not_a_directory(tmp_path, package):
    with pytest.raises(ConfigError, match="check the path"):
        open_package(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="check the path"):
        open_package(package / "manifest.json")


# --- accidents: any byte changed, any length cut ---------------------------------------------


@pytest.mark.parametrize("flip", [0xFF, 0x01])
def test_every_flipped_byte_is_refused(package, flip):
    checked = 0
    for name, whole in tree(package).items():
        for position in range(len(whole)):
            altered = bytearray(whole)
            altered[position] ^= flip
            (package / name).write_bytes(altered)
            with pytest.raises(PackageError):
                open_package(package)
            checked += 1
        (package / name).write_bytes(whole)
    assert checked == sum(map(len, tree(package).values())) > 1000
    open_package(package)


def test_every_truncation_is_refused(package):
    for name, whole in tree(package).items():
        for length in [*range(len(whole)), len(whole) + 1]:
            (package / name).write_bytes((whole + b"\n")[:length])
            with pytest.raises(PackageError):
                open_package(package)
        (package / name).write_bytes(whole)
    open_package(package)


def test_a_forged_manifest_is_refused_or_another_package(package, forge_bytes):
    """One who also recomputes manifest.sha256 changes what it says, never under the same id."""
    original = open_package(package)
    whole = (package / "manifest.json").read_bytes()
    opened = []
    for position in range(len(whole)):
        for flip in (0x01,):
            altered = bytearray(whole)
            altered[position] ^= flip
            forge_bytes(package, bytes(altered))
            try:
                forged = open_package(package)
            except PackageError:
                continue
            assert forged.id != original.id
            assert forged.manifest != original.manifest
            assert forged.manifest.files == original.manifest.files
            opened.append(position)
    # Only free values can change so: digits, and letters of names and of the configuration.
    assert all(chr(whole[position]).isalnum() or whole[position] in b"._" for position in opened)
    assert 0 < len(opened) < len(whole) / 2


# --- strangers ---------------------------------------------------------------------------------


def test_an_extra_file_is_refused(package):
    for name in ("run.py", "pytorch_model.bin", ".hidden", "tokenizer.json"):
        (package / name).write_bytes(b"x")
        with pytest.raises(PackageError, match="not in the manifest"):
            open_package(package)
        (package / name).unlink()


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sha256", "weights.safetensors", "LICENSE"]
)
def test_a_missing_file_is_refused(package, name):
    (package / name).unlink()
    with pytest.raises(PackageError, match="missing"):
        open_package(package)


@pytest.mark.parametrize(
    "name", ["manifest.json", "manifest.sha256", "weights.safetensors", "LICENSE"]
)
def test_a_symbolic_link_is_refused(package, tmp_path, name, monkeypatch):
    (package / name).rename(tmp_path / "elsewhere")
    (package / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="regular files"):
        open_package(package)
    # Even if it was put there after the names were listed.
    names = {p.name for p in package.iterdir()}
    monkeypatch.setattr(package_module, "_list_names", lambda path: names)
    with pytest.raises(PackageError, match="symbolic link"):
        open_package(package)


def test_a_linked_directory_is_refused(package, tmp_path):
    (tmp_path / "link").symlink_to(package)
    with pytest.raises(PackageError, match="symbolic link"):
        open_package(tmp_path / "link")


def test_pipes_and_subdirectories_are_refused(package, monkeypatch):
    names = {p.name for p in package.iterdir()}
    (package / "LICENSE").unlink()
    os.mkfifo(package / "LICENSE")
    with pytest.raises(PackageError, match="only regular files"):
        open_package(package)
    monkeypatch.setattr(package_module, "_list_names", lambda path: names)
    with pytest.raises(PackageError, match="not a regular file"):
        open_package(package)
    monkeypatch.undo()
    (package / "LICENSE").unlink()
    (package / "LICENSE").mkdir()
    with pytest.raises(PackageError, match="only regular files"):
        open_package(package)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "sub/LICENSE",
        "..",
        "",
        "license",
        "manifest.json",
        "manifest.sha256",
        "weights-00001-of-00001.safetensors",
        "weights-00001-of-00002.safetensors",
        "model.safetensors",
        "adapter_model.bin",
        "config.json",
    ],
)
def test_a_name_outside_the_list_is_refused(package, forge, name, tmp_path):
    (tmp_path / "outside").write_bytes(b"free")

    def add(plain):
        plain["files"][name] = plain["files"]["LICENSE"]

    forge(package, add)
    with pytest.raises(PackageError, match="not a complete set"):
        open_package(package)


@pytest.mark.parametrize("count", [0, 2])
def test_an_incomplete_set_of_shards_is_refused(tmp_path, emulator_manifest, tensors, forge, count):
    path = tmp_path / "e"
    write_package(path, emulator_manifest, tensors, {}, max_shard_bytes=1)
    shards = sorted(p.name for p in path.glob("weights-*"))
    assert len(shards) == 3
    for name in shards[count:]:
        (path / name).unlink()
    plain = json.loads((path / "manifest.json").read_bytes())
    kept = {name: plain["files"][name] for name in shards[:count]}
    (path / "manifest.json").write_text(json.dumps(plain | {"files": kept}))
    forge(path)
    with pytest.raises(PackageError, match="not a complete set"):
        open_package(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, emulator_manifest, tensors, forge):
    path = tmp_path / "e"
    write_package(path, emulator_manifest, tensors, {}, max_shard_bytes=1)
    first, second, _ = sorted(path.glob("weights-*"))
    shutil.copy(first, second)
    forge(path)
    with pytest.raises(PackageError, match="another shard"):
        open_package(path)


def test_tensors_of_all_shards_are_counted(tmp_path, emulator_manifest, tensors, monkeypatch):
    path = tmp_path / "e"
    write_package(path, emulator_manifest, tensors, {}, max_shard_bytes=1)
    monkeypatch.setattr(package_module, "MAX_TENSORS", len(tensors))
    open_package(path)
    monkeypatch.setattr(package_module, "MAX_TENSORS", len(tensors) - 1)
    with pytest.raises(PackageError, match="in all shards"):
        open_package(path)


def test_no_tensor_is_parsed_before_the_hashes_agree(package, monkeypatch):
    whole = (package / "weights.safetensors").read_bytes()
    (package / "weights.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(package_module, "read_header", lambda path: pytest.fail("parsed"))
    with pytest.raises(PackageError, match="altered"):
        open_package(package)


def test_rehashed_weights_must_still_be_sound(package, forge, tensors, expected):
    bad = tensors | {"scale": torch.tensor(float("nan"), dtype=torch.float16)}
    safetensors.torch.save_file(bad, package / "weights.safetensors")
    forge(package)
    with pytest.raises(PackageError, match="scale holds NaN"):
        open_package(package).read_tensors(expected)
    safetensors.torch.save_file({"scale": torch.ones(1).double()}, package / "weights.safetensors")
    forge(package)
    with pytest.raises(PackageError, match="malformed"):
        open_package(package)


def test_large_files_are_refused_before_they_are_read(package, forge, monkeypatch):
    monkeypatch.setattr(package_module, "verify", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(PackageError, match="at most 100 were allowed"):
        open_package(package, max_bytes=100)

    def huge(plain):
        plain["files"]["LICENSE"]["bytes"] = SMALL_FILES["LICENSE"] + 1

    forge(package, huge)
    with pytest.raises(PackageError, match="too large"):
        open_package(package)
    forge(package, lambda plain: plain["files"]["weights.safetensors"].update(bytes=2**62))
    with pytest.raises(PackageError, match="at most"):
        open_package(package)
    with (package / "manifest.json").open("r+b") as handle:
        handle.truncate(2**33)
    with pytest.raises(PackageError, match="at most 1048576"):
        open_package(package)


def test_a_flood_of_files_is_refused(package):
    for i in range(1100):
        (package / f"{i}").touch()
    with pytest.raises(PackageError, match="too many files"):
        open_package(package)


def test_a_future_version_is_refused_with_what_to_do(package, forge):
    forge(package, lambda plain: plain.update(version=2, new_field={}))
    with pytest.raises(PackageError, match=r"version 2; this release .* upgrade blindtune"):
        open_package(package)


def test_files_exchanged_after_opening_are_refused(tmp_path, package, tensors, expected):
    opened = open_package(package)
    (package / "LICENSE").write_bytes(b"evil")
    with pytest.raises(PackageError, match="altered"):
        opened.read_file("LICENSE")
    other = {name: tensor * 2 for name, tensor in tensors.items()}
    safetensors.torch.save_file(other, package / "weights.safetensors")
    with pytest.raises(PackageError, match="altered"):
        opened.read_tensors(expected)
    for name in ("README.md", "weights.safetensors", "../x"):
        with pytest.raises(PackageError, match="expected a file"):
            opened.read_file(name)


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b""}, "allowed are"),
        ({"../LICENSE": b""}, "allowed are"),
        ({"LICENSE": b"x" * (2**20 + 1)}, "allowed are"),
    ],
)
def test_other_files_are_not_written(tmp_path, emulator_manifest, tensors, files, message):
    with pytest.raises(OutputError, match=message):
        write_package(tmp_path / "e", emulator_manifest, tensors, files)
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way_stays(tmp_path, package, emulator_manifest, tensors):
    def write(name, **options):
        return write_package(tmp_path / name, emulator_manifest, tensors, {}, **options)

    before = tree(package)
    with pytest.raises(OutputError, match="something is there"):
        write("emulator")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(package)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/README.md").write_bytes(b"mine")
    for name in ("file", "link", "home"):
        with pytest.raises(OutputError):
            write(name, overwrite=True)
    (package / "notes.txt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write("emulator", overwrite=True)
    (package / "notes.txt").unlink()
    assert tree(package) == before
    identity = write("emulator", overwrite=True)
    assert open_package(package).id == identity
    assert not (package / "LICENSE").exists()
    (tmp_path / "empty").mkdir()
    assert write("empty") == identity
    assert names_in(tmp_path) == ["empty", "emulator", "file", "home", "link"]


class Disk:
    """Lets the first `steps` operations through, then fails once."""

    def __init__(self, monkeypatch, steps, failure):
        self.left, self.failure, self.failed = steps, failure, None
        for owner, name in [
            (Path, "mkdir"), (Path, "open"), (Path, "rename"), (os, "fsync"),
        ]:  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, call):
        def step(*args, **kwargs):
            if self.left == 0:
                self.left, self.failed = -1, name
                raise self.failure
            self.left -= 1
            result = call(*args, **kwargs)
            if name == "open":
                return FullFile(result, self.wrap("write", result.write))
            return result

        return step


class FullFile:
    def __init__(self, raw, write):
        self.raw, self.write = raw, write

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()


def assert_helps(error, failure):
    assert failure.strerror in str(error)
    assert ("free some space" in str(error)) == (failure.errno == errno.ENOSPC)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "I/O"),
        KeyboardInterrupt(),
    ],
    ids=["full", "broken", "interrupted"],
)
def test_a_failure_at_any_step_leaves_what_was(
    tmp_path, monkeypatch, emulator_manifest, tensors, overwrite, failure
):
    target = tmp_path / "here/emulator"
    if overwrite:
        old = write_package(target, emulator_manifest, tensors, {"LICENSE": b"old"})
    else:
        target.parent.mkdir()
    failed = []
    for steps in range(100):
        with monkeypatch.context() as patch:
            disk = Disk(patch, steps, failure)
            try:
                new = write_package(
                    target, emulator_manifest, tensors, {}, overwrite=True, max_shard_bytes=8
                )
                break
            except OutputError as error:
                assert_helps(error, failure)
            except KeyboardInterrupt:
                pass
        assert disk.failed is not None
        failed.append(disk.failed)
        assert names_in(target.parent) == (["emulator"] if overwrite else [])
        if overwrite:
            assert open_package(target).id == old
    assert open_package(target).id == new
    assert names_in(target.parent) == ["emulator"]
    assert {"mkdir", "open", "write", "fsync", "rename"} == set(failed)
    assert failed.count("rename") == 1 + 2 * overwrite
    assert failed.count("fsync") == 2 * 4 + 2  # as they are written, and all of them in the end


def test_the_kernel_stops_a_write(tmp_path, emulator_manifest, tensors):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(OutputError, match="file size limit"):
            write_package(tmp_path / "e", emulator_manifest, tensors, {"LICENSE": b"x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path):
    script = """
        import os, signal, sys, torch
        from blindtune.exchange.packages.manifest import AdapterManifest
        from blindtune.exchange.packages.writing import write_package
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        manifest = AdapterManifest(
            emulator="sha256:" + "0" * 64, model="5f" * 32, kind="full", model_type="x",
            dtype="float32", adapter_layers=1, layers=2, lora=None,
        )
        write_package(sys.argv[1], manifest, {"a": torch.ones(3)}, {})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "adapter")], check=False
    )
    assert done.returncode == -9
    left, lock = sorted(path.name for path in tmp_path.iterdir())
    assert re.fullmatch(r"\.adapter\.[0-9a-f]{8}\.partial", left)
    assert lock == ".adapter.lock"


# --- the written format ------------------------------------------------------------------------


def spec():
    return (ROOT / "docs/package-format.md").read_text()


def test_the_limits_in_the_spec_are_those_of_the_code():
    stated = dict(re.findall(r"^\| `(MAX_[A-Z_]+)` \|.*\| ([0-9,]+) \|$", spec(), re.MULTILINE))
    found = {
        name: f"{value:,}"
        for module in (
            manifest_module,
            tensors_module,
            package_module,
            writing_module,
            signing_module,
        )
        for name, value in vars(module).items()
        if name.startswith("MAX_") and isinstance(value, int)
    }
    assert stated == found
    small = dict(re.findall(r"^\| `([A-Za-z_.]+)` \|.*\| ([0-9,]+) \|$", spec(), re.MULTILINE))
    assert {name: small[name] for name in SMALL_FILES} == {
        name: f"{limit:,}" for name, limit in SMALL_FILES.items()
    }
    for key in manifest_module.FORBIDDEN_CONFIG_KEYS:
        assert f"`{key}`" in spec()


def test_the_examples_in_the_spec_are_manifests():
    examples = re.findall(r"```json\n(.*?)```", spec(), re.DOTALL)
    manifests = [
        decode_manifest(
            json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode()
        )
        for text in examples
    ]
    assert [m.format for m in manifests] == [
        "blindtune-emulator", "blindtune-adapter", "blindtune-bottom"
    ]  # fmt: skip
    for manifest in manifests:
        for field in manifest.__struct_fields__:
            assert f"`{field}`" in spec()


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("v1-emulator", "sha256:3baebff21434241f8c4420efebbcb2340e84bc47e2c7b7dbe777e9f26c7013b2"),
        ("v1-adapter", "sha256:9e46ccbf0ad0961bbacb15a6dea15c1361bbc118339d069e85d91c7bfbd769ba"),
    ],
)
def test_packages_of_every_released_version_open(name, identity):
    package = open_package(RELEASED / name)
    assert package.id == identity
    expected = {tensor: (facts.shape, facts.dtype) for tensor, facts in package.header.items()}
    for tensor in package.read_tensors(expected).values():
        assert torch.equal(tensor.flatten().float(), torch.arange(tensor.numel()).float())
    assert package.read_file("LICENSE") == b"free\n"
