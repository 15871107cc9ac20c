"""The customer's command lines against a vendor's service, and as processes that are killed."""

import json
import pydoc_data.topics
import random
import time

import pytest
import torch
import yaml
from customer_world import NAMES, write_table
from processes import command_line, free_port, wait_for
from split_world import TEXTS
from vendor_world import VendorWorld, write_model

from blindtune.cli.main import run
from blindtune.errors import ConfigError
from blindtune.exchange.wire.transcript import open_transcript
from blindtune.split.customer.job import CustomerJob
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.tuning_job import split_tune

QUICK = ["--lora-rank", "2", "--batch-size", "4", "--epochs", "2", "--learning-rate", "1e-2"]
NOISE = ["--privatizer", "vector", "--eta", "20"]


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    world = VendorWorld(tmp_path_factory.mktemp("vendor"))
    with world.start() as service:
        world.trust(service)
        yield world, service


@pytest.fixture
def blindtune(vendor, tmp_path, monkeypatch, capsys):
    """Run a customer's verb against the vendor; its exit code, stdout and stderr."""
    world, service = vendor
    monkeypatch.setenv("BLINDTUNE_TOKEN", world.tokens["anna"])
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "train.csv")
    bottom = ["--bottom", str(service.bottom.path), "--data", "train.csv", "--out", "job"]
    bottom.append("--allow-unsigned")  # the world is made by functions that sign nothing

    def call(verb, *arguments, url=service.addresses[0], fingerprint=service.fingerprint):
        capsys.readouterr()
        given = bottom if verb == "split-tune" else ["--job", "job"]
        code = run([verb, url, *given, "--fingerprint", fingerprint, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_tune_predict_cancel_on_the_command_line(blindtune, tmp_path):
    code, out, err = blindtune("split-tune", *NOISE, *QUICK, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["verb"], facts["steps"], facts["names"]) == ("split-tune", 6, NAMES)
    assert len(facts["losses"]) == 6
    assert facts["bytes_sent"] > 2 * 32 * 2 * sum(map(len, TEXTS))
    for words in ("eta 20 per token", "x the median distance", "tokens that change:",
                  "one draw, reused", "epsilon", "labels are sent as they are"):  # fmt: skip
        assert words in err
    assert [path.name for path in tmp_path.iterdir() if "job" in path.name] == ["job"]
    asked = ["--data", "train.csv", "--out", "p.jsonl"]
    code, out, err = blindtune("predict", *asked)
    assert code == 0, err
    assert "accuracy" in out
    assert "when these texts are predicted again" in err
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(1, len(TEXTS) + 1))
    assert blindtune("predict", *asked)[0] == 2  # nothing is overwritten
    code, out, err = blindtune("split-tune", *NOISE, *QUICK)
    assert (code, "gone on from step" in out) == (0, True)
    code, out, err = blindtune("cancel")
    assert code == 0, err
    assert "adapter, head, optimizer and checkpoints of job_" in out
    assert "6 steps" in out
    assert blindtune("predict", "--data", "train.csv")[0] == 2


def test_what_crosses_is_recorded_and_audited(blindtune, tmp_path, vendor, capsys):
    """In tuning, when it is run again, and in predictions; of a job from its first byte on."""
    code, _, err = blindtune("split-tune", *NOISE, *QUICK, "--record")
    assert code == 0, err
    path = tmp_path / "job" / "transcript.bin"
    sizes = [path.stat().st_size]
    assert blindtune("split-tune", *NOISE, *QUICK, "--record")[0] == 0
    assert blindtune("predict", "--data", "train.csv")[0] == 0
    sizes.append(path.stat().st_size)
    assert sizes[1] > 1.3 * sizes[0]
    names = [type(c.message).__name__ for c in open_transcript(path).crossings()]
    assert names[0] == "Hello"
    assert names.count("Batch") == 6
    assert "Predict" in " ".join(names)
    audit = ["audit", str(path), "--bottom", str(vendor[1].bottom.path), "--data", "train.csv"]
    audit += [*NOISE, "--allow-unsigned", "--out", "audit", "--json"]
    assert run(audit) == 0
    recorded = json.loads(capsys.readouterr().out)["findings"][0]
    assert run(["audit", "job", "--allow-unsigned", "--out", "kept", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["findings"][0]
    assert recorded["attack"] == kept["attack"] == "nearest neighbour"
    assert recorded["value"] == pytest.approx(kept["value"], abs=0.01)  # the same states
    assert (tmp_path / "audit" / "audit.html").exists()


def test_a_job_is_recorded_from_its_first_byte_or_not(blindtune, tmp_path, vendor):
    assert blindtune("split-tune", *NOISE, *QUICK)[0] == 0
    code, _, err = blindtune("split-tune", *NOISE, *QUICK, "--record")
    assert code == 2
    assert "recorded from its first states on" in err
    assert not (tmp_path / "job" / "transcript.bin").exists()
    with pytest.raises(ConfigError, match="expected an address to record"):
        split_tune(lambda: None, vendor[1].bottom.path, "train.csv", "other",
                   PrivatizerConfig(privatizer="vector", eta=20.0), record=True)  # fmt: skip


def test_words_become_their_groups(blindtune, tmp_path):
    text = "\n".join(pydoc_data.topics.topics.values())
    (tmp_path / "public.txt").write_text(text[:60_000])
    grouped = ["--privatizer", "groups", "--public-text", "public.txt", "--wrong-guesses", "0.5"]
    code, out, err = blindtune("split-tune", *grouped, *QUICK, "--json", "--dry-run")
    assert code == 0, err
    parts = json.loads(out)["estimate"]["parts"]
    assert ("word groups" in parts, "noise" in parts) == (True, False)
    code, out, err = blindtune("split-tune", *grouped, *QUICK, "--json")
    assert code == 0, err
    facts = json.loads(out)["privacy"]
    assert (facts["privatizer"], facts["eta"], facts["spending"]) == ("groups", None, None)
    assert 0.2 < facts["changed"] < 0.9
    assert "hidden perfectly, whatever the vendor computes" in err
    groups = CustomerJob("job").groups()
    private = CustomerJob("job").states()
    sent = [groups.apply(ids) for ids in private.ids]
    drawn = sum(int((a != b).sum()) for a, b in zip(sent, private.ids, strict=True))
    assert drawn / sum(map(len, sent)) == pytest.approx(facts["changed"], abs=0.2)  # specials count
    code, out, err = blindtune("predict", "--data", "train.csv")
    assert code == 0, err
    assert "hidden perfectly" in err
    asked = next((tmp_path / "job").glob("asked-*.safetensors"))
    again = PrivateStates.load(asked)
    for mine, theirs in zip(again.states, private.states, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)  # the same groups, and no noise


def test_words_are_drawn(blindtune):
    drawn = ["--privatizer", "exponential", "--changed-share", "0.5"]
    code, out, err = blindtune("split-tune", *drawn, *QUICK, "--dry-run")
    assert code == 0, err
    assert "words to draw from" in out + err
    code, out, err = blindtune("split-tune", *drawn, *QUICK, "--json")
    assert code == 0, err
    facts = json.loads(out)["privacy"]
    assert facts["privatizer"] == "exponential"
    assert facts["expected_change"] == pytest.approx(0.5, abs=0.1)
    assert 0.2 < facts["changed"] < 0.8
    assert 0 < facts["noise_norm"] < 2 * facts["typical_norm"]
    assert "words drawn at a mean distance of" in err
    assert "looking up the nearest word" in err
    assert facts["spending"]["epsilon_per_token"] == pytest.approx(
        facts["eta"] * facts["typical_norm"]
    )
    code, out, err = blindtune("predict", "--data", "train.csv")
    assert code == 0, err
    assert "words drawn" in err


def test_a_dry_run_opens_no_package_that_nobody_trusts(blindtune, vendor, capsys):
    bottom = ["--bottom", str(vendor[1].bottom.path), "--data", "train.csv", "--out", "job"]
    code = run(["split-tune", vendor[1].addresses[0], *bottom, *NOISE, "--dry-run"])
    assert code == 4
    assert "unsigned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--privatizer", "groups"], "--public-text"),
        (["--privatizer", "token", "--eta", "9", "--public-text", "train.csv"], "only then"),
        (["--privatizer", "groups", "--public-text", "train.csv"], "at least 10,000 tokens"),
        (
            ["--privatizer", "groups", "--public-text", "train.csv", "--changed-share", "0.5"],
            "follows from --wrong-guesses",
        ),
    ],
)
def test_groups_that_cannot_be_made(blindtune, options, says):
    code, _, err = blindtune("split-tune", *options, *QUICK)
    assert code == 2
    assert says in err.splitlines()[-1]


