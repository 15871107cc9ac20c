"""What the gradients of the U-shape give away, and what hiding it costs.

    python benchmarks/targets.py --data DIR --work DIR [--smoke] [labels|words ...]

labels: film reviews, MiniLM, cut 0, no noise on texts: labels as they are, drawn anew by randomized
    response, and, beside it, DP-SGD at the customer: every record's gradient scaled to one norm and
    noised before it leaves, the head trained by Opacus's per-record gradients, both accounted for
    all passes by Opacus, between any two labels. UA, and the EP of labels when gradients of the
    first pass are grouped.
words: WikiText-2, SmolLM2-135M, cut 6 and 2: true tokens as targets, and the words that were sent.
    Perplexity on true text, and the EP of the words that the gradients of the first batches give.

Rows are kept and collected as `rows.py` says, into benchmarks/results/targets-PART.json.
"""

import warnings

import msgspec
import torch

from blindtune.attacks.gradient_matching import GradientsView, tokens_from_gradients
from blindtune.attacks.label_inference import groups_of_gradients
from blindtune.attacks.observation import seen_gradients, seen_texts
from blindtune.evaluation.leakage.empirical_privacy import record_privacy
from blindtune.exchange.wire.messages import Backward, Forward
from blindtune.exchange.wire.transcript import Recorder
from blindtune.models.encoders import load_any
from blindtune.privacy.entropy import system_uniforms
from blindtune.privacy.metric_dp import Mechanism
from blindtune.split.customer.private_states import privatize
from blindtune.split.customer.ushape import Top, customers_head, predict_u_shape, train_u_shape
from blindtune.split.partition import stack_of
from blindtune.training.private_sgd import add_clipped, gaussian
from rows import parse_options, run_parts
from split import (
    BATCH,
    EPOCHS,
    LENGTH,
    RATE,
    SEEDS,
    Bench,
    accuracy,
    job,
    nats_per_token,
    tuning,
    windows,
)  # fmt: skip

EPSILONS = (4.0, 2.0, 1.0)
DP_EPSILON = 8.0
ETAS = (60.0, 45.0, 35.0)  # of token mode; about 8, 30 and 57 % of the words change
EXACT = {"task": "hidden", "precision": "float32"}  # of the terms of a recorded job
UNIT = 1e-3  # every record's gradient is above it, so all are scaled to one norm


class NoisyGradients:
    """A transport on which every record's gradient leaves with norm 1 and noise on every number."""

    def __init__(self, inner, sigma, batch):
        self.inner, self.sigma, self.batch, self.lengths = inner, sigma, batch, {}

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def submit(self, message):
        if isinstance(message, Forward):
            self.lengths[message.sequence] = message.lengths
        if isinstance(message, Backward):
            rows = message.gradient_TD.double().split(self.lengths.pop(message.forward))
            noised = [
                row / row.norm().clamp_min(1e-30)
                + self.sigma * gaussian(system_uniforms, row.shape)
                for row in rows
            ]
            gradient_TD = (torch.cat(noised) / self.batch).float()
            message = msgspec.structs.replace(message, gradient_TD=gradient_TD)
        return self.inner.submit(message)

    def call(self, message):
        return self.submit(message).result()


class PrivateTop:
    """A top whose head is trained by DP-SGD: per-record gradients by Opacus's hooks."""

    def __init__(self, top, head, sigma):
        from opacus.grad_sample import GradSampleHooks

        self.top, self.head, self.sigma = top, head, sigma
        self.hooks = GradSampleHooks(head, loss_reduction="sum")
        self.optimizer = torch.optim.AdamW(head.parameters(), RATE)

    def __getattr__(self, name):
        return getattr(self.top, name)

    def loss(self, trunk_BLD, mask_BL, target):
        self.records = len(target)
        return self.top.loss(trunk_BLD, mask_BL, target)

    def step(self):
        parameters = list(self.head.parameters())
        sums = [torch.zeros_like(p) for p in parameters]
        add_clipped(sums, parameters, UNIT, self.records)
        for parameter, total in zip(parameters, sums, strict=True):
            noise = gaussian(system_uniforms, parameter.shape).float()
            parameter.grad = (total / UNIT + self.sigma * noise) / self.records
        self.optimizer.step()
        self.optimizer.zero_grad()


def planned_sigma(texts):
    """The noise for two releases of each record a pass (its gradient, its part of the head's).

    Another label can turn a gradient of norm 1 around, so what is told apart lies 2 away.
    """
    from opacus.accountants.utils import get_noise_multiplier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return 2 * get_noise_multiplier(
            target_epsilon=DP_EPSILON, target_delta=1 / (10 * texts), sample_rate=1.0,
            steps=2 * EPOCHS, accountant="rdp",
        )  # fmt: skip


