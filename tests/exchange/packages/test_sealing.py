"""Sealed packages: for one reader, whole, and from nobody else than their signer."""

import io
import resource
import tarfile

import pyrage
import pytest

from blindtune.errors import ConfigError, OutputError, PackageError, PolicyError
from blindtune.exchange.packages import sealing
from blindtune.exchange.packages.keys import new_private_key
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.sealing import MAX_RECIPIENTS, seal, unseal
from blindtune.exchange.packages.signing import Signer, Trust
from blindtune.exchange.packages.writing import write_package

FRIEND, STRANGER = new_private_key(), new_private_key()


@pytest.fixture
def signed(tmp_path, emulator_manifest, tensors):
    """A package signed by FRIEND."""
    files = {"LICENSE": b"free", "README.md": b"r" * 3000}
    signer = Signer(key=FRIEND)
    write_package(
        tmp_path / "e", emulator_manifest, tensors, files, max_shard_bytes=8, signer=signer
    )
    return tmp_path / "e"


@pytest.fixture
def pack(tmp_path):
    """pack(members): any tar archive, sealed to FRIEND as a stranger could."""

    def _pack(*members, format=tarfile.USTAR_FORMAT, end=True):
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w", format=format) as archive:
            for member, content in members:
                archive.addfile(member, io.BytesIO(content))
        data = plain.getvalue()[: plain.getbuffer().nbytes if end is True else end]
        key = pyrage.x25519.Recipient.from_str(FRIEND.public.receiving_key)
        path = tmp_path / "hostile.age"
        # tarfile pads to 10,240 bytes, `seal` does not.
        whole = data.rstrip(b"\0") if end is True else data
        whole += bytes(-len(whole) % 512 + 1024) if end is True else b""
        path.write_bytes(pyrage.encrypt(whole, [key]))
        return path

    return _pack