def test_a_config_file_and_a_dry_run(blindtune, tmp_path):
    options = {"privatizer": "token", "changed_share": 0.5, "epochs": 3, "precision": "int8"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    code, out, err = blindtune("split-tune", "--config", "run.yaml", "--dry-run", "--json")
    assert code == 0, err
    estimate = json.loads(out)["estimate"]
    tokens = 3 * sum(map(len, TEXTS))
    assert estimate["tokens"] == tokens
    assert estimate["sizes"]["sent"] == pytest.approx(36 * tokens, rel=0.2)
    assert estimate["seconds"] == pytest.approx(sum(estimate["parts"].values()))
    assert not (tmp_path / "job").exists()
    code, out, err = blindtune("split-tune", "--config", "run.yaml", *QUICK[:2], "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["bytes_sent"] == pytest.approx(estimate["sizes"]["sent"], rel=0.3)
    assert facts["privacy"]["changed"] is not None


def test_what_a_customer_does_wrong(blindtune, monkeypatch):
    def refused(code, words, *arguments, **where):
        found, out, err = blindtune("split-tune", *arguments, **where)
        assert (found, out) == (code, ""), err
        assert words in err.splitlines()[-1]

    refused(2, "--changed-share 0.5 finds")
    refused(2, "give unprotected too", "--privatizer", "none")
    refused(2, "expected an address", *NOISE, url="http://vendor")
    refused(2, "U-shape".lower(), *NOISE, "--task", "language-model", "--data", "train.csv")
    refused(3, "another certificate", *NOISE, fingerprint="0" * 64)
    nobody = f"https://127.0.0.1:{free_port()}"
    refused(5, "run the same command again", *NOISE, url=nobody)
    monkeypatch.setenv("BLINDTUNE_TOKEN", "x" * 40)
    refused(4, "does not accept this token", *NOISE)
    monkeypatch.delenv("BLINDTUNE_TOKEN")
    refused(2, "blindtune admit", *NOISE)


def test_a_customer_is_killed_at_random_moments(tmp_path, fork, capsys, monkeypatch):
    """kill -9, three times: the losses are an undisturbed run's, and nothing is trained twice."""
    model = write_model(tmp_path / "model")
    assert run(["admit", "anna", "--out", str(tmp_path / "vendor"),
                "--token-file", str(tmp_path / "token")]) == 0  # fmt: skip
    serve = ["serve", model, "--cut", 1, "--out", tmp_path / "vendor", "--self-signed"]
    vendor = fork(command_line, [*serve, "--port", 0, "--json"], tmp_path / "serve")
    text = wait_for(lambda: (tmp_path / "serve.out").exists() and first(tmp_path / "serve.out"))
    facts = json.loads(text)
    write_table(tmp_path / "train.csv")

    def arguments(out):
        return ["split-tune", facts["addresses"][0], "--bottom", facts["bottom"],
                "--data", tmp_path / "train.csv", "--out", tmp_path / out,
                "--fingerprint", facts["fingerprint"], "--token-file", tmp_path / "token",
                "--privatizer", "none", "--unprotected", *QUICK[:6], "--epochs", 20,
                "--lora-dropout", 0.1, "--checkpoint-steps", 7, "--json"]  # fmt: skip

    capsys.readouterr()
    assert run([str(a) for a in arguments("calm")]) == 0
    expected = json.loads(capsys.readouterr().out)
    seed = random.randrange(2**32)
    print("seed", seed)  # pytest shows it when the test fails
    draw = random.Random(seed)
    moments = [0, *sorted(draw.sample(range(1, 45), 2))]
    for moment in moments:
        customer = fork(command_line, arguments("job"), tmp_path / "killed")
        wait_for(lambda moment=moment: noted(tmp_path / "job") >= moment)
        time.sleep(draw.uniform(0, 0.05))
        customer.kill()
        customer.join()
        assert customer.exitcode == -9
    fork(command_line, arguments("job"), tmp_path / "last").join(60)
    done = json.loads((tmp_path / "last.out").read_text())
    assert done["losses"] == expected["losses"]
    assert len(done["losses"]) == done["steps"] == 60
    assert done["resumed_from"] > 0
    ends = []
    for job in ("calm", "job"):  # the vendor's own count of what was trained
        cancel = ["cancel", facts["addresses"][0], "--job", tmp_path / job, "--fingerprint",
                  facts["fingerprint"], "--token-file", tmp_path / "token", "--json"]  # fmt: skip
        capsys.readouterr()
        assert run([str(a) for a in cancel]) == 0
        ended = json.loads(capsys.readouterr().out)
        ends.append((ended["steps"], ended["tokens"]))
    assert ends[0] == ends[1] == (60, 20 * sum(map(len, TEXTS)))
    assert not [p for p in (tmp_path / "job").iterdir() if "partial" in p.name]
    vendor.terminate()
    vendor.join(30)


def first(path):
    text = path.read_text()
    return text.splitlines()[0] if "\n" in text else ""


def noted(job):
    """Losses that a job has noted; -1 before there is a job."""
    return len(CustomerJob(job).losses()) if (job / "job.json").exists() else -1
