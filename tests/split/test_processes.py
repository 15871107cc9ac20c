"""Vendor and customer as processes that are killed: the result is an undisturbed run's.

Processes are forked from one that has imported everything, so that starting one takes a moment.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import command_line, free_port, wait_for
from split_world import TEXTS, World
from vendor_world import write_model

from blindtune.cli.main import run
from blindtune.errors import NetworkError
from blindtune.exchange.wire.credentials import VendorTrust
from blindtune.exchange.wire.messages import Status
from blindtune.exchange.wire.network import Connection
from blindtune.exchange.wire.resuming import RetryConfig
from blindtune.split.bottom import open_bottom
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.customer.requests import PassConfig, new_token, open_job, predict, train
from blindtune.split.terms import TuningConfig

CONFIG = TuningConfig(lora_rank=2, learning_rate=3e-3, lora_dropout=0.1, seed=3)
PLAN = PassConfig(epochs=30, batch_size=3, checkpoint_steps=5, seed=1)
BATCHES = 30 * 4
RETRIES = RetryConfig(first_delay_seconds=0.02, longest_delay_seconds=0.2, give_up_after_seconds=60)


def customer(folder, address, fingerprint, token, secret):
    """Tune from where the vendor is, note losses as they come, and end with predictions."""
    torch.set_num_threads(1)
    trust = VendorTrust(token=token, fingerprint=fingerprint)
    private = PrivateStates.load(folder / "private.safetensors")
    bottom = open_bottom(folder / "vendor" / "bottom")

    def opened():
        try:
            return open_job(
                lambda: Connection(address, trust), bottom, secret, CONFIG,
                task="classification", outputs=2, retries=RETRIES,
            )  # fmt: skip
        except NetworkError:  # the vendor is not up again yet
            return None

    batch = 0
    with (folder / "losses").open("a") as file:

        def note(loss):
            nonlocal batch
            file.write(f"{batch} {loss!r}\n")
            file.flush()
            batch += 1

        while True:
            job = wait_for(opened)
            batch = (job.job.applied + 1) // 2  # batches have the odd numbers
            try:
                train(job, private, PLAN, applied=job.job.applied, on_loss=note)
                break
            except NetworkError:  # the vendor went back behind where this process began
                job.close()
    state = job.call(Status())
    logits = predict(job, private, precision="float32")
    partial = folder / "result.partial"
    torch.save({"logits": logits, "steps": state.steps, "tokens": state.tokens}, partial)
    partial.rename(folder / "result")


def losses_of(folder):
    """(batch, loss) of every line that was written to its end."""
    file = folder / "losses"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    pairs = [line.split() for line in lines if line.endswith("\n")]
    return [(int(batch), float(loss)) for batch, loss in pairs]


def first_line(path):
    text = Path(f"{path}.out").read_text() if Path(f"{path}.out").exists() else ""
    return json.loads(text.splitlines()[0]) if "\n" in text else None


class Parties:
    """Both parties' files, and the processes that work on them now."""

    def __init__(self, folder, fork):
        self.folder, self.fork, self.port = folder, fork, free_port()
        self.model = write_model(folder / "model")
        self.lives = 0
        assert run(["admit", "anna", "--out", str(folder / "vendor"), "--token-file",
                    str(folder / "token")]) == 0  # fmt: skip
        self.token, self.secret = (folder / "token").read_text().strip(), new_token()
        self.start_vendor()
        self.facts = wait_for(lambda: first_line(folder / "serve1"))

    def start_vendor(self):
        self.lives += 1
        options = f"--cut 1 --self-signed --port {self.port} --retry-after-seconds 0.01 --json"
        arguments = ["serve", self.model, "--out", self.folder / "vendor", *options.split()]
        self.vendor = self.fork(command_line, arguments, self.folder / f"serve{self.lives}")

    def start_customer(self):
        self.customer = self.fork(
            customer, self.folder, self.facts["addresses"][0], self.facts["fingerprint"],
            self.token, self.secret,
        )  # fmt: skip


def test_both_are_killed_at_random_moments(tmp_path, fork):
    calm = World(tmp_path)
    job = calm.job(CONFIG, precision="float16")
    private = calm.private()
    expected = train(job, private, PLAN)
    logits = predict(job, private, precision="float32")
    private.save(tmp_path / "private.safetensors")
    (tmp_path / "vendor").rename(tmp_path / "calm")

    parties = Parties(tmp_path, fork)
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    parties.start_customer()
    victims = ["vendor", "customer", "vendor", "both"]
    moments = sorted(draw.sample(range(2, BATCHES - 10), len(victims)))
    print("seed", seed)  # pytest shows it when the test fails
    for moment, victim in zip(moments, victims, strict=True):
        wait_for(lambda moment=moment: any(b >= moment for b, _ in losses_of(tmp_path)))
        time.sleep(draw.uniform(0, 0.02))
        if victim != "customer":
            parties.vendor.kill()
            parties.vendor.join()
            parties.start_vendor()
        if victim != "vendor":
            parties.customer.kill()
            parties.customer.join()
            parties.start_customer()
    parties.customer.join(60)
    assert parties.customer.exitcode == 0
    result = torch.load(tmp_path / "result")
    assert (result["steps"], result["tokens"]) == (BATCHES, 30 * sum(map(len, private.states)))
    assert torch.equal(result["logits"], logits)
    found = losses_of(tmp_path)
    assert {batch for batch, _ in found} <= set(range(BATCHES))
    assert all(loss == expected[batch] for batch, loss in found)
    assert len({batch for batch, _ in found}) > BATCHES - 3 * 8 * 2  # some replies were lost
    parties.vendor.terminate()
    parties.vendor.join(30)
    assert parties.vendor.exitcode == 0
    kept = sorted(p.name for p in (tmp_path / "vendor").rglob("*") if p.is_file())
    assert not [name for name in kept if "partial" in name], kept
    assert sum(name.startswith("at-") for name in kept) == 2


