"""Audits of both packages: attacks that must succeed do, those that must fail do not."""

import math
from dataclasses import replace

import pytest
import torch

from blindtune.errors import DataError, MismatchError
from blindtune.evaluation.audits.adapter import _apart, _strongest, _verdict, audit_adapter
from blindtune.evaluation.audits.audit import AuditConfig
from blindtune.evaluation.audits.emulator import _findings, audit_emulator, spread
from blindtune.evaluation.audits.emulator import _verdict as emulator_verdict
from blindtune.evaluation.audits.estimate import estimate_audit_emulator
from blindtune.evaluation.leakage.membership import membership_leakage
from blindtune.evaluation.leakage.misuse import Lead, Misuse
from blindtune.evaluation.pages.audit import page, write_audit
from blindtune.evaluation.pages.report import render
from blindtune.evaluation.utility.loss import Perplexity
from blindtune.models.surgery import keep_layers
from blindtune.offsite.adapter import AdapterConfig
from blindtune.offsite.data_owner.tuning import tune
from blindtune.training.loop import TrainingConfig
from blindtune.training.text import DataConfig, encode_rows
from offsite_world import SILENT, owners_world
from tiny_models import tiny_model, tiny_tokenizer

WINDOWS = DataConfig(max_length=32, max_tokens=4000)
CONFIG = AuditConfig(healing_steps=16, healing_learning_rate=(3e-3,), test_tokens=512)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return owners_world(tmp_path_factory.mktemp("owners"), "llama").path


@pytest.fixture(scope="module")
def emulator_audit(world):
    seen = []
    found = audit_emulator(
        world / "emulator", world / "model", public=world / "public.txt",
        test=world / "private.txt", adapter=world / "adapter", reading=WINDOWS, config=CONFIG,
        on_progress=lambda *told: seen.append(told),
    )  # fmt: skip
    assert seen[-1] == ("heal the emulator at 0.003", 16, 16)
    return found


def test_an_emulator_is_used_tuned_and_healed(emulator_audit):
    found = {finding.attack: finding for finding in emulator_audit.findings}
    assert list(found) == [
        "free model, as it is", "free model, tuned", "healing", "control, no attack",
    ]  # fmt: skip
    assert all(f.low < f.value < f.high for f in found.values())
    assert found["healing"].value < found["free model, as it is"].value
    healed = emulator_audit.curves["healed emulator"]
    assert math.exp(min(nats for _, nats in healed)) == pytest.approx(found["healing"].value)
    best = emulator_audit.findings[emulator_audit.strongest]
    attacks = [f for f in found.values() if not f.attack.startswith("control")]
    assert best.value == min(f.value for f in attacks)
    assert best.shown in emulator_audit.verdict
    assert "no guarantee" in emulator_audit.guarantee[0]


def test_what_is_not_run_is_named(world):
    found = audit_emulator(
        world / "emulator", world / "model", public=world / "public.txt",
        test=world / "private.txt", reading=WINDOWS,
        config=AuditConfig(healing_steps=0, test_tokens=256),
    )  # fmt: skip
    assert [f.attack for f in found.findings] == ["free model, as it is"]
    assert [s.attack for s in found.not_run] == ["free model, tuned", "healing"]


