"""DP-SGD against slow oracles: clipping, noise, sampling, the account, and a killed run."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import FAMILIES, copy_of, dataset, freeze_all_but, llama

from blindtune.errors import ConfigError, TrainingError
from blindtune.privacy.entropy import system_uniforms
from blindtune.training import private_sgd
from blindtune.training.batches import collate
from blindtune.training.config import RunConfig, TrainingConfig
from blindtune.training.dp_plan import DpConfig, DpPlan, plan_noise
from blindtune.training.loss import next_token_loss, record_losses
from blindtune.training.private_sgd import add_clipped, fit_private, gaussian

CONFIG = TrainingConfig(
    learning_rate=1e-2, max_steps=4, per_device_train_batch_size=4, lr_scheduler_type="constant"
)
RUN = RunConfig(silent=True, save_steps=1)
PART = {"llama": "layers.0.", "gpt2": "h.0.", "gemma2": "layers.0.", "opt": "self_attn"}


def plan_of(records=21, **changes):
    plan = DpPlan(
        epsilon=1.0, delta=1e-3, unit="record", noise_multiplier=0.0, sampling_rate=4 / records,
        steps=4, max_grad_norm=1.0, expected_batch=4.0,
    )  # fmt: skip
    return replace(plan, **changes)


def everything(*shape):
    """Every record is drawn; noise of these numbers is finite."""
    return torch.full(shape, 1e-9, dtype=torch.float64)


def lora(model):
    config = LoraConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, config)


def per_record_gradients(model, data):
    """The slow way: one record, one backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for i in range(len(data)):
        loss = record_losses(model, collate([data[i]], 0), logits_to_keep=False).sum()
        yield torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sums_are_those_of_one_record_after_the_other(family):
    model, data = freeze_all_but(FAMILIES[family](), PART[family]), dataset(7, seed=3)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected, norms = [torch.zeros_like(p) for p in trained], []
    for gradients in per_record_gradients(model, data):
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, 0.5 / norms[-1])
    assert min(norms) > 0.5 or max(norms) > 0.5  # something is clipped
    sums = [torch.zeros_like(p) for p in trained]
    with private_sgd._per_record(model):
        batch = collate([data[i] for i in range(7)], 0)
        record_losses(model, batch, logits_to_keep=True).sum().backward()
        add_clipped(sums, trained, 0.5, 7)
    for total, wanted in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-6)


def test_record_losses_are_means_over_own_targets():
    model, data = llama(), dataset(5, seed=1)
    records = [data[i] for i in range(5)]
    found = record_losses(model, collate(records, 0), logits_to_keep=True).detach()
    for loss, record in zip(found, records, strict=True):
        batch = collate([record], 0)
        targets = int((batch["labels"][:, 1:] != -100).sum())
        alone = next_token_loss(model, batch, logits_to_keep=True).detach() / targets
        assert float(loss) == pytest.approx(float(alone), rel=1e-5)


def test_without_noise_and_clipping_it_is_an_ordinary_step(tmp_path):
    data, model = dataset(8, seed=2), lora(llama())
    twin = lora(llama())
    config, plan = replace(CONFIG, max_steps=1), plan_of(8, steps=1, max_grad_norm=1e9)
    fit_private(model, data, config, plan, tmp_path, uniforms=everything, run=RUN)
    trained = [p for p in twin.parameters() if p.requires_grad]
    batch = collate([data[i] for i in range(8)], 0)
    (record_losses(twin, batch, logits_to_keep=True).sum() / 4.0).backward()
    torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0).step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_one_record_moves_the_sum_by_no_more_than_c(tmp_path, monkeypatch):
    """Neighbouring data: the gradients of a step, before noise, differ by C / expected batch."""
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step",
        lambda self: seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]]),
    )  # fmt: skip
    whole = dataset(9, seed=5)
    for records in (whole, whole._subset(range(8))):
        plan = plan_of(8, steps=1, max_grad_norm=0.1)
        fit_private(
            lora(llama()), records, replace(CONFIG, max_steps=1), plan, tmp_path / str(len(seen)),
            uniforms=everything, run=RUN,
        )  # fmt: skip
    distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*seen, strict=True)))
    assert 0 < distance <= 0.1 / 4.0 + 1e-6


def test_noise_has_the_deviation_of_the_plan(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step",
        lambda self: seen.extend(p.grad for g in self.param_groups for p in g["params"]),
    )  # fmt: skip
    plan = plan_of(sampling_rate=1e-12, noise_multiplier=3.0, max_grad_norm=0.5, steps=1)
    model = freeze_all_but(llama(), "layers.0.")
    fit_private(
        model, dataset(21, seed=1), replace(CONFIG, max_steps=1), plan, tmp_path,
        uniforms=system_uniforms, run=RUN,
    )  # fmt: skip
    noise = torch.cat([g.flatten() for g in seen]).double()  # an empty step: nothing but noise
    expected = 3.0 * 0.5 / 4.0
    assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(len(noise))


def test_gaussian_numbers_are_gaussian():
    drawn = gaussian(system_uniforms, torch.Size([40_001])).sort().values
    assert drawn.shape == (40_001,)
    cdf = torch.distributions.Normal(0.0, 1.0).cdf(drawn)
    steps = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    assert float((cdf - steps).abs().max()) < 2.0 / math.sqrt(len(drawn))  # p about 1e-3