def label_row(bench, folder, seed, epsilon=None, dp=False):
    """UA of one U-shape job, and how many labels its gradients give away."""
    learn, test = bench.reviews(seed)
    vendor, bottom = bench.party(folder, partition="u-shape")
    private = privatize(bottom, *learn, mechanism=None, classes=2, label_epsilon=epsilon)
    unseen = privatize(bottom, test[0], mechanism=None)
    config, passes = tuning(len(learn[0]), seed)
    head, recorder = customers_head(bottom, 2, config), Recorder()
    top, wrap, sigma = Top(bottom, head, learning_rate=RATE), lambda transport: transport, None
    if dp:
        sigma = planned_sigma(len(learn[0]))
        top = PrivateTop(top, head, sigma)

        def wrap(transport):
            return NoisyGradients(transport, sigma, BATCH)

    with job(vendor, bottom, config, tap=recorder, wrap=wrap, **EXACT) as transport:
        losses = train_u_shape(transport, top, private, passes, language_model=False)
        if dp:
            top.hooks.remove_hooks()
        logits_NC = torch.cat(predict_u_shape(transport, Top(bottom, head), unseen))
    return {
        "UA": accuracy(logits_NC, test[1]),
        **read_labels(recorder.transcript(), passes, learn[1]),
        "changed labels": private.changed_labels,
        "epsilon": DP_EPSILON if dp else epsilon,
        "noise multiplier": sigma,
        "last loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def first_gradients(transcript, passes, texts):
    """(output, gradient) [L, D] of every text's first backward pass, by the number of the text."""
    order = [batch.texts for batch in passes.numbered(texts, "u-shape")]
    found = {}
    for numbers, seen in zip(
        order, seen_gradients(transcript, seen_texts(transcript)), strict=True
    ):
        for i, output_LD, gradient_LD in zip(numbers, seen.outputs, seen.gradients, strict=True):
            found.setdefault(i, (output_LD, gradient_LD))
    return found


def read_labels(transcript, passes, labels_N):
    """EP of labels: gradients of each text's first pass, grouped by direction."""
    found = first_gradients(transcript, passes, len(labels_N))
    groups_N = groups_of_gradients([found[i][1] for i in range(len(labels_N))], 2)
    read = record_privacy(groups_N, labels_N, unnamed=True).privacy
    return {"EP labels": read.value, "interval": {"low": read.low, "high": read.high}}


def read_words(transcript, passes, cut, private, texts=24):
    """EP of words: the true tokens against those that the gradients of some texts give."""
    found = first_gradients(transcript, passes, len(private))
    some = list(found)[:texts]
    view = GradientsView(
        model=stack_of(load_any("smollm2-135m")[0]), last=cut.last,
        outputs=tuple(found[i][0] for i in some), gradients=tuple(found[i][1] for i in some),
    )  # fmt: skip
    guess = tokens_from_gradients(view)
    right = [guess_L[1:] == private.ids[i][1:] for guess_L, i in zip(guess, some, strict=True)]
    return {"EP words": 1 - float(torch.cat(right).float().mean())}


def word_row(bench, folder, seed, eta, *, sent):
    """Perplexity before and after, and the words that the first gradients give away."""
    vendor, bottom = bench.party(folder, "smollm2-135m", partition="u-shape", cut=6, last=2)
    learn = windows(bench, bottom.tokenizer, "valid", 96, seed)
    test = windows(bench, bottom.tokenizer, "test", 32, 0)
    config, passes = tuning(len(learn), seed, rate=5e-4, epochs=1)
    mechanism = Mechanism(eta=eta)
    private = privatize(bottom, learn, mechanism=mechanism, predict_sent=sent)
    unseen = privatize(bottom, test, mechanism=mechanism)
    recorder, top = Recorder(), Top(bottom, None)
    with job(vendor, bottom, config, tap=recorder, **EXACT) as transport:
        before = nats_per_token(transport, top, unseen)
        train_u_shape(transport, top, private, passes, language_model=True)
        after = nats_per_token(transport, top, unseen)
    return {
        "nats before": before,
        "nats after": after,
        "changed in training": private.changed,
        **read_words(recorder.transcript(), passes, bottom.cut, private),
    }


def plan(bench, part):
    """The rows of a part, most wanted first: (name, function)."""
    rows = []

    def add(name, function, *args, **options):
        rows.append((name, lambda folder: function(bench, folder, *args, **options)))

    for seed in SEEDS:
        if part == "labels":
            add(f"as-they-are-{seed}", label_row, seed)
            for epsilon in EPSILONS:
                add(f"response-{epsilon:g}-{seed}", label_row, seed, epsilon)
            add(f"dp-sgd-{DP_EPSILON:g}-{seed}", label_row, seed, dp=True)
        else:
            for eta in ETAS:
                add(f"true-{eta:g}-{seed}", word_row, seed, eta, sent=False)
                add(f"sent-{eta:g}-{seed}", word_row, seed, eta, sent=True)
    return rows


def main():
    options = parse_options(__doc__, ("labels", "words"))
    bench = Bench(options.data, options.work, options.smoke)
    facts = {"batch": BATCH, "epochs": EPOCHS, "learning_rate": RATE, "max_length": LENGTH}
    run_parts("targets", options, lambda part: plan(bench, part), facts=facts)


if __name__ == "__main__":
    main()