def member(name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def test_what_is_sealed_is_unsealed(tmp_path, signed):
    identity = seal(signed, tmp_path / "e.age", [FRIEND.public])
    trust = Trust(signers={"friend": FRIEND.public})
    found, signature = unseal(tmp_path / "e.age", tmp_path / "out", FRIEND, trust=trust)
    assert found == identity == open_package(signed).id
    assert signature.name == "friend"
    before = {p.name: p.read_bytes() for p in signed.iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    for content in before.values():
        assert content[:40] not in (tmp_path / "e.age").read_bytes()


def test_other_tools_open_it(tmp_path, signed):
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    identity = pyrage.x25519.Identity.from_str(FRIEND.receiving_secret)
    plain = pyrage.decrypt((tmp_path / "e.age").read_bytes(), [identity])
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        assert set(archive.getnames()) == {p.name for p in signed.iterdir()}


def test_nobody_else_opens_it(tmp_path, signed):
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    with pytest.raises(PolicyError, match="sealed for somebody else"):
        unseal(tmp_path / "e.age", tmp_path / "out", STRANGER)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "e.age"]
    seal(signed, tmp_path / "both.age", [FRIEND.public, STRANGER.public])
    for key in (FRIEND, STRANGER):
        unseal(tmp_path / "both.age", tmp_path / "out", key, overwrite=True)


def test_the_package_inside_must_be_trusted(tmp_path, signed):
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    with pytest.raises(PolicyError, match="do not trust"):
        unseal(tmp_path / "e.age", tmp_path / "out", FRIEND, trust=Trust(signers={}))
    assert not (tmp_path / "out").exists()


def test_every_altered_or_missing_byte_is_refused(tmp_path, package):
    seal(package, tmp_path / "e.age", [FRIEND.public])
    whole = (tmp_path / "e.age").read_bytes()
    step = max(1, len(whole) // 300)
    for position in range(0, len(whole), step):
        altered = bytearray(whole)
        altered[position] ^= 1
        for data in (altered, whole[:position]):
            (tmp_path / "x.age").write_bytes(data)
            with pytest.raises((PackageError, PolicyError)):
                unseal(tmp_path / "x.age", tmp_path / "out", FRIEND)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "hostile",
    [
        [member("../outside")],
        [member("/etc/passwd")],
        [member("run.py")],
        [member("LICENSE"), member("LICENSE")],
        [member("LICENSE", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [member("LICENSE", b"", type=tarfile.LNKTYPE, linkname="manifest.json")],
        [member("LICENSE", b"", type=tarfile.DIRTYPE)],
        [member("LICENSE", b"", type=tarfile.CHRTYPE)],
        [member("LICENSE", mode=0o777)],
        [member("LICENSE", uid=1000)],
        [member("LICENSE", mtime=1)],
        [],
        [member("LICENSE")],
    ],
    ids=range(13),
)
def test_an_archive_of_anything_else_is_refused(tmp_path, pack, hostile):
    with pytest.raises(PackageError) as caught:
        unseal(pack(*hostile), tmp_path / "out", FRIEND)
    assert str(caught.value).isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hostile.age"]


def test_long_names_of_other_formats_are_refused(tmp_path, pack):
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(PackageError):
            unseal(pack(member("a/" * 200), format=format), tmp_path / "out", FRIEND)


def test_an_archive_without_an_end_is_refused(tmp_path, pack):
    with pytest.raises(PackageError, match="no end"):
        unseal(pack(member("LICENSE"), end=1024), tmp_path / "out", FRIEND)


def test_a_declared_size_is_not_believed(tmp_path, pack, signed):
    info, _ = member("weights.safetensors")
    huge = tarfile.TarInfo("weights.safetensors")
    huge.size = 8**11 - 1
    path = pack((info, b"x"))
    key = pyrage.x25519.Recipient.from_str(FRIEND.public.receiving_key)
    path.write_bytes(pyrage.encrypt(huge.tobuf(tarfile.USTAR_FORMAT) + b"x" * 100, [key]))
    with pytest.raises(PackageError, match="no end"):
        unseal(path, tmp_path / "out", FRIEND)
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    with pytest.raises(PackageError, match="larger than allowed"):
        unseal(tmp_path / "e.age", tmp_path / "out", FRIEND, max_bytes=1000)


def test_bytes_after_the_end_are_refused(tmp_path, signed):
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    identity = pyrage.x25519.Identity.from_str(FRIEND.receiving_secret)
    key = pyrage.x25519.Recipient.from_str(FRIEND.public.receiving_key)
    plain = pyrage.decrypt((tmp_path / "e.age").read_bytes(), [identity])
    for more in (b"\0", bytes(512), b"x"):
        (tmp_path / "x.age").write_bytes(pyrage.encrypt(plain + more, [key]))
        with pytest.raises(PackageError, match="where an archive has none"):
            unseal(tmp_path / "x.age", tmp_path / "out", FRIEND)


def test_an_endless_header_is_refused_before_it_is_read(tmp_path, signed, monkeypatch):
    """age would read it again for every part: a few hundred kilobytes take minutes."""
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    first, rest = (tmp_path / "e.age").read_bytes().split(b"\n", 1)
    hostile = tmp_path / "hostile.age"
    monkeypatch.setattr(pyrage, "decrypt_io", None)
    for stanza, times in ((b"-> X25519 a\n\n", MAX_RECIPIENTS + 1), (b"-> " + b"a" * 70_000, 1)):
        hostile.write_bytes(first + b"\n" + stanza * times + rest)
        with pytest.raises(PackageError, match="expected a header of at most"):
            unseal(hostile, tmp_path / "out", FRIEND)
    hostile.write_bytes(b"anything else")
    with pytest.raises(PackageError, match="no sealed file"):
        unseal(hostile, tmp_path / "out", FRIEND)
    with pytest.raises(ConfigError, match="got 257"):
        seal(signed, tmp_path / "f.age", [FRIEND.public] * (MAX_RECIPIENTS + 1))


def test_what_is_in_the_way_stays(tmp_path, package):
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(OutputError, match="something is there"):
        seal(package, tmp_path / "mine", [FRIEND.public])
    with pytest.raises(ConfigError, match="1 to 256 recipients, got 0"):
        seal(package, tmp_path / "new", [])
    assert (tmp_path / "mine").read_bytes() == b"mine"
    seal(package, tmp_path / "mine", [FRIEND.public], overwrite=True)
    with pytest.raises(OutputError):
        unseal(tmp_path / "mine", package, FRIEND)
    before = (package / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="apart from what is read"):
        seal(package, package / "manifest.json", [FRIEND.public], overwrite=True)
    assert (package / "manifest.json").read_bytes() == before


def test_only_a_package_is_overwritten(tmp_path, signed):
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    extension = tmp_path / "extension"
    extension.mkdir()
    (extension / "manifest.json").write_text('{"manifest_version": 3}')
    (extension / "content.js").write_text("mine")
    before = {path: path.read_bytes() for path in extension.iterdir()}
    with pytest.raises(OutputError, match=r"content\.js"):
        unseal(tmp_path / "e.age", extension, FRIEND, overwrite=True)
    with pytest.raises(OutputError, match="--overwrite"):
        unseal(tmp_path / "e.age", signed, FRIEND)
    assert {path: path.read_bytes() for path in extension.iterdir()} == before
    unseal(tmp_path / "e.age", signed, FRIEND, overwrite=True)


@pytest.fixture
def small_files():
    """While it lasts, no file grows beyond 2,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_not_the_other_partys_fault(tmp_path, signed, request):
    seal(signed, tmp_path / "e.age", [FRIEND.public])
    request.getfixturevalue("small_files")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="file size limit"):
        seal(signed, tmp_path / "other.age", [FRIEND.public])
    with pytest.raises(OutputError, match="file size limit"):
        unseal(tmp_path / "e.age", tmp_path / "out", FRIEND)
    assert sorted(tmp_path.iterdir()) == before


def test_a_package_that_changes_while_it_is_sealed(tmp_path, signed, monkeypatch):
    def cut(handle, count, path):
        raise PackageError(f"{path}: it is shorter than it was")

    monkeypatch.setattr(sealing, "read_exactly", cut)
    with pytest.raises(PackageError, match="shorter than it was"):
        seal(signed, tmp_path / "e.age", [FRIEND.public])