def test_every_record_is_drawn_with_the_same_chance(tmp_path, monkeypatch):
    counts = []

    def count(model, train, config, plan, uniforms, step):
        counts.append((uniforms(len(train)) <= plan.sampling_rate).double())
        return 0.0, 1

    monkeypatch.setattr(private_sgd, "_private_step", count)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    run = RunConfig(silent=True, save_steps=10**6)
    plan = plan_of(sampling_rate=0.2, steps=600)
    model = freeze_all_but(llama(), "layers.0.self_attn.q_proj")
    fit_private(
        model, dataset(21, seed=1), CONFIG, plan, tmp_path, uniforms=system_uniforms, run=run
    )
    drawn = torch.stack(counts)
    bound = 5 * math.sqrt(0.2 * 0.8 / 600)
    assert float((drawn.mean(0) - 0.2).abs().max()) < bound
    sizes = drawn.sum(1)  # Poisson sampling: the size of a step varies as a binomial's does
    assert float(sizes.var()) == pytest.approx(21 * 0.2 * 0.8, rel=0.35)


def test_the_account_is_that_of_the_accountant():
    from opacus.accountants import PRVAccountant

    plan = plan_noise(DpConfig(epsilon=3.0, delta=1e-4), replace(CONFIG, max_steps=50), 100)
    assert plan.steps == 50
    assert plan.sampling_rate == 0.04
    accountant = PRVAccountant()
    for _ in range(50):
        accountant.step(noise_multiplier=plan.noise_multiplier, sample_rate=0.04)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)
        spent = accountant.get_epsilon(delta=1e-4)
    assert spent == pytest.approx(plan.epsilon, rel=1e-3)
    assert 2.9 < plan.epsilon <= 3.0
    more = plan_noise(DpConfig(epsilon=1.0, delta=1e-4), replace(CONFIG, max_steps=50), 100)
    assert more.noise_multiplier > plan.noise_multiplier


@pytest.mark.parametrize(
    ("privacy", "training", "records", "says"),
    [
        (DpConfig(epsilon=1.0), replace(CONFIG, early_stopping_patience=2), 100, "early_stopping"),
        (DpConfig(epsilon=1.0), CONFIG, 7, "at least 8 records"),
    ],
)
def test_plans_that_would_promise_too_much_are_refused(privacy, training, records, says):
    with pytest.raises(ConfigError, match=says):
        plan_noise(privacy, training, records)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", math.inf),
        ("delta", 1.0),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.inf),
        ("unit", "x"),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        DpConfig(**{field: value})


class Killed(Exception):
    pass


def test_threads_are_the_runs_and_put_back_after_a_fault(tmp_path):
    before, seen = torch.get_num_threads(), []

    def stop(_report):
        seen.append(torch.get_num_threads())
        raise Killed

    model = freeze_all_but(llama(), "layers.0.self_attn.q_proj")
    with pytest.raises(Killed):
        fit_private(
            model, dataset(21, seed=1), CONFIG, plan_of(), tmp_path, uniforms=everything,
            run=replace(RUN, threads=before + 1), on_progress=stop,
        )  # fmt: skip
    assert (seen, torch.get_num_threads(), model.training) == ([before + 1], before, False)


def test_a_killed_run_goes_on_and_takes_as_many_steps(tmp_path):
    seen = []

    def die(report):
        seen.append(report.step)
        if report.step == 2 and len(seen) == 2:
            raise Killed

    data, plan = dataset(21, seed=1), plan_of(noise_multiplier=1.0)

    def go():
        model = lora(llama())
        before = copy_of(model)
        result = fit_private(
            model, data, CONFIG, plan, tmp_path, uniforms=system_uniforms, run=RUN,
            on_progress=die,
        )  # fmt: skip
        return result, before, model

    with pytest.raises(Killed):
        go()
    result, before, model = go()
    assert seen == [1, 2, 3, 4]
    assert (result.steps, result.resumed_from) == (4, 2)
    assert [step for step, _ in result.train_loss] == [1, 2, 3, 4]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="noise_multiplier"):
        fit_private(
            lora(llama()), data, CONFIG, replace(plan, noise_multiplier=0.5), tmp_path,
            uniforms=system_uniforms, run=RUN,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"tensorboard": True}, "tensorboard"),
        ({"precision": "bfloat16"}, "precision float32"),
        ({"eval_steps": 2, "logging_steps": 5}, "no eval_steps or logging_steps with"),
        ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size"),
    ],
)
def test_runs_that_cannot_be_private_are_refused(tmp_path, option, says):
    with pytest.raises(ConfigError, match=says):
        fit_private(
            llama(), dataset(21, seed=1), CONFIG, plan_of(), tmp_path, uniforms=everything,
            run=replace(RUN, **option),
        )  # fmt: skip


def test_layers_that_mix_records_are_refused(tmp_path):
    model = freeze_all_but(FAMILIES["opt"](), "fc1")
    with pytest.raises(ConfigError, match="gradient of every record"):
        fit_private(
            model, dataset(21, seed=1), CONFIG, plan_of(), tmp_path, uniforms=everything, run=RUN
        )
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_gradients_that_are_no_numbers_are_refused(tmp_path):
    model = freeze_all_but(llama(), "layers.0.self_attn.q_proj")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="finite"):
        fit_private(
            model, dataset(21, seed=1), CONFIG, plan_of(), tmp_path, uniforms=everything, run=RUN
        )


def test_a_norm_that_would_not_be_used_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no max_grad_norm with .* to dp_max_grad_norm"):
        fit_private(
            llama(), dataset(21, seed=1), replace(CONFIG, max_grad_norm=0.5), plan_of(), tmp_path,
            uniforms=everything, run=RUN,
        )  # fmt: skip
