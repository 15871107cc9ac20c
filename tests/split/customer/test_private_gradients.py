"""DP-SGD of the U-shape: what leaves through gradients, and that nothing is noised twice."""

import csv
import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest
import torch
from customer_world import OPEN, PASSES, QUICK, TUNING, write_table
from safetensors.torch import save_file
from scipy.optimize import brentq
from scipy.stats import norm
from split_world import FAST, LABELS, TEXTS, World

import blindtune
from blindtune.attacks.label_inference import groups_of_gradients
from blindtune.attacks.observation import seen_gradients, seen_texts
from blindtune.cli.main import run
from blindtune.errors import ConfigError, DataError, NetworkError, PolicyError
from blindtune.exchange.wire.messages import Backward, Forward, Outputs, Predict, Step, equal
from blindtune.exchange.wire.transcript import Recorder
from blindtune.split.customer import tuning_job, ushape
from blindtune.split.customer.job import CustomerJob
from blindtune.split.customer.private_gradients import (
    GradientConfig,
    GradientNoise,
    GradientPlan,
    plan_gradients,
)
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, PlannedBatch, new_token
from blindtune.split.customer.ushape import Top, customers_head, go_on, train_u_shape
from blindtune.training.dp_plan import DpConfig

PLAN = PassConfig(epochs=3, batch_size=4, precision="float32", checkpoint_steps=2)
DP = GradientConfig(epsilon=8.0, delta=1e-5)
WORDS = ReadingConfig(task="language-model", max_length=8)
TRUE = replace(OPEN, targets="true")
NO_NOISE = GradientPlan(
    epsilon=1e9, delta=0.0, unit="record", passes=3, max_grad_norm=1e6, scaled=False,
    sensitivity=1.0, noise_multiplier=0.0,
)  # fmt: skip


def u_shape(folder, name="bert", **options):
    folder.mkdir(exist_ok=True)
    return World(folder, name, "u-shape", cut=1, last=1, **options)


def tuned(world, dp=DP, recorder=None, privatizer=OPEN, **options):
    data = options.pop("data", None) or write_table(world.folder / "train.csv")
    return blindtune.split_tune(
        lambda: world.connect(tap=recorder), world.folder / "bottom", data, world.folder / "job",
        privatizer, TUNING, options.pop("passes", PASSES), dp=dp, access=QUICK, silent=True,
        **options,
    )  # fmt: skip


def batch_of(size, number=2, step_texts=None):
    return PlannedBatch(
        step=1, texts=list(range(size)), step_texts=step_texts or size, number=number,
        ends_step=True, checkpoint=False,
    )  # fmt: skip


def noised(plan, gradient, step_texts=None):
    """What becomes of the gradient of a sum, whose rows are its records' gradients."""
    tensor, share = torch.zeros_like(gradient, requires_grad=True), step_texts or len(gradient)
    batch = batch_of(len(gradient), step_texts=share)
    GradientNoise(plan, None).cover(through := tensor * 1, batch)
    (through * gradient / share).sum().backward()
    return tensor.grad * share


def exact_noise(epsilon, delta, releases):
    """The least noise over sensitivity of a Gaussian mechanism (arXiv 1805.06530, theorem 8)."""

    def excess(mu):
        spent = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
            -mu / 2 - epsilon / mu
        )
        return spent - delta

    return math.sqrt(releases) / brentq(excess, 1e-2, 50)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("passes", [1, 3, 30])
def test_the_noise_is_hardly_more_than_an_exact_account_needs(epsilon, passes):
    config = GradientConfig(epsilon=epsilon, delta=1e-5)
    plan = plan_gradients(config, "regression", 500, passes)
    exact = exact_noise(epsilon, 1e-5, passes)
    assert exact <= plan.noise_multiplier <= 1.03 * exact
    assert plan.epsilon <= epsilon
    assert plan.sensitivity == 2.0


