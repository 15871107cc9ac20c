"""Split tuning without noise is the centralised one; with faults it is still the same."""

import copy
from contextlib import contextmanager

import pytest
import torch
from split_world import CONFIG, FAST, LABELS, TEXTS, World, build
from torch.nn.functional import cross_entropy

from blindtune.errors import PolicyError, VerificationError
from blindtune.exchange.wire.messages import (
    Backward,
    Batch,
    BatchResult,
    Checkpoint,
    Checkpointed,
    Forward,
    Gradients,
    Outputs,
    Predict,
    Predictions,
    Status,
    Step,
    Stepped,
)
from blindtune.split.customer.private_states import PrivateStates
from blindtune.split.customer.remote import RemoteTrunk
from blindtune.split.customer.requests import PassConfig, new_token, predict, train
from blindtune.split.customer.ushape import Top, go_on, predict_u_shape, train_u_shape
from blindtune.split.partition import (
    PooledHead,
    default_pooling,
    feature_size,
    run_bottom,
    run_vendor,
    stack_of,
)
from blindtune.split.terms import TuningConfig

PLAN = PassConfig(epochs=2, batch_size=3, accumulate=2, precision="float32", checkpoint_steps=2)


class Central:
    """Ordinary LoRA tuning of the unsplit model, written without any code of the split."""

    def __init__(self, world, config=CONFIG, *, head_seed=None, outputs=2, lm=False):
        from peft import LoraConfig, inject_adapter_in_model

        self.model = copy.deepcopy(world.model).requires_grad_(False).eval()
        stack = stack_of(self.model)
        names = [
            f"{stack.family.layers}.{i}.{n}"
            for i in world.cut.vendor_layers
            for n, m in stack.layers[i].named_modules()
            if not list(m.children()) and type(m).__name__ in ("Linear", "Conv1D")
        ]
        torch.manual_seed(config.seed)
        fused = type(self.model.get_submodule(names[0])).__name__ == "Conv1D"
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names,
            fan_in_fan_out=fused,
        )  # fmt: skip
        inject_adapter_in_model(lora, self.model)
        self.lora = [p for p in self.model.parameters() if p.requires_grad]
        if head_seed is not None:
            torch.manual_seed(head_seed)
        self.head = None if lm else PooledHead(feature_size(stack), outputs, default_pooling(stack))
        self.optimizer = torch.optim.AdamW(
            [*self.lora, *([] if lm else self.head.parameters())],
            lr=config.learning_rate, weight_decay=0.0,
        )  # fmt: skip
        self.tokenizer = world.bottom.tokenizer
        self.stack, self.config = stack, config

    def loss(self, texts, labels):
        coded = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids, mask = coded["input_ids"], coded["attention_mask"]
        if self.head is None:
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            kept = mask[:, 1:].bool()
            return cross_entropy(logits[kept], ids[:, 1:][kept])
        return cross_entropy(self.head(self.features(ids, mask), mask), labels)

    def features(self, ids, mask):
        backbone = self.model
        if hasattr(self.stack, "head"):
            backbone = self.model.get_submodule(self.stack.family.layers.rpartition(".")[0])
        return backbone(input_ids=ids, attention_mask=mask).last_hidden_state

    def train(self, plan, clip=True):
        losses = []
        for step in plan.steps(len(TEXTS)):
            for indices in step:
                loss = self.loss([TEXTS[i] for i in indices], LABELS[indices])
                (loss * len(indices) / sum(map(len, step))).backward()
                losses.append(float(loss.detach()))
            if clip:
                everything = [p for group in self.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(everything, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses


@pytest.mark.parametrize(
    ("name", "cut"), [("bert", 0), ("bert", 2), ("mpnet", 1), ("smollm2", 3), ("gpt2", 1)]
)
def test_two_part_training_is_the_centralised_one(tmp_path, name, cut):
    world = World(tmp_path, name, cut=cut)
    central = Central(world)
    expected = central.train(PLAN)
    with_job = world.job()
    private = world.private()
    losses = train(with_job, private, PLAN)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert losses[-1] != pytest.approx(losses[0])
    logits = predict(with_job, private, batch_size=4, precision="float32")
    coded = world.bottom.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        features = central.features(coded["input_ids"], coded["attention_mask"])
        whole = central.head(features, coded["attention_mask"])
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)
    with_job.close()


@pytest.mark.parametrize(("name", "last"), [("smollm2", 1), ("gemma2", 0)])
def test_u_shape_language_modelling_is_the_centralised_one(tmp_path, name, last):
    world = World(tmp_path, name, "u-shape", cut=1, last=last)
    expected = Central(world, lm=True).train(PLAN)
    job = world.job()
    private = world.private()
    top = Top(world.bottom, None)
    losses = train_u_shape(job, top, private, PLAN, language_model=True)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert len(predict_u_shape(job, top, private, batch_size=4)) == 3
    job.close()


def head_of(world, seed=5):
    torch.manual_seed(seed)
    stack = world.bottom.stack
    return PooledHead(feature_size(stack), 2, default_pooling(stack))


def test_u_shape_classification_is_the_centralised_one(tmp_path):
    config = TuningConfig(lora_rank=2, learning_rate=1e-2, seed=3, max_grad_norm=0)
    world = World(tmp_path, "roberta", "u-shape", cut=1, last=1)
    expected = Central(world, config, head_seed=5).train(PLAN, clip=False)
    job = world.job(config)
    top = Top(world.bottom, head_of(world), learning_rate=1e-2)
    losses = train_u_shape(job, top, world.private(), PLAN, language_model=False)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=2e-4)
    job.close()


