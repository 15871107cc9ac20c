"""DP-SGD of the U-shape: what leaves through gradients, and that nothing is noised twice."""

import csv
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from customer_world import NAMES, OPEN, PASSES, QUICK, TUNING, write_table
from scipy.optimize import brentq
from scipy.stats import norm
from split_world import FAST, LABELS, TEXTS, World

import blindtune
from blindtune.attacks.label_inference import groups_of_gradients
from blindtune.attacks.observation import seen_gradients, seen_texts
from blindtune.errors import ConfigError, DataError, PolicyError
from blindtune.exchange.wire.messages import Backward, Forward, Outputs, Predict, Step, equal
from blindtune.exchange.wire.transcript import Recorder
from blindtune.split.customer import private_gradients, tuning_job
from blindtune.split.customer.job import CustomerJob
from blindtune.split.customer.private_gradients import GradientNoise, GradientPlan, plan_gradients
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.private_texts import ReadingConfig
from blindtune.split.customer.privatizer_config import PrivatizerConfig
from blindtune.split.customer.requests import PassConfig, PlannedBatch, new_token
from blindtune.split.customer.ushape import Top, customers_head, go_on, train_u_shape
from blindtune.training.dp_plan import DpConfig

PLAN = PassConfig(epochs=3, batch_size=4, precision="float32", checkpoint_steps=2)
DP = DpConfig(epsilon=8.0, delta=1e-5)
WORDS = ReadingConfig(task="language-model", max_length=8)
TRUE = replace(OPEN, targets="true")
NO_NOISE = GradientPlan(
    epsilon=math.inf, delta=0.0, unit="record", passes=3, max_grad_norm=1e6, scaled=False,
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


def batch_of(size, number=2):
    return PlannedBatch(
        step=1, texts=list(range(size)), step_texts=size, number=number, ends_step=True,
        checkpoint=False,
    )  # fmt: skip


def noised(plan, gradient, **options):
    """What becomes of the gradient of a sum, whose rows are its records' gradients."""
    tensor = torch.zeros_like(gradient, requires_grad=True)
    found = []
    GradientNoise(plan, None, **options).cover(through := tensor * 1, batch_of(len(gradient)))
    through.register_hook(found.append)
    (through * gradient / len(gradient)).sum().backward()
    assert torch.equal(found[0], tensor.grad)
    return found[0] * len(gradient)


def exact_noise(epsilon, delta, releases):
    """The least noise over sensitivity of a Gaussian mechanism (arXiv 1805.06530, theorem 8)."""

    def excess(mu):
        spent = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
            -mu / 2 - epsilon / mu
        )
        return spent - delta

    return math.sqrt(releases) / brentq(excess, 1e-2, 50)


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_noise_is_hardly_more_than_an_exact_account_needs(epsilon, passes):
    config = DpConfig(epsilon=epsilon, delta=1e-5)
    plan = plan_gradients(config, "regression", 500, passes)
    exact = exact_noise(epsilon, 1e-5, passes)
    assert exact <= plan.noise_multiplier <= 1.03 * exact
    assert plan.epsilon <= epsilon
    assert plan.sensitivity == 2.0


def test_a_plan_follows_from_what_is_told_before():
    plan = plan_gradients(DpConfig(epsilon=2.0), "classification", 500, 2)
    assert plan.delta == pytest.approx(1 / 5000)
    assert plan.sensitivity == pytest.approx(math.sqrt(2))
    small = plan_gradients(DpConfig(epsilon=2.0, max_grad_norm=0.1), "classification", 500, 2)
    assert small.sensitivity == pytest.approx(0.2)
    assert plan_gradients(DpConfig(), "classification", 500, 2) is None
    with pytest.raises(ConfigError, match="dp_unit window"):
        plan_gradients(DpConfig(epsilon=2.0), "language-model", 500, 2)
    with pytest.raises(ConfigError, match="dp_unit record"):
        plan_gradients(DpConfig(epsilon=2.0, unit="window"), "regression", 500, 2)


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
        plan = plan_gradients(DpConfig(epsilon=epsilon, delta=1e-3), "classification", 50, 1)
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
    shapes = torch.Generator().manual_seed(0)

    def drawn(_self, gradient, batch):
        shapes.manual_seed(batch.number)
        return torch.randn(gradient.shape, generator=shapes) / batch.step_texts

    monkeypatch.setattr(GradientNoise, "_drawn", drawn)
    monkeypatch.setattr(tuning_job, "new_token", lambda: "ab" * 32)
    monkeypatch.setattr(tuning_job, "system_uniforms", lambda count: torch.arange(count) / count)
    words, seen = task == "language-model", []
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
    assert len(seen[0]) == len(seen[1]) > 10
    assert all(equal(a, b) for a, b in zip(*seen, strict=True))


