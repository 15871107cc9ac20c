"""`blindtune audit` as both owners use it."""

import hashlib
import json
import shutil

import pytest

from blindtune.cli.audit import VERB
from blindtune.cli.audit_acts import AUDITS, OPTIONS, PRIVACY
from blindtune.exchange.packages.package import package_kind

QUICK = ["--max-length", "32", "--test-tokens", "256", "--healing-steps", "4"]


def test_an_owner_audits_an_emulator_before_shipping(made, blindtune, tmp_path):
    out = tmp_path / "audit"
    asked = [
        "audit", made / "emulator", "--model", made / "llama", "--public", made / "public.txt",
        "--test", made / "public.txt", "--out", out, *QUICK,
    ]  # fmt: skip
    done = blindtune(*asked, "--json")
    assert done.code == 0, done.err
    assert [f["attack"] for f in done.facts["findings"]] == [
        "free model, as it is", "healing", "control, no attack",
    ]  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["audit.html", "audit.json"]
    kept = json.loads((out / "audit.json").read_text())
    assert kept["findings"] == done.facts["findings"]
    again = blindtune(*asked)
    assert again.code == 0
    assert "Nothing was run" in again.err
    assert "The most that was made of this emulator" in again.out
    assert "Not run" in again.out
    assert "it needs --adapter" in again.out


def test_a_data_owner_audits_an_adapter_before_returning_it(made, blindtune, tmp_path):
    done = blindtune(
        "audit", made / "adapter", "--model", made / "emulator", "--data", made / "private.jsonl",
        "--max-length", 64, "--out", tmp_path / "audit",
    )  # fmt: skip
    assert done.code == 0, done.err
    for word in ("There is no guarantee", "loss drop", "AUC", "false alarms"):
        assert word in done.out


def test_records_are_read_as_the_tuning_read_them(made, blindtune, tmp_path):
    """Read otherwise they look as if they were not trained on, and no leak is found."""
    adapter, data = tmp_path / "adapter", made / "private.jsonl"
    tuned = blindtune("tune", made / "emulator", "--data", data, "--out", adapter, "--max-steps", 1,
                      "--max-length", 48, "--no-pack")  # fmt: skip
    assert tuned.code == 0, tuned.err
    asked = ["audit", adapter, "--model", made / "emulator", "--data", data, "--out",
             tmp_path / "audit"]  # fmt: skip
    for more in ((), ("--dry-run",)):
        done = blindtune(*asked, *more)
        assert done.code == 2
        assert "--max-length 48, --no-pack" in done.err
    assert not (tmp_path / "audit").exists()
    assert blindtune(*asked, "--max-length", 48, "--no-pack").code == 0


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_an_adapter_says_it_is_is_not_believed_of_the_rest(made, blindtune, tmp_path, more):
    """Which audit fits follows from the manifest; the audit checks every other byte."""
    damaged = tmp_path / "adapter"
    shutil.copytree(made / "adapter", damaged)
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert package_kind(damaged) == "adapter"
    done = blindtune("audit", damaged, "--model", made / "emulator", "--data",
                     made / "private.jsonl", "--out", tmp_path / "audit", *more)  # fmt: skip
    assert done.code == 3, done.err
    assert "weights.safetensors" in done.err
    assert not (tmp_path / "audit").exists()


