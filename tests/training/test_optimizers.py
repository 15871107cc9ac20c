import pytest
import torch
from tiny_training import freeze_all_but, gpt2

from blindtune.errors import ConfigError
from blindtune.training.optimizers import build_optimizer, build_scheduler


def test_vectors_are_not_decayed_and_frozen_parameters_are_left_out():
    model = freeze_all_but(gpt2(), "h.0.")
    decayed, plain = build_optimizer(model, 1e-3, 0.1).param_groups
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in decayed["params"] + plain["params"]} == {id(p) for p in trained}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="all are frozen"):
        build_optimizer(freeze_all_but(gpt2(), "no such name"), 1e-3)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(name, wanted):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), 1.0)
    schedule = build_scheduler(optimizer, name, warmup_steps=2, max_steps=4)
    rates = []
    for _ in wanted:
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(wanted)
