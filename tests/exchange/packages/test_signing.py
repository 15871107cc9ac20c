"""Signatures: what is not signed by a trusted key is not even parsed."""

import json
import shutil
import stat

import pytest
from msgspec.structs import replace

from blindtune.errors import ConfigError, MismatchError, PackageError, PolicyError
from blindtune.exchange.packages import package as package_module
from blindtune.exchange.packages.keyring import (
    HOME_VARIABLE,
    Keyring,
    default_home,
    read_public_key,
)
from blindtune.exchange.packages.keys import (
    PrivateKey,
    PublicKey,
    decode_private_key,
    decode_public_key,
    new_private_key,
)
from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.signing import SIGNATURE_NAME, Signer, Trust
from blindtune.exchange.packages.writing import write_package


def nothing():
    raise AssertionError("asked for a passphrase")


@pytest.fixture
def owner(tmp_path):
    """The keyring of one who signs."""
    keyring = Keyring(tmp_path / "owner")
    keyring.new()
    return keyring


@pytest.fixture
def reader(tmp_path, owner):
    """The keyring of one who trusts the owner."""
    keyring = Keyring(tmp_path / "reader")
    keyring.trust_signer("owner", owner.public())
    return keyring


@pytest.fixture
def write(tmp_path, owner, emulator_manifest, tensors):
    """write(name, **fields): an emulator package signed by the owner."""

    def _write(name, signer=None, **fields):
        manifest = replace(emulator_manifest, **fields)
        signer = signer or owner.signer(nothing)
        write_package(tmp_path / name, manifest, tensors, {}, signer=signer)
        return tmp_path / name

    return _write


def test_a_signed_package_is_opened_and_its_signer_named(write, owner, reader):
    signature = open_package(write("e"), "emulator", trust=reader.trust()).signature
    assert signature.name == "owner"
    assert signature.key == owner.public()
    assert signature.serial == 1
    assert str(signature) == f"owner ({owner.public().fingerprint})"


def test_one_trusts_oneself(write, owner):
    assert open_package(write("e"), trust=owner.trust()).signature.name == "you"


def test_without_trust_a_signature_is_checked_all_the_same(write):
    path = write("e")
    assert open_package(path).signature.name is None
    plain = json.loads((path / SIGNATURE_NAME).read_bytes())
    plain["serial"] += 1
    (path / SIGNATURE_NAME).write_bytes(
        json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    )
    with pytest.raises(PackageError, match="not a signature of this package"):
        open_package(path)


def test_the_unsigned_and_the_untrusted_are_refused_before_parsing(
    package, write, reader, monkeypatch
):
    stranger = write("s", Signer(key=new_private_key()))
    monkeypatch.setattr(package_module, "decode_manifest", lambda data: pytest.fail("parsed"))
    with pytest.raises(PolicyError, match=r"nobody signed it.*--allow-unsigned"):
        open_package(package, trust=reader.trust())
    with pytest.raises(PolicyError, match=r"do not trust, fingerprint [\d ]{47}: compare"):
        open_package(stranger, trust=reader.trust())
    monkeypatch.undo()
    lenient = reader.trust(allow_unsigned=True)
    assert open_package(package, trust=lenient).signature is None
    assert open_package(stranger, trust=lenient).signature.name is None


def test_a_signature_fits_no_other_package(write, reader):
    first, second = write("a"), write("b", max_length=9)
    shutil.copy(first / SIGNATURE_NAME, second / SIGNATURE_NAME)
    with pytest.raises(PackageError, match="not a signature of this package"):
        open_package(second, trust=reader.trust(allow_unsigned=True))


def test_a_package_is_no_other_kind(write, tmp_path, owner, reader, adapter_manifest, tensors):
    path = write("a")
    with pytest.raises(MismatchError, match="expected an adapter package"):
        open_package(path, "adapter", trust=reader.trust())
    # Even a signer who states another kind than the manifest does is refused.
    signer = owner.signer(nothing)

    class Confused:
        def sign(self, manifest, manifest_bytes):
            return signer.sign(adapter_manifest, manifest_bytes)

    with pytest.raises(PackageError, match="signed as a blindtune-adapter"):
        open_package(write("b", Confused()), trust=reader.trust())


