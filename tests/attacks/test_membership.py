"""Membership inference finds what was memorised, and nothing where nothing was trained on."""

from __future__ import annotations

import copy

import pytest
import torch

from blindtune.attacks.membership import AdapterView, loss_drops, tuned_losses
from blindtune.errors import DataError
from blindtune.evaluation.leakage.exposure import exposure
from blindtune.evaluation.leakage.membership import membership_leakage
from blindtune.training.batches import collate
from tiny_models import VOCAB, tiny_model

Record = dict[str, torch.Tensor]


def records(count: int, seed: int) -> tuple[Record, ...]:
    """Random texts of 8 to 12 tokens: nothing tells one draw from another but having been seen."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(4, VOCAB, (8 + i % 5,), generator=generator)
        found.append({"input_ids": ids, "labels": ids.clone()})
    return tuple(found)


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """(untuned, tuned until it knows `records(40, 1)` by heart)."""
    untuned = tiny_model("llama")
    tuned = copy.deepcopy(untuned)
    batch = collate(records(40, 1), 0)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        tuned(**batch).loss.backward()
        optimizer.step()
    return untuned, tuned


def scores(models: tuple[torch.nn.Module, torch.nn.Module], judged: tuple[Record, ...]):
    return loss_drops(AdapterView(untuned=models[0], tuned=models[1], records=judged))


def test_memorised_records_are_found(models) -> None:
    leakage = membership_leakage(scores(models, records(40, 1)), scores(models, records(200, 2)))
    assert leakage.auc > 0.95
    assert leakage.auc_low > 0.5
    assert leakage.found > 0.5


def test_records_that_were_never_seen_are_not_told_apart(models) -> None:
    leakage = membership_leakage(scores(models, records(200, 3)), scores(models, records(200, 2)))
    assert leakage.auc_low < 0.5 < leakage.auc_high
    assert leakage.found < 0.06


def test_a_memorised_canary_comes_first_and_an_unseen_one_anywhere(models) -> None:
    planted = exposure(scores(models, (records(40, 1)[0], *records(255, 4))), 0)
    unseen = [
        exposure(scores(models, (canary, *records(255, 4))), 0).rank / 256
        for canary in records(8, 5)
    ]
    assert planted.rank <= 3
    assert 0.15 < sum(unseen) / 8 < 0.85


def test_a_score_is_the_models_own_loss_whatever_it_is_padded_with(models) -> None:
    judged = records(5, 1)
    got = tuned_losses(AdapterView(untuned=models[0], tuned=models[1], records=judged))
    with torch.no_grad():
        alone = [
            -models[1](input_ids=r["input_ids"][None], labels=r["labels"][None]).loss
            for r in judged
        ]
    torch.testing.assert_close(got.float(), torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_record_without_a_trained_token_is_refused(models) -> None:
    ids = torch.tensor([5, 6, 7])
    with pytest.raises(DataError, match="record 0"):
        AdapterView(
            untuned=models[0],
            tuned=models[1],
            records=({"input_ids": ids, "labels": torch.full_like(ids, -100)},),
        )