def test_another_model_is_refused_before_anything_is_healed(world, tmp_path):
    """It was measured against whatever model was given, with a verdict of no meaning."""
    other, smaller = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    keep_layers(smaller, [0, 1, 3, 4])
    told = []
    for name, model in (("other", other), ("smaller", smaller)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(MismatchError, match="the model that the emulator was made of"):
            audit_emulator(
                world / "emulator", tmp_path / name, public=world / "public.txt",
                test=world / "private.txt", reading=WINDOWS, config=CONFIG,
                on_progress=lambda *progress: told.append(progress),
            )  # fmt: skip
    assert told == []
    asked = {"reading": WINDOWS, "config": CONFIG}
    with pytest.raises(MismatchError, match="the model that the emulator was made of"):
        estimate_audit_emulator(world / "emulator", tmp_path / "smaller", **asked)
    assert estimate_audit_emulator(world / "emulator", world / "model", **asked).seconds > 0


def records(count, seed):
    """Sentences of random words that no model expects."""
    draw = torch.Generator().manual_seed(seed)
    words = ["cat", "mat", "home", "fish", "rice", "eats", "sits", "some"]
    picks = torch.randint(len(words), (count, 12), generator=draw)
    return [" ".join(words[k] for k in row) for row in picks]


@pytest.fixture(scope="module")
def data(world):
    import json

    for name, seed in (("members", 1), ("strangers", 2)):
        lines = (json.dumps({"text": text}) + "\n" for text in records(24, seed))
        (world / f"{name}.jsonl").write_text("".join(lines))
    return world


READING = DataConfig(max_length=64, pack=False, validation_split=0.0)


def audited(world, out, steps, rate):
    tune(
        world / "emulator", world / "members.jsonl", world / out, AdapterConfig(),
        TrainingConfig(max_steps=steps, learning_rate=rate), reading=READING, run=SILENT,
    )  # fmt: skip
    return audit_adapter(
        world / out, world / "emulator", world / "members.jsonl",
        others=world / "strangers.jsonl", reading=READING,
    )  # fmt: skip


def test_records_learned_by_heart_are_found(data):
    found = audited(data, "by-heart", steps=150, rate=5e-3)
    best = found.findings[found.strongest]
    assert best.measure == "AUC"
    assert best.low > 0.8
    assert "tells which records" in found.verdict
    assert "no guarantee" in found.guarantee[0]


def test_an_adapter_that_learned_nothing_tells_nothing(data):
    found = audited(data, "untouched", steps=1, rate=1e-9)
    best = found.findings[found.strongest]
    assert best.low <= 0.5 <= best.high
    assert "no proof" in found.verdict


def test_the_verdict_and_the_strongest_row_are_of_one_attack():
    noise = torch.Generator().manual_seed(0)
    members, others = (torch.randn(n, generator=noise) for n in (400, 200))
    nothing = membership_leakage(members, others)
    few = membership_leakage(members + 9 * (torch.arange(400) < 32), others)
    all_told = membership_leakage(members + 2, others)
    assert _strongest({"loss": nothing, "drop": few}) == ("drop", "found")
    assert "of some records" in _verdict({"loss": nothing, "drop": few})
    assert _strongest({"loss": all_told, "drop": few}) == ("loss", "AUC")
    assert "tells which records" in _verdict({"loss": all_told, "drop": few})
    assert _strongest({"loss": nothing})[1] == "AUC"
    assert "no proof" in _verdict({"loss": nothing})


def test_copies_of_one_record_are_no_leak(data, tmp_path):
    """An adapter that learned nothing; the record of the lowest loss is there a hundred times."""
    tuned = audited(data, "copied", steps=1, rate=1e-9)
    lines = (data / "members.jsonl").read_text().splitlines()
    (tmp_path / "copies.jsonl").write_text("\n".join(lines + 100 * lines[:1]) + "\n")
    found = audit_adapter(
        data / "copied", data / "emulator", tmp_path / "copies.jsonl",
        others=data / "strangers.jsonl", reading=READING,
    )  # fmt: skip
    assert found.facts["trained records"].startswith("24 different of 124")
    assert found.findings == tuned.findings


def test_records_of_both_kinds_are_left_out_of_both(tokenizer):
    def read(*words):
        rows = [("x", {"prompt": word, "completion": word}) for word in words]
        return encode_rows(rows, "x", tokenizer, READING)

    members, others = _apart(read("a", "b", "b", "c"), read("c", "d", "d"))
    assert (len(members), len(others)) == (2, 1)  # copies count once
    with pytest.raises(DataError, match="every one of the others was"):
        _apart(read("a", "b"), read("b"))


def test_what_tuning_set_aside_serves_as_others(data):
    reading = DataConfig(max_length=64, pack=False, validation_split=0.25)
    found = audit_adapter(
        data / "adapter", data / "emulator", data / "members.jsonl", reading=reading
    )
    assert found.facts["trained records"].startswith("18 different of 18")
    assert found.facts["other records"] == "6 set aside by the tuning"


def test_without_other_records_it_says_what_to_give(data):
    with pytest.raises(DataError, match="--others"):
        audit_adapter(data / "adapter", data / "emulator", data / "members.jsonl", reading=READING)


def test_the_page_says_every_row_and_needs_no_network(emulator_audit, tmp_path):
    write_audit(emulator_audit, tmp_path / "audit")
    html = (tmp_path / "audit" / "audit.html").read_text()
    assert html == render(page(emulator_audit))
    for finding in emulator_audit.findings:
        assert finding.knew in html
        assert finding.meaning in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    assert "<script" not in html


def test_windows_are_spread_over_the_whole_text():
    windows_NL = torch.arange(20).view(10, 2)
    assert spread(windows_NL, 4)[:, 0].tolist() == [0, 10]
    assert len(spread(windows_NL, 1)) == 1
    assert len(spread(windows_NL, 10**6)) == 10


def loss(nats):
    return Perplexity(
        nats_per_token=nats, perplexity=math.exp(nats), tokens=100, examples=10,
        standard_error=0.01,
    )  # fmt: skip


def test_best_is_compared_with_best_and_an_unsettled_attack_is_said_to_be():
    curves = {"healed": (4.4, 4.2, 4.3), "control": (6.0, 5.0, 4.6)}
    told = {
        name: tuple((k * 512, loss(nats)) for k, nats in enumerate(curve))
        for name, curve in curves.items()
    }
    found = Misuse(
        full=loss(3.9), emulator=loss(4.4), tuned=None, learning_rate=5e-5,
        lead=Lead(nats=0.4, reach=0.1), **told,
    )  # fmt: skip
    assert found.settled
    assert found.healed_share == pytest.approx(0.4)
    *_, healing, control = _findings(found, AuditConfig(), used_tokens=1024)
    assert control.value == pytest.approx(math.exp(4.6))
    assert "0.40 nats better: it gave away more" in control.meaning
    assert "at 5e-05, the best of 2 learning rates" in healing.knew
    for nats, says in (
        (0.05, "0.05 nats better, within the error (0.10): nothing shows"),
        (-0.3, "0.30 nats worse: no further than this, which does not prove"),
    ):
        other = replace(found, lead=Lead(nats=nats, reach=0.1))
        assert says in _findings(other, AuditConfig(), used_tokens=1024)[-1].meaning
    assert "still getting better" not in healing.meaning
    falling = replace(found, healed=found.healed[:2])
    assert not falling.settled
    *_, healing, _ = _findings(falling, AuditConfig(), used_tokens=1024)
    assert "still getting better" in healing.meaning
    assert "on 512 tokens, and still getting better" in emulator_verdict(falling, healing)