def test_every_bit_of_a_signed_package_counts(write, reader):
    path, checked = write("e"), 0
    trust = reader.trust(remember=False)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        altered = bytearray(whole)
        for bit in range(8 * len(whole)):
            altered[bit // 8] ^= 1 << bit % 8
            file.write_bytes(altered)
            with pytest.raises((PackageError, PolicyError)):
                open_package(path, trust=trust)
            altered[bit // 8] ^= 1 << bit % 8
            checked += 1
        file.write_bytes(whole)
    assert checked > 10_000
    open_package(path, trust=trust)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"serial":1', b'"serial":1,"serial":1'),
        (b'"serial":1', b'"serial":1.0'),
        (b'"serial":1', b'"serial":0'),
        (b'"serial":1', b'"serial":-1'),
        (b'"serial":1', b'"serial":1,"x":1'),
        (b'"serial":1', b'"serial": 1'),
        (b'"serial":1', b'"serial":' + b"9" * 3000),
        (b'"serial":1', b'"serial":' + b"[" * 3000),
        (b'"version":1', b'"version":2'),
        (b"{", b"\xff{"),
        (b"}", b"}" + b" " * 5000),
        (b"age1", b"age1../"),
    ],
)
def test_another_spelling_is_refused(write, old, new):
    path = write("e") / SIGNATURE_NAME
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(PackageError) as caught:
        open_package(path.parent)
    assert str(caught.value).isprintable()


# --- rollback ---------------------------------------------------------------------------------


def test_an_old_package_under_a_new_name_is_refused(write, tmp_path, reader):
    old, new = write("old"), write("new", max_length=9)
    assert open_package(old, trust=reader.trust()).signature.serial == 1
    assert open_package(new, trust=reader.trust()).signature.serial == 2
    open_package(new, trust=reader.trust())  # the newest one opens again and again
    shutil.copytree(old, tmp_path / "newest")
    with pytest.raises(PolicyError, match=r"number 1 of owner .* number 2 .*--allow-older"):
        open_package(tmp_path / "newest", trust=reader.trust())
    open_package(old, trust=reader.trust(allow_older=True))
    with pytest.raises(PolicyError, match="number 2"):  # being allowed once forgets nothing
        open_package(old, trust=reader.trust())


def test_serial_numbers_count_one_subject(write, reader, adapter_manifest, tensors, owner):
    assert open_package(write("a")).signature.serial == 1
    assert open_package(write("b", model="77" * 32)).signature.serial == 1
    assert open_package(write("c", max_length=9)).signature.serial == 2
    assert open_package(write("again", max_length=9)).signature.serial == 2


def test_the_same_package_is_signed_with_the_same_bytes(write):
    first, second = write("a"), write("b")
    assert (first / SIGNATURE_NAME).read_bytes() == (second / SIGNATURE_NAME).read_bytes()


def test_two_packages_of_one_number_are_not_exchanged(write, reader, owner):
    forgetful = Signer(key=owner.private(nothing))
    open_package(write("a", forgetful), trust=reader.trust())
    with pytest.raises(PolicyError, match="number 1"):
        open_package(write("b", forgetful, max_length=9), trust=reader.trust())


# --- keys -------------------------------------------------------------------------------------