def test_a_plan_follows_from_what_is_told_before():
    plan = plan_gradients(GradientConfig(epsilon=2.0), "classification", 500, 2)
    assert plan.delta == pytest.approx(1 / 5000)
    assert plan.sensitivity == pytest.approx(math.sqrt(2))
    small = plan_gradients(GradientConfig(epsilon=2.0, max_grad_norm=0.1), "classification", 500, 2)
    assert small.sensitivity == pytest.approx(0.2)
    assert plan_gradients(GradientConfig(), "classification", 500, 2) is None
    words = plan_gradients(GradientConfig(epsilon=2.0, unit="window"), "language-model", 500, 2)
    assert words.scaled
    assert not plan.scaled
    assert words.sensitivity == 2.0
    with pytest.raises(ConfigError, match="dp_unit window"):
        plan_gradients(GradientConfig(epsilon=2.0), "language-model", 500, 2)
    with pytest.raises(ConfigError, match="dp_unit record"):
        plan_gradients(GradientConfig(epsilon=2.0, unit="window"), "regression", 500, 2)


@pytest.mark.parametrize("logits", [[[0.0, 0.0, 0.0]], [[9.0, -9.0, 1.0]], [[0.1, 2.0, -3.0]]])
def test_no_label_moves_a_gradient_further_than_the_plan_says(logits):
    plan = replace(plan_gradients(DP, "classification", 50, 1), noise_multiplier=0.0)
    rows = []
    for label in range(3):
        outputs = torch.tensor(logits, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(outputs, torch.tensor([label]))
        rows.append(noised(plan, torch.autograd.grad(loss, outputs)[0]))
    apart = max((a - b).norm().item() for a in rows for b in rows)
    assert apart <= plan.sensitivity + 1e-6
    assert max(row.norm().item() for row in rows) <= plan.max_grad_norm + 1e-6


def test_gradients_are_shortened_or_scaled_record_by_record():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    plan = replace(NO_NOISE, max_grad_norm=1.0)
    torch.testing.assert_close(
        noised(plan, gradient), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    )
    torch.testing.assert_close(noised(plan, gradient, 12), noised(plan, gradient))
    torch.testing.assert_close(
        noised(replace(plan, scaled=True), gradient),
        torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_gradient_sends_noise_alone(bad):
    gradient = torch.tensor([[bad, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(noised(NO_NOISE, gradient), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_the_noise_is_that_of_the_plan():
    plan = replace(NO_NOISE, max_grad_norm=1.0, sensitivity=2.0, noise_multiplier=1.5)
    gradient = torch.zeros(2000, 8)
    gradient[:, 0] = 1.0
    found = noised(plan, gradient) - gradient
    assert found.std().item() == pytest.approx(3.0, rel=0.03)
    assert found.mean(0).abs().max().item() < 5 * 3.0 / math.sqrt(2000)
    correlation = torch.corrcoef(found.T) - torch.eye(8)
    assert correlation.abs().max().item() < 5 / math.sqrt(2000)
    assert not torch.equal(noised(plan, gradient) - gradient, found)


def test_the_best_guess_of_a_label_is_bounded():
    """Two labels, one release: the likelihood ratio's guess, against the bound of the promise."""
    for epsilon in (1.0, 3.0):
        plan = plan_gradients(GradientConfig(epsilon=epsilon, delta=1e-3), "classification", 50, 1)
        truth_N = torch.arange(20_000) % 2
        outputs_NC = torch.zeros(20_000, 2, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(outputs_NC, truth_N, reduction="sum")
        (gradient_NC,) = torch.autograd.grad(loss, outputs_NC)
        released_NC = noised(plan, gradient_NC)
        right = ((released_NC[:, 0] > released_NC[:, 1]).long() == truth_N).double().mean().item()
        bound = (math.exp(epsilon) + 1e-3) / (1 + math.exp(epsilon))  # of two equally likely ones
        assert 0.55 < right <= bound + 0.02


def head_of(world, outputs=2):
    return customers_head(world.bottom, outputs, TUNING)


def losses_of(world, noise, *, language_model=False, labels=LABELS, recorder=None):
    private = privatize(world.bottom, TEXTS, None if language_model else labels, mechanism=None)
    top = Top(world.bottom, None if language_model else head_of(world))
    job = world.job(tap=recorder)
    losses = train_u_shape(job, top, private, PLAN, language_model=language_model, noise=noise)
    job.close()
    return losses


def test_without_noise_and_bound_it_trains_as_ever(tmp_path):
    plain = losses_of(u_shape(tmp_path / "one"), None)
    covered = losses_of(u_shape(tmp_path / "two"), GradientNoise(NO_NOISE, None))
    assert covered == pytest.approx(plain, rel=1e-4)
    third = losses_of(u_shape(tmp_path / "three"), GradientNoise(
        replace(NO_NOISE, noise_multiplier=1.0), None))  # fmt: skip
    assert third != pytest.approx(plain, rel=1e-2)


def crossing(recorder, *kinds):
    messages = [c.message for c in recorder.transcript().crossings()]
    return [m for m in messages if isinstance(m, kinds)]


@pytest.mark.parametrize("task", ["classification", "regression", "language-model"])
def test_all_that_crosses_follows_from_noised_gradients(tmp_path, monkeypatch, task):
    """Other targets, the same noised gradients: every request is the same, of every pass."""
    draw, covered = torch.Generator(), set()

    def drawn(_self, gradient, batch):
        covered.add(gradient.ndim)
        draw.manual_seed(batch.number)
        return torch.randn(gradient.shape, generator=draw) / batch.step_texts

    monkeypatch.setattr(GradientNoise, "_drawn", drawn)
    monkeypatch.setattr(tuning_job, "new_token", lambda: "ab" * 32)
    monkeypatch.setattr(tuning_job, "system_uniforms", lambda count: torch.arange(count) / count)
    words, seen, heads = task == "language-model", [], []
    dp = replace(DP, unit="window" if words else "record")
    for name, labels in (("one", LABELS), ("two", 1 - LABELS)):
        world = u_shape(tmp_path / name, "smollm2" if words else "bert")
        if words:  # the same states, other words to predict
            true = tuning_job.privatize
            move = int(name == "two")

            def other(*args, true=true, move=move, **options):
                private = true(*args, **options)
                return replace(private, ids=tuple((i + move) % 50 for i in private.ids))

            monkeypatch.setattr(tuning_job, "privatize", other)
        data = write_table(world.folder / "a.csv", labels=labels)
        if task == "regression":
            data = numbers(world.folder / "a.csv", labels.tolist())
        recorder = Recorder()
        reading = WORDS if words else ReadingConfig(task=task)
        tuned(world, dp, recorder, TRUE if words else OPEN, data=data, reading=reading)
        monkeypatch.setattr(tuning_job, "privatize", privatize)
        seen.append(crossing(recorder, Forward, Backward, Step))
        top = max((world.folder / "job").glob("top-*.pt"))
        heads.append(torch.load(top, weights_only=True).get("head", {}))
    assert covered == ({3} if words else {2})  # where the target enters
    assert words or len(heads[0]) > 0
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert len(seen[0]) == len(seen[1]) > 10
    assert all(equal(a, b) for a, b in zip(*seen, strict=True))


def numbers(path, targets, texts=TEXTS):
    with path.open("w", newline="") as file:
        rows = zip(texts, targets, strict=True)
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


class Killed(Exception):
    pass


def killer(losses):
    def kill(_loss, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == losses:
            raise Killed

    return kill


def test_a_job_that_goes_on_sends_what_it_has_sent(tmp_path):
    """A vendor that restarts with other weights sees no second noise on the same gradients."""
    world = u_shape(tmp_path, "smollm2")
    plan = plan_gradients(replace(DP, unit="window"), "language-model", len(TEXTS), PLAN.epochs)
    GradientNoise.begin(plan, folder := tmp_path / "gradients")
    token, private = new_token(), privatize(world.bottom, TEXTS, mechanism=None)
    recorders = [Recorder(), Recorder()]

    def run(job, applied, recorder, **options):
        top = Top(world.bottom, None, directory=tmp_path)
        train_u_shape(
            job, top, private, PLAN, language_model=True, applied=applied,
            noise=GradientNoise(plan, folder), **options,
        )  # fmt: skip
        return crossing(recorder, Backward)

    job = world.job(token=token, tap=recorders[0])
    with pytest.raises(Killed):
        run(job, 0, recorders[0], on_loss=killer(4))  # after the checkpoint of step 2
    job.close()
    session = world.vendor.session

    @contextmanager
    def lying(customer):
        def lie(message, handler):
            reply = handler(message)
            moved = isinstance(reply, Outputs) and not isinstance(message, Predict)
            return Outputs(sequence=reply.sequence, hidden_TD=reply.hidden_TD + 1) if moved else (
                reply
            )  # fmt: skip

        with session(customer) as handler:
            yield lambda message: lie(message, handler)

    world.vendor.session = lying
    job, at = go_on(
        lambda: world.connect(tap=recorders[1]), Top(world.bottom, None, directory=tmp_path),
        token, retries=FAST,
    )  # fmt: skip
    assert at > 0
    run(job, at, recorders[1])
    first = {m.sequence: m for m in crossing(recorders[0], Backward)}
    again = {m.sequence: m for m in crossing(recorders[1], Backward)}
    both = first.keys() & again.keys()
    assert both
    assert min(both) > at
    assert all(torch.equal(first[n].gradient_TD, again[n].gradient_TD) for n in both)
    assert len(first | again) == PLAN.epochs * -(-len(TEXTS) // PLAN.batch_size)


def train_again(world, folder, plan, recorder=None, **options):
    top = Top(world.bottom, head_of(world), directory=world.folder)
    job = world.job(tap=recorder)
    try:
        train_u_shape(
            job, top, world.private(), PLAN, language_model=False,
            noise=GradientNoise(plan, folder), **options,
        )  # fmt: skip
    finally:
        job.close()
    return top


def label_plan():
    return plan_gradients(DP, "classification", len(TEXTS), PLAN.epochs)


def test_old_gradients_are_removed_and_never_noised_again(tmp_path):
    world, folder, plan = u_shape(tmp_path), tmp_path / "gradients", label_plan()
    GradientNoise.begin(plan, folder)
    kept = []

    def look(_loss):
        kept.append({int(path.stem) for path in folder.glob("*.safetensors")})
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.safetensors"))

    top = train_again(world, folder, plan, on_loss=look)
    assert max(map(len, kept)) == 4  # of the last two checkpoints
    assert max(kept[-1]) == max(top.numbers()) - 1
    assert list(folder.iterdir()) == []  # the job is whole at both parties
    fresh, recorder = u_shape(tmp_path / "other"), Recorder()
    with pytest.raises(PolicyError, match=r"request 2 were sent before.*more than was promised"):
        train_again(fresh, folder, plan, recorder)
    assert not crossing(recorder, Backward)


def test_a_gradient_is_kept_before_it_is_sent(tmp_path):
    """Killed on the way to the vendor, the next run sends the same."""
    world, folder, plan = u_shape(tmp_path), tmp_path / "gradients", label_plan()
    GradientNoise.begin(plan, folder)
    gone = []

    original = world.vendor.session

    @contextmanager
    def killing(customer):
        with original(customer) as handler:

            def handle(message):
                if isinstance(message, Backward) and not gone:
                    gone.append(message.gradient_TD.clone())
                    raise Killed
                return handler(message)

            yield handle

    world.vendor.session = killing
    with pytest.raises(NetworkError, match="the vendor failed"):
        train_again(world, folder, plan)
    again, recorder = u_shape(tmp_path / "again"), Recorder()
    train_again(again, folder, plan, recorder)
    assert torch.equal(crossing(recorder, Backward)[0].gradient_TD, gone[0])


def test_gradients_are_not_forgotten_before_the_vendor_has_its_share(tmp_path, monkeypatch):
    world, folder, plan = u_shape(tmp_path), tmp_path / "gradients", label_plan()
    GradientNoise.begin(plan, folder)

    def kill(_self):
        raise Killed

    monkeypatch.setattr(ushape.RemoteTrunk, "checkpoint", kill)
    with pytest.raises(Killed):
        train_again(world, folder, plan)
    assert {path.stem for path in folder.glob("*.safetensors")} == {"2", "5"}


def test_nothing_is_noised_twice_without_a_folder(tmp_path):
    noise, tensor = GradientNoise(NO_NOISE, None), torch.zeros(2, 2, requires_grad=True)
    noise.cover(through := tensor * 1, batch_of(2))
    through.sum().backward(retain_graph=True)
    with pytest.raises(PolicyError, match="more than was promised"):
        through.sum().backward()


@pytest.mark.parametrize("lost", ["gradients", "gradients.json", "files"])
def test_gradients_that_are_gone_end_the_job(tmp_path, monkeypatch, lost):
    world = u_shape(tmp_path)

    def kill(*_args, **_options):
        raise Killed

    monkeypatch.setattr(GradientNoise, "forget", kill)
    with pytest.raises(Killed):
        tuned(world)
    monkeypatch.undo()
    folder = CustomerJob(tmp_path / "job").gradients_path
    assert folder.stat().st_mode & 0o077 == 0
    # As if killed before the first checkpoint: all gradients are asked for again.
    for state in (tmp_path / "job").glob("top-*.pt"):
        state.unlink()
    for state in (tmp_path / "vendor").rglob("at-*.pt"):
        if state.stem != "at-0":
            state.unlink()
    world.start()
    backup = tmp_path / "backup"
    shutil.copytree(tmp_path / "job", backup)
    if lost == "gradients":
        shutil.rmtree(folder)
    elif lost == "files":
        for path in folder.iterdir():
            path.unlink()
    else:
        folder.with_suffix(".json").unlink()
    with pytest.raises((DataError, PolicyError), match="more than was promised"):
        tuned(world)
    shutil.rmtree(tmp_path / "job")
    shutil.move(backup, tmp_path / "job")
    assert tuned(world).steps > 0


def test_a_kill_between_keeping_and_marking_is_made_good(tmp_path):
    folder, noises = tmp_path / "gradients", NO_NOISE
    GradientNoise.begin(noises, folder)
    save_file({"gradient": torch.ones(2, 2)}, folder / "2.safetensors")
    noise = GradientNoise(noises, folder)
    noise.cover(through := torch.zeros(2, 2, requires_grad=True) * 1, batch_of(2))
    through.sum().backward()
    noise.forget(2)
    again = GradientNoise(noises, folder)
    again.cover(through := torch.zeros(2, 2, requires_grad=True) * 1, batch_of(2))
    with pytest.raises(PolicyError, match="more than was promised"):
        through.sum().backward()


def test_what_is_kept_is_of_this_plan_and_whole(tmp_path):
    folder = tmp_path / "gradients"
    GradientNoise.begin(NO_NOISE, folder)
    with pytest.raises(DataError, match="another one"):
        GradientNoise(label_plan(), folder)
    noise = GradientNoise(NO_NOISE, folder)
    for content in (b"nothing", None):
        path = folder / "2.safetensors"
        if content is None:
            save_file({"gradient": torch.zeros(3, 3)}, path)
        else:
            path.write_bytes(content)
        noise.cover(through := torch.zeros(2, 2, requires_grad=True) * 1, batch_of(2))
        with pytest.raises(DataError, match="cannot read it"):
            through.sum().backward()
    folder.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match="how far gradients were noised"):
        GradientNoise(NO_NOISE, folder)


def test_noise_hides_labels_that_gradients_give(tmp_path):
    """Grouped by direction gradients give every label; at epsilon 0.5 hardly more than chance."""
    texts = [f"{TEXTS[i % len(TEXTS)]} {'so ' * (i % 3)}good" for i in range(200)]
    labels = torch.arange(200) % 2
    right = {}
    for name, plan in (
        ("open", None),
        ("private", plan_gradients(GradientConfig(epsilon=0.5), "classification", 200, 1)),
    ):
        world, recorder = u_shape(tmp_path / name), Recorder()
        private = privatize(world.bottom, texts, labels, mechanism=None)
        job = world.job(tap=recorder)
        train_u_shape(
            job, Top(world.bottom, head_of(world), learning_rate=1e-9), private,
            replace(PLAN, epochs=1, batch_size=50), language_model=False,
            noise=None if plan is None else GradientNoise(plan, None),
        )  # fmt: skip
        job.close()
        transcript, found, truth = recorder.transcript(), [], []
        seen = seen_texts(transcript)
        order = [b.texts for b in replace(PLAN, epochs=1, batch_size=50).numbered(200, "u-shape")]
        for texts_B, step in zip(order, seen_gradients(transcript, seen), strict=True):
            found += step.gradients
            truth += [int(labels[i]) for i in texts_B]
        groups_N = groups_of_gradients(found, 2)
        share = (groups_N == torch.tensor(truth)).double().mean().item()
        right[name] = max(share, 1 - share)
    assert right["open"] > 0.95
    assert right["private"] < 0.65


def test_the_statement_says_what_gradients_spend(tmp_path):
    world = u_shape(tmp_path)
    done = tuned(world)
    assert done.privacy.gradients.epsilon <= 8.0
    assert done.privacy.gradients.passes == PASSES.epochs
    assert "gradients leave with noise (DP-SGD" in str(done.privacy)
    assert "give them away" not in str(done.privacy)
    assert CustomerJob(tmp_path / "job").statements()["tuning"] == done.privacy
    with pytest.raises(ConfigError, match=r"dp\.epsilon 8\.0 -> 4\.0"):
        tuned(world, replace(DP, epsilon=4.0))
    audit = blindtune.audit_split(tmp_path / "job")
    assert any("DP-SGD" in line for line in audit.guarantee)


def test_a_language_models_words_are_not_taken_to_be_given(tmp_path):
    world = u_shape(tmp_path, "smollm2")
    done = tuned(world, replace(DP, unit="window"), privatizer=TRUE, reading=WORDS)
    assert "what each window predicts" in str(done.privacy)
    audit = blindtune.audit_split(tmp_path / "job")
    assert "gradients of the tuning" not in {finding.attack for finding in audit.findings}
    plain = u_shape(tmp_path / "plain", "smollm2")
    tuned(plain, None, privatizer=TRUE, reading=WORDS)
    audit = blindtune.audit_split(tmp_path / "plain" / "job")
    assert "gradients of the tuning" in {finding.attack for finding in audit.findings}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_sorted_file_is_sent_in_an_order_that_nobody_knows(tmp_path, task):
    world = u_shape(tmp_path)
    texts = [f"{TEXTS[i % len(TEXTS)]} {'so ' * (i % 3)}good" for i in range(100)]
    halves = torch.arange(100) // 50
    data = write_table(tmp_path / "sorted.csv", texts, halves)
    if task == "regression":
        data = numbers(tmp_path / "sorted.csv", halves.tolist(), texts)
    tuned(
        world, data=data, passes=replace(PASSES, epochs=1, batch_size=50),
        reading=ReadingConfig(task=task),
    )  # fmt: skip
    states = CustomerJob(tmp_path / "job").states()
    halves = states.labels[:50].double().mean(), states.labels[50:].double().mean()
    assert abs(halves[0] - halves[1]) < 0.6  # 1 in the order of the file


@pytest.mark.parametrize("field", ["epsilon", "delta", "max_grad_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        GradientConfig(**{field: value})


def test_units_and_deltas_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="record or window"):
        GradientConfig(unit="person")
    with pytest.raises(ConfigError, match="below 1"):
        GradientConfig(delta=1.0)


@pytest.mark.parametrize("config", [GradientConfig, DpConfig])
@pytest.mark.parametrize(
    ("field", "value"), [("delta", 1e-5), ("max_grad_norm", 0.5), ("unit", "window")]
)
def test_without_an_epsilon_the_others_are_refused(config, field, value):
    """They were ignored, and a run that asked for privacy had none."""
    with pytest.raises(ConfigError, match=f"expected dp_epsilon with dp_{field}"):
        config(**{field: value})
    config(**{field: value}, epsilon=1.0)
    config(**{field: getattr(config(), field)})


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_command_noises_gradients(tmp_path, monkeypatch, capsys, task):
    world = u_shape(tmp_path)
    labels = LABELS if task == "classification" else None
    data = write_table(tmp_path / "a.csv", labels=labels)
    if labels is None:
        data = numbers(tmp_path / "a.csv", LABELS.tolist())
    monkeypatch.setattr(
        tuning_job, "connector", lambda *_arguments, **_options: lambda: world.connect()
    )
    command = [
        "split-tune", "host:1", "--bottom", str(tmp_path / "bottom"), "--data", str(data),
        "--out", str(tmp_path / "job"), "--privatizer", "none", "--unprotected", "--task", task,
        "--dp-epsilon", "4", "--dp-delta", "1e-3", "--allow-unsigned",
    ]  # fmt: skip
    assert run([*command, "--dry-run"]) == 0
    assert not (tmp_path / "job").exists()
    assert run([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert "gradients leave with noise" in shown.err
    assert json.loads(shown.out[shown.out.index("{") :])["privacy"]["gradients"]["delta"] == 1e-3
    mark = json.loads((tmp_path / "job" / "gradients.json").read_text())
    assert mark["noised_to"] > 0
    assert mark["plan"]["epsilon"] <= 4.0
    assert run([*command, "--dp-unit", "window", "--dry-run"]) == 2
    assert "expected --dp-unit record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("partition", "changes", "reading", "said"),
    [
        ("two-part", {}, None, "labels are sent"),
        ("u-shape", {"label_epsilon": 1.0}, None, "label_epsilon, got both"),
        ("u-shape", {"targets": "sent"}, WORDS, "targets sent, got both"),
    ],
)
def test_noise_that_protects_nothing_is_refused(tmp_path, partition, changes, reading, said):
    world = World(tmp_path, "smollm2", partition, cut=1)
    privatizer = PrivatizerConfig(privatizer="none", unprotected=True, **changes)
    with pytest.raises(ConfigError, match=said):
        tuned(world, replace(DP, unit="window"), privatizer=privatizer, reading=reading)
    assert not (tmp_path / "job").exists()


def test_tokens_spared_by_label_are_refused(tmp_path):
    privatizer = PrivatizerConfig(privatizer="token", eta=5.0, cti_fraction=0.01)
    with pytest.raises(ConfigError, match="spared by their label"):
        tuned(u_shape(tmp_path), privatizer=privatizer)


def test_a_job_of_an_earlier_version_has_no_noise_on_gradients(tmp_path):
    world = u_shape(tmp_path)
    tuned(world, None)
    job = CustomerJob(tmp_path / "job")
    options = {name: some for name, some in job.record.options.items() if name != "dp"}
    older = msgspec.structs.replace(job.record, options=options)
    (tmp_path / "job" / "job.json").write_bytes(msgspec.json.encode(older))
    assert tuned(world, None).resumed_from == 4