def test_serving_from_the_command_line(tmp_path, fork, capsys):
    model = write_model(tmp_path / "model", "distilbert")
    common = ["serve", model, "--cut", 1, "--out", tmp_path / "vendor", "--self-signed"]
    for life, ending in enumerate((signal.SIGINT, signal.SIGTERM)):
        out = tmp_path / f"serve{life}"
        arguments = [*common, "--port", 0, "--metrics-port", 0, "--json"]
        vendor = fork(command_line, arguments, out)
        facts = wait_for(lambda out=out: first_line(out))
        assert (facts["verb"], facts["state"], facts["cut"]) == ("serve", "serving", 1)
        capsys.readouterr()
        assert run([str(argument) for argument in common]) == 2
        assert "another process serves" in capsys.readouterr().err
        os.kill(vendor.pid, ending)
        vendor.join(30)
        assert vendor.exitcode == 0
        told = [json.loads(line) for line in Path(f"{out}.out").read_text().splitlines()]
        assert [line["state"] for line in told] == ["serving", "ended"]
        log = [json.loads(line) for line in Path(f"{out}.err").read_text().splitlines()]
        assert [line["event"] for line in log] == ["service-began", "service-ends"]
    assert facts["bottom_id"] == open_bottom(facts["bottom"]).id
    vendor = fork(command_line, [*common, "--port", 0], tmp_path / "shown")
    text = wait_for(lambda: (tmp_path / "shown.out").exists()
                    and (tmp_path / "shown.out").read_text())  # fmt: skip
    wait_for(lambda: "to end" in (tmp_path / "shown.out").read_text())
    text = (tmp_path / "shown.out").read_text()
    for word in ("https://127.0.0.1:", "fingerprint", "bottom id", "blindtune admit NAME --out"):
        assert word in text
    vendor.terminate()
    vendor.join(30)
    assert vendor.exitcode == 0
    assert TEXTS[0] not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_it_serves_interrupts(tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(
        "blindtune.split.vendor.service.load_any", lambda _model: signal.raise_signal(number)
    )
    asked = ["serve", "m", "--cut", "1", "--out", str(tmp_path / "vendor"), "--self-signed"]
    assert run([*asked, "--unsigned"]) == 130
    assert "interrupted; jobs are kept" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_mistakes_and_estimates_of_the_vendor(tmp_path, capsys):
    model = write_model(tmp_path / "model", "mpnet")

    def refused(*arguments):
        capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    here = ["--out", tmp_path / "v"]
    assert "at least one of 3 layers" in refused("bottom", model, "--cut", 3, *here)
    assert "got neither" in refused("serve", model, "--cut", 1, *here)
    wrong = ["serve", model, "--cut", 1, *here, "--self-signed"]
    assert "--max-steps must be above 0" in refused(*wrong, "--max-steps", 0)
    assert "--max-buffered-bytes" in refused(*wrong, "--max-buffered-bytes", 5)
    assert "name a customer" in refused("admit", "a/b", *here)
    assert run(["bottom", str(model), "--cut", "1", "--out", str(tmp_path / "b"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["cut"], made["layers"], len(made["id"])) == (1, 3, 64)
    for verb in ("bottom", "serve"):
        arguments = [verb, str(model), "--cut", "1", "--out", str(tmp_path / "d"), "--dry-run"]
        assert run([*arguments, "--json"]) == 0
        estimate = json.loads(capsys.readouterr().out)["estimate"]
        assert estimate["written_bytes"] == pytest.approx(made["bytes"], rel=0.5)
    assert not (tmp_path / "d").exists()
    assert run(["admit", "anna", "--out", str(tmp_path / "v"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token"]) == 43
    assert "no token is given" in refused("admit", "--revoke", "anna", *here, "--token-file", "t")
    assert run(["admit", "--revoke", "anna", "--out", str(tmp_path / "v")]) == 0
    assert "Revoked" in capsys.readouterr().out
    assert json.loads((tmp_path / "v" / "customers.json").read_text()) == {}
    assert "known are nobody" in refused("admit", "--revoke", "anna", *here)
