import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny_training import copy_of, dataset, freeze_all_but, gpt2, llama

from blindtune.errors import ConfigError, OutputError, TrainingError
from blindtune.training import checkpoint, loop
from blindtune.training.batches import BatchOrder, collate
from blindtune.training.loop import RunConfig, TrainingConfig, fit
from blindtune.training.loss import count_targets

CONFIG = TrainingConfig(
    max_steps=6,
    learning_rate=1e-2,
    per_device_train_batch_size=3,
    gradient_accumulation_steps=2,
    warmup_steps=2,
    weight_decay=0.1,
)
RUN = RunConfig(eval_steps=2, save_steps=2)


def train(model, out, config=CONFIG, run=RUN, validation=7, on_progress=None, identity=None):
    return fit(
        model,
        dataset(21, seed=1),
        dataset(validation, seed=2) if validation else None,
        config,
        out,
        run=run,
        identity=identity,
        on_progress=on_progress,
    )


def tuned(model):
    return freeze_all_but(model, "layers.0")


def mean_loss(model, data):
    with torch.no_grad():
        parts = [
            (model(**(b := collate([row], 0))).loss * (n := count_targets(b["labels"])), n)
            for row in data
        ]
    return float(sum(p[0] for p in parts) / sum(p[1] for p in parts))


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_equals_a_plain_loop(tmp_path):
    """Slow oracle: whole effective batches, transformers' own loss, unfused AdamW."""
    config = replace(CONFIG, load_best_model_at_end=False)
    model, plain = tuned(llama()), tuned(llama())
    result = train(model, tmp_path, config)
    data = dataset(21, seed=1)
    trained = [p for p in plain.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    order = BatchOrder(examples=21, batch_size=6, accumulation=1, steps=6, seed=42)
    losses = []
    for step, indices in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(step / 2, (6 - step) / 4)
        loss = plain(**collate([data[i] for i in indices], 0)).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert [loss for _, loss in result.train_loss] == pytest.approx(losses, rel=1e-5)
    assert result.validation_loss[-1][1] == pytest.approx(
        mean_loss(model, dataset(7, seed=2)), rel=1e-5
    )


def test_only_what_requires_a_gradient_changes(tmp_path):
    model = tuned(llama())
    before = copy_of(model)
    result = train(model, tmp_path)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not model.training
    assert model.config.use_cache
    assert result.steps == 6
    assert [step for step, _ in result.validation_loss] == [2, 4, 6]
    assert result.peak_memory_bytes > 0
    assert result.tokens_per_second > 0


def test_bfloat16_multiplies_in_it_and_trains_float32(tmp_path):
    """What is trained is float32 all along; what is not is rounded once, and half as large."""
    model, before, seen = tuned(llama()), copy_of(llama()), set()
    layers = model.model.layers

    def note(layer, _, output):
        seen.add((layer.weight.requires_grad, layer.weight.dtype, output.dtype))

    hooks = [layers[i].mlp.up_proj.register_forward_hook(note) for i in (0, 1)]
    found = train(model, tmp_path / "half", run=replace(RUN, precision="bfloat16"))
    assert seen == {
        (True, torch.float32, torch.bfloat16),
        (False, torch.bfloat16, torch.bfloat16),
    }
    for hook in hooks:
        hook.remove()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name].bfloat16().float())
    whole = train(tuned(llama()), tmp_path / "whole")
    losses, expected = ([loss for _, loss in run.validation_loss] for run in (found, whole))
    assert losses == pytest.approx(expected, rel=0.01)
    assert losses != expected
    with pytest.raises(ConfigError, match="precision"):
        train(tuned(llama()), tmp_path / "half")


