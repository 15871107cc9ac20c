"""A repeated canary is found, one that was never planted is not, and chances are what they say."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from blindtune.attacks.membership import AdapterView, loss_drops
from blindtune.errors import DataError
from blindtune.evaluation.audits.canaries import (
    CanaryLeakage,
    canary_findings,
    canary_leakage,
    canary_verdict,
)
from blindtune.evaluation.leakage.exposure import Exposure
from blindtune.evaluation.leakage.membership import membership_leakage
from blindtune.training.batches import collate
from blindtune.training.canaries import CanaryConfig, draw_canaries
from blindtune.training.config import RunConfig, TrainingConfig
from blindtune.training.dp_plan import DpConfig, plan_noise
from blindtune.training.private_sgd import fit_private
from blindtune.training.text import DataConfig, encode_rows
from tiny_models import tiny_model

CONFIG = CanaryConfig(repeats=(0, 16), each=6, candidates=64)
READING = DataConfig(max_length=96, pack=False)


@pytest.fixture(scope="module")
def planted():
    return draw_canaries(CONFIG)


@pytest.fixture(scope="module")
def models(planted, tokenizer):
    """(untuned, tuned on the planted canaries until they are known)."""
    rows = [("x", c.with_code(c.code)) for c in planted if c.repeats]
    data = encode_rows(rows, "x", tokenizer, READING)
    untuned = tiny_model("llama")
    tuned = copy.deepcopy(untuned)
    batch = collate([data[i] for i in range(len(data))], 0)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        tuned(**batch).loss.backward()
        optimizer.step()
    return tuned, untuned


def test_planted_ones_are_found_and_others_are_not(models, tokenizer, planted):
    never, often = canary_leakage(*models, tokenizer, planted, READING)
    assert (never.repeats, often.repeats) == (0, 16)
    assert often.bits > 5
    assert often.p_value < 1e-5
    assert often.found_first >= 4
    assert never.p_value > 0.01
    assert never.bits < 3.5
    assert "Codes planted 16 times come out" in canary_verdict((never, often))


def test_a_canary_counts_as_often_as_it_was_trained_on(models, tokenizer, planted):
    rows = [("x", c.with_code(c.code)) for c in planted for _ in range(c.repeats)]
    kept = encode_rows(rows[:-3], "x", tokenizer, READING)  # three were set aside
    leaks = canary_leakage(*models, tokenizer, planted, READING, trained=kept)
    assert {leak.repeats: len(leak.exposures) for leak in leaks} == {0: 6, 13: 1, 16: 5}
    windows = DataConfig(max_length=96)  # of plain text: nobody can tell where a canary is
    leaks = canary_leakage(*models, tokenizer, planted, windows, trained=kept)
    assert [leak.repeats for leak in leaks] == [0, 16]


def test_without_tuning_nothing_is_found(models, tokenizer, planted):
    for leak in canary_leakage(models[1], models[1], tokenizer, planted, READING):
        assert (leak.bits, leak.p_value, leak.found_first) == (0, 1, 0)
        assert "No planted code" in canary_verdict([leak])


def test_noise_of_dp_sgd_hides_what_the_same_steps_without_it_tell(tokenizer, planted, tmp_path):
    fillers = [("x", {"text": f"the cat number {i} eats rice"}) for i in range(26)]
    once = [("x", c.with_code(c.code)) for c in planted if c.repeats]
    data = encode_rows([*once, *fillers], "x", tokenizer, READING)
    others = encode_rows(
        [("x", c.with_code(c.others[0])) for c in planted if c.repeats], "x", tokenizer, READING
    )
    training = TrainingConfig(max_steps=60, learning_rate=3e-3, per_device_train_batch_size=16)
    plan = plan_noise(DpConfig(epsilon=1.0, delta=1e-3), training, len(data))
    told = {}
    for name, chosen in (("private", plan), ("bare", replace(plan, noise_multiplier=0.0))):
        untuned = tiny_model("llama")
        tuned = copy.deepcopy(untuned)
        tuned.requires_grad_(False)
        tuned.model.layers.requires_grad_(True)
        draw = torch.Generator().manual_seed(7)
        uniforms = partial(torch.rand, generator=draw, dtype=torch.float64)
        fit_private(
            tuned, data, training, chosen, tmp_path / name, uniforms, RunConfig(silent=True)
        )
        _, often = canary_leakage(tuned, untuned, tokenizer, planted, READING)
        records = [tuple(some[i] for i in range(6)) for some in (data, others)]
        scores = (
            loss_drops(AdapterView(tuned=tuned, untuned=untuned, records=some)) for some in records
        )
        told[name] = often.p_value, membership_leakage(*scores).auc
    assert told["bare"][0] < 1e-4
    assert told["private"][0] > 0.01
    assert told["bare"][1] == 1
    assert told["private"][1] < 0.9


def level(ranks, candidates=64, repeats=1):
    found = tuple(Exposure(rank=int(r), candidates=candidates) for r in ranks)
    return CanaryLeakage(repeats=repeats, exposures=found)


def test_the_chance_of_one_canary_is_its_rank_and_of_several_fishers():
    assert level([3]).p_value == pytest.approx(3 / 64)
    # chi square of 4 degrees: P(X > x) = exp(-x / 2) (1 + x / 2)
    half = torch.tensor(64 / 2 * 64 / 5).log().item()
    expected = torch.exp(torch.tensor(-half)).item() * (1 + half)
    assert level([2, 5]).p_value == pytest.approx(expected, rel=1e-5)


def test_uniform_ranks_are_called_a_leak_no_more_often_than_said():
    draw = torch.Generator().manual_seed(0)
    chances = torch.tensor(
        [level(torch.randint(1, 65, (4,), generator=draw)).p_value for _ in range(2000)]
    )
    assert (chances < 0.05).float().mean() < 0.065
    assert 0.45 < chances.mean() < 0.6


def test_rows_say_what_was_seen():
    finding = canary_findings([level([1, 1], repeats=4)])[0]
    assert (finding.attack, finding.value) == ("canaries, 4 times", 6.0)
    assert "at rank 1, 1 of 64" in finding.meaning


def test_canaries_that_are_cut_are_refused(models, tokenizer, planted):
    with pytest.raises(DataError, match="--max-length"):
        canary_leakage(*models, tokenizer, planted, DataConfig(max_length=24))


@pytest.mark.parametrize("candidates", [2, 64])
def test_what_unplanted_codes_have_on_average(candidates):
    every = [Exposure(rank=r + 1, candidates=candidates) for r in range(candidates)]
    one = CanaryLeakage(repeats=0, exposures=(every[0],))
    assert one.blind_bits == pytest.approx(sum(e.bits for e in every) / candidates)
