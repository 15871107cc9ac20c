"""Pairing of what crossed with the customer's texts: one to one, as near as can be."""

from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from blindtune.attacks.observation import SeenTexts
from blindtune.evaluation import owners
from blindtune.evaluation.owners import assigned, owners_of


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


def test_a_state_that_lies_nearest_to_anothers_text_goes_to_its_own(monkeypatch):
    monkeypatch.setattr(
        owners, "clean_states", lambda _, ids: [text[:, None].float() for text in ids]
    )
    ids = [torch.tensor([word]) for word in (0, 10, 30)] + [torch.tensor([5, 5])]
    states = [4.0, 7.0, 29.0]  # 4 and 7 crossed in noise
    seen = SeenTexts(
        states=(*(torch.tensor([[x]]) for x in states), torch.tensor([[0.0]]), torch.zeros(3, 1)),
        labels=(None,) * 5, times=(1,) * 5, tuned=(True, True, True, False, True),
    )  # fmt: skip
    assert owners_of(SimpleNamespace(), None, ids, seen) == {0: 0, 1: 1, 2: 2}
    few = [torch.tensor([10]), torch.tensor([30])]
    assert owners_of(SimpleNamespace(), None, few, seen) == {1: 0, 2: 1}