def test_checkpoints_hold_only_the_trained_parameters(tmp_path):
    model = tuned(llama())
    train(model, tmp_path)
    folder = tmp_path / "checkpoints"
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    with safe_open(folder / "checkpoint-6" / checkpoint.WEIGHTS_NAME, "pt") as file:
        names = set(file.keys())
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not list(folder.glob(".*"))


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def stop(report):
        if report.step == step:
            raise Interrupted

    return stop


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_resume_is_bit_identical(tmp_path, step):
    undisturbed = train(whole := gpt2(dropout=0.2), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(gpt2(dropout=0.2), tmp_path / "parts", on_progress=interrupt_at(step))
    resumed = train(parts := gpt2(dropout=0.2), tmp_path / "parts")
    assert same(copy_of(whole), copy_of(parts))
    assert resumed.train_loss == undisturbed.train_loss
    assert resumed.validation_loss == undisturbed.validation_loss
    assert resumed.tokens == undisturbed.tokens
    assert resumed.resumed_from == ((step - 1) // 2 * 2 or None)


def test_going_on_reads_the_trainers_file_once(tmp_path, monkeypatch):
    """It holds two moments a weight; the random states are a few kilobytes of it."""
    with pytest.raises(Interrupted):
        train(gpt2(), tmp_path, on_progress=interrupt_at(3))
    read, real = [], checkpoint.load_trainer
    monkeypatch.setattr(checkpoint, "load_trainer", lambda path: read.append(path) or real(path))
    assert train(gpt2(), tmp_path).resumed_from == 2
    assert len(read) == 1


def test_evaluation_does_not_disturb_training(tmp_path):
    config = replace(CONFIG, load_best_model_at_end=False)
    train(often := gpt2(dropout=0.2), tmp_path / "often", config, RunConfig(eval_steps=1))
    train(never := gpt2(dropout=0.2), tmp_path / "never", config, validation=None)
    assert same(copy_of(often), copy_of(never))


def test_a_finished_run_is_not_repeated(tmp_path):
    first = train(model := tuned(llama()), tmp_path)
    reports = []
    second = train(again := tuned(llama()), tmp_path, on_progress=reports.append)
    assert not reports
    assert same(copy_of(model), copy_of(again))
    assert (second.train_loss, second.tokens) == (first.train_loss, first.tokens)
    third = train(tuned(llama()), tmp_path, run=replace(RUN, resume="never"))
    assert third.resumed_from is None


@pytest.mark.parametrize(
    ("config", "model", "named"),
    [
        (replace(CONFIG, learning_rate=2e-2), llama, "learning_rate 0.01 -> 0.02"),
        (CONFIG, gpt2, "model"),
        (replace(CONFIG, gradient_accumulation_steps=1), llama, "effective_batch 6 -> 3"),
    ],
)
def test_another_run_does_not_go_on(tmp_path, config, model, named):
    train(tuned(llama()), tmp_path)
    other = freeze_all_but(model(), ".0.")
    with pytest.raises(ConfigError, match=named):
        train(other, tmp_path, config)


@pytest.mark.parametrize("other", [{"lora_alpha": 1.0}, {"lora_alpha": 32.0, "rank": 4}, None])
def test_what_the_caller_names_is_part_of_the_run(tmp_path, other):
    train(tuned(llama()), tmp_path, identity={"lora_alpha": 32.0})
    assert train(tuned(llama()), tmp_path, identity={"lora_alpha": 32}).resumed_from == 6
    with pytest.raises(ConfigError, match=r"lora_alpha 32.0 -> (1.0|None)|rank None -> 4"):
        train(tuned(llama()), tmp_path, identity=other)


def test_other_steps_of_evaluation_are_another_run(tmp_path):
    train(tuned(llama()), tmp_path)
    with pytest.raises(ConfigError, match="eval_steps 2 -> 3"):
        train(tuned(llama()), tmp_path, run=RunConfig(eval_steps=3, save_steps=2))


def test_without_validation_the_steps_of_evaluation_decide_nothing(tmp_path):
    train(tuned(llama()), tmp_path, validation=None)
    other = RunConfig(eval_steps=3, save_steps=2)
    assert train(tuned(llama()), tmp_path, run=other, validation=None).resumed_from == 6


def test_another_split_of_the_same_effective_batch_goes_on(tmp_path):
    with pytest.raises(Interrupted):
        train(tuned(llama()), tmp_path, on_progress=interrupt_at(3))
    config = replace(CONFIG, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    assert train(tuned(llama()), tmp_path, config).resumed_from == 2


def test_best_weights_and_early_stopping(tmp_path):
    """A learning rate that overfits 21 random examples at once makes validation worse."""
    model = llama()
    config = replace(
        CONFIG, max_steps=60, learning_rate=5e-2, warmup_steps=0, early_stopping_patience=3
    )
    result = train(model, tmp_path, config, RunConfig(eval_steps=1, save_steps=100))
    losses = [loss for _, loss in result.validation_loss]
    assert result.steps < 60
    assert result.best_step == 1 + losses.index(min(losses))
    assert result.steps == result.best_step + 3
    assert mean_loss(model, dataset(7, seed=2)) == pytest.approx(min(losses), rel=1e-5)
    again = train(other := llama(), tmp_path, config, RunConfig(eval_steps=1, save_steps=100))
    assert again.steps == result.steps
    assert same(copy_of(model), copy_of(other))
    bests = list((tmp_path / "checkpoints").glob("best-*"))
    assert [p.name for p in bests] == [f"best-{result.best_step}.safetensors"]


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    model = tuned(llama())
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(
        TrainingError, match=r"step 1: expected a finite training loss, got nan.*try"
    ):
        train(model, tmp_path)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path):
    model = tuned(llama())
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * float("inf"))
    before = copy_of(model)
    with pytest.raises(TrainingError, match="step 1: expected a finite gradient norm"):
        train(model, tmp_path)
    assert same(before, copy_of(model))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    real = torch.save

    def full(value, path):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        real(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"checkpoint-4.*No space left"):
        train(tuned(llama()), tmp_path)
    folder = tmp_path / "checkpoints"
    assert [p.name for p in folder.glob("*checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train(whole := tuned(llama()), tmp_path / "whole")
    assert train(model := tuned(llama()), tmp_path).resumed_from == 2
    assert same(copy_of(whole), copy_of(model))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(tuned(llama()), tmp_path, on_progress=interrupt_at(3))
    weights = tmp_path / "checkpoints" / "checkpoint-2" / checkpoint.WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"cannot read.*resume=never"):
        train(tuned(llama()), tmp_path)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    train(plain := tuned(llama()), tmp_path / "plain")
    model = tuned(llama())
    train(model, tmp_path / "saved", run=replace(RUN, gradient_checkpointing=True))
    assert same(copy_of(plain), copy_of(model))
    assert not model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_alone_cleans_the_folder(tmp_path, rank):
    train(tuned(llama()), tmp_path)
    folder = tmp_path / "checkpoints"
    left = folder / ".checkpoint-9.01234567.partial"
    left.mkdir()
    identity = json.loads((folder / "run.json").read_text())
    alone = SimpleNamespace(output_dir=folder, process_index=rank, world_size=1)
    start = loop._prepare_folder(identity, RUN, alone)
    assert (start.name, left.exists()) == ("checkpoint-6", rank == 1)


def test_reports_and_tensorboard(tmp_path):
    reports = []
    run = replace(RUN, tensorboard=True, threads=1)
    train(tuned(llama()), tmp_path, run=run, on_progress=reports.append)
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].max_steps == 6
    assert reports[-1].validation_loss is not None
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by peft
def test_lora_parameters_alone_are_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    train(model, tmp_path)
    again = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    train(again, tmp_path)  # other random A, but the run is finished: the weights come back
    assert same(copy_of(model), copy_of(again))


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"num_train_epochs": float("inf")},
        {"max_steps": 0},
        {"per_device_train_batch_size": 0},
        {"warmup_steps": -1},
        {"lr_scheduler_type": "polynomial"},
        {"early_stopping_patience": 0},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_early_stopping_needs_validation(tmp_path):
    with pytest.raises(ConfigError, match="validation"):
        train(llama(), tmp_path, replace(CONFIG, early_stopping_patience=1), validation=None)
    assert not list(tmp_path.iterdir())