DROPOUT = TuningConfig(
    lora_rank=2, learning_rate=1e-2, lora_dropout=0.3, schedule="linear", warmup_steps=1,
    max_steps=8,
)  # fmt: skip


@pytest.mark.parametrize("kill_after", [1, 4, 6, 7])
def test_a_killed_vendor_ends_where_an_undisturbed_one_ends(tmp_path, kill_after):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    calm, rough = World(tmp_path / "a"), World(tmp_path / "b")
    token = new_token()
    expected = train(calm.job(DROPOUT, token=token), calm.private(), PLAN)

    def kill(_loss, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == kill_after:
            rough.start()

    job = rough.job(DROPOUT, token=token)
    losses = train(job, rough.private(), PLAN, on_loss=kill)
    assert losses == expected
    assert rough.life == 2
    first, second = (
        predict(world.job(DROPOUT, token=token), world.private(), precision="float32")
        for world in (calm, rough)
    )
    assert torch.equal(first, second)


def test_a_killed_customer_goes_on_where_the_vendor_is(tmp_path):
    world, token = World(tmp_path), new_token()
    world.private().save(tmp_path / "private.safetensors")
    job = world.job(DROPOUT, token=token)

    class Killed(Exception):
        pass

    def kill(_loss, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise Killed

    private = PrivateStates.load(tmp_path / "private.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(private.ids, world.private().ids, strict=True))
    with pytest.raises(Killed):
        train(job, private, PLAN, on_loss=kill)
    job.close()
    again = world.job(DROPOUT, token=token)
    assert again.job.applied > 4
    train(again, private, PLAN, applied=again.job.applied)
    state = again.job
    assert (state.job, again.call(Status()).steps) == (job.job.job, 4)
    (tmp_path / "calm").mkdir()
    calm = World(tmp_path / "calm")
    whole = calm.job(DROPOUT)
    train(whole, calm.private(), PLAN)
    first = predict(whole, private, precision="float32")
    assert torch.equal(first, predict(again, private, precision="float32"))


@pytest.mark.parametrize("vendor_stored", [True, False])
def test_u_shape_resumes_both_parties_at_the_same_step(tmp_path, vendor_stored):
    (tmp_path / "calm").mkdir()
    calm = World(tmp_path / "calm", "bert", "u-shape", cut=1, last=1)
    expected = train_u_shape(
        calm.job(), Top(calm.bottom, head_of(calm)), calm.private(), PLAN, language_model=False
    )
    world = World(tmp_path, "bert", "u-shape", cut=1, last=1)
    token, private = new_token(), world.private()
    top = Top(world.bottom, head_of(world), directory=tmp_path)

    class Killed(Exception):
        pass

    def kill(_loss, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 6:
            raise Killed

    job = world.job(token=token)
    with pytest.raises(Killed):
        train_u_shape(job, top, private, PLAN, language_model=False, on_loss=kill)
    job.close()
    world.start()
    if not vendor_stored:  # killed between the customer's state and the vendor's checkpoint
        newest = max((tmp_path / "vendor").rglob("at-*.pt"), key=lambda p: int(p.stem[3:]))
        newest.unlink()
        world.start()
    top = Top(world.bottom, head_of(world), directory=tmp_path)
    job, at = go_on(world.connect, top, token, retries=FAST)
    assert (at > 0) == vendor_stored
    losses = train_u_shape(job, top, private, PLAN, language_model=False, applied=at)
    assert 0 < len(losses) <= len(expected)
    assert losses == expected[-len(losses) :]
    assert (len(losses) < len(expected)) == vendor_stored
    job.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_going_on_with_a_job_that_ended_touches_nothing(tmp_path, restarted):
    world = World(tmp_path, "bert", "u-shape", cut=1, last=1)
    token = new_token()
    job = world.job(token=token)
    train_u_shape(job, Top(world.bottom, head_of(world), directory=tmp_path), world.private(), PLAN,
                  language_model=False)  # fmt: skip
    job.close()
    (ended,) = world.vendor._jobs
    world.vendor._jobs.cancel(ended)
    if restarted:
        world.start()
    top = Top(world.bottom, head_of(world), directory=tmp_path)
    kept = top.numbers()
    assert kept
    with pytest.raises(PolicyError, match="was cancelled: begin another job"):
        go_on(world.connect, top, token, retries=FAST)
    assert top.numbers() == kept


def test_models_agree_before_training(tmp_path):
    """LoRA starts as nothing: an untrained job predicts what the base and its head predict."""
    world = World(tmp_path, "bert", cut=1)
    job, central = world.job(), Central(world)
    assert torch.equal(build("bert").embeddings.word_embeddings.weight,
                       world.bottom.stack.embedding.weight)  # fmt: skip
    logits = predict(job, world.private(), batch_size=10, precision="float32")
    loss = cross_entropy(logits, LABELS)
    torch.testing.assert_close(loss, central.loss(TEXTS, LABELS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "lie",
    [
        {Batch: lambda m: Stepped(sequence=m.sequence, steps=1, gradient_norm=0.0)},
        {Batch: lambda m: BatchResult(sequence=m.sequence + 1, loss=0.5, metrics={})},
        {Step: lambda m: Checkpointed(sequence=m.sequence)},
        {Checkpoint: lambda m: Checkpointed(sequence=m.sequence - 1)},
        {Predict: lambda m: Predictions(logits_BC=torch.zeros(len(m.lengths) + 1, 2))},
        {Predict: lambda m: Predictions(logits_BC=torch.zeros(len(m.lengths), 3))},
        {Predict: lambda m: Outputs(sequence=None, hidden_TD=m.hidden_TD)},
        {Forward: lambda m: Outputs(sequence=m.sequence, hidden_TD=m.hidden_TD[:, :-1])},
        {Forward: lambda m: Gradients(sequence=m.sequence)},
        {Backward: lambda m: Outputs(sequence=m.sequence, hidden_TD=m.gradient_TD)},
        {Backward: lambda m: Gradients(sequence=m.sequence, gradient_TD=m.gradient_TD)},
    ],
)
def test_a_vendor_that_answers_something_else_is_noticed(tmp_path, lie):
    u_shape = bool({Forward, Backward} & set(lie))
    world = World(tmp_path, partition="u-shape" if u_shape else "two-part")
    session = world.vendor.session

    @contextmanager
    def lying(customer):
        with session(customer) as handler:
            yield lambda message: lie.get(type(message), handler)(message)

    world.vendor.session = lying
    job, private = world.job(), world.private()

    def run():
        if u_shape:
            top = Top(world.bottom, head_of(world))
            return train_u_shape(job, top, private, PLAN, language_model=False)
        train(job, private, PLAN)
        return predict(job, private, outputs=2)

    with pytest.raises(VerificationError):
        run()
    job.close()


def test_gradients_reach_what_the_customer_tunes_below_the_cut(tmp_path):
    world = World(tmp_path, partition="u-shape", cut=1, last=1)
    job = world.job()
    trunk, top = RemoteTrunk(job, precision="float32"), Top(world.bottom, head_of(world))
    coded = world.bottom.tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    mask = coded["attention_mask"]
    below, whole = (torch.zeros(32, requires_grad=True) for _ in range(2))

    def states(shift):
        return run_bottom(
            world.bottom.stack, world.cut, world.bottom.stack.begin(coded["input_ids"], mask)
        ) + shift  # fmt: skip

    top.loss(trunk(states(below), mask), mask, LABELS[:2]).backward()
    local = run_vendor(stack_of(world.model), world.cut, states(whole), mask)
    top.loss(local, mask, LABELS[:2]).backward()
    torch.testing.assert_close(below.grad, whole.grad, rtol=1e-4, atol=1e-6)
    assert trunk.applied == 2
    job.close()