def test_codes_planted_before_the_tuning_are_ranked(made, blindtune, tmp_path):
    planted = tmp_path / "planted"
    asked = ["plant", made / "private.jsonl", "--out", planted, "--repeats", "0,4"]
    done = blindtune(*asked, "--each", 2, "--candidates", 16)
    assert done.code == 0, done.err
    assert "48, 8 of them canaries" in done.out
    data = planted / "planted.jsonl"
    tuned = blindtune("tune", made / "emulator", "--data", data, "--out", tmp_path / "trial",
                      "--max-steps", 2, "--max-length", 64)  # fmt: skip
    assert tuned.code == 0, tuned.err
    done = blindtune(
        "audit", tmp_path / "trial", "--model", made / "emulator", "--data", data, "--max-length",
        64, "--canaries", planted / "canaries.json", "--out", tmp_path / "audit", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = {f["attack"]: f for f in done.facts["findings"]}
    assert list(found) == ["loss", "loss drop", "canaries, never", "canaries, 4 times"]
    assert 0 <= found["canaries, 4 times"]["value"] <= 4
    assert [s["attack"] for s in done.facts["not_run"]] == ["shadow models"]
    assert "planted code" in done.facts["verdict"] or "Codes planted" in done.facts["verdict"]


def test_a_customer_audits_a_bottom_before_the_first_run(made, blindtune, tmp_path):
    package = blindtune(
        "bottom", made / "llama", "--cut", 1, "--out", tmp_path / "bottom", "--unsigned"
    )
    assert package.code == 0, package.err
    done = blindtune(
        "audit", tmp_path / "bottom", "--data", made / "public.txt", "--public",
        made / "public.txt", "--changed-share", 0.5, "--test-tokens", 300, "--public-tokens", 1500,
        "--attack-seconds", 1, "--allow-unsigned", "--out", tmp_path / "audit",
    )  # fmt: skip
    assert done.code == 0, done.err
    for word in ("The strongest attack", "trained inverter", "Bayes, trigrams", "EP, whole texts"):
        assert word in done.out
    assert "eta" in done.out
    assert (tmp_path / "audit" / "audit.html").exists()


def test_an_adversary_is_given_a_model_an_attribute_and_a_search(made, blindtune, tmp_path):
    bottom = tmp_path / "bottom"
    assert blindtune("bottom", made / "llama", "--cut", 1, "--out", bottom).code == 0
    words = [line for line in (made / "public.txt").read_text().splitlines() if line.strip()][:80]
    rows = [{"text": line, "author": "ab"[len(line) % 2]} for line in words]
    for name, some in (("data", rows[:20]), ("public", rows[20:])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    asked = [
        "audit", bottom, "--data", tmp_path / "data.jsonl", "--public", tmp_path / "public.jsonl",
        "--privatizer", "none", "--unprotected", "--max-length", 16, "--attack-seconds", 1,
        "--prior", made / "llama", "--attribute-column", "author", "--dummies", "--out",
        tmp_path / "audit",
    ]  # fmt: skip
    dry = blindtune(*asked, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert dry.facts["estimate"]["parts"]["dummy embeddings, at most"] == 1
    done = blindtune(*asked)
    assert done.code == 0, done.err
    for word in ("trained inverter, language model", "dummy embeddings", "EP of attribute"):
        assert word in done.out
    refused = blindtune(*asked[:2], "--data", made / "public.txt", "--eta", 1, "--prior",
                        made / "llama", "--out", tmp_path / "other")  # fmt: skip
    assert (refused.code, "expected --public for --prior" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("subject", "options", "says"),
    [
        (
            "adapter",
            ["--model", "emulator", "--data", "private.jsonl", "--eta", "3"],
            "--eta does not fit the audit of an adapter",
        ),
        ("public.txt", ["--data", "public.txt"], "expected --bottom for the audit of a transcript"),
        ("public.txt", ["--data", "x", "--bottom", "x", "--eta", "1"], "not a transcript"),
        (
            "emulator",
            ["--model", "llama"],
            "expected --public, --test for the audit of an emulator",
        ),
        ("adapter", ["--model", "emulator"], "expected --data for the audit of an adapter"),
        (
            "adapter",
            ["--model", "emulator", "--data", "private.jsonl", "--public", "public.txt"],
            "--public does not fit the audit of an adapter",
        ),
        (
            "emulator",
            ["--model", "llama", "--public", "p", "--test", "t", "--canaries", "c"],
            "--canaries does not fit the audit of an emulator",
        ),
        (
            "adapter",
            ["--model", "emulator", "--data", "private.jsonl", "--healing-steps", "3", "--seed", 1],
            "--healing-steps, --seed do not fit the audit of an adapter",
        ),
        (
            "emulator",
            ["--model", "llama", "--public", "p", "--test", "t", "--max-records", 9],
            "--max-records does not fit the audit of an emulator",
        ),
        (
            "emulator",
            ["--model", "llama", "--public", "p", "--test", "t", "--label-column", "mood"],
            "--label-column does not fit the audit of an emulator",
        ),
        (
            "public.txt",
            ["--data", "x", "--bottom", "x", "--validation-split", "0.2", "--no-pack"],
            "--no-pack, --validation-split do not fit the audit of a transcript",
        ),
        ("llama", [], "manifest.json"),
        (
            "adapter",
            ["--model", "emulator", "--data", "private.jsonl", "--dummies", "--prior", "llama"],
            "--prior, --dummies do not fit the audit of an adapter",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    made, blindtune, tmp_path, monkeypatch, subject, options, says
):
    monkeypatch.chdir(made)
    done = blindtune("audit", subject, *options, "--out", tmp_path / "audit")
    assert done.code in (2, 3)
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "audit").exists()


def test_every_option_has_its_kinds():
    groups = [group for group in VERB.groups if group is not PRIVACY]
    assert {name for group in groups for name in group.options()} == set(OPTIONS)
    assert all(set(kinds) <= set(AUDITS) for kinds in OPTIONS.values())


def test_options_that_say_the_default_fit_every_kind(made, blindtune, tmp_path):
    asked = ["audit", made / "adapter", "--model", made / "emulator", "--data",
             made / "private.jsonl", "--max-length", 64, "--healing-steps", 64,
             "--label-column", "label", "--out", tmp_path / "audit", "--dry-run"]  # fmt: skip
    done = blindtune(*asked)
    assert done.code == 0, done.err


def test_nothing_of_a_strangers_package_is_parsed(made, blindtune, tmp_path):
    assert blindtune("bottom", made / "llama", "--cut", 0, "--out", tmp_path / "b").code == 0
    bottom = tmp_path / "b"
    (bottom / "signature.json").unlink()
    (bottom / "manifest.json").write_text("{")
    digest = hashlib.sha256(b"{").hexdigest()
    (bottom / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    done = blindtune("audit", bottom, "--data", made / "public.txt", "--out", tmp_path / "a")
    assert (done.code, "nobody signed it" in done.err) == (4, True)


@pytest.mark.parametrize(
    ("subject", "options", "part"),
    [
        (
            "emulator",
            ["--model", "llama", "--public", "public.txt", "--test", "public.txt"],
            "heal",
        ),
        (
            "adapter",
            ["--model", "emulator", "--data", "private.jsonl", "--max-length", 64],
            "score",
        ),
        (
            "bottom",
            ["--data", "public.txt", "--public", "public.txt", "--eta", 1],
            "nearest neighbour",
        ),
    ],
)
def test_a_dry_run_says_how_long_each_audit_takes(
    made, blindtune, tmp_path, monkeypatch, subject, options, part
):
    monkeypatch.chdir(made)
    if subject == "bottom":
        subject = tmp_path / "bottom"
        assert blindtune("bottom", "llama", "--cut", 0, "--out", subject).code == 0
    out = tmp_path / "audit"
    done = blindtune("audit", subject, *options, "--out", out, "--dry-run", "--json")
    assert done.code == 0, done.err
    found = done.facts["estimate"]
    assert found["parts"][part] > 0
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert not out.exists()
