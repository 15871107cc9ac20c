"""Signed by default, verified by default, and the short path of two newcomers."""

import stat

import pytest
from command_line import TUNE_OPTIONS

from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.writing import write_package


@pytest.fixture
def home(tmp_path, monkeypatch):
    """home(name): be somebody else, with a keyring of their own."""

    def _be(name):
        monkeypatch.setenv("BLINDTUNE_HOME", str(tmp_path / "homes" / name))
        return tmp_path / "homes" / name

    return _be


@pytest.fixture
def fingerprint(blindtune):
    return lambda: blindtune("keys", "show", "--json").facts["fingerprint"]


def test_what_a_party_writes_is_signed_and_opened_by_itself(made, blindtune):
    for name in ("emulator", "adapter"):
        facts = blindtune("inspect", made / name, "--json").facts
        assert facts["trusted"]
        assert facts["signed_by"].startswith("you (")
    done = blindtune("inspect", made / "emulator")
    assert "signed by" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "emulator", "--data", "private.jsonl", "--out", "new"],
        ["plug-in", "llama", "adapter", "--out", "new"],
        ["evaluate", "emulator", "--data", "private.jsonl"],
        ["audit", "emulator", "--model", "llama", "--public", "public.txt", "--test", "public.txt",
         "--out", "new"],
        ["audit", "adapter", "--model", "emulator", "--data", "private.jsonl", "--out", "new",
         "--max-length", "64"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_a_dry_run_opens_no_package_that_nobody_trusts(
    made, blindtune, home, monkeypatch, arguments
):
    home("somebody else")
    monkeypatch.chdir(made)
    done = blindtune(*arguments, "--dry-run")
    assert done.code == 4, done.err
    assert "blindtune keys trust" in done.err
    assert blindtune(*arguments, "--dry-run", "--allow-unsigned").code == 0


def test_two_newcomers(made, blindtune, home, fingerprint, tmp_path):
    owner = tmp_path / "e"
    home("owner")
    done = blindtune("emulate", made / "study", "--out", owner)
    assert (done.code, "A key was made for you" in done.err) == (0, True)
    spoken = fingerprint()
    place = home("data-owner")
    tune = ["tune", owner, "--data", made / "private.jsonl", "--out", tmp_path / "a", *TUNE_OPTIONS]
    done = blindtune(*tune)
    assert done.code == 4
    assert f"fingerprint {spoken}" in done.err
    assert "blindtune keys trust NAME" in done.err
    assert not (tmp_path / "a").exists()
    told = blindtune("inspect", owner, "--json").facts
    assert (told["trusted"], spoken in told["signed_by"]) == (False, True)
    done = blindtune("keys", "trust", "owner", owner)
    assert (done.code, "--fingerprint" in done.err) == (2, True)
    done = blindtune("keys", "trust", "owner", owner, "--fingerprint", "0" * 40)
    assert (done.code, "not the one" in done.err) == (4, True)
    assert blindtune("keys", "trust", "owner", owner, "--fingerprint", spoken).code == 0
    facts = blindtune(*tune, "--json").facts
    assert facts["emulator_signed_by"] == f"owner ({spoken})"
    mine = fingerprint()
    assert stat.S_IMODE((place / "private.key").stat().st_mode) == 0o600

    # The adapter goes back sealed.
    done = blindtune("seal", tmp_path / "a", tmp_path / "a.age", "--to", "owner")
    assert done.code == 0, done.err
    assert blindtune("unseal", tmp_path / "a.age", tmp_path / "x").code == 4
    home("owner")
    done = blindtune("unseal", tmp_path / "a.age", tmp_path / "back")
    assert (done.code, "do not trust" in done.err) == (4, True)
    assert not (tmp_path / "back").exists()
    (tmp_path / "mate.pub").write_bytes((place / "public.key").read_bytes())
    trust = ["keys", "trust", "mate", tmp_path / "mate.pub", "--fingerprint", mine]
    assert blindtune(*trust).code == 0
    facts = blindtune("unseal", tmp_path / "a.age", tmp_path / "back", "--json").facts
    assert facts["signed_by"] == f"mate ({mine})"
    again = ["unseal", tmp_path / "a.age", tmp_path / "back"]
    done = blindtune(*again)
    assert (done.code, "--overwrite" in done.err) == (2, True)
    assert blindtune(*again, "--overwrite").code == 0
    done = blindtune("unseal", tmp_path / "none.age", tmp_path / "y")
    assert (done.code, "check the path" in done.err) == (2, True)
    done = blindtune("plug-in", made / "llama", tmp_path / "back", "--out", tmp_path / "t")
    assert (done.code, f"mate ({mine})" in done.out) == (0, True)


def test_the_unsigned_is_refused_unless_it_is_said(made, blindtune, tmp_path):
    out = tmp_path / "e"
    done = blindtune("emulate", made / "study", "--out", out, "--unsigned")
    assert (done.code, "nobody (--unsigned)" in done.out) == (0, True)
    assert not (out / "signature.json").exists()
    arguments = ["evaluate", out, "--data", made / "public.txt", "--max-tokens", 64]
    done = blindtune(*arguments)
    assert (done.code, "--allow-unsigned" in done.err) == (4, True)
    assert blindtune(*arguments, "--allow-unsigned").code == 0
    tune = ["tune", out, "--data", made / "private.jsonl", "--out", tmp_path / "a", *TUNE_OPTIONS]
    done = blindtune(*tune, "--allow-unsigned")
    assert "NOBODY: unsigned, taken as it is (--allow-unsigned)" in done.out


def test_an_old_emulator_is_refused(made, blindtune, home, fingerprint, tmp_path):
    home("owner")
    old, new = tmp_path / "old", tmp_path / "new"
    assert blindtune("emulate", made / "study", "--out", old).code == 0
    assert blindtune("emulate", made / "study", "--out", new, "--alpha", 0.0).code == 0
    spoken = fingerprint()
    home("data-owner")
    assert blindtune("keys", "trust", "owner", old, "--fingerprint", spoken).code == 0
    options = ["--data", made / "public.txt", "--max-tokens", 64]
    assert blindtune("evaluate", new, *options).code == 0
    done = blindtune("evaluate", old, *options)
    assert (done.code, "--allow-older" in done.err) == (4, True)
    assert blindtune("evaluate", old, *options, "--allow-older").code == 0
    home("owner")  # one may open one's own packages in any order
    for path in (new, old):
        assert blindtune("evaluate", path, *options).code == 0


def test_a_passphrase_comes_from_the_environment(blindtune, home, monkeypatch, made, tmp_path):
    place = home("careful")
    monkeypatch.setenv("BLINDTUNE_PASSPHRASE", "open sesame")
    assert blindtune("keys", "new", "--passphrase").code == 0
    assert b"signing_key" not in (place / "private.key").read_bytes()
    arguments = ["emulate", made / "study", "--out", tmp_path / "e"]
    monkeypatch.setenv("BLINDTUNE_PASSPHRASE", "open barley")
    done = blindtune(*arguments)
    assert (done.code, "passphrase does not open" in done.err) == (4, True)
    monkeypatch.delenv("BLINDTUNE_PASSPHRASE")
    done = blindtune(*arguments)
    assert (done.code, "BLINDTUNE_PASSPHRASE" in done.err) == (2, True)
    assert not (tmp_path / "e").exists()
    monkeypatch.setenv("BLINDTUNE_PASSPHRASE", "open sesame")
    assert blindtune(*arguments).code == 0


def test_the_keyring_is_shown_and_changed(blindtune, home, tmp_path, fingerprint):
    home("one")
    assert blindtune("keys", "show").code == 2
    assert blindtune("keys", "list", "--json").facts["own"] is None
    assert blindtune("keys", "new").code == 0
    assert blindtune("keys", "new").code == 2
    spoken = fingerprint()
    (tmp_path / "thesis").write_text("mine")
    done = blindtune("keys", "show", "--save", tmp_path / "thesis")
    assert (done.code, "thesis: expected a new file" in done.err) == (2, True)
    assert (tmp_path / "thesis").read_text() == "mine"
    for _ in range(2):
        assert blindtune("keys", "show", "--save", tmp_path / "one.pub").code == 0
    home("two")
    given = ["--fingerprint", spoken.replace(" ", "-")]
    assert blindtune("keys", "trust", "one", tmp_path / "one.pub", *given).code == 0
    listed = blindtune("keys", "list", "--json").facts
    assert listed["signers"] == {"one": spoken}
    assert spoken in blindtune("keys", "list").out
    assert blindtune("keys", "forget", "one").code == 0
    assert blindtune("keys", "list", "--json").facts["signers"] == {}
    assert blindtune("keys", "forget", "one").code == 2
    (tmp_path / "bad.pub").write_bytes(b"{}")
    assert blindtune("keys", "trust", "x", tmp_path / "bad.pub", "--fingerprint", "1").code == 3
    assert blindtune("seal", tmp_path, tmp_path / "x", "--to", "nobody").code == 2


def test_a_dry_run_of_plug_in_measures(made, blindtune, tmp_path):
    arguments = ["plug-in", made / "llama", made / "adapter", "--out", tmp_path / "x"]
    found = blindtune(*arguments, "--data", made / "public.txt", "--dry-run", "--json").facts
    findings = found["estimate"]["findings"]
    assert findings["verdict"] == "within bounds"
    assert "->" in findings["loss on public text"]
    assert any("of its spectrum" in text for text in findings.values())
    assert not (tmp_path / "x").exists()


def test_a_harmful_adapter_is_refused(made, blindtune, tmp_path):
    package = open_package(made / "adapter", "adapter")
    expected = {n: (facts.shape, facts.dtype) for n, facts in package.header.items()}
    tensors = {n: -t if t.ndim > 1 else t for n, t in package.read_tensors(expected).items()}
    write_package(tmp_path / "poison", package.manifest, tensors, {})
    arguments = ["plug-in", made / "llama", tmp_path / "poison", "--out", tmp_path / "x"]
    done = blindtune(*arguments)
    assert (done.code, "nobody signed it" in done.err) == (4, True)
    done = blindtune(*arguments, "--allow-unsigned")
    assert (done.code, "--accept-large-change" in done.err) == (4, True)
    assert not (tmp_path / "x").exists()
    dry = blindtune(*arguments, "--allow-unsigned", "--dry-run", "--json").facts
    assert "would move" in dry["estimate"]["findings"]["verdict"]
    done = blindtune(*arguments, "--allow-unsigned", "--accept-large-change")
    assert (done.code, "NOBODY" in done.out) == (0, True)


def test_what_inspect_told_of_trust_is_told_anew(made, blindtune, home, fingerprint, tmp_path):
    home("owner")
    assert blindtune("emulate", made / "study", "--out", tmp_path / "e").code == 0
    trust = ["keys", "trust", "owner", tmp_path / "e", "--fingerprint", fingerprint()]
    home("data-owner")
    asked = ["inspect", tmp_path / "e", "--out", tmp_path / "told.json"]
    assert blindtune(*asked, "--json").facts["trusted"] is False
    assert blindtune(*trust).code == 0
    done = blindtune(*asked)
    assert (done.code, "an earlier output of inspect is there" in done.err) == (2, True)
    assert blindtune(*asked, "--overwrite", "--json").facts["trusted"] is True
