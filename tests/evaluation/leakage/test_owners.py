"""Pairing of what crossed with the customer's texts: one to one, as near as can be."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from blindtune.attacks.observation import SeenTexts
from blindtune.evaluation.leakage import owners
from blindtune.evaluation.leakage.owners import Owners, assigned, owners_of


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (4, 6), (6, 4), (0, 3), (3, 0)])
def test_no_other_pairing_costs_less(rows, columns):
    draw = torch.Generator().manual_seed(rows + 10 * columns)
    for _ in range(20):
        cost_SN = torch.rand(rows, columns, generator=draw)
        found = assigned(cost_SN)
        taken = [column for column in found if column is not None]
        assert len(taken) == len(set(taken)) == min(rows, columns)
        cost = sum(float(cost_SN[row, c]) for row, c in enumerate(found) if c is not None)
        few, many = sorted((cost_SN, cost_SN.T), key=len)
        least = min(
            sum(float(few[row, column]) for row, column in enumerate(order))
            for order in permutations(range(len(many)), len(few))
        )
        assert cost == pytest.approx(least)


def test_equal_texts_each_get_one_of_equal_states():
    assert sorted(assigned(torch.zeros(4, 4))) == [0, 1, 2, 3]


@pytest.fixture
def bottom(monkeypatch):
    """One whose states without noise are the numbers of the words."""
    monkeypatch.setattr(
        owners, "clean_states", lambda _, ids: [text[:, None].float() for text in ids]
    )


def seen_of(states, tuned):
    count = len(states)
    return SeenTexts(states=states, labels=(None,) * count, times=(1,) * count, tuned=tuned)


@pytest.mark.usefixtures("bottom")
def test_a_state_that_lies_nearest_to_anothers_text_goes_to_its_own():
    ids = [torch.tensor([word]) for word in (0, 10, 30)] + [torch.tensor([5, 5])]
    states = [torch.tensor([[x]]) for x in (4.0, 7.0, 29.0, 0.0)]  # 4 and 7 crossed in noise
    seen = seen_of((*states, torch.zeros(3, 1)), (True, True, True, False, True))
    found = owners_of(SimpleNamespace(), None, ids, seen, drawn=False)
    assert found == Owners(own={0: 0, 1: 1, 2: 2}, again={})
    few = [torch.tensor([10]), torch.tensor([30])]
    assert owners_of(SimpleNamespace(), None, few, seen, drawn=False).own == {1: 0, 2: 1}


@pytest.mark.usefixtures("bottom")
@pytest.mark.parametrize("length", [4, 40])
def test_what_was_only_predicted_is_another_draw_or_another_text(length):
    draw = torch.Generator().manual_seed(length)
    ids = [torch.randint(0, 9, (length,), generator=draw) for _ in range(60)]
    clean = torch.stack(ids)[:, :, None].float()
    noisy = torch.cat([clean, clean]) + 0.1 * torch.randn(120, length, 1, generator=draw)
    others = torch.randint(0, 9, (50, length, 1), generator=draw).float()
    seen = seen_of((*noisy, *others), (*[True] * 40, *[False] * 130))
    found = owners_of(SimpleNamespace(), None, ids[:40], seen, drawn=True)
    assert found.own == {i: i for i in range(40)}
    assert {i: k for i, k in found.again.items() if i >= 100 or i < 60} == {}
    known = sum(found.again.get(60 + k) == k for k in range(40))
    assert 38 <= known <= 40