def numbers(path, targets):
    with path.open("w", newline="") as file:
        rows = zip(TEXTS, targets, strict=True)
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
    (folder := tmp_path / "gradients").mkdir()
    plan = plan_gradients(replace(DP, unit="window"), "language-model", len(TEXTS), PLAN.epochs)
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


def test_old_gradients_are_removed_and_never_noised_again(tmp_path):
    world = u_shape(tmp_path)
    (folder := tmp_path / "gradients").mkdir()
    plan = plan_gradients(DP, "classification", len(TEXTS), PLAN.epochs)
    private = world.private()
    top = Top(world.bottom, head_of(world), directory=tmp_path)
    job = world.job()
    train_u_shape(job, top, private, PLAN, language_model=False, noise=GradientNoise(plan, folder))
    job.close()
    kept = sorted(int(path.stem) for path in folder.glob("*.safetensors"))
    oldest = min(top.numbers())
    assert kept
    assert all(number > oldest for number in kept)
    assert (folder / "forgotten").read_text() == str(oldest)
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.safetensors"))
    fresh, recorder = u_shape(tmp_path / "other"), Recorder()
    job = fresh.job(tap=recorder)
    with pytest.raises(PolicyError, match="would spend again"):
        train_u_shape(
            job, Top(fresh.bottom, head_of(fresh)), private, PLAN, language_model=False,
            noise=GradientNoise(plan, folder),
        )  # fmt: skip
    job.close()
    assert not crossing(recorder, Backward)


def test_gradients_that_are_gone_or_damaged_end_the_job(tmp_path, monkeypatch):
    world = u_shape(tmp_path)

    def kill(*_args, **_options):
        raise Killed

    monkeypatch.setattr(private_gradients.GradientNoise, "forget", kill)
    with pytest.raises(Killed):
        tuned(world)
    monkeypatch.undo()
    folder = CustomerJob(tmp_path / "job").gradients_path
    assert folder.stat().st_mode & 0o077 == 0
    some = list(folder.iterdir())
    assert some
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(DataError, match="gradients that were sent are gone"):
        tuned(world)
    shutil.move(tmp_path / "elsewhere", folder)
    done = tuned(world)
    assert done.resumed_from
    other = GradientNoise(NO_NOISE, folder)
    (path := folder / "999.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read it"):
        other._noised(torch.zeros(2, 2), batch_of(2, 999))
    path.unlink()


def test_noise_hides_labels_that_gradients_give(tmp_path):
    """Grouped by direction gradients give every label; at epsilon 0.5 hardly more than chance."""
    texts = [f"{TEXTS[i % len(TEXTS)]} {'so ' * (i % 3)}good" for i in range(200)]
    labels = torch.arange(200) % 2
    right = {}
    for name, plan in (
        ("open", None),
        ("private", plan_gradients(DpConfig(epsilon=0.5), "classification", 200, 1)),
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


def test_a_sorted_file_is_sent_in_an_order_that_nobody_knows(tmp_path):
    world = u_shape(tmp_path)
    texts = [f"{TEXTS[i % len(TEXTS)]} {'so ' * (i % 3)}good" for i in range(100)]
    data = write_table(tmp_path / "sorted.csv", texts, torch.arange(100) // 50)
    tuned(world, data=data, passes=replace(PASSES, epochs=1, batch_size=50))
    states = CustomerJob(tmp_path / "job").states()
    halves = states.labels[:50].double().mean(), states.labels[50:].double().mean()
    assert abs(halves[0] - halves[1]) < 0.6  # 1 in the order of the file


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
    text = (tmp_path / "job" / "job.json").read_text()
    assert NAMES[0] in text
    import msgspec

    older = msgspec.structs.replace(job.record, options=options)
    (tmp_path / "job" / "job.json").write_bytes(msgspec.json.encode(older))
    assert tuned(world, None).resumed_from == 4