def test_private_keys_are_for_their_owner_alone(owner):
    assert stat.S_IMODE(owner.private_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(owner.directory.stat().st_mode) == 0o700
    owner.private_path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode is 640"):
        owner.private(nothing)


def test_a_key_is_not_replaced(owner):
    before = owner.public()
    with pytest.raises(ConfigError, match="you have a key"):
        owner.new()
    assert owner.public() == before


def test_a_passphrase_is_needed_and_must_be_right(tmp_path):
    keyring = Keyring(tmp_path / "k")
    public = keyring.new("open sesame")
    assert b"signing_key" not in keyring.private_path.read_bytes()
    assert keyring.private(lambda: "open sesame").public == public == keyring.public()
    with pytest.raises(PolicyError, match="passphrase does not open"):
        keyring.private(lambda: "open barley")


def test_nothing_prints_a_secret(owner):
    key = owner.private(nothing)
    for text in (repr(key), str(key), f"{owner.signer(nothing)}"):
        assert key.signing_seed not in text
        assert key.receiving_secret not in text
    with pytest.raises(ConfigError) as caught:
        decode_private_key(owner.private_path.read_bytes().replace(b'"version":1', b'"version":2'))
    assert key.signing_seed not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_fingerprint_is_of_both_keys_and_can_be_read_aloud():
    first, second = new_private_key(), new_private_key()
    mixed = PrivateKey(
        signing_seed=first.signing_seed, receiving_secret=second.receiving_secret
    ).public
    prints = [first.public.fingerprint, second.public.fingerprint, mixed.fingerprint]
    assert len(set(prints)) == 3
    assert all(len(p.split()) == 8 and p.replace(" ", "").isdigit() for p in prints)
    fixed = PrivateKey(signing_seed="01" * 32, receiving_secret=first.receiving_secret).public
    assert fixed.signing_key == "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c"


def test_public_keys_have_one_spelling(owner, tmp_path):
    data = owner.public().encode()
    assert decode_public_key(data) == owner.public()
    for other in (b" " + data, data[:-1], data + b"\n", data.replace(b":1", b": 1"), b"", b"{}"):
        with pytest.raises(PackageError):
            decode_public_key(other)
    (tmp_path / "owner.pub").write_bytes(data)
    assert read_public_key(tmp_path / "owner.pub") == owner.public()


def test_the_key_of_a_package_is_its_signer(write, package, owner):
    assert read_public_key(write("e")) == owner.public()
    with pytest.raises(PackageError, match="nobody signed"):
        read_public_key(package)


def test_signers_are_kept_by_name(owner, reader):
    other = new_private_key().public
    with pytest.raises(ConfigError, match="is another key"):
        reader.trust_signer("owner", other)
    for name in ("you", "../x", "", ".x", "a/b", "x" * 65, "a\n"):
        with pytest.raises(ConfigError, match="expected a name"):
            reader.trust_signer(name, other)
    reader.trust_signer("other", other)
    assert reader.signers() == {"other": other, "owner": owner.public()}
    assert reader.forget_signer("other") == other
    assert list(reader.signers()) == ["owner"]
    with pytest.raises(ConfigError, match=r"\(owner\), got `other`"):
        reader.forget_signer("other")


def test_a_key_that_nothing_can_be_sealed_to_is_not_trusted(reader):
    """A package's signature may bring one: its spelling is right, its check sum is not."""
    signing_key = new_private_key().public.signing_key
    damaged = PublicKey(signing_key=signing_key, receiving_key="age1" + "q" * 58)
    with pytest.raises(PackageError, match="a damaged one"):
        reader.trust_signer("other", damaged)
    assert list(reader.signers()) == ["owner"]
    (reader.directory / "signers" / "other.key").write_bytes(damaged.encode())
    with pytest.raises(ConfigError, match="keys forget other"):
        reader.trust()


def test_a_forgotten_signer_is_refused(write, reader):
    path = write("e")
    open_package(path, trust=reader.trust())
    reader.forget_signer("owner")
    with pytest.raises(PolicyError, match="do not trust"):
        open_package(path, trust=reader.trust())


def test_an_empty_keyring_trusts_nobody(write, tmp_path):
    empty = Keyring(tmp_path / "none")
    assert empty.public() is None
    assert empty.signer(nothing) is None
    assert empty.trust() == Trust(signers={}, memory=empty, own_name="you")
    with pytest.raises(PolicyError):
        open_package(write("e"), trust=empty.trust())
    assert not empty.directory.exists()


def test_where_the_keyring_is(monkeypatch, tmp_path):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "x"))
    assert default_home() == tmp_path / "x"
    monkeypatch.delenv(HOME_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert default_home() == tmp_path / "blindtune"


def test_a_key_that_nothing_can_be_sealed_to_is_refused(owner):
    data = owner.public().encode()
    receiving = owner.public().receiving_key.encode()
    damaged = receiving[:-1] + (b"q" if receiving[-1:] != b"q" else b"p")
    with pytest.raises(PackageError, match="a damaged one"):
        decode_public_key(data.replace(receiving, damaged))
